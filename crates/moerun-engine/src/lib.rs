//! Which sequences run next, and that step: prefill, decode, paged KV shared by prefix,
//! drafts, sampling. Knows no text and no sockets.
#![forbid(unsafe_code)]

mod request;

mod engine;
mod handle;
mod limits;
mod reply;

mod chunk;
mod draft;
mod engine_thread;
mod page_hash;
mod pages;
mod scheduler;
mod sequence;

mod forward;
mod moe_layer;
mod sampler;
mod step;

pub use engine::{Engine, EngineConfig, EngineStats};
pub use forward::{Capture, Forward, ForwardMemory};
pub use handle::EngineHandle;
pub use request::{
    EngineError, FinishReason, ForwardRequest, GenerateRequest, LogitsRow, LogprobEntry, MoeLayerRequest,
    SamplingParams, TokenEvent,
};
