//! The gateway as a library: what the gRPC doors and the command line both stand on.

use std::{
    num::NonZeroUsize,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use moerun_dispatch::{Combined, DispatchStats, RemoteExperts, WorkerStatus};
use moerun_engine::{EngineHandle, EngineStats, ForwardRequest, LogitsRow, MoeLayerRequest};
use moerun_types::{LayerId, ModelConfig, Numerics};
use moerun_weights::GenerationConfig;
use ndarray::Array2;
use tokio::sync::{Semaphore, mpsc, oneshot};

use crate::{
    AnswerShare, AnswerStats, ChatMessage, GatewayError, Generation, Prompt, StopStrings, TextCodec, TextRequest,
    answer_counts::AnswerCounts, answer_room::AnswerRoom, request::Defaults,
};

/// Most turns of a conversation.
const MAX_CHAT_MESSAGES: usize = 4096;

/// Most KiB of logits, and of rows of MoE layers with their answers, of all requests together, that clients have asked for
/// and not read to their end; a single request may take half of it.
const MAX_ANSWERS_KIB: u32 = 2 << 20;

/// What a gateway is made of.
#[derive(Debug)]
pub struct GatewayParts {
    /// Runs the sequences.
    pub engine: EngineHandle,
    /// Text to tokens and back.
    pub codec: TextCodec,
    /// The model's shape.
    pub config: ModelConfig,
    /// Defaults of requests.
    pub generation: GenerationConfig,
    /// Number format, combine mode and block.
    pub numerics: Numerics,
    /// BLAKE3 (hex) of the canonical form of the config.
    pub config_hash: String,
    /// Name of the model in requests.
    pub served_name: String,
    /// Longest sequence, prompt and answer together, in tokens: that of the engine.
    pub max_context: usize,
    /// Most tokens of an answer that a request may ask for; `None` = what the context leaves.
    pub max_answer_tokens: Option<usize>,
    /// The workers that the engine's experts are in, to tell how they are; `None` = the experts are in this process.
    pub workers: Option<Arc<RemoteExperts>>,
}

/// Requests in text and rows, answers in text and rows.
#[derive(Debug)]
pub struct Gateway {
    engine: EngineHandle,
    codec: TextCodec,
    model: ServedModel,
    defaults: Defaults,
    max_prompt_bytes: usize,
    /// Tokenising takes a thread for as long as the text is long; no more run at once than there are processors.
    tokenising: Arc<Semaphore>,
    answer_room: AnswerRoom,
    answers: Arc<AnswerCounts>,
    workers: Option<Arc<RemoteExperts>>,
    draining: AtomicBool,
}

/// The model that is served.
#[derive(Debug, Clone)]
pub struct ServedModel {
    /// Its name in requests.
    pub name: String,
    /// Its shape.
    pub config: ModelConfig,
    /// Number format, combine mode and block.
    pub numerics: Numerics,
    /// BLAKE3 (hex) of the canonical form of its config.
    pub config_hash: String,
    /// Longest sequence, prompt and answer together, in tokens.
    pub max_context: usize,
}

/// Rows of logits as they come: one per position, ascending.
#[derive(Debug)]
pub struct LogitRows {
    /// The positions, ascending.
    pub positions: Vec<usize>,
    /// Their rows, in this order; an error ends the channel.
    pub rows: mpsc::Receiver<Result<LogitsRow, moerun_engine::EngineError>>,
    /// The memory they take; keep it as long as the rows.
    pub share: AnswerShare,
}

impl Gateway {
    /// Puts the parts together.
    pub fn new(parts: GatewayParts) -> Self {
        let GatewayParts {
            engine,
            codec,
            config,
            generation,
            numerics,
            config_hash,
            served_name,
            max_context,
            max_answer_tokens,
            workers,
        } = parts;
        Gateway {
            engine,
            codec,
            defaults: Defaults::new(&config, generation, max_context, max_answer_tokens),
            model: ServedModel {
                name: served_name,
                config,
                numerics,
                config_hash,
                max_context,
            },
            // Few tokens are longer than 16 bytes on average, so what is refused here would not fit the context.
            max_prompt_bytes: max_context.saturating_mul(16).max(1 << 20),
            tokenising: Arc::new(Semaphore::new(
                thread::available_parallelism().map_or(1, NonZeroUsize::get),
            )),
            answer_room: AnswerRoom::new(MAX_ANSWERS_KIB),
            answers: Arc::default(),
            workers,
            draining: AtomicBool::new(false),
        }
    }

    /// The model that is served.
    pub fn model(&self) -> &ServedModel {
        &self.model
    }

    /// An error unless `name` is the served model's, or empty.
    pub fn check_model(&self, name: &str) -> Result<(), GatewayError> {
        if name.is_empty() || name == self.model.name {
            return Ok(());
        }
        Err(GatewayError::UnknownModel {
            wanted: name.to_owned(),
            served: self.model.name.clone(),
        })
    }

    /// Starts an answer. Everything that can be wrong with the request is an error here, before the first token; a
    /// prompt that does not fit is one of them and is never cut.
    pub async fn generate(&self, request: TextRequest) -> Result<Generation, GatewayError> {
        self.defaults.check(&request)?;
        let stop_strings = StopStrings::new(&request.stop)?;
        let prompt_ids = match &request.prompt {
            Prompt::TokenIds(ids) => ids.clone(),
            other => self.tokenize(other.clone()).await?,
        };
        self.defaults.check_prompt(request.prompt.field(), &prompt_ids, 1)?;
        let prompt_tokens = prompt_ids.len();
        let tokens = self.engine.generate(self.defaults.complete(&request, prompt_ids))?;
        let answers = Arc::clone(&self.answers);
        Ok(Generation::new(
            tokens,
            self.codec.clone(),
            stop_strings,
            prompt_tokens,
            answers,
        ))
    }

    /// Token ids of a prompt, as [`Gateway::generate`] sees them.
    pub async fn tokenize(&self, prompt: Prompt) -> Result<Vec<u32>, GatewayError> {
        let limit = self.max_prompt_bytes;
        match prompt {
            Prompt::TokenIds(ids) => Ok(ids),
            Prompt::Text(text) => {
                check_bytes("text", text.len(), limit)?;
                self.on_blocking_thread(move |codec| codec.encode(&text)).await
            }
            Prompt::Chat(messages) => {
                check_messages(&messages, limit)?;
                self.on_blocking_thread(move |codec| {
                    let rendered = codec.render_chat(&messages)?;
                    check_bytes("chat.messages", rendered.len(), limit)?;
                    codec.encode_rendered(&rendered)
                })
                .await
            }
        }
    }

    /// Each token as it stands in the vocabulary; empty for ids that the tokenizer does not know.
    pub fn vocabulary_entries(&self, token_ids: &[u32]) -> Vec<String> {
        token_ids
            .iter()
            .map(|&id| self.codec.token(id).unwrap_or_default())
            .collect()
    }

    /// Text of token ids; an id that the model does not have is an error.
    pub async fn detokenize(&self, token_ids: Vec<u32>, keep_special_tokens: bool) -> Result<String, GatewayError> {
        let (found, most) = (token_ids.len(), self.max_prompt_bytes / 4);
        if found > most {
            return Err(GatewayError::invalid("token_ids", format!("at most {most} ids"), found));
        }
        self.defaults.check_ids("token_ids", &token_ids)?;
        self.on_blocking_thread(move |codec| codec.decode(&token_ids, !keep_special_tokens))
            .await
    }

    /// Logits of a prompt at `positions` (any order, repetitions count once; none = the last), ascending.
    pub fn forward(&self, token_ids: Vec<u32>, mut positions: Vec<usize>) -> Result<LogitRows, GatewayError> {
        self.defaults.check_prompt("token_ids", &token_ids, 0)?;
        positions.sort_unstable();
        positions.dedup();
        match positions.last() {
            None => positions.push(token_ids.len() - 1),
            Some(&last) if last >= token_ids.len() => {
                let wanted = format!("positions below the number of tokens, {}", token_ids.len());
                return Err(GatewayError::invalid("positions", wanted, last));
            }
            Some(_) => {}
        }
        let share = self.answer_room.take(positions.len(), self.model.config.vocab_size)?;
        let rows = self.engine.forward(ForwardRequest {
            token_ids,
            positions: positions.clone(),
        })?;
        Ok(LogitRows { positions, rows, share })
    }

    /// One MoE layer, named by its model layer index, on finite rows `[rows, hidden]`: the input of a MoE block to its
    /// output, shared experts included, with the rows for which an expert was left out.
    pub async fn run_moe_layer(&self, layer: u32, hidden_states: Array2<f32>) -> Result<Combined, GatewayError> {
        let layer = LayerId(layer);
        let moe_layers = self.model.config.moe_layers();
        if !moe_layers.contains(&layer) {
            let known: Vec<String> = moe_layers.iter().map(ToString::to_string).collect();
            return Err(GatewayError::invalid(
                "layer",
                format!("a MoE layer: one of [{}]", known.join(", ")),
                layer,
            ));
        }
        let (rows, width) = hidden_states.dim();
        if rows == 0 || width != self.model.config.hidden {
            let wanted = format!("at least one row of {}", self.model.config.hidden);
            return Err(GatewayError::invalid(
                "hidden_states",
                wanted,
                format!("[{rows}, {width}]"),
            ));
        }
        if let Some(at) = hidden_states.iter().position(|value| !value.is_finite()) {
            let found = format!("{} in row {}", hidden_states[(at / width, at % width)], at / width);
            return Err(GatewayError::invalid("hidden_states", "finite values", found));
        }
        let _share = self.answer_room.take(2 * rows, width)?; // what came and what goes
        let answer = self.engine.moe_layer(MoeLayerRequest { layer, hidden_states })?;
        Ok(answer.await.map_err(|_| GatewayError::EngineGone)??)
    }

    /// Counts of the engine, as of its last step.
    pub fn stats(&self) -> EngineStats {
        self.engine.stats()
    }

    /// How answers ended, since the start.
    pub fn answer_stats(&self) -> AnswerStats {
        self.answers.now()
    }

    /// The workers as they are now, in the order given; none where the experts are in this process.
    pub fn workers(&self) -> Vec<WorkerStatus> {
        self.workers
            .as_ref()
            .map(|workers| workers.workers())
            .unwrap_or_default()
    }

    /// The workers, where the experts are in some.
    pub fn remote_experts(&self) -> Option<&Arc<RemoteExperts>> {
        self.workers.as_ref()
    }

    /// What dispatches to the workers have met so far; `None` where the experts are in this process.
    pub fn dispatch_stats(&self) -> Option<DispatchStats> {
        self.workers.as_ref().map(|workers| workers.stats())
    }

    /// Whether new requests are refused.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Refuses new requests from now on; the receiver is told when the last running one has ended.
    pub fn drain(&self) -> oneshot::Receiver<()> {
        self.draining.store(true, Ordering::Relaxed);
        self.engine.drain()
    }

    /// Tokenising is arithmetic on long inputs and belongs on no thread that serves sockets.
    async fn on_blocking_thread<T: Send + 'static>(
        &self,
        work: impl FnOnce(&TextCodec) -> Result<T, GatewayError> + Send + 'static,
    ) -> Result<T, GatewayError> {
        let permit = self
            .tokenising
            .clone()
            .acquire_owned()
            .await
            .expect("the semaphore is never closed");
        let codec = self.codec.clone();
        let task = tokio::task::spawn_blocking(move || {
            let _permit = permit; // held to the end of the work, even if the client does not wait for it
            work(&codec)
        });
        // A panic in a tokenizer that a checkpoint brought along is that request's error, nobody else's. What it says may
        // quote the prompt, so it is not passed on.
        task.await.map_err(|_| GatewayError::Tokenizer {
            reason: "it panicked on this input".to_owned(),
        })?
    }
}

impl Prompt {
    /// The field of a request that holds it.
    fn field(&self) -> &'static str {
        match self {
            Prompt::Text(_) => "text",
            Prompt::TokenIds(_) => "token_ids",
            Prompt::Chat(_) => "chat.messages",
        }
    }
}

fn check_messages(messages: &[ChatMessage], max_bytes: usize) -> Result<(), GatewayError> {
    if messages.is_empty() || messages.len() > MAX_CHAT_MESSAGES {
        let wanted = format!("1 to {MAX_CHAT_MESSAGES} messages");
        return Err(GatewayError::invalid("chat.messages", wanted, messages.len()));
    }
    let bytes = messages
        .iter()
        .map(|message| message.role.len() + message.content.len())
        .sum();
    check_bytes("chat.messages", bytes, max_bytes)
}

fn check_bytes(field: &'static str, bytes: usize, limit: usize) -> Result<(), GatewayError> {
    if bytes <= limit {
        return Ok(());
    }
    Err(GatewayError::invalid(
        field,
        format!("at most {limit} bytes"),
        format!("{bytes} bytes"),
    ))
}
