//! Attention of one layer: what both kinds share.

use moerun_kernels::{KV_PAGE_TOKENS, KvPages, Workspace};
use moerun_types::{AttentionConfig, LayerConfig};
use ndarray::{ArrayView2, ArrayViewMut2};

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
    /// Threads and memory.
    pub(crate) workspace: &'a Workspace<'a>,
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
    pub(crate) fn forward<'a>(&self, context: AttentionContext<'a>, x: ArrayView2<'a, f32>) -> ArrayViewMut2<'a, f32> {
        match self {
            Attention::Grouped(attention) => attention.forward(context, x),
            Attention::Latent(attention) => attention.forward(context, x),
        }
    }
}

/// Writes the keys and values of every row to its place in the cache; there are none where values are the start of
/// their keys.
pub(crate) fn store(
    kv: &mut KvPages,
    rows: &[StepRow<'_>],
    keys: ArrayView2<'_, f32>,
    values: Option<ArrayView2<'_, f32>>,
) {
    for (index, row) in rows.iter().enumerate() {
        let page = row.sequence.pages[row.position / KV_PAGE_TOKENS];
        let values = values.as_ref().map_or(&[][..], |values| row_of(values, index));
        kv.write(page, row.position % KV_PAGE_TOKENS, row_of(&keys, index), values);
    }
}

/// One row of a row-major matrix.
pub(crate) fn row_of<'a>(matrix: &ArrayView2<'a, f32>, row: usize) -> &'a [f32] {
    &elements(*matrix)[row * matrix.ncols()..][..matrix.ncols()]
}

/// All elements of a row-major matrix.
pub(crate) fn elements(matrix: ArrayView2<'_, f32>) -> &[f32] {
    matrix.to_slice().expect("rows lie one after another")
}

/// All elements of a row-major matrix, to be changed.
pub(crate) fn elements_mut<'a>(matrix: &'a mut ArrayViewMut2<'_, f32>) -> &'a mut [f32] {
    matrix.as_slice_mut().expect("rows lie one after another")
}
