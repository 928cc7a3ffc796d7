//! Products of a few rows with a few panels at a time, over runs of columns.

use std::ops::Range;

use moerun_types::NumberFormat;

use crate::{
    PackedMatrix,
    interleaved::{InterleavedRows, RowBlock},
    isa::Kernel,
    lines::{LANES, Line},
    panels::{Bf16Panels, F32Panels, Int4Blocks, Int8Blocks, Mxfp4Blocks, PanelFormat, PanelTile},
    simd::Simd,
};

/// Where products go: called once per row and run of segments.
pub(crate) trait Sink {
    /// Takes the sums of row `row` with the output rows of `panels`, sixteen each, over each of the segments.
    fn put<S: Simd>(&mut self, simd: S, row: usize, panels: Range<usize>, sums: SegmentSums<'_>);
}

/// Sums of one row with some panels over consecutive segments, ascending.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SegmentSums<'a> {
    /// Index of the first segment.
    pub(crate) first: usize,
    /// Those of segment `first + i` and panel `p` are `sums[i * stride + p]`.
    sums: &'a [[f32; LANES]],
    stride: usize,
}

impl<'a> SegmentSums<'a> {
    /// Of one segment and one panel.
    pub(crate) fn one(sums: &'a [f32; LANES]) -> Self {
        Self {
            first: 0,
            sums: std::slice::from_ref(sums),
            stride: 1,
        }
    }

    /// Segment by segment, those of panel `panel`, counted from the first.
    #[inline(always)]
    pub(crate) fn of_panel(self, panel: usize) -> impl Iterator<Item = &'a [f32; LANES]> {
        self.sums[panel..].iter().step_by(self.stride)
    }
}

/// Products of the rows of `x` with panels of `weights`, separately over each of `segments`, ascending runs of columns.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Products<'a> {
    pub(crate) weights: &'a PackedMatrix,
    pub(crate) x: &'a InterleavedRows<'a>,
    /// The column of `weights` that the first column of `x` meets.
    pub(crate) first_col: usize,
    pub(crate) segments: &'a [Range<usize>],
}

/// Most sums of a block of rows and panels: twelve rows with two panels, or two with four.
pub(crate) const MAX_SUMS_OF_ONE_SEGMENT: usize = 24;
/// Segments that are computed before their sums are taken.
const SEGMENTS_AT_ONCE: usize = 8;

/// Sums between their computation and their use: made once per task, since to clear it costs as much as a small product.
pub(crate) type SumsBuffer = [[f32; LANES]; MAX_SUMS_OF_ONE_SEGMENT * SEGMENTS_AT_ONCE];

/// An empty one.
pub(crate) const EMPTY_SUMS: SumsBuffer = [[0.0; LANES]; MAX_SUMS_OF_ONE_SEGMENT * SEGMENTS_AT_ONCE];

/// A panel that is read soon, the one of that index.
pub(crate) type Next<'a> = Option<(&'a PackedMatrix, usize)>;

impl Products<'_> {
    /// All rows of `x`: a few panels at a time, which stay in the cache while the rows pass. `next` is what is read
    /// afterwards, `sums` memory to work in.
    #[inline(always)]
    pub(crate) fn run<S: Simd>(
        &self,
        simd: S,
        panels: Range<usize>,
        next: Next<'_>,
        sums: &mut SumsBuffer,
        sink: &mut impl Sink,
    ) {
        let together = panels_together(self.x.rows());
        for first in panels.clone().step_by(together) {
            let (panels, end) = (first..panels.end.min(first + together), panels.end);
            for (index, &block) in self.x.blocks().iter().enumerate() {
                let next = match index + 1 < self.x.blocks().len() {
                    true => Some((self.weights, first)),
                    false if panels.end < end => Some((self.weights, panels.end)),
                    false => next,
                };
                for first_segment in (0..self.segments.len()).step_by(SEGMENTS_AT_ONCE) {
                    let segments = first_segment..self.segments.len().min(first_segment + SEGMENTS_AT_ONCE);
                    self.sum(simd, panels.clone(), block, segments.clone(), next, sums);
                    let stride = block.rows * panels.len();
                    for t in 0..block.rows {
                        let sums = SegmentSums {
                            first: first_segment,
                            sums: &sums[t * panels.len()..segments.len() * stride],
                            stride,
                        };
                        sink.put(simd, block.first + t, panels.clone(), sums);
                    }
                }
            }
        }
    }

    /// The sums of one block of rows, `[segments][rows][panels]`, at the start of `out`. `next` is what is read afterwards.
    #[inline(always)]
    pub(crate) fn sum<S: Simd>(
        &self,
        simd: S,
        panels: Range<usize>,
        block: RowBlock,
        segments: Range<usize>,
        next: Next<'_>,
        out: &mut [[f32; LANES]],
    ) {
        simd.call(Tiles {
            products: self,
            panels,
            block,
            segments,
            next,
            out,
        });
    }
}

/// The inner loops, compiled once per instruction set, whatever is done with the sums.
struct Tiles<'a> {
    products: &'a Products<'a>,
    panels: Range<usize>,
    block: RowBlock,
    segments: Range<usize>,
    next: Next<'a>,
    /// `[segments][block rows][panels]`.
    out: &'a mut [[f32; LANES]],
}

impl Kernel for Tiles<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        match self.products.weights.format() {
            NumberFormat::F32 => self.run_format::<S, F32Panels>(simd),
            NumberFormat::Bf16 => self.run_format::<S, Bf16Panels>(simd),
            NumberFormat::Int8 => self.run_blocks::<S, Int8Blocks>(simd),
            NumberFormat::Int4 => self.run_blocks::<S, Int4Blocks>(simd),
            NumberFormat::Mxfp4 => self.run_blocks::<S, Mxfp4Blocks>(simd),
        }
    }
}

impl Tiles<'_> {
    /// As many panels as the registers hold beside the rows; with one row, a single stream of weights is the fastest,
    /// unless a sum's chain of multiply-adds takes longer than its line (two of four cycles on narrow registers).
    #[inline(always)]
    fn run_format<S: Simd, F: PanelFormat>(&mut self, simd: S) {
        if S::WIDE {
            match self.block.rows {
                1 => self.run_tiles::<S, F, 1, 1>(simd),
                2 => self.run_tiles::<S, F, 2, 2>(simd),
                4 => self.run_tiles::<S, F, 4, 2>(simd),
                8 => self.run_tiles::<S, F, 8, 2>(simd),
                12 => self.run_tiles::<S, F, 12, 2>(simd),
                rows => unreachable!("{rows} is not in TILE_ROWS"),
            }
        } else {
            match self.block.rows {
                1 => self.run_tiles::<S, F, 1, 2>(simd),
                2 => self.run_tiles::<S, F, 2, 2>(simd),
                4 => self.run_tiles::<S, F, 4, 1>(simd),
                6 => self.run_tiles::<S, F, 6, 1>(simd),
                rows => unreachable!("{rows} is not in TILE_ROWS"),
            }
        }
    }

    /// The same where integer sums take half of the registers.
    #[inline(always)]
    fn run_blocks<S: Simd, F: PanelFormat>(&mut self, simd: S) {
        if S::WIDE {
            match self.block.rows {
                1 => self.run_tiles::<S, F, 1, 1>(simd),
                2 => self.run_tiles::<S, F, 2, 2>(simd),
                4 => self.run_tiles::<S, F, 4, 2>(simd),
                6 => self.run_tiles::<S, F, 6, 2>(simd),
                rows => unreachable!("{rows} is not in BLOCK_TILE_ROWS"),
            }
        } else {
            match self.block.rows {
                1 => self.run_tiles::<S, F, 1, 1>(simd),
                2 => self.run_tiles::<S, F, 2, 1>(simd),
                4 => self.run_tiles::<S, F, 4, 1>(simd),
                rows => unreachable!("{rows} is not in BLOCK_TILE_ROWS"),
            }
        }
    }

    #[inline(always)]
    fn run_tiles<S: Simd, F: PanelFormat, const T: usize, const P: usize>(&mut self, simd: S) {
        let mut panel = self.panels.start;
        while panel + P <= self.panels.end {
            self.run_tile::<S, F, T, P>(simd, panel);
            panel += P;
        }
        while panel < self.panels.end {
            self.run_tile::<S, F, T, 1>(simd, panel);
            panel += 1;
        }
    }

    #[inline(always)]
    fn run_tile<S: Simd, F: PanelFormat, const T: usize, const P: usize>(&mut self, simd: S, first_panel: usize) {
        let Products {
            weights,
            x,
            first_col,
            segments,
        } = self.products;
        let (mut panels, mut following): ([&[Line]; P], [&[Line]; P]) = ([&[]; P], [&[]; P]);
        for p in 0..P {
            panels[p] = weights.panel(first_panel + p);
            let later = first_panel + P + p;
            following[p] = match self.next {
                _ if later < self.panels.end => weights.panel(later),
                Some((next, panel)) if panel + p < next.panels() => next.panel(panel + p),
                // Nothing is known to be read: what is near already does no harm.
                _ => panels[p],
            };
        }
        let panels = PanelTile::new(panels, following);
        let width = self.panels.len();
        for (index, cols) in segments[self.segments.clone()].iter().enumerate() {
            let x = x.tile::<T>(self.block.first, cols.start - first_col, cols.end - first_col);
            let sums = F::tile::<S, T, P>(simd, panels, cols.clone(), x);
            for (t, sums) in sums.into_iter().enumerate() {
                let first = (index * T + t) * width + first_panel - self.panels.start;
                for (out, sums) in self.out[first..first + P].iter_mut().zip(sums) {
                    *out = simd.store(sums);
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
