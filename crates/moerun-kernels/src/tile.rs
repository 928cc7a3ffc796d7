//! The one inner loop: a few rows times a few panels, accumulated in registers.

use std::ops::Range;

use moerun_types::NumberFormat;

use crate::{
    PackedMatrix,
    interleaved::{InterleavedRows, RowBlock},
    lines::{LANES, Line},
    simd::Simd,
};

/// How the weights of a panel lie in its lines; lane = output row.
pub(crate) trait LineFormat {
    /// Columns in a line.
    const DEPTH: usize;

    /// The weights of column `index` of `DEPTH` of a line.
    fn weights<S: Simd>(simd: S, line: &Line, index: usize) -> S::F32s;
}

/// `[cols][16]` f32: a column per line.
pub(crate) enum F32Lines {}

impl LineFormat for F32Lines {
    const DEPTH: usize = 1;

    #[inline(always)]
    fn weights<S: Simd>(simd: S, line: &Line, _index: usize) -> S::F32s {
        simd.load_bits(line)
    }
}

/// `[cols / 2][16][2]` bfloat16: two columns per line, the even one in the lower half of each word. Pairs lie together
/// because that is how dot-product instructions read them; here they are widened to f32, where products are exact, and
/// accumulated one after the other, the even column first.
pub(crate) enum Bf16Lines {}

impl LineFormat for Bf16Lines {
    const DEPTH: usize = 2;

    #[inline(always)]
    fn weights<S: Simd>(simd: S, line: &Line, index: usize) -> S::F32s {
        if index == 0 {
            simd.load_low_bf16(line)
        } else {
            simd.load_high_bf16(line)
        }
    }
}

/// Adds to `sums[t][p]`, lane by lane, the products of row `t` with panel `p` over the columns `cols`: one fused
/// multiply-add per column, ascending.
///
/// `x` is `[cols.len()][T]`, its first element belonging to column `cols.start`.
#[inline(always)]
pub(crate) fn tile<S: Simd, F: LineFormat, const T: usize, const P: usize>(
    simd: S,
    panels: [&[Line]; P],
    cols: Range<usize>,
    x: &[f32],
    mut sums: [[S::F32s; P]; T],
) -> [[S::F32s; P]; T] {
    let (x, rest) = x.as_chunks::<T>();
    assert!(rest.is_empty() && x.len() == cols.len());
    for panel in panels {
        assert!(cols.end.div_ceil(F::DEPTH) <= panel.len());
    }
    let mut col = cols.start;
    while col < cols.end && !col.is_multiple_of(F::DEPTH) {
        // SAFETY: `col` is in `cols`, and `x` and the panels are as long as was just asserted.
        unsafe { add_column::<S, F, T, P>(simd, &panels, col, col % F::DEPTH, x, cols.start, &mut sums) };
        col += 1;
    }
    while col + F::DEPTH <= cols.end {
        for index in 0..F::DEPTH {
            // SAFETY: as above.
            unsafe { add_column::<S, F, T, P>(simd, &panels, col + index, index, x, cols.start, &mut sums) };
        }
        col += F::DEPTH;
    }
    while col < cols.end {
        // SAFETY: as above.
        unsafe { add_column::<S, F, T, P>(simd, &panels, col, col % F::DEPTH, x, cols.start, &mut sums) };
        col += 1;
    }
    sums
}

/// Adds the products of column `col`, the `index`-th of its line.
///
/// # Safety
/// `col` lies in a line of each panel, and `col - first_col` in `x`.
#[inline(always)]
unsafe fn add_column<S: Simd, F: LineFormat, const T: usize, const P: usize>(
    simd: S,
    panels: &[&[Line]; P],
    col: usize,
    index: usize,
    x: &[[f32; T]],
    first_col: usize,
    sums: &mut [[S::F32s; P]; T],
) {
    let mut weights = [simd.splat(0.0); P];
    for p in 0..P {
        // SAFETY: as the caller promises.
        weights[p] = F::weights(simd, unsafe { panels[p].get_unchecked(col / F::DEPTH) }, index);
    }
    // SAFETY: as the caller promises.
    let x = unsafe { x.get_unchecked(col - first_col) };
    for t in 0..T {
        let x = simd.splat(x[t]);
        for p in 0..P {
            sums[t][p] = simd.mul_add(x, weights[p], sums[t][p]);
        }
    }
}

/// Where products go: called once per segment, row and panel.
pub(crate) trait Sink {
    /// Takes the sums of segment `segment` (an index) of row `row` with the sixteen output rows of panel `panel`.
    fn put(&mut self, segment: usize, row: usize, panel: usize, sums: &[f32; LANES]);
}

/// Products of the rows of `x` with panels of `weights`, separately over each of `segments`, ascending runs of columns.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Products<'a> {
    pub(crate) weights: &'a PackedMatrix,
    pub(crate) x: &'a InterleavedRows,
    /// The column of `weights` that the first column of `x` meets.
    pub(crate) first_col: usize,
    pub(crate) segments: &'a [Range<usize>],
}

impl Products<'_> {
    /// All rows of `x`: a few panels at a time, which stay in the cache while the rows pass.
    #[inline(always)]
    pub(crate) fn run<S: Simd>(&self, simd: S, panels: Range<usize>, sink: &mut impl Sink) {
        let together = panels_together(self.x.rows());
        for first in panels.clone().step_by(together) {
            for &block in self.x.blocks() {
                self.run_block(simd, first..panels.end.min(first + together), block, sink);
            }
        }
    }

    /// One block of rows.
    #[inline(always)]
    pub(crate) fn run_block<S: Simd>(&self, simd: S, panels: Range<usize>, block: RowBlock, sink: &mut impl Sink) {
        match self.weights.format() {
            NumberFormat::F32 => self.run_format::<S, F32Lines>(simd, panels, block, sink),
            NumberFormat::Bf16 => self.run_format::<S, Bf16Lines>(simd, panels, block, sink),
        }
    }

    #[inline(always)]
    fn run_format<S: Simd, F: LineFormat>(&self, simd: S, panels: Range<usize>, block: RowBlock, sink: &mut impl Sink) {
        if S::WIDE {
            match block.rows {
                1 => self.run_tiles::<S, F, 1, 4>(simd, panels, block.first, sink),
                2 => self.run_tiles::<S, F, 2, 4>(simd, panels, block.first, sink),
                4 => self.run_tiles::<S, F, 4, 2>(simd, panels, block.first, sink),
                8 => self.run_tiles::<S, F, 8, 2>(simd, panels, block.first, sink),
                12 => self.run_tiles::<S, F, 12, 2>(simd, panels, block.first, sink),
                rows => unreachable!("{rows} is not in TILE_ROWS"),
            }
        } else {
            match block.rows {
                1 => self.run_tiles::<S, F, 1, 4>(simd, panels, block.first, sink),
                2 => self.run_tiles::<S, F, 2, 2>(simd, panels, block.first, sink),
                4 => self.run_tiles::<S, F, 4, 1>(simd, panels, block.first, sink),
                6 => self.run_tiles::<S, F, 6, 1>(simd, panels, block.first, sink),
                rows => unreachable!("{rows} is not in TILE_ROWS"),
            }
        }
    }

    #[inline(always)]
    fn run_tiles<S: Simd, F: LineFormat, const T: usize, const P: usize>(
        &self,
        simd: S,
        panels: Range<usize>,
        first_row: usize,
        sink: &mut impl Sink,
    ) {
        let mut panel = panels.start;
        while panel + P <= panels.end {
            self.run_tile::<S, F, T, P>(simd, panel, first_row, sink);
            panel += P;
        }
        while panel < panels.end {
            self.run_tile::<S, F, T, 1>(simd, panel, first_row, sink);
            panel += 1;
        }
    }

    #[inline(always)]
    fn run_tile<S: Simd, F: LineFormat, const T: usize, const P: usize>(
        &self,
        simd: S,
        first_panel: usize,
        first_row: usize,
        sink: &mut impl Sink,
    ) {
        let mut panels: [&[Line]; P] = [&[]; P];
        for (p, lines) in panels.iter_mut().enumerate() {
            *lines = self.weights.panel(first_panel + p);
        }
        let x = self.x.block(RowBlock {
            first: first_row,
            rows: T,
        });
        for (index, cols) in self.segments.iter().enumerate() {
            let x = &x[(cols.start - self.first_col) * T..(cols.end - self.first_col) * T];
            let zero = [[simd.splat(0.0); P]; T];
            let sums = tile::<S, F, T, P>(simd, panels, cols.clone(), x, zero);
            for (t, sums) in sums.into_iter().enumerate() {
                for (p, sums) in sums.into_iter().enumerate() {
                    sink.put(index, first_row + t, first_panel + p, &simd.store(sums));
                }
            }
        }
    }
}

/// Panels that are worked on together: with one or two rows they are only streamed, with more they are to stay in the
/// second-level cache.
#[inline(always)]
pub(crate) fn panels_together(rows: usize) -> usize {
    if rows <= 2 { 4 } else { 2 }
}
