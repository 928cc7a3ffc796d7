//! Products of a few rows with a few panels at a time, over runs of columns.

use std::ops::Range;

use moerun_types::NumberFormat;

use crate::{
    PackedMatrix,
    interleaved::{InterleavedRows, RowBlock},
    lines::{LANES, Line},
    panels::{Bf16Panels, F32Panels, Int4Blocks, Int8Blocks, Mxfp4Blocks, PanelFormat},
    simd::Simd,
};

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
            NumberFormat::F32 => self.run_format::<S, F32Panels>(simd, panels, block, sink),
            NumberFormat::Bf16 => self.run_format::<S, Bf16Panels>(simd, panels, block, sink),
            NumberFormat::Int8 => self.run_blocks::<S, Int8Blocks>(simd, panels, block, sink),
            NumberFormat::Int4 => self.run_blocks::<S, Int4Blocks>(simd, panels, block, sink),
            NumberFormat::Mxfp4 => self.run_blocks::<S, Mxfp4Blocks>(simd, panels, block, sink),
        }
    }

    /// As many panels as the registers hold beside the rows.
    #[inline(always)]
    fn run_format<S: Simd, F: PanelFormat>(
        &self,
        simd: S,
        panels: Range<usize>,
        block: RowBlock,
        sink: &mut impl Sink,
    ) {
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

    /// The same where integer sums take half of the registers.
    #[inline(always)]
    fn run_blocks<S: Simd, F: PanelFormat>(
        &self,
        simd: S,
        panels: Range<usize>,
        block: RowBlock,
        sink: &mut impl Sink,
    ) {
        if S::WIDE {
            match block.rows {
                1 => self.run_tiles::<S, F, 1, 4>(simd, panels, block.first, sink),
                2 => self.run_tiles::<S, F, 2, 4>(simd, panels, block.first, sink),
                4 => self.run_tiles::<S, F, 4, 2>(simd, panels, block.first, sink),
                6 => self.run_tiles::<S, F, 6, 2>(simd, panels, block.first, sink),
                rows => unreachable!("{rows} is not in BLOCK_TILE_ROWS"),
            }
        } else {
            match block.rows {
                1 => self.run_tiles::<S, F, 1, 2>(simd, panels, block.first, sink),
                2 => self.run_tiles::<S, F, 2, 1>(simd, panels, block.first, sink),
                4 => self.run_tiles::<S, F, 4, 1>(simd, panels, block.first, sink),
                rows => unreachable!("{rows} is not in BLOCK_TILE_ROWS"),
            }
        }
    }

    #[inline(always)]
    fn run_tiles<S: Simd, F: PanelFormat, const T: usize, const P: usize>(
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
    fn run_tile<S: Simd, F: PanelFormat, const T: usize, const P: usize>(
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
        for (index, cols) in self.segments.iter().enumerate() {
            let x = self
                .x
                .tile::<T>(first_row, cols.start - self.first_col, cols.end - self.first_col);
            let sums = F::tile::<S, T, P>(simd, panels, cols.clone(), x);
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
