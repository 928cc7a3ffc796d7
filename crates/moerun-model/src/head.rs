//! Hidden states → logits.

use std::sync::Arc;

use moerun_kernels::{ActivationRows, PackedMatrix, Workspace};
use moerun_weights::TensorRole;
use ndarray::{ArrayView2, ArrayViewMut2};

use crate::{ModelError, embedding::Embedding, loader::Loader};

/// The language-model head.
#[derive(Debug)]
pub(crate) struct Head {
    /// `[vocab, hidden]`; the embedding's matrix where the config ties them.
    weight: Arc<PackedMatrix>,
    /// `[vocab]`.
    bias: Option<Vec<f32>>,
    /// Logits are divided by this.
    scaling: f32,
}

impl Head {
    pub(crate) fn load(loader: &mut Loader<'_>, embedding: &Embedding) -> Result<Self, ModelError> {
        let config = loader.config();
        let weight = if config.tied_head {
            embedding.weight()
        } else {
            Arc::new(loader.matrix(TensorRole::Head)?)
        };
        let bias = loader.vector_if(config.head_bias, TensorRole::HeadBias)?;
        Ok(Head {
            weight,
            bias,
            scaling: config.logits_scaling,
        })
    }

    /// `[rows, hidden]` → `[rows, vocab]`.
    pub(crate) fn forward<'w>(
        &self,
        workspace: &'w Workspace<'_>,
        normed: ArrayView2<'_, f32>,
    ) -> ArrayViewMut2<'w, f32> {
        let own = workspace.pool().workspace();
        let x = ActivationRows::round(&own, self.weight.format().activations(), normed);
        let mut logits = workspace.matrix(normed.nrows(), self.weight.rows());
        self.weight.matmul(workspace.pool(), x, logits.view_mut());
        if let Some(bias) = &self.bias {
            for mut row in logits.rows_mut() {
                row.iter_mut().zip(bias).for_each(|(logit, bias)| *logit += bias);
            }
        }
        if self.scaling != 1.0 {
            logits.iter_mut().for_each(|logit| *logit /= self.scaling);
        }
        logits
    }
}
