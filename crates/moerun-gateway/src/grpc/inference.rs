//! `moerun.v1.InferenceService`.

use std::{pin::Pin, sync::Arc};

use futures::{Stream, StreamExt, stream};
use moerun_proto::v1::{self, inference_service_server::InferenceService};
use tonic::{Request, Response, Status, metadata::MetadataValue};

use super::{COMBINE_MODE_METADATA, convert, to_status};
use crate::{Gateway, GatewayError};

/// Answers `InferenceService` from a gateway. A client that goes away drops its stream, and with it the request.
#[derive(Debug, Clone)]
pub struct InferenceDoor {
    gateway: Arc<Gateway>,
    log_prompts: LogPrompts,
}

/// Whether what people ask and are told is logged. Nothing else in this process does so, at any level.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogPrompts {
    /// Numbers of tokens at most.
    #[default]
    Never,
    /// Prompts and answers, in full.
    Always,
}

type ResponseStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl InferenceDoor {
    /// Over this gateway.
    pub fn new(gateway: Arc<Gateway>) -> Self {
        InferenceDoor {
            gateway,
            log_prompts: LogPrompts::default(),
        }
    }

    /// Logs prompts and answers, or not.
    pub fn logging(self, log_prompts: LogPrompts) -> Self {
        InferenceDoor { log_prompts, ..self }
    }

    fn combine_mode(&self) -> String {
        self.gateway.model().numerics.combine.to_string()
    }
}

/// Marks a response with the combine mode under which its numbers were made.
pub(super) fn with_combine_mode<T>(gateway: &Gateway, message: T) -> Response<T> {
    let mut response = Response::new(message);
    let mode = gateway.model().numerics.combine.to_string();
    let mode = MetadataValue::try_from(mode).expect("the names of combine modes are ASCII");
    response.metadata_mut().insert(COMBINE_MODE_METADATA, mode);
    response
}

#[tonic::async_trait]
impl InferenceService for InferenceDoor {
    type GenerateStream = ResponseStream<v1::GenerateResponse>;
    type ForwardStream = ResponseStream<v1::ForwardResponse>;

    async fn generate(&self, request: Request<v1::GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let message = request.into_inner();
        let logs = self.log_prompts == LogPrompts::Always;
        let start = async {
            self.gateway.check_model(&message.model)?;
            let request = convert::text_request(message)?;
            if logs {
                tracing::info!(prompt = ?request.prompt, "prompt");
            }
            self.gateway.generate(request).await
        };
        let generation = start.await.map_err(|error| to_status(&error))?;
        tracing::debug!(prompt_tokens = generation.prompt_tokens(), "answer begins");
        let mut combine_mode = self.combine_mode();
        let responses = generation.map(move |event| {
            let event = event.map_err(|error| to_status(&error))?;
            if logs {
                tracing::info!(text = event.text, "answer");
            }
            if let Some(finish) = event.finish {
                tracing::debug!(completion_tokens = finish.completion_tokens, reason = ?finish.reason, "answer ends");
            }
            Ok(convert::generate_response(event, std::mem::take(&mut combine_mode)))
        });
        #[cfg(feature = "planted-violations")]
        let responses = super::planted::answer(responses);
        Ok(with_combine_mode(&self.gateway, responses.boxed()))
    }

    async fn tokenize(&self, request: Request<v1::TokenizeRequest>) -> Result<Response<v1::TokenizeResponse>, Status> {
        let message = request.into_inner();
        let token_ids = async {
            self.gateway.check_model(&message.model)?;
            self.gateway.tokenize(convert::tokenize_input(message)?).await
        };
        let token_ids = token_ids.await.map_err(|error| to_status(&error))?;
        let tokens = self.gateway.vocabulary_entries(&token_ids);
        Ok(Response::new(v1::TokenizeResponse { token_ids, tokens }))
    }

    async fn detokenize(
        &self,
        request: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeResponse>, Status> {
        let message = request.into_inner();
        let text = async {
            self.gateway.check_model(&message.model)?;
            self.gateway
                .detokenize(message.token_ids, message.keep_special_tokens)
                .await
        };
        let text = text.await.map_err(|error| to_status(&error))?;
        Ok(Response::new(v1::DetokenizeResponse { text }))
    }

    async fn forward(&self, request: Request<v1::ForwardRequest>) -> Result<Response<Self::ForwardStream>, Status> {
        let message = request.into_inner();
        let positions = message.positions.iter().map(|&position| position as usize).collect();
        let logits = self
            .gateway
            .check_model(&message.model)
            .and_then(|()| self.gateway.forward(message.token_ids, positions))
            .map_err(|error| to_status(&error))?;
        let (mut rows, share) = (logits.rows, logits.share);
        let rows = stream::poll_fn(move |context| {
            let _held_until_the_stream_ends = &share;
            rows.poll_recv(context)
        });
        // A channel that ends early is an error, not a short answer; nothing follows an error.
        let rows = rows
            .map(|row| row.map_err(GatewayError::from))
            .chain(stream::iter([Err(GatewayError::EngineGone)]));
        let mut failed = false;
        let responses = stream::iter(logits.positions)
            .zip(rows)
            .map(|(position, row)| match row {
                Ok(row) => Ok(v1::ForwardResponse {
                    position: convert::count(position),
                    logits: convert::row_bytes(&row.logits),
                    degraded: row.degraded,
                }),
                Err(error) => Err(to_status(&error)),
            });
        let responses = responses.take_while(move |response| {
            let follows_an_error = std::mem::replace(&mut failed, response.is_err());
            std::future::ready(!follows_an_error)
        });
        Ok(with_combine_mode(&self.gateway, responses.boxed()))
    }

    async fn list_models(
        &self,
        _request: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        Ok(Response::new(v1::ListModelsResponse {
            models: vec![convert::model(self.gateway.model())],
        }))
    }
}
