//! Weight matrices packed in lane-wide panels: lane = output row, so one layout serves decode and prefill.

use moerun_types::NumberFormat;
use ndarray::ArrayViewMut2;

use crate::{
    Activations, CpuPool, Isa,
    bf16::{from_bf16, to_bf16},
    interleaved::InterleavedRows,
    lines::{LANES, Line, Lines},
    row_products::{RowProducts, Store, sum_f32},
    tile::Products,
};

/// A weight matrix `[rows, cols]` (`rows` output features, `cols` input features), packed in panels of 16 rows.
///
/// A panel is `[cols][16]` in f32, `[cols / 2][16][2]` in bf16: whole cache lines that are read one after another,
/// whatever the number of tokens. The last panel and the last pair of columns are filled up with zeroes.
#[derive(Debug, Clone)]
pub struct PackedMatrix {
    format: NumberFormat,
    rows: usize,
    cols: usize,
    lines: Lines,
}

impl PackedMatrix {
    /// Packs a matrix whose row `i` is written by `fill(i, row)`, `row` being `[cols]`. In bf16 the values are rounded
    /// to nearest even. `fill` is called once per row, in any order.
    pub fn pack(format: NumberFormat, rows: usize, cols: usize, mut fill: impl FnMut(usize, &mut [f32])) -> Self {
        let lines_per_panel = lines_per_panel(format, cols);
        let mut lines = Lines::zeroed(rows.div_ceil(LANES) * lines_per_panel);
        let mut row = vec![0.0; cols];
        for row_index in 0..rows {
            row.fill(0.0);
            fill(row_index, &mut row);
            let lane = row_index % LANES;
            let first_line = row_index / LANES * lines_per_panel;
            let panel = &mut lines.as_mut_slice()[first_line..first_line + lines_per_panel];
            match format {
                NumberFormat::F32 => panel
                    .iter_mut()
                    .zip(&row)
                    .for_each(|(line, value)| line[lane] = value.to_bits()),
                NumberFormat::Bf16 => panel.iter_mut().zip(row.chunks(2)).for_each(|(line, pair)| {
                    let high = pair.get(1).map_or(0, |&value| to_bf16(value));
                    line[lane] = u32::from(to_bf16(pair[0])) | u32::from(high) << 16;
                }),
            }
        }
        Self {
            format,
            rows,
            cols,
            lines,
        }
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
                pair[0] = from_bf16(line[lane] as u16);
                if let Some(odd) = pair.get_mut(1) {
                    *odd = from_bf16((line[lane] >> 16) as u16);
                }
            }),
        }
    }

    /// The lines of one panel.
    #[inline(always)]
    pub(crate) fn panel(&self, panel: usize) -> &[Line] {
        let lines = lines_per_panel(self.format, self.cols);
        &self.lines.as_slice()[panel * lines..(panel + 1) * lines]
    }

    /// `out = x · Wᵀ`, `[tokens, cols]` → `[tokens, rows]`.
    ///
    /// Each output element is one chain of fused multiply-adds from 0.0 in ascending column order, so a row of `out`
    /// depends on its own row of `x` alone and is the same on every instruction set. `x` must be in this matrix'
    /// format and `cols` wide, `out` of the shape given (asserted).
    pub fn matmul(&self, pool: &CpuPool, x: &Activations, out: ArrayViewMut2<'_, f32>) {
        self.matmul_on(Isa::current(), pool, x, out);
    }

    /// [`PackedMatrix::matmul`] in the variant `isa`.
    pub(crate) fn matmul_on(&self, isa: Isa, pool: &CpuPool, x: &Activations, mut out: ArrayViewMut2<'_, f32>) {
        assert_eq!(x.format(), self.format, "format of the activations");
        assert_eq!(x.cols(), self.cols, "width of the activations");
        assert_eq!(out.dim(), (x.rows(), self.rows), "shape of the product");
        if let Some(out) = out.as_slice_mut() {
            self.matmul_into(isa, pool, x, out);
        } else {
            let mut product = vec![0.0; x.rows() * self.rows];
            self.matmul_into(isa, pool, x, &mut product);
            out.iter_mut().zip(product).for_each(|(out, value)| *out = value);
        }
    }

    fn matmul_into(&self, isa: Isa, pool: &CpuPool, x: &Activations, out: &mut [f32]) {
        let x = InterleavedRows::from_activations(isa, pool, x, None);
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

fn lines_per_panel(format: NumberFormat, cols: usize) -> usize {
    match format {
        NumberFormat::F32 => cols,
        NumberFormat::Bf16 => cols.div_ceil(2),
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Array2, ShapeBuilder, s};

    use super::*;
    use crate::test_data::{FORMATS, Rng, pack_array};

    /// The definition: one chain of fused multiply-adds per element.
    fn naive(weights: &Array2<f32>, x: &Array2<f32>) -> Array2<f32> {
        Array2::from_shape_fn((x.nrows(), weights.nrows()), |(token, row)| {
            (0..x.ncols()).fold(0.0, |sum, col| weights[[row, col]].mul_add(x[[token, col]], sum))
        })
    }

    fn bits(array: &Array2<f32>) -> Vec<u32> {
        array.iter().map(|value| value.to_bits()).collect()
    }

    #[test]
    fn products_have_the_bits_of_the_definition_on_every_isa_for_all_odd_shapes() {
        for seed in 0..120 {
            let mut rng = Rng::new(seed);
            let (rows, cols, tokens) = match seed {
                0 => (0, 5, 3),
                1 => (5, 0, 3),
                2 => (5, 3, 0),
                3 => (1, 1, 1),
                4 => (300, 257, 67),
                _ => (rng.below(70), rng.below(40), rng.below(30)),
            };
            for format in FORMATS {
                let (weights, packed) = pack_array(format, &rng.array(rows, cols));
                let x = Activations::round(format, rng.array(tokens, cols).view());
                let expected = bits(&naive(&weights, &x.to_f32()));
                for threads in [1, 2, 3] {
                    let pool = CpuPool::new(threads);
                    for isa in Isa::all_available() {
                        let mut out = Array2::from_elem((tokens, rows), f32::NAN);
                        packed.matmul_on(isa, &pool, &x, out.view_mut());
                        assert!(
                            bits(&out) == expected,
                            "seed {seed}: {rows} x {cols}, {tokens} tokens, {format} {isa}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_alone_has_the_bits_it_has_in_a_batch() {
        let mut rng = Rng::new(7);
        let pool = CpuPool::new(2);
        for format in FORMATS {
            let (_, packed) = pack_array(format, &rng.array(50, 133));
            let x = Activations::round(format, rng.array(31, 133).view());
            for isa in Isa::all_available() {
                let mut batch = Array2::zeros((31, 50));
                packed.matmul_on(isa, &pool, &x, batch.view_mut());
                for row in 0..31 {
                    let mut alone = Array2::zeros((1, 50));
                    packed.matmul_on(isa, &pool, &x.select_rows(&[row]), alone.view_mut());
                    assert_eq!(
                        bits(&alone),
                        bits(&batch.slice(s![row as usize..=row as usize, ..]).to_owned())
                    );
                }
            }
        }
    }

    #[test]
    fn denormals_are_flushed_alike_on_every_isa() {
        for seed in 0..20 {
            let mut rng = Rng::new(seed);
            let pool = CpuPool::new(2);
            for format in FORMATS {
                let (_, packed) = pack_array(format, &rng.array(40, 9).mapv(|value| value * 1e-19));
                let tiny = rng
                    .array(13, 9)
                    .mapv(|value| value * [1e-19, 1e-18, 1e-39, 1e-44][seed as usize % 4]);
                let x = Activations::round(format, tiny.view());
                let mut expected = Array2::zeros((13, 40));
                packed.matmul_on(Isa::Portable, &pool, &x, expected.view_mut());
                assert!(
                    expected.iter().all(|value| !value.is_subnormal()),
                    "seed {seed}, {format}"
                );
                for isa in Isa::all_available() {
                    let mut found = Array2::zeros((13, 40));
                    packed.matmul_on(isa, &pool, &x, found.view_mut());
                    assert!(bits(&found) == bits(&expected), "seed {seed}, {format} {isa}");
                }
            }
        }
    }

    #[test]
    fn an_output_of_any_layout_is_filled() {
        let mut rng = Rng::new(8);
        let pool = CpuPool::new(1);
        let (weights, packed) = pack_array(NumberFormat::F32, &rng.array(20, 9));
        let x = rng.array(6, 9);
        let rounded = Activations::round(NumberFormat::F32, x.view());
        let mut column_major = Array2::zeros((6, 20).f());
        packed.matmul(&pool, &rounded, column_major.view_mut());
        assert_eq!(column_major, naive(&weights, &x));
        let mut wide = Array2::zeros((6, 30));
        packed.matmul(&pool, &rounded, wide.slice_mut(s![.., 5..25]));
        assert_eq!(wide.slice(s![.., 5..25]), naive(&weights, &x));
        assert!(
            wide.slice(s![.., ..5])
                .iter()
                .chain(wide.slice(s![.., 25..]).iter())
                .all(|&value| value == 0.0)
        );
    }

    #[test]
    fn unpacking_gives_back_the_rounded_rows() {
        let mut rng = Rng::new(9);
        for format in FORMATS {
            for (rows, cols) in [(1, 1), (17, 3), (40, 8)] {
                let (weights, packed) = pack_array(format, &rng.array(rows, cols));
                assert_eq!((packed.rows(), packed.cols(), packed.format()), (rows, cols, format));
                assert!(packed.bytes() >= rows * cols * format.bytes());
                let mut row = vec![f32::NAN; cols];
                for index in 0..rows {
                    packed.unpack_row(index, &mut row);
                    assert_eq!(row, weights.row(index).to_vec());
                }
            }
        }
    }
}
