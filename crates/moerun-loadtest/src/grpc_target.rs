//! `InferenceService.Generate` as a target.

use std::{
    error::Error,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use moerun_proto::v1::{
    self, FinishReason, GenerateRequest, SamplingParams, generate_request::Prompt,
    inference_service_client::InferenceServiceClient,
};
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt;

use crate::{Attempt, Case, LoadError, Outcome, Target};

/// How long a gateway may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// A gateway, over a few connections that are made anew when they break.
#[derive(Debug)]
pub struct GrpcTarget {
    clients: Vec<InferenceServiceClient<Channel>>,
    next: AtomicUsize,
}

impl GrpcTarget {
    /// The gateway at `address` (`host:port`), over `connections` connections, at least one; they are made when the first
    /// request needs them.
    pub fn new(address: &str, connections: usize) -> Result<Self, LoadError> {
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|error| LoadError::server(address, error))?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true);
        let clients = (0..connections.max(1))
            .map(|_| InferenceServiceClient::new(endpoint.connect_lazy()))
            .collect();
        Ok(Self {
            clients,
            next: AtomicUsize::new(0),
        })
    }

    /// Tokens of a case that is asked while nothing is broken.
    pub async fn tokens(&self, case: &Case) -> Result<Vec<u32>, Status> {
        let mut stream = self.client().generate(request(case)).await?.into_inner();
        let mut ids = Vec::new();
        while let Some(response) = stream.message().await? {
            ids.extend(response.token_ids);
        }
        Ok(ids)
    }

    /// What is served.
    pub async fn model(&self) -> Result<v1::Model, Status> {
        let served = self.client().list_models(v1::ListModelsRequest {}).await?;
        let first = served.into_inner().models.into_iter().next();
        first.ok_or_else(|| Status::not_found("no model is served"))
    }

    fn client(&self) -> InferenceServiceClient<Channel> {
        let index = self.next.fetch_add(1, Ordering::Relaxed) % self.clients.len();
        self.clients[index].clone()
    }
}

impl Target for GrpcTarget {
    async fn ask(&self, case: &Case, _deadline: Duration, attempt: &mut Attempt) {
        let mut stream = match self.client().generate(request(case)).await {
            Ok(response) => response.into_inner(),
            Err(status) => return attempt.ended(outcome(&status)),
        };
        // To the end of the stream, so that what comes after an end is noted too.
        loop {
            match stream.message().await {
                Ok(Some(response)) => {
                    if response.degraded {
                        attempt.degraded();
                    }
                    if !response.token_ids.is_empty() {
                        attempt.tokens(&response.token_ids);
                    }
                    if let Some(usage) = &response.usage {
                        attempt.reported(usage.completion_tokens.into());
                    }
                    match response.finish_reason() {
                        FinishReason::Unspecified => {}
                        reason => attempt.ended(Outcome::Finished(reason.as_str_name().to_owned())),
                    }
                }
                Ok(None) => return,
                Err(status) => return attempt.ended(outcome(&status)),
            }
        }
    }
}

fn request(case: &Case) -> GenerateRequest {
    GenerateRequest {
        prompt: Some(Prompt::TokenIds(v1::TokenIds {
            ids: case.prompt.clone(),
        })),
        max_tokens: case.max_tokens,
        ignore_eos: true,
        sampling: Some(SamplingParams {
            temperature: Some(0.0),
            ..SamplingParams::default()
        }),
        ..GenerateRequest::default()
    }
}

/// What a server said has no source on this side; what the transport says has.
fn outcome(status: &Status) -> Outcome {
    let details = status.get_error_details();
    match (details.error_info(), status.source()) {
        (None, Some(source)) => Outcome::Disconnected(format!("{}: {source}", status.message())),
        (info, _) => Outcome::Error {
            code: format!("{:?}", status.code()),
            reason: info.map(|info| info.reason.clone()).unwrap_or_default(),
            message: status.message().to_owned(),
        },
    }
}
