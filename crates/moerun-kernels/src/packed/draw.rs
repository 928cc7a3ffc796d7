//! Quantised matrices made of codes and scales that are drawn, not computed from weights.

use moerun_types::{NumberFormat, QUANTIZED_BLOCK};

use super::PackedMatrix;
use crate::{
    lines::LANES,
    panels::{code_place, lines_per_panel, scale_place},
};

impl PackedMatrix {
    /// A matrix whose codes are written by `codes` as they are stored: in `Int8` a byte each, with 128 added; else two a
    /// byte, in `Int4` with 8 added. `scale` gives the bits of one scale: f16, or an exponent with a bias of 127. Both are
    /// called in the order of memory. Lanes and columns beyond the matrix are zero afterwards.
    ///
    /// # Panics
    /// If the format is not quantised.
    pub fn draw(
        format: NumberFormat,
        rows: usize,
        cols: usize,
        mut codes: impl FnMut(&mut [u8]),
        mut scale: impl FnMut() -> u16,
    ) -> Self {
        assert!(format.is_quantized(), "{format} has no codes");
        let mut drawn = Self::zeroed(format, rows, cols);
        let lines = lines_per_panel(format, cols);
        let blocks = cols.div_ceil(QUANTIZED_BLOCK);
        for first_row in (0..rows).step_by(LANES) {
            let (_, panel) = drawn.lane_mut(first_row);
            let padding = panel[lines - 1];
            for block in 0..blocks {
                let first = code_place(format, block * QUANTIZED_BLOCK).line;
                let end = code_place(format, (block + 1) * QUANTIZED_BLOCK - 1).line + 1;
                codes(bytemuck::cast_slice_mut(&mut panel[first..end]));
                for lane in 0..LANES {
                    let place = scale_place(format, block, lane);
                    let word = &mut panel[place.line][place.word];
                    *word = *word & !(place.mask << place.shift) | u32::from(scale()) << place.shift;
                }
            }
            clear_columns(format, panel, cols..blocks * QUANTIZED_BLOCK);
            for lane in (rows - first_row).min(LANES)..LANES {
                clear_columns_of(format, panel, lane, 0..blocks * QUANTIZED_BLOCK);
                for block in 0..blocks {
                    let place = scale_place(format, block, lane);
                    let empty = padding[place.word] >> place.shift & place.mask;
                    let word = &mut panel[place.line][place.word];
                    *word = *word & !(place.mask << place.shift) | empty << place.shift;
                }
            }
        }
        drawn
    }
}

fn clear_columns(format: NumberFormat, panel: &mut [[u32; LANES]], cols: std::ops::Range<usize>) {
    for lane in 0..LANES {
        clear_columns_of(format, panel, lane, cols.clone());
    }
}

/// Gives some columns of one row the code that stands for zero.
fn clear_columns_of(format: NumberFormat, panel: &mut [[u32; LANES]], lane: usize, cols: std::ops::Range<usize>) {
    let (zero, mask) = match format {
        NumberFormat::Int8 => (0x80, 0xff),
        NumberFormat::Int4 => (8, 15),
        _ => (0, 15),
    };
    for col in cols {
        let place = code_place(format, col);
        let word = &mut panel[place.line][lane];
        *word = *word & !(mask << place.shift) | zero << place.shift;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::QuantizedRow;

    /// Codes and scales of a row, read where the layout has them.
    fn quantized_row(matrix: &PackedMatrix, row: usize) -> QuantizedRow {
        let (format, panel, lane) = (matrix.format(), matrix.panel(row / LANES), row % LANES);
        let blocks = matrix.cols().div_ceil(QUANTIZED_BLOCK);
        let code = |col: usize| {
            let place = code_place(format, col);
            let code = (panel[place.line][lane] >> place.shift) as u8;
            if format == NumberFormat::Int8 {
                code ^ 0x80
            } else {
                code & 15
            }
        };
        QuantizedRow {
            codes: (0..blocks)
                .map(|block| std::array::from_fn(|index| code(block * QUANTIZED_BLOCK + index)))
                .collect(),
            scales: (0..blocks)
                .map(|block| {
                    let place = scale_place(format, block, lane);
                    (panel[place.line][place.word] >> place.shift & place.mask) as u16
                })
                .collect(),
        }
    }

    #[test]
    fn a_drawn_matrix_is_the_one_that_its_codes_make() {
        for format in [NumberFormat::Int8, NumberFormat::Int4, NumberFormat::Mxfp4] {
            for (rows, cols) in [(16, 64), (35, 130), (7, 20)] {
                let mut state = 1_u32;
                let mut random = || {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    state >> 24
                };
                let mut state_of_scales = 0_u16;
                let drawn = PackedMatrix::draw(
                    format,
                    rows,
                    cols,
                    |bytes| bytes.iter_mut().for_each(|byte| *byte = random() as u8),
                    || {
                        state_of_scales = (state_of_scales + 1) % 100;
                        if format == NumberFormat::Mxfp4 {
                            80 + state_of_scales
                        } else {
                            0x2000 + state_of_scales
                        }
                    },
                );
                let again = PackedMatrix::from_quantized(format, rows, cols, |row| quantized_row(&drawn, row));
                let again = again.expect("finite scales");
                assert!(drawn.as_bytes() == again.as_bytes(), "{format} [{rows}, {cols}]");
            }
        }
    }
}
