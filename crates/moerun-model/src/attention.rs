//! Attention of one layer: what both kinds share.

use moerun_kernels::{CpuPool, KV_PAGE_TOKENS, KvPages};
use moerun_types::{AttentionConfig, LayerConfig};
use ndarray::Array2;

use crate::{
    ModelError, attention_grouped::GroupedQueryAttention, attention_latent::MultiHeadLatentAttention,
    loader::LayerLoader, rope::RotaryEmbedding, step::StepRow,
};

/// The attention of one layer.
#[derive(Debug)]
pub(crate) enum Attention {
    Grouped(GroupedQueryAttention),
    Latent(MultiHeadLatentAttention),
}

/// What attention works with besides its weights and its input.
pub(crate) struct AttentionContext<'a> {
    pub(crate) pool: &'a CpuPool,
    pub(crate) layer: &'a LayerConfig,
    pub(crate) rope: &'a RotaryEmbedding,
    pub(crate) rows: &'a [StepRow<'a>],
    /// The layer's keys and values.
    pub(crate) kv: &'a mut KvPages,
}

impl Attention {
    pub(crate) fn load(loader: &mut LayerLoader<'_, '_>) -> Result<Self, ModelError> {
        Ok(match &loader.config().attention {
            AttentionConfig::Grouped(shape) => Attention::Grouped(GroupedQueryAttention::load(loader, shape)?),
            AttentionConfig::Latent(shape) => Attention::Latent(MultiHeadLatentAttention::load(loader, shape)?),
        })
    }

    /// Output of the attention branch on normed rows, `[tokens, hidden]` → `[tokens, hidden]`.
    pub(crate) fn forward(&self, context: AttentionContext<'_>, x: &Array2<f32>) -> Array2<f32> {
        match self {
            Attention::Grouped(attention) => attention.forward(context, x),
            Attention::Latent(attention) => attention.forward(context, x),
        }
    }
}

/// Writes the keys and values of every row to its place in the cache.
pub(crate) fn store(kv: &mut KvPages, rows: &[StepRow<'_>], keys: &Array2<f32>, values: &Array2<f32>) {
    for ((row, keys), values) in rows.iter().zip(keys.rows()).zip(values.rows()) {
        let page = row.sequence.pages[row.position / KV_PAGE_TOKENS];
        let keys = keys.to_slice().expect("keys are row-major");
        let values = values.to_slice().expect("values are row-major");
        kv.write(page, row.position % KV_PAGE_TOKENS, keys, values);
    }
}

/// All elements of a row-major matrix.
pub(crate) fn elements(matrix: &Array2<f32>) -> &[f32] {
    matrix.as_slice().expect("a new array is row-major")
}

/// All elements of a row-major matrix, to be changed.
pub(crate) fn elements_mut(matrix: &mut Array2<f32>) -> &mut [f32] {
    matrix.as_slice_mut().expect("a new array is row-major")
}
