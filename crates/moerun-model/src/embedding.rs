//! Token ids → hidden states.

use std::sync::Arc;

use moerun_kernels::PackedMatrix;
use moerun_weights::TensorRole;
use ndarray::Array2;

use crate::{ModelError, loader::Loader, memory::reshape};

/// The embedding matrix; a tied head is the same one.
#[derive(Debug)]
pub(crate) struct Embedding {
    /// `[vocab, hidden]`.
    weight: Arc<PackedMatrix>,
    multiplier: f32,
}

impl Embedding {
    pub(crate) fn load(loader: &mut Loader<'_>) -> Result<Self, ModelError> {
        let weight = Arc::new(loader.matrix(TensorRole::Embedding)?);
        Ok(Embedding {
            weight,
            multiplier: loader.config().embedding_multiplier,
        })
    }

    /// The matrix, for a tied head.
    pub(crate) fn weight(&self) -> Arc<PackedMatrix> {
        Arc::clone(&self.weight)
    }

    /// `[tokens]` → `[tokens, hidden]`.
    pub(crate) fn forward(&self, token_ids: &[u32], hidden_states: &mut Array2<f32>) {
        reshape(hidden_states, token_ids.len(), self.weight.cols());
        for (&token_id, mut row) in token_ids.iter().zip(hidden_states.rows_mut()) {
            let row = row.as_slice_mut().expect("a row of a new array is contiguous");
            self.weight.unpack_row(token_id as usize, row);
            row.iter_mut().for_each(|value| *value *= self.multiplier);
        }
    }
}
