//! Requests in, text ↔ tokens, streaming out; gRPC doors.
//!
//! [`Gateway`] is the library that the command line uses in its own process and that [`grpc::serve`] puts on a socket.
#![forbid(unsafe_code)]

mod answer_counts;
mod answer_room;
pub mod auth;
mod error;
mod gateway;
mod generation;
pub mod grpc;
mod metrics;
mod request;
mod text;

pub use answer_counts::AnswerStats;
pub use answer_room::AnswerShare;
pub use error::GatewayError;
pub use gateway::{Gateway, GatewayParts, LogitRows, ServedModel};
pub use generation::Generation;
pub use metrics::GatewayFigures;
pub use request::{Finish, Prompt, SamplingOverrides, TextEvent, TextRequest, TokenLogprob};
pub use text::{
    ChatMessage, Checked, Detokenizer, MAX_STOP_STRING_BYTES, MAX_STOP_STRINGS, StopStrings, TextCodec, gguf_text_files,
};

pub use moerun_engine::FinishReason;

#[cfg(test)]
mod test_checkpoints;
