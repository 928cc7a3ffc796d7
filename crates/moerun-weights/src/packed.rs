//! Packed checkpoints: weights as they are held in memory, written once and mapped at every start.
//!
//! The directory has the small files of the checkpoint that it was made from, and `packed.safetensors` or the shards of
//! `packed.safetensors.index.json`. Every tensor is bytes that begin on a 64-byte border: the panels of a matrix as
//! [`moerun_kernels::PackedMatrix::as_bytes`] gives them, or f32 values; one tensor for each tensor outside the experts,
//! one for each expert (gate, up, down, biases), and one with the hashes of all experts' blocks. `__metadata__` of every
//! file says version, number format, and the hashes that a worker on the original files would announce.

mod form;
mod metadata;
mod tensors;
mod write;

pub(crate) use form::{ExpertForm, Part, dense_parts, expert_parts, places};
pub(crate) use metadata::PackedMetadata;
pub(crate) use tensors::{Content, HASHES, PackedTensor, expert_name, packed_tensors, verify};
pub(crate) use write::{PackedPlan, Piece, Writing};
