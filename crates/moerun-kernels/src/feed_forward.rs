//! Gated feed-forwards: dense ones whole, routed ones by groups of rows with the exact combine.

mod intermediate;
#[cfg(test)]
mod tests;

use std::ops::Range;

use moerun_types::{Activation, NumberFormat};
use ndarray::ArrayViewMut2;

use self::intermediate::{Wanted, intermediates};
use crate::{
    ActivationRows, CpuPool, Isa, PackedMatrix, Workspace,
    interleaved::InterleavedRows,
    row_products::{RowProducts, Store, sum_exact, sum_f32},
    tile::Products,
};

/// The weights of one gated feed-forward, or of a slice of its intermediate dimension.
#[derive(Debug, Clone)]
pub struct FeedForward {
    /// `[intermediate, hidden]`.
    pub gate_proj: PackedMatrix,
    /// `[intermediate, hidden]`.
    pub up_proj: PackedMatrix,
    /// `[hidden, intermediate]`.
    pub down_proj: PackedMatrix,
    /// `[intermediate]`, added to the gate product.
    pub gate_bias: Option<Vec<f32>>,
    /// `[intermediate]`, added to the up product.
    pub up_bias: Option<Vec<f32>>,
    /// `[hidden]`.
    pub down_bias: Option<Vec<f32>>,
    /// Applied to gate and up products.
    pub activation: Activation,
}

/// A dense feed-forward is a [`FeedForward`] run on every row.
pub type DenseFeedForward = FeedForward;

/// Rows that take one feed-forward slice: the unit of work of [`grouped_exact`].
#[derive(Debug)]
pub struct Group<'a> {
    /// The weights held here.
    pub weights: &'a FeedForward,
    /// Rows of the activations that take it, ascending.
    pub rows: &'a [u32],
    /// Routing weight of each of those rows.
    pub routing_weights: &'a [f32],
    /// Blocks to run, counted from the start of `weights` (not of the whole expert).
    pub blocks: Range<usize>,
    /// Whether this group owes the term `routing_weight * down_bias`.
    pub owes_down_bias: bool,
}

/// A term of the exact combine was not finite or too large for fixed point.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error("term {term} of group {group}, block {block:?} is not finite or not below {limit}")]
pub struct ExactTermError {
    /// Index of the group; the lowest of those that failed.
    pub group: usize,
    /// Block within the group's weights, the lowest that failed; `None` for the down bias, which comes last.
    pub block: Option<usize>,
    /// The term's value: of those of that block, the one of the lowest row, then column.
    pub term: f32,
    /// The bound on its magnitude.
    pub limit: f32,
}

/// `out = feed_forward(x)`, `[tokens, hidden]`: down products accumulate over the whole intermediate dimension in f32,
/// then the down bias is added. Panics if shapes or formats differ.
pub fn dense_feed_forward<'a>(
    pool: &CpuPool,
    weights: &FeedForward,
    x: impl Into<ActivationRows<'a>>,
    out: ArrayViewMut2<'_, f32>,
) {
    dense_feed_forward_on(Isa::current(), pool, weights, x.into(), out);
}

fn dense_feed_forward_on(
    isa: Isa,
    pool: &CpuPool,
    weights: &FeedForward,
    x: ActivationRows<'_>,
    mut out: ArrayViewMut2<'_, f32>,
) {
    let workspace = pool.workspace();
    weights.check(x);
    let hidden = weights.down_proj.rows();
    assert_eq!(out.dim(), (x.rows(), hidden), "shape of the output");
    let cols = 0..weights.intermediate();
    let wanted = Wanted {
        weights,
        rows: None,
        input_factors: None,
        cols: cols.clone(),
    };
    let intermediate = intermediates(isa, &workspace, x, &[wanted]);
    let products = Products {
        weights: &weights.down_proj,
        x: &intermediate[0],
        first_col: 0,
        segments: std::slice::from_ref(&cols),
    };
    let bias = weights.down_bias.as_deref();
    let rows = [RowProducts {
        products,
        out_rows: None,
        factors: None,
        bias,
    }];
    if let Some(out) = out.as_slice_mut() {
        sum_f32(isa, pool, &rows, Store::Replace, hidden, out);
    } else {
        let result = workspace.filled(x.rows() * hidden, 0.0);
        sum_f32(isa, pool, &rows, Store::Replace, hidden, result);
        out.iter_mut().zip(result).for_each(|(out, value)| *out = *value);
    }
}

/// Runs all groups and adds their terms to `sums`, `[rows of x, hidden]`, in fixed point with
/// [`moerun_types::COMBINE_FRACTION_BITS`] fraction bits and wrapping addition.
///
/// For each group, row and block: the down products of the block accumulate from 0.0 in ascending order (fused
/// multiply-adds, one accumulator per element), the sum times the routing weight is the term. With `weight_on_input`
/// the gate and up products (biases included) are multiplied by the routing weight before the activation and the term
/// is the sum itself, or the down bias itself. The activation's result is rounded to the weights' format before the
/// down product. A term that is not finite or not below `term_limit` is an error; `sums` is then meaningless.
///
/// `combine_block` is the length of a block in intermediate columns; the last may be short.
///
/// # Panics
/// If shapes or formats differ, a row or block does not exist, or `term_limit` is above 2^23.
#[allow(clippy::too_many_arguments)]
pub fn grouped_exact<'a>(
    pool: &CpuPool,
    x: impl Into<ActivationRows<'a>>,
    groups: &[Group<'_>],
    weight_on_input: bool,
    combine_block: usize,
    term_limit: f32,
    sums: &mut [i64],
) -> Result<(), ExactTermError> {
    let grouped = Grouped {
        isa: Isa::current(),
        workspace: &pool.workspace(),
        x: x.into(),
        groups,
        weight_on_input,
        combine_block,
    };
    grouped.exact(term_limit, sums)
}

/// Like [`grouped_exact`], but sums in f32 in the order of the groups, a group's blocks as one: closeness only.
pub fn grouped_fast<'a>(
    pool: &CpuPool,
    x: impl Into<ActivationRows<'a>>,
    groups: &[Group<'_>],
    weight_on_input: bool,
    combine_block: usize,
    sums: &mut [f32],
) {
    let grouped = Grouped {
        isa: Isa::current(),
        workspace: &pool.workspace(),
        x: x.into(),
        groups,
        weight_on_input,
        combine_block,
    };
    grouped.fast(sums);
}

/// The arguments that [`grouped_exact`] and [`grouped_fast`] share.
struct Grouped<'a> {
    isa: Isa,
    workspace: &'a Workspace<'a>,
    x: ActivationRows<'a>,
    groups: &'a [Group<'a>],
    weight_on_input: bool,
    combine_block: usize,
}

impl<'a> Grouped<'a> {
    fn exact(&self, limit: f32, sums: &mut [i64]) -> Result<(), ExactTermError> {
        let Some(hidden) = self.check(sums.len()) else {
            return Ok(());
        };
        let segments = self.groups.iter().map(|group| {
            let blocks = group.blocks.clone();
            let segments = blocks.map(|block| group.cols(&(block..block + 1), self.combine_block));
            &*self.workspace.collect(segments)
        });
        let segments = self.workspace.collect(segments);
        let parts = self.parts(self.intermediates(), segments);
        sum_exact(self.isa, self.workspace.pool(), parts, limit, hidden, sums).map_err(|failure| ExactTermError {
            group: failure.part,
            block: failure
                .segment
                .map(|segment| self.groups[failure.part].blocks.start + segment),
            term: failure.term,
            limit,
        })
    }

    fn fast(&self, sums: &mut [f32]) {
        let Some(hidden) = self.check(sums.len()) else {
            return;
        };
        let segments = self.groups.iter().map(|group| {
            let whole = group.cols(&group.blocks, self.combine_block);
            &*self.workspace.collect([whole])
        });
        let segments = self.workspace.collect(segments);
        let parts = self.parts(self.intermediates(), segments);
        sum_f32(self.isa, self.workspace.pool(), parts, Store::Add, hidden, sums);
    }

    /// Asserts that everything fits together; the hidden size, or `None` if there is nothing to do.
    fn check(&self, sums: usize) -> Option<usize> {
        assert!(self.combine_block > 0, "a combine block of no columns");
        let down_proj = &self.groups.first()?.weights.down_proj;
        assert!(
            self.combine_block.is_multiple_of(down_proj.format().column_unit()),
            "a combine block of {} columns cuts through {} weights",
            self.combine_block,
            down_proj.format()
        );
        let hidden = down_proj.rows();
        assert_eq!(sums, self.x.rows() * hidden, "length of the sums");
        for group in self.groups {
            group.weights.check(self.x);
            assert_eq!(group.weights.down_proj.rows(), hidden, "hidden size of a group");
            assert_eq!(
                group.rows.len(),
                group.routing_weights.len(),
                "a routing weight per row"
            );
            let blocks = group.weights.intermediate().div_ceil(self.combine_block);
            assert!(
                group.blocks.start <= group.blocks.end && group.blocks.end <= blocks,
                "blocks {:?} of {blocks}",
                group.blocks
            );
        }
        Some(hidden)
    }

    fn intermediates(&self) -> &'a [InterleavedRows<'a>] {
        let wanted = self.groups.iter().map(|group| Wanted {
            weights: group.weights,
            rows: Some(group.rows),
            input_factors: self.weight_on_input.then_some(group.routing_weights),
            cols: group.cols(&group.blocks, self.combine_block),
        });
        intermediates(self.isa, self.workspace, self.x, self.workspace.collect(wanted))
    }

    fn parts(
        &self,
        intermediates: &'a [InterleavedRows<'a>],
        segments: &'a [&'a [Range<usize>]],
    ) -> &'a [RowProducts<'a>] {
        let parts = self.groups.iter().zip(intermediates).zip(segments);
        self.workspace.collect(parts.map(|((group, x), segments)| RowProducts {
            products: Products {
                weights: &group.weights.down_proj,
                x,
                first_col: group.cols(&group.blocks, self.combine_block).start,
                segments,
            },
            out_rows: Some(group.rows),
            factors: (!self.weight_on_input).then_some(group.routing_weights),
            bias: group.weights.down_bias.as_deref().filter(|_| group.owes_down_bias),
        }))
    }
}

impl Group<'_> {
    /// The intermediate columns of `blocks`.
    fn cols(&self, blocks: &Range<usize>, combine_block: usize) -> Range<usize> {
        let intermediate = self.weights.intermediate();
        intermediate.min(blocks.start * combine_block)..intermediate.min(blocks.end * combine_block)
    }
}

impl FeedForward {
    /// Number format of the weights.
    pub fn format(&self) -> NumberFormat {
        self.down_proj.format()
    }

    /// Columns of the intermediate dimension held.
    fn intermediate(&self) -> usize {
        self.down_proj.cols()
    }

    /// Asserts that the three matrices, the biases and `x` fit together.
    fn check(&self, x: ActivationRows<'_>) {
        for (name, projection, bias) in [
            ("gate", &self.gate_proj, &self.gate_bias),
            ("up", &self.up_proj, &self.up_bias),
        ] {
            let shape = (self.intermediate(), x.cols());
            assert_eq!(
                (projection.rows(), projection.cols()),
                shape,
                "shape of the {name} projection"
            );
            assert_eq!(
                projection.format().activations(),
                x.format(),
                "activations for the {name} projection"
            );
            assert!(
                bias.as_ref().is_none_or(|bias| bias.len() == shape.0),
                "length of the {name} bias"
            );
        }
        assert!(
            self.gate_proj.format() == self.down_proj.format() && self.up_proj.format() == self.down_proj.format(),
            "one format for all three projections"
        );
        let hidden = self.down_proj.rows();
        assert!(
            self.down_bias.as_ref().is_none_or(|bias| bias.len() == hidden),
            "length of the down bias"
        );
    }
}
