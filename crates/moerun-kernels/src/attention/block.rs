//! A few vectors over a few pages: scores, softmax, weighted values.

use std::ops::Range;

use super::{
    AttentionRow,
    softmax::{PageWeights, Running},
    unit::PageSource,
};
use crate::{
    KV_PAGE_TOKENS,
    lines::{LANES, Line},
    simd::Simd,
};

/// Pages whose weights are computed before their values are added: the sums are loaded and stored once for all of them.
pub(super) const PAGES_TOGETHER: usize = 4;

/// Vectors that are computed together, and what each sees.
#[derive(Debug, Clone)]
pub(super) struct Block {
    /// How many: one of `block_sizes`.
    pub(super) vectors: usize,
    /// Tiles in which at least one vector sees a key.
    pub(super) tiles: Range<usize>,
    /// Positions that all vectors see.
    seen_by_all: Range<usize>,
    /// `[vector]`.
    keys: [(usize, usize); LANES],
    pub(super) running: Running,
    scale: f32,
}

/// Where the numbers of one block lie.
pub(super) struct BlockMemory<'a> {
    /// `[key_dim][vectors]`.
    pub(super) query: &'a [f32],
    /// `[value_dim / 16][vectors]`.
    pub(super) acc: &'a mut [[f32; LANES]],
    /// Need not be kept.
    pub(super) pages: &'a mut [PageWeights; PAGES_TOGETHER],
}

impl Block {
    /// `rows` yields the row of each vector; a sink is a vector's first maximum.
    #[inline(always)]
    pub(super) fn new<'a>(scale: f32, rows: impl Iterator<Item = (AttentionRow<'a>, Option<f32>)>) -> Self {
        let mut block = Self {
            vectors: 0,
            tiles: 0..0,
            seen_by_all: 0..usize::MAX,
            keys: [(0, 0); LANES],
            running: Running {
                max: [f32::NEG_INFINITY; LANES],
                sum: [0.0; LANES],
            },
            scale,
        };
        for (row, sink) in rows {
            let t = block.vectors;
            block.vectors += 1;
            block.keys[t] = (row.first_key, row.end_key);
            block.seen_by_all.start = block.seen_by_all.start.max(row.first_key);
            block.seen_by_all.end = block.seen_by_all.end.min(row.end_key);
            if row.first_key < row.end_key {
                let tiles = row.first_key / KV_PAGE_TOKENS..row.end_key.div_ceil(KV_PAGE_TOKENS);
                block.tiles = if block.tiles.is_empty() {
                    tiles
                } else {
                    block.tiles.start.min(tiles.start)..block.tiles.end.max(tiles.end)
                };
            }
            if let Some(sink) = sink {
                block.running.max[t] = sink;
                block.running.sum[t] = 1.0;
            }
        }
        block
    }

    /// For each key of a tile the vectors that see it; none if all see all.
    #[inline(always)]
    fn visible(&self, tile: usize) -> Option<[u16; KV_PAGE_TOKENS]> {
        let start = tile * KV_PAGE_TOKENS;
        if self.seen_by_all.start <= start && start + KV_PAGE_TOKENS <= self.seen_by_all.end {
            return None;
        }
        let mut visible = [0; KV_PAGE_TOKENS];
        for (t, &(first, end)) in self.keys[..self.vectors].iter().enumerate() {
            for (key, visible) in visible.iter_mut().enumerate() {
                *visible |= u16::from(first <= start + key && start + key < end) << t;
            }
        }
        Some(visible)
    }

    /// Adds the tiles `tiles`, at most [`PAGES_TOGETHER`].
    ///
    /// - `T`: `self.vectors`; `K`: pages of keys computed together; `V`: runs of sixteen value dimensions computed together
    #[inline(always)]
    pub(super) fn attend<S: Simd, const T: usize, const K: usize, const V: usize>(
        &mut self,
        simd: S,
        source: &PageSource<'_>,
        tiles: Range<usize>,
        memory: BlockMemory<'_>,
    ) {
        let BlockMemory { query, acc, pages } = memory;
        let query = query.as_chunks::<T>().0;
        let pages = &mut pages[..tiles.len()];
        let mut done = 0;
        while done + K <= pages.len() {
            self.weigh::<S, T, K>(simd, source, tiles.start + done, query, &mut pages[done..done + K]);
            done += K;
        }
        while done < pages.len() {
            self.weigh::<S, T, 1>(simd, source, tiles.start + done, query, &mut pages[done..=done]);
            done += 1;
        }

        let (panels, rest) = acc.as_chunks_mut::<T>().0.as_chunks_mut::<V>();
        for (index, acc) in panels.iter_mut().enumerate() {
            add_values::<S, T, V>(simd, pages, source, tiles.start, index * V, acc);
        }
        for (index, acc) in rest.iter_mut().enumerate() {
            let acc = std::array::from_mut(acc);
            add_values::<S, T, 1>(simd, pages, source, tiles.start, panels.len() * V + index, acc);
        }
    }

    /// Scores and softmax of `P` pages.
    #[inline(always)]
    fn weigh<S: Simd, const T: usize, const P: usize>(
        &mut self,
        simd: S,
        source: &PageSource<'_>,
        first_tile: usize,
        query: &[[f32; T]],
        pages: &mut [PageWeights],
    ) {
        let mut keys: [&[Line]; P] = [&[]; P];
        for (p, keys) in keys.iter_mut().enumerate() {
            *keys = source.keys(first_tile + p);
        }
        // One or two vectors wait for memory: ask for the next page while computing with this one.
        let next = if T <= 2 { source.stored(first_tile + P) } else { &[] };
        let scores = scores::<S, T, P>(simd, keys, query, next);
        for (p, page) in pages.iter_mut().enumerate() {
            page.visible = self.visible(first_tile + p);
            let mut own = [simd.splat(0.0); T];
            for (own, scores) in own.iter_mut().zip(&scores) {
                *own = scores[p];
            }
            page.fill::<S, T>(simd, own, self.scale, &mut self.running);
        }
    }
}

/// Products of `T` vectors with the keys of `P` pages, lane = key: one fused multiply-add per dimension, ascending,
/// from zero. `next`: lines to ask for on the way, two per dimension.
#[inline(always)]
fn scores<S: Simd, const T: usize, const P: usize>(
    simd: S,
    keys: [&[Line]; P],
    query: &[[f32; T]],
    next: &[Line],
) -> [[S::F32s; P]; T] {
    let keys = keys.map(|keys| &keys[..query.len()]);
    let mut next = next.as_chunks::<2>().0.iter();
    let mut scores = [[simd.splat(0.0); P]; T];
    for (d, query) in query.iter().enumerate() {
        if T <= 2
            && let Some(lines) = next.next()
        {
            lines.iter().for_each(|line| simd.prefetch(line));
        }
        let mut lines = [simd.splat(0.0); P];
        for p in 0..P {
            lines[p] = simd.load_bits(&keys[p][d]);
        }
        for t in 0..T {
            let x = simd.splat(query[t]);
            for p in 0..P {
                scores[t][p] = simd.mul_add(x, lines[p], scores[t][p]);
            }
        }
    }
    scores
}

/// Step 4 for the pages from `first_tile` on: the dimensions of `P` runs of sixteen, from run `first_panel`.
#[inline(always)]
fn add_values<S: Simd, const T: usize, const P: usize>(
    simd: S,
    pages: &[PageWeights],
    source: &PageSource<'_>,
    first_tile: usize,
    first_panel: usize,
    acc: &mut [[[f32; LANES]; T]; P],
) {
    let mut sums = [[simd.splat(0.0); P]; T];
    for (t, sums) in sums.iter_mut().enumerate() {
        for (sum, acc) in sums.iter_mut().zip(acc.iter()) {
            *sum = simd.load(&acc[t]);
        }
    }
    for (index, page) in pages.iter().enumerate() {
        let values = source.values(first_tile + index);
        let panels = &values.as_chunks::<KV_PAGE_TOKENS>().0[first_panel..first_panel + P];
        for (sums, &correction) in sums.iter_mut().zip(&page.corrections) {
            for sum in sums {
                *sum = simd.mul(*sum, simd.splat(correction));
            }
        }
        match &page.visible {
            None => {
                for (key, weights) in page.weights.iter().enumerate() {
                    let lines = lines::<S, P>(simd, panels, key);
                    for (sums, &weight) in sums.iter_mut().zip(weights) {
                        add::<S, P>(simd, sums, weight, &lines);
                    }
                }
            }
            // Adding nothing is not the same as adding zero times a value, which may be infinite.
            Some(visible) => {
                for (key, (weights, visible)) in page.weights.iter().zip(visible).enumerate() {
                    let lines = lines::<S, P>(simd, panels, key);
                    for (t, (sums, &weight)) in sums.iter_mut().zip(weights).enumerate() {
                        if visible >> t & 1 == 1 {
                            add::<S, P>(simd, sums, weight, &lines);
                        }
                    }
                }
            }
        }
    }
    for (t, sums) in sums.into_iter().enumerate() {
        for (acc, sum) in acc.iter_mut().zip(sums) {
            acc[t] = simd.store(sum);
        }
    }
}

/// Line `index` of each panel.
#[inline(always)]
fn lines<S: Simd, const P: usize>(simd: S, panels: &[[Line; KV_PAGE_TOKENS]], index: usize) -> [S::F32s; P] {
    let mut lines = [simd.splat(0.0); P];
    for (line, panel) in lines.iter_mut().zip(panels) {
        *line = simd.load_bits(&panel[index]);
    }
    lines
}

/// Adds `weight` times `lines` to `sums`.
#[inline(always)]
fn add<S: Simd, const P: usize>(simd: S, sums: &mut [S::F32s; P], weight: f32, lines: &[S::F32s; P]) {
    let weight = simd.splat(weight);
    for (sum, &line) in sums.iter_mut().zip(lines) {
        *sum = simd.mul_add(weight, line, *sum);
    }
}
