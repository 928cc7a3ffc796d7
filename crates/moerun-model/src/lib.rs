//! The layers and the families: embedding, attention, gate, experts, decoder layer, head. Synchronous.
//!
//! A layer is three pieces, [`Model::attend`], [`Model::route`] and [`Model::finish`]; between the last two the caller
//! takes the routed rows to the experts, wherever they are. Every piece is driven by the fields of
//! [`moerun_types::ModelConfig`]; which family a checkpoint came from is never asked here.
//!
//! What a row becomes does not depend on which other rows are in the batch.

mod error;
mod loader;
mod model;
mod step;

mod embedding;
mod head;
mod linear;
mod norm;

mod attention;
mod attention_grouped;
mod attention_latent;
mod kv_cache;
mod mask;
mod rope;

mod expert_bank;
mod feed_forward;
mod gate;
mod layer;

mod memory;
mod parallel;

pub use error::ModelError;
pub use expert_bank::{ExpertBank, ExpertError};
pub use kv_cache::KvCache;
pub use model::{Model, MoeInput, Routed};
pub use step::{Step, StepSequence};
