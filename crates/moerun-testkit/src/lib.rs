//! What the other crates are checked against: a naive reference, tiny checkpoints of any shape, malformed checkpoints;
//! a proxy that breaks connections, and a name server that fails.
//!
//! Nothing here shares arithmetic with `moerun-kernels`, config parsing with `moerun-types` or tensor reading with
//! `moerun-weights`: an error in one of those cannot hide itself by being made here too.

mod error;
mod family;
mod number;
mod raw_file;

mod authority;
mod edit;
mod gguf;
mod lies;
mod naive;
mod tiny;

mod name_server;
mod proxy;

pub use authority::{Authority, Validity};
pub use edit::{
    copy_checkpoint, copy_only_experts, copy_perturbed, copy_without_experts, edit_json, edit_tensor, edit_tensors,
    is_expert_tensor, perturb_tensor,
};
pub use error::TestkitError;
pub use family::{ALL_FAMILIES, Family, golden_dir};
pub use gguf::{GgufRawTensor, GgufValue, RawGguf};
pub use lies::{LIE_PROMPT, Lie, Stage, lies};
pub use naive::{NaiveForward, NaiveModel, NaiveMoeBlock};
pub use name_server::{Mood, NameServer, Record};
pub use number::{Element, decode, encode};
pub use proxy::{Corrupt, FaultProxy, Faults, Flow, ProxyCounts, Within};
pub use raw_file::{RawFile, RawTensor};
pub use tiny::{LatentSizes, Spelling, Storage, TinyCheckpoint, TinyRope};
