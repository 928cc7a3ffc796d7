//! Activations that a kernel is lent, and how rows are rounded to them.

use moerun_types::{ActivationFormat, QUANTIZED_BLOCK};
use ndarray::ArrayView2;

use crate::{Activations, Isa, Workspace, bf16::to_bf16, isa::Kernel, quantize::quantize_activations, simd::Simd};

/// [`Activations`] that are somebody else's, or in a [`Workspace`].
#[derive(Debug, Clone, Copy)]
pub enum ActivationRows<'a> {
    /// Not rounded.
    F32 {
        /// Number of rows.
        rows: usize,
        /// Length of a row.
        cols: usize,
        /// `[rows, cols]`.
        data: &'a [f32],
    },
    /// As [`Activations::Bf16`].
    Bf16 {
        /// Number of rows.
        rows: usize,
        /// Length of a row.
        cols: usize,
        /// `[rows, cols]`, bfloat16 bits.
        data: &'a [u16],
    },
    /// As [`Activations::Int8`].
    Int8 {
        /// Number of rows.
        rows: usize,
        /// Length of a row.
        cols: usize,
        /// `[rows, blocks][32]`, zeroes behind the last column.
        codes: &'a [[i8; QUANTIZED_BLOCK]],
        /// `[rows, blocks]`.
        scales: &'a [f32],
    },
}

impl<'a> ActivationRows<'a> {
    /// Rounds `x`, `[rows, cols]`, to `format`, as [`Activations::round`] does; in f32 rows that lie one after another
    /// are taken as they are.
    pub fn round(workspace: &'a Workspace<'_>, format: ActivationFormat, x: ArrayView2<'a, f32>) -> Self {
        let (rows, cols) = x.dim();
        match format {
            ActivationFormat::F32 => {
                let data = match x.to_slice() {
                    Some(data) => data,
                    None => workspace.collect(x.iter().copied()),
                };
                ActivationRows::F32 { rows, cols, data }
            }
            ActivationFormat::Bf16 => {
                let data = workspace.filled(rows * cols, 0);
                round_bf16(x, data);
                ActivationRows::Bf16 { rows, cols, data }
            }
            ActivationFormat::Int8 => {
                let blocks = cols.div_ceil(QUANTIZED_BLOCK);
                let codes = workspace.filled(rows * blocks, [0; QUANTIZED_BLOCK]);
                let scales = workspace.filled(rows * blocks, 0.0);
                round_int8(x, codes, scales);
                ActivationRows::Int8 {
                    rows,
                    cols,
                    codes,
                    scales,
                }
            }
        }
    }

    /// Whether both are the same rows in the same memory.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        let same_shape = (self.rows(), self.cols()) == (other.rows(), other.cols());
        same_shape
            && match (self, other) {
                (ActivationRows::F32 { data, .. }, ActivationRows::F32 { data: other, .. }) => {
                    std::ptr::eq(*data, *other)
                }
                (ActivationRows::Bf16 { data, .. }, ActivationRows::Bf16 { data: other, .. }) => {
                    std::ptr::eq(*data, *other)
                }
                (ActivationRows::Int8 { codes, .. }, ActivationRows::Int8 { codes: other, .. }) => {
                    std::ptr::eq(*codes, *other)
                }
                _ => false,
            }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        match *self {
            ActivationRows::F32 { rows, .. }
            | ActivationRows::Bf16 { rows, .. }
            | ActivationRows::Int8 { rows, .. } => rows,
        }
    }

    /// Length of a row.
    pub fn cols(&self) -> usize {
        match *self {
            ActivationRows::F32 { cols, .. }
            | ActivationRows::Bf16 { cols, .. }
            | ActivationRows::Int8 { cols, .. } => cols,
        }
    }

    /// The format the rows are rounded to.
    pub fn format(&self) -> ActivationFormat {
        match self {
            ActivationRows::F32 { .. } => ActivationFormat::F32,
            ActivationRows::Bf16 { .. } => ActivationFormat::Bf16,
            ActivationRows::Int8 { .. } => ActivationFormat::Int8,
        }
    }
}

impl<'a> From<&'a Activations> for ActivationRows<'a> {
    fn from(activations: &'a Activations) -> Self {
        match *activations {
            Activations::F32 { rows, cols, ref data } => ActivationRows::F32 { rows, cols, data },
            Activations::Bf16 { rows, cols, ref data } => ActivationRows::Bf16 { rows, cols, data },
            Activations::Int8 {
                rows,
                cols,
                ref codes,
                ref scales,
            } => ActivationRows::Int8 {
                rows,
                cols,
                codes,
                scales,
            },
        }
    }
}

/// Rounds `x`, `[rows, cols]`, to bfloat16, row after row.
pub(super) fn round_bf16(x: ArrayView2<'_, f32>, out: &mut [u16]) {
    if let Some(x) = x.as_slice() {
        Isa::current().dispatch(RoundBf16 { x, out });
        return;
    }
    for (x, out) in x.rows().into_iter().zip(out.chunks_mut(x.ncols().max(1))) {
        match x.as_slice() {
            Some(x) => Isa::current().dispatch(RoundBf16 { x, out }),
            None => out.iter_mut().zip(x).for_each(|(out, &value)| *out = to_bf16(value)),
        }
    }
}

/// Rounds `x`, `[rows, cols]`, to `codes` and `scales`, `[rows, blocks]`; the codes behind the last column must be 0.
pub(super) fn round_int8(x: ArrayView2<'_, f32>, codes: &mut [[i8; QUANTIZED_BLOCK]], scales: &mut [f32]) {
    let blocks = x.ncols().div_ceil(QUANTIZED_BLOCK).max(1);
    let out = codes.chunks_mut(blocks).zip(scales.chunks_mut(blocks));
    for (x, (codes, scales)) in x.rows().into_iter().zip(out) {
        match x.as_slice() {
            Some(row) => Isa::current().dispatch(RoundInt8 { row, codes, scales }),
            None => {
                let mut values = x.iter().copied();
                for (codes, scale) in codes.iter_mut().zip(scales) {
                    let mut block = [0.0; QUANTIZED_BLOCK];
                    block.iter_mut().zip(&mut values).for_each(|(to, value)| *to = value);
                    *scale = quantize_activations(&block, codes);
                }
            }
        }
    }
}

struct RoundBf16<'a> {
    x: &'a [f32],
    out: &'a mut [u16],
}

impl Kernel for RoundBf16<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        for (out, &value) in self.out.iter_mut().zip(self.x) {
            *out = to_bf16(value);
        }
    }
}

struct RoundInt8<'a> {
    row: &'a [f32],
    codes: &'a mut [[i8; QUANTIZED_BLOCK]],
    scales: &'a mut [f32],
}

impl Kernel for RoundInt8<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        let blocks = self.row.chunks(QUANTIZED_BLOCK);
        for ((values, codes), scale) in blocks.zip(self.codes).zip(self.scales) {
            *scale = match values.as_array() {
                Some(values) => quantize_activations(values, codes),
                None => {
                    let mut padded = [0.0; QUANTIZED_BLOCK];
                    padded[..values.len()].copy_from_slice(values);
                    quantize_activations(&padded, codes)
                }
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Array2, s};

    use super::*;
    use crate::CpuPool;

    #[test]
    fn rows_rounded_in_a_workspace_are_those_rounded_elsewhere_whatever_their_layout() {
        let pool = CpuPool::new(1);
        let x = Array2::from_shape_fn((6, 75), |(row, col)| (row as f32 - 2.3) * 1.1_f32.powi(col as i32));
        for view in [x.view(), x.slice(s![.., 3..70]), x.slice(s![1..4, ..;2]), x.t()] {
            for format in [ActivationFormat::F32, ActivationFormat::Bf16, ActivationFormat::Int8] {
                let workspace = pool.workspace();
                let expected = Activations::round(format, view.as_standard_layout().view());
                let rows = ActivationRows::round(&workspace, format, view);
                assert_eq!(
                    (rows.rows(), rows.cols(), rows.format()),
                    (view.nrows(), view.ncols(), format)
                );
                let equal = match (rows, &expected) {
                    (ActivationRows::F32 { data, .. }, Activations::F32 { data: wanted, .. }) => data == wanted,
                    (ActivationRows::Bf16 { data, .. }, Activations::Bf16 { data: wanted, .. }) => data == wanted,
                    (
                        ActivationRows::Int8 { codes, scales, .. },
                        Activations::Int8 {
                            codes: wanted_codes,
                            scales: wanted_scales,
                            ..
                        },
                    ) => codes == wanted_codes && scales == wanted_scales,
                    _ => false,
                };
                assert!(equal, "{format:?}");
            }
        }
    }
}
