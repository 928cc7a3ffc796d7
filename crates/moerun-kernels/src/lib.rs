//! Array maths on one machine: packed weights, matmul, norms, softmax, activations, rotary, attention.
//!
//! The only home of SIMD `unsafe`. Nothing here knows what a model or an expert is.
//!
//! Every kernel is written once, over 16 lanes, and compiled for each instruction set ([`Isa`]); the operations and
//! their order are the same, so the bits are too. Where a sum has more than one possible order, the doc comment of the
//! function gives the one that is used.
//!
//! Denormals are flushed to zero while a [`CpuPool`] computes. Norms, softmax, rotary and the scalar functions run on
//! the caller's own thread: a thread that calls them should call [`flush_denormals`] once when it starts.

mod activations;
#[allow(unsafe_code)] // calls the allocator's own settings
mod allocator;
mod attention;
mod bf16;
#[allow(unsafe_code)] // reads and writes the floating-point control register
mod denormals;
#[allow(unsafe_code)] // hands out parts of one array to several threads
mod disjoint;
mod elementwise;
mod exponential;
mod feed_forward;
mod interleaved;
#[allow(unsafe_code)] // enters functions compiled for a detected instruction set
mod isa;
mod kv_pages;
mod lines;
mod norm;
mod packed;
#[allow(unsafe_code)] // unchecked indexing in the inner loop
mod panels;
#[allow(unsafe_code)] // lends a borrowed task to the pool's threads
mod pool;
#[allow(unsafe_code)] // SIMD intrinsics
mod probe;
mod quantize;
mod rotary;
mod row_products;
#[allow(unsafe_code)] // SIMD intrinsics
mod simd;
#[cfg(test)]
mod test_data;
mod tile;
mod workspace;

pub use activations::{ActivationRows, Activations, ActivationsError};
pub use allocator::keep_freed_memory;
pub use attention::{AttentionRow, paged_attention};
pub use denormals::flush_denormals;
pub use elementwise::{sigmoid, softmax};
pub use feed_forward::{
    DenseFeedForward, ExactTermError, FeedForward, Group, dense_feed_forward, grouped_exact, grouped_fast,
};
pub use isa::{Isa, IsaError};
pub use kv_pages::{KV_PAGE_TOKENS, KvPages, KvShape, KvValues};
pub use lines::ReadMapped;
pub use norm::{layer_norm, rms_norm, rms_norm_weightless};
pub use packed::{MappedError, PackError, PackedMatrix, QuantizedRow};
pub use pool::CpuPool;
pub use probe::{Multiply, ProbeMemory, multiply_peak, read_bandwidth};
pub use quantize::BlockError;
pub use rotary::RotaryTable;
pub use workspace::Workspace;
