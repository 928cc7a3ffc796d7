//! Weight matrices packed in lane-wide panels: lane = output row, so one layout serves decode and prefill.

mod draw;
mod mapped;
mod part;
#[cfg(test)]
mod tests;

use half::f16;
use moerun_types::{NumberFormat, QUANTIZED_BLOCK};
use ndarray::ArrayViewMut2;

pub use mapped::MappedError;

use crate::{
    ActivationRows, CpuPool, Isa,
    bf16::{from_bf16, to_bf16},
    interleaved::InterleavedRows,
    lines::{LANES, Line, Lines},
    panels::{code_place, lines_per_panel, scale_place},
    quantize::{BlockError, MXFP4_DOUBLED, quantize_int4, quantize_int8, quantize_mxfp4},
    row_products::{RowProducts, Store, sum_f32, sum_f32_apart},
    tile::Products,
};

/// A weight matrix `[rows, cols]` (`rows` output features, `cols` input features), packed in panels of 16 rows.
///
/// A panel is whole cache lines that are read one after another, whatever the number of tokens: `[cols][16]` in f32,
/// `[cols / 2][16][2]` in bf16, groups of blocks and their scales in the quantised formats. The last panel, pair of
/// columns and group are filled up with zeroes.
#[derive(Debug, Clone)]
pub struct PackedMatrix {
    format: NumberFormat,
    rows: usize,
    cols: usize,
    lines: Lines,
}

/// Weights that a format cannot hold.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error("row {row}, columns from {first_col}, as {format}: {cause}")]
#[allow(missing_docs)]
pub struct PackError {
    pub row: usize,
    pub first_col: usize,
    pub format: NumberFormat,
    #[source]
    pub cause: BlockError,
}

/// One row of a matrix as blocks of codes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuantizedRow {
    /// `[blocks][32]`, zeroes (of the format) behind the last column: two's complement in `Int8`, 8 more than the value
    /// in `Int4`, E2M1 bits in `Mxfp4`.
    pub codes: Vec<[u8; QUANTIZED_BLOCK]>,
    /// A scale per block: f16 bits, or an exponent with a bias of 127 (at most 254) in `Mxfp4`.
    pub scales: Vec<u16>,
}

impl PackedMatrix {
    /// Packs a matrix whose row `i` is written by `fill(i, row)`, `row` being `[cols]`. In bf16 the values are rounded
    /// to nearest even; in the quantised formats each block gets the scale that its largest magnitude asks for. `fill`
    /// is called once per row, in ascending order.
    pub fn pack(
        format: NumberFormat,
        rows: usize,
        cols: usize,
        mut fill: impl FnMut(usize, &mut [f32]),
    ) -> Result<Self, PackError> {
        let mut packed = Self::zeroed(format, rows, cols);
        let mut row = vec![0.0; cols];
        for row_index in 0..rows {
            row.fill(0.0);
            fill(row_index, &mut row);
            match format {
                NumberFormat::F32 => {
                    let (lane, panel) = packed.lane_mut(row_index);
                    panel
                        .iter_mut()
                        .zip(&row)
                        .for_each(|(line, value)| line[lane] = value.to_bits());
                }
                NumberFormat::Bf16 => {
                    let (lane, panel) = packed.lane_mut(row_index);
                    panel.iter_mut().zip(row.chunks(2)).for_each(|(line, pair)| {
                        let odd = pair.get(1).map_or(0, |&value| to_bf16(value));
                        line[lane] = u32::from(to_bf16(pair[0])) << 16 | u32::from(odd);
                    });
                }
                NumberFormat::Int8 | NumberFormat::Int4 | NumberFormat::Mxfp4 => {
                    packed.put_quantized(row_index, &quantize_row(format, row_index, &row)?)?;
                }
            }
        }
        Ok(packed)
    }

    /// Packs a matrix whose row `i` is `row(i)`, codes and scales as they are. `row` is called once per row, in
    /// ascending order. A scale that is not finite is an error.
    ///
    /// # Panics
    /// If the format is not quantised, a row has not `cols / 32` blocks (rounded up) or a 4-bit code is above 15.
    pub fn from_quantized(
        format: NumberFormat,
        rows: usize,
        cols: usize,
        mut row: impl FnMut(usize) -> QuantizedRow,
    ) -> Result<Self, PackError> {
        assert!(format.is_quantized(), "{format} has no codes");
        let mut packed = Self::zeroed(format, rows, cols);
        for row_index in 0..rows {
            packed.put_quantized(row_index, &row(row_index))?;
        }
        Ok(packed)
    }

    /// Bytes that a matrix of this shape takes when it is packed.
    pub fn packed_bytes(format: NumberFormat, rows: usize, cols: usize) -> u64 {
        (rows.div_ceil(LANES) as u64)
            .saturating_mul(lines_per_panel(format, cols) as u64)
            .saturating_mul(size_of::<Line>() as u64)
    }

    fn zeroed(format: NumberFormat, rows: usize, cols: usize) -> Self {
        let mut lines = Lines::zeroed(rows.div_ceil(LANES) * lines_per_panel(format, cols));
        // The code that stands for zero, so that padding adds nothing whatever its scale.
        let zero = match format {
            NumberFormat::Int8 => 0x8080_8080,
            NumberFormat::Int4 => 0x8888_8888,
            NumberFormat::F32 | NumberFormat::Bf16 | NumberFormat::Mxfp4 => 0,
        };
        if zero != 0 {
            lines.as_mut_slice().as_flattened_mut().fill(zero);
        }
        Self {
            format,
            rows,
            cols,
            lines,
        }
    }

    /// The lane of a row and the lines of its panel.
    fn lane_mut(&mut self, row: usize) -> (usize, &mut [Line]) {
        let lines = lines_per_panel(self.format, self.cols);
        let first = row / LANES * lines;
        (row % LANES, &mut self.lines.as_mut_slice()[first..first + lines])
    }

    fn put_quantized(&mut self, row: usize, quantized: &QuantizedRow) -> Result<(), PackError> {
        let format = self.format;
        let blocks = self.cols.div_ceil(QUANTIZED_BLOCK);
        assert!(
            quantized.codes.len() == blocks && quantized.scales.len() == blocks,
            "{blocks} blocks in row {row}"
        );
        let (lane, panel) = self.lane_mut(row);
        for (block, (codes, &scale)) in quantized.codes.iter().zip(&quantized.scales).enumerate() {
            let first = code_place(format, block * QUANTIZED_BLOCK).line;
            if format == NumberFormat::Int8 {
                let quads = codes.as_chunks::<4>().0;
                for (line, &quad) in panel[first..].iter_mut().zip(quads) {
                    line[lane] = u32::from_le_bytes(quad) ^ 0x8080_8080;
                }
            } else {
                assert!(codes.iter().all(|&code| code < 16), "4-bit codes in row {row}");
                let octets = codes.as_chunks::<8>().0;
                for (line, octet) in panel[first..].iter_mut().zip(octets) {
                    line[lane] = u32::from_le_bytes(std::array::from_fn(|i| octet[i] | octet[4 + i] << 4));
                }
            }
            let is_finite = match format {
                NumberFormat::Mxfp4 => scale < 255,
                _ => f16::from_bits(scale).is_finite(),
            };
            if !is_finite {
                return Err(PackError {
                    row,
                    first_col: block * QUANTIZED_BLOCK,
                    format,
                    cause: BlockError::Scale(scale),
                });
            }
            let place = scale_place(format, block, lane);
            let word = &mut panel[place.line][place.word];
            *word = *word & !(place.mask << place.shift) | u32::from(scale) << place.shift;
        }
        Ok(())
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Number format of the weights.
    pub fn format(&self) -> NumberFormat {
        self.format
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.lines.bytes()
    }

    /// Writes row `row` as f32 into `out`, `[cols]` (the embedding look-up of a tied head). Panics if there is no such
    /// row or `out` has another length.
    pub fn unpack_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        assert_eq!(out.len(), self.cols, "length of the row");
        let (panel, lane) = (self.panel(row / LANES), row % LANES);
        match self.format {
            NumberFormat::F32 => out
                .iter_mut()
                .zip(panel)
                .for_each(|(out, line)| *out = f32::from_bits(line[lane])),
            NumberFormat::Bf16 => out.chunks_mut(2).zip(panel).for_each(|(pair, line)| {
                pair[0] = from_bf16((line[lane] >> 16) as u16);
                if let Some(odd) = pair.get_mut(1) {
                    *odd = from_bf16(line[lane] as u16);
                }
            }),
            NumberFormat::Int8 | NumberFormat::Int4 | NumberFormat::Mxfp4 => {
                for (block, out) in out.chunks_mut(QUANTIZED_BLOCK).enumerate() {
                    let place = scale_place(self.format, block, lane);
                    let scale = panel[place.line][place.word] >> place.shift & place.mask;
                    for (index, out) in out.iter_mut().enumerate() {
                        let place = code_place(self.format, block * QUANTIZED_BLOCK + index);
                        let code = (panel[place.line][lane] >> place.shift) as u8;
                        *out = match self.format {
                            NumberFormat::Int8 => {
                                f32::from((code ^ 0x80).cast_signed()) * f16::from_bits(scale as u16).to_f32()
                            }
                            NumberFormat::Int4 => (f32::from(code & 15) - 8.0) * f16::from_bits(scale as u16).to_f32(),
                            _ => f32::from(MXFP4_DOUBLED[usize::from(code & 15)]) * 0.5 * f32::from_bits(scale << 23),
                        };
                    }
                }
            }
        }
    }

    /// Number of panels.
    #[inline(always)]
    pub(crate) fn panels(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    /// The lines of one panel.
    #[inline(always)]
    pub(crate) fn panel(&self, panel: usize) -> &[Line] {
        let lines = lines_per_panel(self.format, self.cols);
        &self.lines.as_slice()[panel * lines..(panel + 1) * lines]
    }

    /// `out = x · Wᵀ`, `[tokens, cols]` → `[tokens, rows]`.
    ///
    /// Each output element is one chain of fused multiply-adds from 0.0 in ascending column order (of quantised weights:
    /// one per block, `fma(exact sum of the codes' products, scale of the weights * scale of x, chain)`), so a row of
    /// `out` depends on its own row of `x` alone and is the same on every instruction set. `x` must be rounded for this
    /// matrix' format and `cols` wide, `out` of the shape given (asserted).
    pub fn matmul<'a>(&self, pool: &CpuPool, x: impl Into<ActivationRows<'a>>, out: ArrayViewMut2<'_, f32>) {
        self.matmul_on(Isa::current(), pool, x.into(), out);
    }

    /// [`PackedMatrix::matmul`] in the variant `isa`.
    pub(crate) fn matmul_on(&self, isa: Isa, pool: &CpuPool, x: ActivationRows<'_>, mut out: ArrayViewMut2<'_, f32>) {
        assert_eq!(x.format(), self.format.activations(), "format of the activations");
        assert_eq!(x.cols(), self.cols, "width of the activations");
        assert_eq!(out.dim(), (x.rows(), self.rows), "shape of the product");
        if let Some(out) = out.as_slice_mut() {
            self.matmul_into(isa, pool, x, out);
        } else {
            let workspace = pool.workspace();
            let product = workspace.filled(x.rows() * self.rows, 0.0);
            self.matmul_into(isa, pool, x, product);
            out.iter_mut().zip(product).for_each(|(out, value)| *out = *value);
        }
    }

    /// [`PackedMatrix::matmul`] of several matrices at once, each with rows of its own; `outs` are row-major, `[tokens,
    /// rows]` of each. Small matrices together keep all threads busy where each alone would not. Where the same rows
    /// are given several times running, to matrices of one format, they are laid out once.
    pub fn matmul_all(pool: &CpuPool, products: &[(&PackedMatrix, ActivationRows<'_>)], outs: &mut [&mut [f32]]) {
        assert_eq!(products.len(), outs.len(), "an output for each product");
        for ((matrix, x), out) in products.iter().zip(&*outs) {
            assert_eq!(x.format(), matrix.format.activations(), "format of the activations");
            assert_eq!(x.cols(), matrix.cols, "width of the activations");
            assert_eq!(out.len(), x.rows() * matrix.rows, "length of an output");
        }
        let isa = Isa::current();
        let workspace = pool.workspace();
        let alike = |a: &(&PackedMatrix, ActivationRows<'_>), b: &(&PackedMatrix, ActivationRows<'_>)| {
            a.0.format == b.0.format && a.1.is_same(&b.1)
        };
        let runs = products.chunk_by(alike).map(|run| {
            let (matrix, x) = run[0];
            let x = InterleavedRows::from_activations(isa, &workspace, matrix.format, x, None);
            (run, x, 0..matrix.cols)
        });
        let runs = &*workspace.collect(runs);
        let parts = runs.iter().flat_map(|(run, x, cols)| {
            run.iter().map(move |&(weights, _)| RowProducts {
                products: Products {
                    weights,
                    x,
                    first_col: 0,
                    segments: std::slice::from_ref(cols),
                },
                out_rows: None,
                factors: None,
                bias: None,
            })
        });
        sum_f32_apart(isa, &workspace, workspace.collect(parts), outs);
    }

    fn matmul_into(&self, isa: Isa, pool: &CpuPool, x: ActivationRows<'_>, out: &mut [f32]) {
        let workspace = pool.workspace();
        let x = InterleavedRows::from_activations(isa, &workspace, self.format, x, None);
        let cols = 0..self.cols;
        let products = Products {
            weights: self,
            x: &x,
            first_col: 0,
            segments: std::slice::from_ref(&cols),
        };
        let rows = RowProducts {
            products,
            out_rows: None,
            factors: None,
            bias: None,
        };
        sum_f32(isa, pool, &[rows], Store::Replace, self.rows, out);
    }
}

fn quantize_row(format: NumberFormat, row: usize, weights: &[f32]) -> Result<QuantizedRow, PackError> {
    let quantize = match format {
        NumberFormat::Int8 => quantize_int8,
        NumberFormat::Int4 => quantize_int4,
        NumberFormat::Mxfp4 => quantize_mxfp4,
        NumberFormat::F32 | NumberFormat::Bf16 => unreachable!("{format} has no codes"),
    };
    let blocks = weights.len().div_ceil(QUANTIZED_BLOCK);
    let mut quantized = QuantizedRow {
        codes: Vec::with_capacity(blocks),
        scales: Vec::with_capacity(blocks),
    };
    for (block, weights) in weights.chunks(QUANTIZED_BLOCK).enumerate() {
        let mut padded = [0.0; QUANTIZED_BLOCK];
        padded[..weights.len()].copy_from_slice(weights);
        let (codes, scale) = quantize(&padded).map_err(|cause| PackError {
            row,
            first_col: block * QUANTIZED_BLOCK,
            format,
            cause,
        })?;
        quantized.codes.push(codes);
        quantized.scales.push(scale);
    }
    Ok(quantized)
}
