//! Rows and columns cut out of a packed matrix, word by word: the same bits as if they had been packed alone.

use std::ops::Range;

use moerun_types::{NumberFormat, QUANTIZED_BLOCK};

use super::PackedMatrix;
use crate::{
    lines::{LANES, Line},
    panels::{code_place, lines_per_panel, scale_place},
};

impl PackedMatrix {
    /// The weights of some rows and columns. Whole panels of a mapped matrix stay where they are; everything else is
    /// copied.
    ///
    /// # Panics
    /// If the matrix has no such rows or columns, or `cols` is not a whole number of the format's column units (it may
    /// also end with the matrix).
    pub fn part(&self, rows: Range<usize>, cols: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows of the matrix");
        assert!(cols.start <= cols.end && cols.end <= self.cols, "columns of the matrix");
        let unit = self.format.column_unit();
        assert!(
            cols.start.is_multiple_of(unit) && (cols.end.is_multiple_of(unit) || cols.end == self.cols),
            "whole units of columns"
        );
        let whole_panels =
            rows.start.is_multiple_of(LANES) && (rows.end.is_multiple_of(LANES) || rows.end == self.rows);
        let panels = rows.start / LANES..rows.end.div_ceil(LANES);
        if whole_panels && cols == (0..self.cols) {
            let lines = lines_per_panel(self.format, self.cols);
            return PackedMatrix {
                format: self.format,
                rows: rows.len(),
                cols: self.cols,
                lines: self.lines.part(panels.start * lines..panels.end * lines),
            };
        }
        let mut part = Self::zeroed(self.format, rows.len(), cols.len());
        if whole_panels {
            for panel in panels.clone() {
                let (_, out) = part.lane_mut((panel - panels.start) * LANES);
                copy_columns(self.format, self.panel(panel), cols.clone(), out);
            }
        } else {
            for row in rows.clone() {
                let (lane, out) = part.lane_mut(row - rows.start);
                copy_row(
                    self.format,
                    (self.panel(row / LANES), row % LANES),
                    cols.clone(),
                    (out, lane),
                );
            }
        }
        part
    }
}

/// Lines of a plain format that hold `cols`.
fn plain_lines(format: NumberFormat, cols: &Range<usize>) -> Range<usize> {
    let unit = format.column_unit();
    cols.start / unit..cols.end.div_ceil(unit)
}

/// Lines with the codes of one block.
fn code_lines(format: NumberFormat, block: usize) -> Range<usize> {
    let first = block * QUANTIZED_BLOCK;
    code_place(format, first).line..code_place(format, first + QUANTIZED_BLOCK - 1).line + 1
}

/// Blocks of `cols`, with their place among those of `cols`.
fn blocks(cols: &Range<usize>) -> impl Iterator<Item = (usize, usize)> {
    (cols.start / QUANTIZED_BLOCK..cols.end.div_ceil(QUANTIZED_BLOCK)).zip(0..)
}

/// Copies columns of all rows of a panel.
fn copy_columns(format: NumberFormat, panel: &[Line], cols: Range<usize>, out: &mut [Line]) {
    if !format.is_quantized() {
        out.copy_from_slice(&panel[plain_lines(format, &cols)]);
        return;
    }
    for (from, to) in blocks(&cols) {
        out[code_lines(format, to)].copy_from_slice(&panel[code_lines(format, from)]);
        // The scales of a block's sixteen rows are adjacent.
        let scales = |block| {
            let (first, last) = (scale_place(format, block, 0), scale_place(format, block, LANES - 1));
            (first.line, first.word..last.word + 1)
        };
        let ((from_line, from_words), (to_line, to_words)) = (scales(from), scales(to));
        out[to_line][to_words].copy_from_slice(&panel[from_line][from_words]);
    }
}

/// Copies columns of one row to a row of another panel, both given with their lane.
fn copy_row(
    format: NumberFormat,
    (panel, lane): (&[Line], usize),
    cols: Range<usize>,
    (out, out_lane): (&mut [Line], usize),
) {
    let copy = |from: &[Line], to: &mut [Line]| {
        for (to, from) in to.iter_mut().zip(from) {
            to[out_lane] = from[lane];
        }
    };
    if !format.is_quantized() {
        copy(&panel[plain_lines(format, &cols)], out);
        return;
    }
    for (from, to) in blocks(&cols) {
        copy(&panel[code_lines(format, from)], &mut out[code_lines(format, to)]);
        let place = scale_place(format, from, lane);
        let scale = panel[place.line][place.word] >> place.shift & place.mask;
        let place = scale_place(format, to, out_lane);
        let word = &mut out[place.line][place.word];
        *word = *word & !(place.mask << place.shift) | scale << place.shift;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use memmap2::MmapMut;

    use super::*;
    use crate::MappedError;

    fn weight(row: usize, col: usize) -> f32 {
        let mixed = (row * 7919 + col * 104_729 + 13) as u32;
        (mixed.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 24) as f32 - 0.5
    }

    fn packed(format: NumberFormat, rows: Range<usize>, cols: Range<usize>) -> PackedMatrix {
        PackedMatrix::pack(format, rows.len(), cols.len(), |row, out| {
            for (out, col) in out.iter_mut().zip(cols.clone()) {
                *out = weight(rows.start + row, col);
            }
        })
        .expect("finite")
    }

    /// The same matrix in a mapping, some lines behind its start.
    fn mapped(matrix: &PackedMatrix) -> PackedMatrix {
        let bytes = matrix.as_bytes();
        let mut map = MmapMut::map_anon(bytes.len() + 192).expect("memory");
        map[128..128 + bytes.len()].copy_from_slice(bytes);
        let map = Arc::new(map.make_read_only().expect("read-only"));
        let place = 128..128 + bytes.len();
        PackedMatrix::from_mapped(matrix.format(), matrix.rows(), matrix.cols(), &map, place).expect("a matrix")
    }

    #[test]
    fn a_part_has_the_bits_that_its_weights_have_packed_alone() {
        for format in NumberFormat::ALL {
            let unit = format.column_unit();
            for (all_rows, all_cols) in [(70, 330), (64, 384)] {
                let whole = packed(format, 0..all_rows, 0..all_cols);
                for owner in [whole.clone(), mapped(&whole)] {
                    for rows in [0..all_rows, 0..32, 16..48, 32..all_rows, 8..24, 5..all_rows, 16..20] {
                        for cols in [
                            0..all_cols,
                            0..unit,
                            3 * unit..8 * unit,
                            5 * unit..all_cols,
                            96..192,
                            128..256,
                        ] {
                            let part = owner.part(rows.clone(), cols.clone());
                            let alone = packed(format, rows.clone(), cols.clone());
                            assert_eq!((part.rows(), part.cols()), (rows.len(), cols.len()));
                            assert!(
                                part.as_bytes() == alone.as_bytes(),
                                "{format} of [{all_rows}, {all_cols}]: rows {rows:?}, columns {cols:?}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn whole_panels_of_a_mapping_are_not_copied() {
        let matrix = mapped(&packed(NumberFormat::Int8, 0..64, 0..96));
        let part = matrix.part(16..48, 0..96);
        assert!(part.is_mapped());
        let panel_bytes = matrix.as_bytes().len() / 4;
        assert_eq!(part.as_bytes().as_ptr(), matrix.as_bytes()[panel_bytes..].as_ptr());
        assert!(!matrix.part(0..64, 32..96).is_mapped());
    }

    #[test]
    fn gathered_matrices_keep_their_weights() {
        let mut first = mapped(&packed(NumberFormat::Int4, 0..40, 0..64));
        let mut second = packed(NumberFormat::Bf16, 0..20, 0..31);
        let before = [first.as_bytes().to_vec(), second.as_bytes().to_vec()];
        let read = &mut |map: &Arc<memmap2::Mmap>, start: usize, out: &mut [u8]| {
            out.copy_from_slice(&map[start..start + out.len()]);
            Ok(())
        };
        let failing = &mut |_: &Arc<memmap2::Mmap>, _, _: &mut [u8]| Err(std::io::ErrorKind::UnexpectedEof.into());
        PackedMatrix::gather(&mut [&mut first, &mut second], failing).unwrap_err();
        assert_eq!([first.as_bytes(), second.as_bytes()], [&before[0][..], &before[1][..]]);
        PackedMatrix::gather(&mut [&mut first, &mut second], read).unwrap();
        assert_eq!([first.as_bytes(), second.as_bytes()], [&before[0][..], &before[1][..]]);
        let end_of_first = first.as_bytes().as_ptr_range().end;
        assert_eq!(end_of_first, second.as_bytes().as_ptr());
    }

    #[test]
    fn bytes_that_are_no_matrix_are_refused() {
        let map = Arc::new(MmapMut::map_anon(4096).unwrap().make_read_only().unwrap());
        let of = |bytes| PackedMatrix::from_mapped(NumberFormat::F32, 16, 2, &map, bytes).map(|_| ());
        assert_eq!(of(0..128), Ok(()));
        assert_eq!(of(32..160), Err(MappedError::Alignment { start: 32 }));
        assert!(matches!(
            of(0..192),
            Err(MappedError::Length {
                wanted: 128,
                found: 192,
                ..
            })
        ));
        assert_eq!(of(4032..4160), Err(MappedError::Outside { end: 4160, len: 4096 }));
    }
}
