//! What the engine is asked for and what it answers.

use moerun_types::LayerId;
use ndarray::Array2;

/// One sequence to continue.
#[derive(Debug, Clone)]
pub struct GenerateRequest {
    /// Prompt, not empty.
    pub prompt_ids: Vec<u32>,
    /// Most tokens to generate, at least 1.
    pub max_tokens: usize,
    /// Ids that end the sequence (they are emitted as its last token); empty with `ignore_eos`.
    pub stop_token_ids: Vec<u32>,
    /// How the next token is chosen.
    pub sampling: SamplingParams,
    /// How many of the likeliest tokens to report with each token: `None` = no logprobs, `Some(0)` = the token's own.
    pub logprobs: Option<usize>,
}

/// How the next token is chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 = greedy.
    pub temperature: f32,
    /// 0 = off.
    pub top_k: u32,
    /// 1 = off.
    pub top_p: f32,
    /// 0 = off.
    pub min_p: f32,
    /// 1 = off; over prompt and output, as in transformers.
    pub repetition_penalty: f32,
    /// Random numbers are a function of (seed, position).
    pub seed: u64,
}

/// One token, or the end.
#[derive(Debug, Clone)]
pub enum TokenEvent {
    /// The next token.
    Token {
        /// Its id.
        id: u32,
        /// Its log-probability and the likeliest others, if asked for.
        logprobs: Option<Vec<LogprobEntry>>,
        /// Leading tokens of the prompt that the prefix cache had when the sequence started; the same in every event.
        cached_tokens: usize,
        /// Whether an expert was left out for this sequence, here or before: its tokens need not be those of the whole
        /// model. Once set it stays.
        degraded: bool,
        /// Set on the last token.
        finish: Option<FinishReason>,
    },
    /// The request failed; nothing follows.
    Failed(EngineError),
}

/// A token and its log-probability (of the model's distribution, before temperature and cuts). The chosen token
/// comes first, then the likeliest in descending order.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogprobEntry {
    /// Token.
    pub id: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop id was generated.
    Stop,
    /// `max_tokens` or the context's end was reached.
    Length,
}

/// Logits of one position.
#[derive(Debug, Clone, PartialEq)]
pub struct LogitsRow {
    /// `[vocab]`.
    pub logits: Vec<f32>,
    /// Whether an expert was left out for this sequence, here or before.
    pub degraded: bool,
}

/// Logits of a prompt.
#[derive(Debug, Clone)]
pub struct ForwardRequest {
    /// Tokens, not empty.
    pub token_ids: Vec<u32>,
    /// Positions whose logits are wanted, ascending; each below the number of tokens.
    pub positions: Vec<usize>,
}

/// Rows for one MoE block: the golden files' `moe.{j}.input` → `moe.{j}.output`.
#[derive(Debug, Clone)]
pub struct MoeLayerRequest {
    /// Model layer.
    pub layer: LayerId,
    /// `[rows, hidden]`.
    pub hidden_states: Array2<f32>,
}

/// Why the engine refused or gave up a request.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The queue is full.
    #[error("the queue is full: {limit} requests wait")]
    QueueFull {
        /// Its bound.
        limit: usize,
    },
    /// Prompt and output do not fit the context.
    #[error("prompt of {prompt_tokens} tokens does not fit a context of {max_context}, output included")]
    PromptTooLong {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Longest sequence that context and cache allow.
        max_context: usize,
    },
    /// A field is out of range.
    #[error("{field}: wanted {wanted}, found {found}")]
    Invalid {
        /// The field.
        field: &'static str,
        /// Wanted, in words.
        wanted: String,
        /// Found.
        found: String,
    },
    /// Experts gave no answer.
    #[error(transparent)]
    Dispatch(#[from] moerun_dispatch::DispatchError),
    /// The model refused (a gate saw NaN, say).
    #[error("{0}")]
    Model(String),
    /// A computation panicked: a defect, in the model, a kernel or the expert backend. Other requests go on.
    #[error("the computation failed unexpectedly: {0}")]
    Panicked(String),
    /// The engine's thread could not be started.
    #[error("the engine's thread could not be started: {0}")]
    Start(String),
    /// The engine is stopping.
    #[error("the engine is stopping")]
    Stopping,
}
