//! Rows as the inner loop reads them: a few rows side by side, column after column, in f32.

use crate::{Activations, CpuPool, Isa, bf16::from_bf16, disjoint::Disjoint};

/// Rows that are computed together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RowBlock {
    /// Index of the first.
    pub(crate) first: usize,
    /// How many: one of [`Isa::tile_rows`].
    pub(crate) rows: usize,
}

/// `[rows, cols]` cut into [`RowBlock`]s, each `[cols][block rows]`, one after another.
#[derive(Debug, Default)]
pub(crate) struct InterleavedRows {
    rows: usize,
    cols: usize,
    blocks: Vec<RowBlock>,
    data: Vec<f32>,
}

impl InterleavedRows {
    /// Zeroes.
    pub(crate) fn zeroed(isa: Isa, rows: usize, cols: usize) -> Self {
        Self {
            rows,
            cols,
            blocks: row_blocks(isa, rows),
            data: vec![0.0; rows * cols],
        }
    }

    /// The rows `selection` of `x` in that order, or all of them. Panics if one is out of range.
    pub(crate) fn from_activations(isa: Isa, pool: &CpuPool, x: &Activations, selection: Option<&[u32]>) -> Self {
        let mut interleaved = Self::zeroed(isa, selection.map_or(x.rows(), <[u32]>::len), x.cols());
        let cols = interleaved.cols;
        let data = Disjoint::new(&mut interleaved.data);
        let blocks = &interleaved.blocks;
        pool.run_sized(blocks.len(), interleaved.rows * cols, &|index| {
            let block = blocks[index];
            // SAFETY: blocks do not overlap, and each is one task's.
            #[allow(unsafe_code)]
            let out = unsafe { data.part(block.first * cols..(block.first + block.rows) * cols) };
            for t in 0..block.rows {
                let row = selection.map_or(block.first + t, |rows| rows[block.first + t] as usize);
                let out = out.iter_mut().skip(t).step_by(block.rows);
                match x {
                    Activations::F32 { data, .. } => {
                        out.zip(&data[row * cols..(row + 1) * cols])
                            .for_each(|(out, &value)| *out = value);
                    }
                    Activations::Bf16 { data, .. } => {
                        out.zip(&data[row * cols..(row + 1) * cols])
                            .for_each(|(out, &bits)| *out = from_bf16(bits));
                    }
                }
            }
        });
        interleaved
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    pub(crate) fn blocks(&self) -> &[RowBlock] {
        &self.blocks
    }

    /// One block, `[cols][block.rows]`.
    #[inline(always)]
    pub(crate) fn block(&self, block: RowBlock) -> &[f32] {
        &self.data[block.first * self.cols..(block.first + block.rows) * self.cols]
    }

    /// All blocks, to be written by several tasks.
    pub(crate) fn data_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }
}

/// Cuts `rows` rows into blocks, the largest first.
pub(crate) fn row_blocks(isa: Isa, rows: usize) -> Vec<RowBlock> {
    let mut blocks = Vec::with_capacity(rows / isa.tile_rows()[0] + isa.tile_rows().len());
    let mut first = 0;
    for &size in isa.tile_rows() {
        while rows - first >= size {
            blocks.push(RowBlock { first, rows: size });
            first += size;
        }
    }
    blocks
}

#[cfg(test)]
mod tests {
    use moerun_types::NumberFormat;
    use ndarray::Array2;

    use super::*;

    #[test]
    fn blocks_cover_all_rows_in_order() {
        for isa in Isa::all_available() {
            for rows in 0..100 {
                let mut next = 0;
                for block in row_blocks(isa, rows) {
                    assert_eq!(block.first, next, "{isa} {rows}");
                    assert!(isa.tile_rows().contains(&block.rows));
                    next += block.rows;
                }
                assert_eq!(next, rows);
            }
        }
    }

    #[test]
    fn selected_rows_are_found_where_the_inner_loop_reads_them() {
        let x = Array2::from_shape_fn((20, 5), |(row, col)| (row * 5 + col) as f32);
        let selection: Vec<u32> = (0..20).filter(|row| row % 3 != 0).collect();
        let pool = CpuPool::new(1);
        for isa in Isa::all_available() {
            for format in [NumberFormat::F32, NumberFormat::Bf16] {
                let x_rounded = Activations::round(format, x.view());
                let rows = InterleavedRows::from_activations(isa, &pool, &x_rounded, Some(&selection));
                for &block in rows.blocks() {
                    for t in 0..block.rows {
                        for col in 0..5 {
                            let found = rows.block(block)[col * block.rows + t];
                            assert_eq!(found, x[[selection[block.first + t] as usize, col]]);
                        }
                    }
                }
            }
        }
    }
}
