//! All vectors of one unit over all their pages, a run of pages at a time.

use std::ops::Range;

use super::{
    Attention,
    block::{Block, BlockMemory, PAGES_TOGETHER},
    plan::{Unit, block_sizes},
    softmax::PageWeights,
};
use crate::{
    Isa, KvPages,
    disjoint::Disjoint,
    isa::Kernel,
    lines::{LANES, Line, Lines},
    simd::Simd,
};

/// Bytes of keys and values that all blocks of a unit pass before the next ones: they stay in the second-level cache.
const RUN_BYTES: usize = 256 * 1024;

/// Some units, one after another.
pub(super) struct UnitTask<'a> {
    pub(super) attention: &'a Attention<'a>,
    /// The variant that runs, for the sizes of its blocks.
    pub(super) isa: Isa,
    pub(super) units: &'a [Unit],
    pub(super) scratch: &'a mut Scratch,
    pub(super) out: &'a Disjoint<'a, f32>,
}

/// Memory of one unit, reused from unit to unit.
#[derive(Default)]
pub(super) struct Scratch {
    blocks: Vec<Block>,
    /// Block after block `[key_dim][vectors]`.
    query: Vec<f32>,
    /// Block after block `[value_dim / 16][vectors]`.
    acc: Vec<[f32; LANES]>,
    pages: [PageWeights; PAGES_TOGETHER],
    /// Keys of a run of pages, where they do not lie ready.
    keys: Lines,
    /// Values of a run of pages, likewise.
    values: Lines,
}

/// Where a run of pages is read.
#[derive(Clone, Copy)]
pub(super) struct PageSource<'a> {
    kv: &'a KvPages,
    kv_head: usize,
    /// The sequence's.
    pages: &'a [u32],
    /// The first tile of the run.
    first_tile: usize,
    /// Keys of the run, page after page, where they do not lie ready in `kv`.
    keys: &'a [Line],
    /// Values of the run, likewise.
    values: &'a [Line],
}

impl<'a> PageSource<'a> {
    /// Keys of tile `tile`, `[key_dim]`, lane = key.
    #[inline(always)]
    pub(super) fn keys(&self, tile: usize) -> &'a [Line] {
        let lines = self.kv.shape().key_dim;
        if self.kv.keys_lie_ready() {
            &self.kv.stored(self.pages[tile], self.kv_head)[..lines]
        } else {
            &self.keys[(tile - self.first_tile) * lines..][..lines]
        }
    }

    /// Values of tile `tile`, `[value_dim / 16][key]`, lane = dimension.
    #[inline(always)]
    pub(super) fn values(&self, tile: usize) -> &'a [Line] {
        let shape = self.kv.shape();
        if self.kv.values_lie_ready() {
            &self.kv.stored(self.pages[tile], self.kv_head)[shape.key_dim..]
        } else {
            let lines = shape.value_dim.next_multiple_of(LANES);
            &self.values[(tile - self.first_tile) * lines..][..lines]
        }
    }

    /// The memory that tile `tile` is read from; nothing after the last.
    #[inline(always)]
    pub(super) fn stored(&self, tile: usize) -> &'a [Line] {
        match self.pages.get(tile) {
            Some(&page) => self.kv.stored(page, self.kv_head),
            None => &[],
        }
    }
}

impl Kernel for UnitTask<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self {
            attention,
            isa,
            units,
            scratch,
            out,
        } = self;
        for unit in units {
            let pass = UnitPass { attention, unit };
            pass.begin(isa, scratch);
            pass.attend(simd, scratch);
            pass.finish(simd, scratch, out);
        }
    }
}

struct UnitPass<'a> {
    attention: &'a Attention<'a>,
    unit: &'a Unit,
}

impl UnitPass<'_> {
    /// Cuts the unit into blocks and lays out their queries.
    #[inline(always)]
    fn begin(&self, isa: Isa, scratch: &mut Scratch) {
        let Attention {
            kv,
            rows,
            queries,
            num_heads,
            scale,
            sinks,
            ..
        } = *self.attention;
        let Scratch { blocks, query, acc, .. } = scratch;
        let vectors = self.unit.vectors.clone();
        blocks.clear();
        query.resize(kv.shape().key_dim * vectors.len(), 0.0);
        let mut first = vectors.start;
        while first < vectors.end {
            let left = vectors.end - first;
            let size = block_sizes(isa).iter().copied().find(|&size| size <= left).unwrap_or(1);
            let out = &mut query[(first - vectors.start) * kv.shape().key_dim..][..size * kv.shape().key_dim];
            for t in 0..size {
                let (row, head) = self.unit.row_and_head(first + t);
                let query = &queries[(row * num_heads + head) * kv.shape().key_dim..][..kv.shape().key_dim];
                out.iter_mut()
                    .skip(t)
                    .step_by(size)
                    .zip(query)
                    .for_each(|(out, &value)| *out = value);
            }
            blocks.push(Block::new(
                scale,
                (first..first + size).map(|vector| {
                    let (row, head) = self.unit.row_and_head(vector);
                    (rows[row], sinks.map(|sinks| sinks[head]))
                }),
            ));
            first += size;
        }
        acc.clear();
        acc.resize(kv.shape().value_dim.div_ceil(LANES) * vectors.len(), [0.0; LANES]);
    }

    #[inline(always)]
    fn attend<S: Simd>(&self, simd: S, scratch: &mut Scratch) {
        let Attention { kv, rows, .. } = *self.attention;
        let Scratch {
            blocks,
            query,
            acc,
            pages,
            keys,
            values,
        } = scratch;
        let pages_of_rows = rows[self.unit.first_row].pages;
        let start = blocks.iter().map(|block| block.tiles.start).min().unwrap_or(0);
        let end = blocks.iter().map(|block| block.tiles.end).max().unwrap_or(0);
        let shape = kv.shape();
        let value_lines = shape.value_dim.next_multiple_of(LANES);
        // A single block gains nothing from pages that stay near.
        let run_bytes = if blocks.len() == 1 { 0 } else { RUN_BYTES };
        let run = (run_bytes / ((shape.key_dim + value_lines) * size_of::<Line>())).max(PAGES_TOGETHER);
        if !kv.keys_lie_ready() {
            grow(keys, run * shape.key_dim);
        }
        if !kv.values_lie_ready() {
            grow(values, run * value_lines);
        }
        for first in (start..end).step_by(run) {
            let run = first..end.min(first + run);
            for (index, tile) in run.clone().enumerate() {
                let page = pages_of_rows[tile];
                let ready = kv.keys_lie_ready();
                let own_keys = index * shape.key_dim..(index + 1) * shape.key_dim;
                if !ready {
                    kv.read_keys(
                        simd,
                        page,
                        self.unit.kv_head,
                        &mut keys.as_mut_slice()[own_keys.clone()],
                    );
                }
                if !kv.values_lie_ready() {
                    let own_keys = if ready {
                        &kv.stored(page, self.unit.kv_head)[..shape.key_dim]
                    } else {
                        &keys.as_slice()[own_keys]
                    };
                    let out = &mut values.as_mut_slice()[index * value_lines..][..value_lines];
                    kv.read_values(simd, page, self.unit.kv_head, own_keys, out);
                }
            }
            let source = PageSource {
                kv,
                kv_head: self.unit.kv_head,
                pages: pages_of_rows,
                first_tile: run.start,
                keys: keys.as_slice(),
                values: values.as_slice(),
            };
            let (mut query, mut acc) = (&query[..], &mut acc[..]);
            for block in blocks.iter_mut() {
                let (own_query, rest) = query.split_at(block.vectors * kv.shape().key_dim);
                query = rest;
                let own_acc = acc
                    .split_off_mut(..block.vectors * kv.shape().value_dim.div_ceil(LANES))
                    .expect("as many as there are vectors");
                let tiles = run.start.max(block.tiles.start)..run.end.min(block.tiles.end);
                // One or two vectors wait for memory, which is fastest when read in order.
                let together = if block.vectors <= 2 { 1 } else { PAGES_TOGETHER };
                for first in tiles.clone().step_by(together) {
                    let tiles = first..tiles.end.min(first + together);
                    let memory = BlockMemory {
                        query: own_query,
                        acc: own_acc,
                        pages,
                    };
                    attend_block(simd, block, &source, tiles, memory);
                }
            }
        }
    }

    /// Divides by the sums, and hands the results over.
    #[inline(always)]
    fn finish<S: Simd>(&self, simd: S, scratch: &Scratch, out: &Disjoint<'_, f32>) {
        let Attention { kv, num_heads, .. } = *self.attention;
        let panels = kv.shape().value_dim.div_ceil(LANES);
        let mut vector = self.unit.vectors.start;
        let mut acc = &scratch.acc[..];
        for block in &scratch.blocks {
            let (own, rest) = acc.split_at(block.vectors * panels);
            acc = rest;
            for t in 0..block.vectors {
                let (row, head) = self.unit.row_and_head(vector);
                vector += 1;
                let start = (row * num_heads + head) * kv.shape().value_dim;
                // SAFETY: each row and head is one unit's.
                #[allow(unsafe_code)]
                let out = unsafe { out.part(start..start + kv.shape().value_dim) };
                let sum = block.running.sum[t];
                let panels = own.iter().skip(t).step_by(block.vectors);
                for (out, acc) in out.chunks_mut(LANES).zip(panels) {
                    let quotients = if sum == 0.0 {
                        [0.0; LANES]
                    } else {
                        simd.store(simd.div(simd.load(acc), simd.splat(sum)))
                    };
                    out.copy_from_slice(&quotients[..out.len()]);
                }
            }
        }
    }
}

/// Makes room for at least `len` lines.
#[inline(always)]
fn grow(lines: &mut Lines, len: usize) {
    if lines.as_slice().len() < len {
        *lines = Lines::zeroed(len);
    }
}

/// [`Block::attend`] for each size of a block, with as many pages and dimensions at a time as leave no multiplier
/// waiting.
#[inline(always)]
fn attend_block<S: Simd>(
    simd: S,
    block: &mut Block,
    source: &PageSource<'_>,
    tiles: Range<usize>,
    memory: BlockMemory<'_>,
) {
    if S::WIDE {
        match block.vectors {
            1 => block.attend::<S, 1, 1, 1>(simd, source, tiles, memory),
            2 => block.attend::<S, 2, 1, 1>(simd, source, tiles, memory),
            4 => block.attend::<S, 4, 2, 2>(simd, source, tiles, memory),
            8 => block.attend::<S, 8, 2, 2>(simd, source, tiles, memory),
            12 => block.attend::<S, 12, 2, 2>(simd, source, tiles, memory),
            vectors => unreachable!("{vectors} is not in block_sizes"),
        }
    } else {
        match block.vectors {
            1 => block.attend::<S, 1, 1, 1>(simd, source, tiles, memory),
            2 => block.attend::<S, 2, 1, 1>(simd, source, tiles, memory),
            4 => block.attend::<S, 4, 1, 1>(simd, source, tiles, memory),
            6 => block.attend::<S, 6, 1, 1>(simd, source, tiles, memory),
            vectors => unreachable!("{vectors} is not in block_sizes"),
        }
    }
}
