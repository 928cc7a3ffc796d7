//! Why a request, or the gateway itself, could not be served.

use std::path::PathBuf;

use moerun_engine::EngineError;

/// Why a request, or the gateway itself, could not be served. Messages name limits and numbers, never a prompt's text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GatewayError {
    /// A file of the checkpoint that text needs could not be read.
    #[error("{path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file of the checkpoint does not say what it should.
    #[error("{path}: {reason}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A GGUF file has no tokenizer, or one that cannot be used here.
    #[error(transparent)]
    Gguf(#[from] moerun_weights::WeightsError),
    /// A conversation was sent to a model that has no chat template.
    #[error("{dir}: no chat template (wanted chat_template.jinja, or chat_template in tokenizer_config.json)")]
    NoChatTemplate {
        /// The checkpoint.
        dir: PathBuf,
    },
    /// The model's chat template cannot be used with anything: it does not compile.
    #[error("{path}: the chat template does not compile: {reason}")]
    BrokenChatTemplate {
        /// Where it stands.
        path: PathBuf,
        /// What the template engine said.
        reason: String,
    },
    /// The chat template refused this conversation, or used up its budget.
    #[error("the chat template refused the conversation: {reason}")]
    ChatTemplate {
        /// What the template, or the template engine, said.
        reason: String,
    },
    /// The tokenizer failed on an input.
    #[error("tokenizer: {reason}")]
    Tokenizer {
        /// What it said.
        reason: String,
    },
    /// A request for a model that is not served here.
    #[error("model {wanted:?} is not served here: wanted {served:?}")]
    UnknownModel {
        /// Its name.
        wanted: String,
        /// What is served.
        served: String,
    },
    /// A field of a request is out of range.
    #[error("{field}: wanted {wanted}, found {found}")]
    Invalid {
        /// Path of the field in the request message.
        field: &'static str,
        /// Wanted, in words.
        wanted: String,
        /// Found.
        found: String,
    },
    /// The prompt leaves no room for a single token.
    #[error("prompt of {prompt_tokens} tokens does not fit a context of {max_context} with room for an answer")]
    PromptTooLong {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Longest sequence, prompt and answer together.
        max_context: usize,
    },
    /// Other requests' large answers, not read yet, take the memory that this request's would need.
    #[error("{wanted_kib} KiB do not fit beside the answers that others have not read, of {limit_kib} KiB in all")]
    AnswersFull {
        /// What this request would take.
        wanted_kib: u32,
        /// What there is for all.
        limit_kib: u32,
    },
    /// Who asks is not known here.
    #[error(transparent)]
    Auth(#[from] crate::auth::AuthError),
    /// The engine refused or gave up.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The engine went away without an answer.
    #[error("the engine ended without an answer")]
    EngineGone,
    /// The gRPC door could not be opened or kept open.
    #[error("gRPC server: {0}")]
    Serve(String),
}

impl GatewayError {
    pub(crate) fn invalid(field: &'static str, wanted: impl Into<String>, found: impl ToString) -> Self {
        GatewayError::Invalid {
            field,
            wanted: wanted.into(),
            found: found.to_string(),
        }
    }
}
