//! The wire: generated messages, and their conversion to our types.
//!
//! A message from a peer is believed only after its lengths have been compared with what it says of itself and with
//! what the receiver knows of the model; nothing is allocated before that.
#![forbid(unsafe_code)]

mod checksum;
mod codec;
mod error;
mod handshake;
mod limits;
mod packed;
mod placement;
mod request;
mod response;

/// Messages and services of `proto/moerun/v1`, generated.
#[allow(missing_docs, clippy::all, unreachable_pub)]
pub mod v1 {
    tonic::include_proto!("moerun.v1");
}

pub use checksum::{answer_is_intact, request_is_intact, seal_answer, seal_request};
pub use codec::{TensorCodec, TensorEncoder};
pub use error::WireError;
pub use handshake::{BlockHash, HeldExpert, WorkerIdentity, decode_handshake, encode_handshake};
pub use limits::{
    CONNECTION_WINDOW_BYTES, MAX_EXECUTE_BYTES, MAX_FRAME_BYTES, MAX_HANDSHAKE_BYTES, MAX_MESSAGE_BYTES,
    MAX_ROWS_PER_MESSAGE, ModelLimits, PROTOCOL_VERSION, STREAM_WINDOW_BYTES, speaks_checksums, speaks_same_major,
};
pub use placement::{HeldNow, decode_expert, decode_load, decode_unload, encode_load, encode_unload};
pub use request::{ExecuteWork, decode_request, encode_request, request_cost_bytes};
pub use response::{ExecuteFailure, ExecuteReply, decode_response, encode_echo, encode_failure, encode_response};

/// Encoded `FileDescriptorSet` of [`v1`], for reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/moerun_descriptor.bin"));
