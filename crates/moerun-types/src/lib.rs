//! The nouns of Moerun: identities, number formats, the shape of a model.
//!
//! Nothing here does I/O, waits, or holds an array. [`ModelConfig`] is the one description of a transformer that
//! every other crate works from; it is parsed from a checkpoint's `config.json` and checked once.
#![forbid(unsafe_code)]

mod ids;
mod kv_format;
mod numerics;

mod model_config;

pub use ids::{BlockRange, ExpertId, ExpertSlice, LayerId, SequenceId};
pub use kv_format::KvFormat;
pub use model_config::*;
pub use numerics::{
    ActivationFormat, COMBINE_FRACTION_BITS, CombineMode, NumberFormat, Numerics, NumericsError, QUANTIZED_BLOCK,
    default_combine_block,
};
