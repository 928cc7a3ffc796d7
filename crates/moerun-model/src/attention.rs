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

/// Writes the keys and values of every row to its place in the cache; there are none where values are the start of
/// their keys.
pub(crate) fn store(kv: &mut KvPages, rows: &[StepRow<'_>], keys: &Array2<f32>, values: Option<&Array2<f32>>) {
    for (index, row) in rows.iter().enumerate() {
        let page = row.sequence.pages[row.position / KV_PAGE_TOKENS];
        let row_of = |matrix: &Array2<f32>| index * matrix.ncols()..(index + 1) * matrix.ncols();
        let keys = &elements(keys)[row_of(keys)];
        let values = values.map_or(&[][..], |values| &elements(values)[row_of(values)]);
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
