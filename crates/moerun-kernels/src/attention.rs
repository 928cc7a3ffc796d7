//! Softmax attention of query rows over a paged key/value cache, in tiles of one page.

#[cfg(test)]
mod tests;

use std::ops::Range;

use moerun_types::NumberFormat;

use crate::{
    CpuPool, Isa, KV_PAGE_TOKENS, KvPages,
    disjoint::Disjoint,
    exponential::exp,
    interleaved::{RowBlock, row_blocks},
    isa::Kernel,
    lines::LANES,
    panels::f32_tile,
    simd::{Simd, sum_lanes},
};

/// One query row: whose pages it reads, and which keys it sees.
#[derive(Debug, Clone, Copy)]
pub struct AttentionRow<'a> {
    /// The sequence's pages in order: the key at position `p` is in `pages[p / KV_PAGE_TOKENS]`.
    pub pages: &'a [u32],
    /// First visible key position.
    pub first_key: usize,
    /// One past the last visible key position.
    pub end_key: usize,
}

/// `out[row] = softmax(scale · q[row]·keys) · values` for every row and head.
///
/// - `queries`: `[rows, num_heads * key_dim]`, `out`: `[rows, num_heads * value_dim]`; query head `h` reads kv head
///   `h / (num_heads / kv_heads)`
/// - `sinks`: a logit per head that joins the softmax denominator and has no value
///
/// Tiles are visited in ascending position with a running maximum; keys outside a row's range are never used, so a
/// row's result depends on its own query and visible keys alone. A row that sees no key gives zeroes. Memory is linear
/// in the number of rows. Panics if shapes differ or a row's pages do not cover its keys.
///
/// The arithmetic of one row and head, from `max = -∞`, `sum = 0` (with a sink: `max = sink`, `sum = 1`) and
/// `acc[d] = 0`, for each tile:
///
/// 1. `s[i] = (fused multiply-adds of q[d] * key[i][d] from 0.0, ascending d) * scale` for visible `i`, -∞ for others
/// 2. `new = max(max, s[0..16])`, `c = exp(max - new)`, `p[i] = exp(s[i] - new)`, `max = new`
/// 3. `sum = fma(sum, c, p[0..16] added upper half onto lower half)`
/// 4. `acc[d] = acc[d] * c`, then for visible `i`, ascending: `acc[d] = fma(p[i], value[i][d], acc[d])`
///
/// and at the end `out[d] = acc[d] / sum`.
#[allow(clippy::too_many_arguments)]
pub fn paged_attention(
    pool: &CpuPool,
    kv: &KvPages,
    rows: &[AttentionRow<'_>],
    queries: &[f32],
    num_heads: usize,
    scale: f32,
    sinks: Option<&[f32]>,
    out: &mut [f32],
) {
    let attention = Attention {
        kv,
        rows,
        queries,
        num_heads,
        scale,
        sinks,
    };
    attention.run(Isa::current(), pool, out);
}

/// The arguments of [`paged_attention`].
#[derive(Debug, Clone, Copy)]
struct Attention<'a> {
    kv: &'a KvPages,
    rows: &'a [AttentionRow<'a>],
    queries: &'a [f32],
    num_heads: usize,
    scale: f32,
    sinks: Option<&'a [f32]>,
}

impl Attention<'_> {
    fn run(&self, isa: Isa, pool: &CpuPool, out: &mut [f32]) {
        let Self {
            kv, rows, num_heads, ..
        } = *self;
        if rows.is_empty() || num_heads == 0 {
            return;
        }
        assert!(
            num_heads.is_multiple_of(kv.kv_heads()),
            "{num_heads} query heads on {} kv heads",
            kv.kv_heads()
        );
        assert_eq!(
            self.queries.len(),
            rows.len() * num_heads * kv.key_dim(),
            "length of the queries"
        );
        assert_eq!(
            out.len(),
            rows.len() * num_heads * kv.value_dim(),
            "length of the output"
        );
        assert!(
            self.sinks.is_none_or(|sinks| sinks.len() == num_heads),
            "one sink per head"
        );
        for row in rows {
            let needed = row.end_key.div_ceil(KV_PAGE_TOKENS);
            assert!(
                row.first_key <= row.end_key && needed <= row.pages.len(),
                "pages of {row:?}"
            );
        }
        let heads_per_kv_head = num_heads / kv.kv_heads();
        let blocks: Vec<RowBlock> = (0..kv.kv_heads())
            .flat_map(|kv_head| {
                let first = kv_head * heads_per_kv_head;
                row_blocks(isa, NumberFormat::F32, heads_per_kv_head)
                    .into_iter()
                    .map(move |block| RowBlock {
                        first: first + block.first,
                        rows: block.rows,
                    })
            })
            .collect();
        let visible: usize = rows.iter().map(|row| row.end_key - row.first_key).sum();
        let items = rows.len() * blocks.len();
        let chunk = items.div_ceil(16 * pool.threads());
        let out = Disjoint::new(out);
        let work = visible * num_heads * (kv.key_dim() + kv.value_dim());
        pool.run_sized(items.div_ceil(chunk), work, &|task| {
            let items = task * chunk..items.min((task + 1) * chunk);
            isa.dispatch(AttentionTask {
                attention: self,
                blocks: &blocks,
                heads_per_kv_head,
                items,
                out: &out,
            });
        });
    }
}

/// A run of (row, block of heads that share a kv head).
struct AttentionTask<'a> {
    attention: &'a Attention<'a>,
    blocks: &'a [RowBlock],
    heads_per_kv_head: usize,
    items: Range<usize>,
    out: &'a Disjoint<'a, f32>,
}

/// Memory of one task, reused from item to item.
struct Scratch {
    /// `[key_dim][heads]`.
    query: Vec<f32>,
    /// `[value_dim / 16][heads]`.
    acc: Vec<[f32; LANES]>,
}

impl Kernel for AttentionTask<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let mut scratch = Scratch {
            query: Vec::new(),
            acc: Vec::new(),
        };
        for item in self.items.clone() {
            let (row, block) = (item / self.blocks.len(), self.blocks[item % self.blocks.len()]);
            if S::WIDE {
                match block.rows {
                    1 => self.heads::<S, 1>(simd, &mut scratch, row, block.first),
                    2 => self.heads::<S, 2>(simd, &mut scratch, row, block.first),
                    4 => self.heads::<S, 4>(simd, &mut scratch, row, block.first),
                    8 => self.heads::<S, 8>(simd, &mut scratch, row, block.first),
                    12 => self.heads::<S, 12>(simd, &mut scratch, row, block.first),
                    rows => unreachable!("{rows} is not in TILE_ROWS"),
                }
            } else {
                match block.rows {
                    1 => self.heads::<S, 1>(simd, &mut scratch, row, block.first),
                    2 => self.heads::<S, 2>(simd, &mut scratch, row, block.first),
                    4 => self.heads::<S, 4>(simd, &mut scratch, row, block.first),
                    6 => self.heads::<S, 6>(simd, &mut scratch, row, block.first),
                    rows => unreachable!("{rows} is not in TILE_ROWS"),
                }
            }
        }
    }
}

impl AttentionTask<'_> {
    /// One row and `T` heads of one kv head, from `first_head` on.
    #[inline(always)]
    fn heads<S: Simd, const T: usize>(&self, simd: S, scratch: &mut Scratch, row: usize, first_head: usize) {
        let Attention {
            kv,
            rows,
            queries,
            num_heads,
            scale,
            sinks,
        } = *self.attention;
        let kv_head = first_head / self.heads_per_kv_head;
        let AttentionRow {
            pages,
            first_key,
            end_key,
        } = rows[row];

        let Scratch { query, acc } = scratch;
        query.resize(kv.key_dim() * T, 0.0);
        for t in 0..T {
            let head = &queries[(row * num_heads + first_head + t) * kv.key_dim()..][..kv.key_dim()];
            query
                .iter_mut()
                .skip(t)
                .step_by(T)
                .zip(head)
                .for_each(|(out, &value)| *out = value);
        }
        acc.clear();
        acc.resize(kv.value_dim().div_ceil(LANES) * T, [0.0; LANES]);
        let mut max = [f32::NEG_INFINITY; T];
        let mut sum = [0.0_f32; T];
        if let Some(sinks) = sinks {
            max.copy_from_slice(&sinks[first_head..first_head + T]);
            sum = [1.0; T];
        }

        let tiles = first_key / KV_PAGE_TOKENS..end_key.div_ceil(KV_PAGE_TOKENS);
        for tile_index in tiles.filter(|_| first_key < end_key) {
            let start = tile_index * KV_PAGE_TOKENS;
            let visible = first_key.max(start) - start..end_key.min(start + KV_PAGE_TOKENS) - start;
            let (keys, values) = kv.head(pages[tile_index], kv_head);
            let zero = [[simd.splat(0.0); 1]; T];
            let scores = f32_tile::<S, T, 1>(simd, [keys], 0..kv.key_dim(), bits(query), zero);
            let mut weights = [[0.0; T]; KV_PAGE_TOKENS];
            let mut corrections = [0.0; T];
            for t in 0..T {
                let (p, correction) = tile_softmax(simd.store(scores[t][0]), scale, &visible, &mut max[t]);
                sum[t] = sum[t].mul_add(correction, sum_lanes(p));
                corrections[t] = correction;
                for key in 0..KV_PAGE_TOKENS {
                    weights[key][t] = p[key];
                }
            }
            let weights = &weights.as_flattened()[visible.start * T..visible.end * T];
            for (values, acc) in values.chunks_exact(KV_PAGE_TOKENS).zip(acc.as_chunks_mut::<T>().0) {
                let mut sums = [[simd.splat(0.0); 1]; T];
                for t in 0..T {
                    sums[t][0] = simd.mul(simd.load(&acc[t]), simd.splat(corrections[t]));
                }
                let sums = f32_tile::<S, T, 1>(simd, [values], visible.clone(), bits(weights), sums);
                for t in 0..T {
                    acc[t] = simd.store(sums[t][0]);
                }
            }
        }

        for (t, &sum) in sum.iter().enumerate() {
            let start = (row * num_heads + first_head + t) * kv.value_dim();
            // SAFETY: each row and head is one item's.
            #[allow(unsafe_code)]
            let out = unsafe { self.out.part(start..start + kv.value_dim()) };
            let panels = acc.iter().skip(t).step_by(T);
            for (out, acc) in out.chunks_mut(LANES).zip(panels) {
                for (out, acc) in out.iter_mut().zip(acc) {
                    *out = if sum == 0.0 { 0.0 } else { acc / sum };
                }
            }
        }
    }
}

/// Steps 1 and 2: raises `max` and returns the tile's weights and the factor on what was summed before.
#[inline(always)]
fn tile_softmax(mut s: [f32; LANES], scale: f32, visible: &Range<usize>, max: &mut f32) -> ([f32; LANES], f32) {
    for (lane, s) in s.iter_mut().enumerate() {
        let is_visible = lane >= visible.start && lane < visible.end;
        *s = if is_visible { *s * scale } else { f32::NEG_INFINITY };
    }
    let mut new = *max;
    for &s in &s {
        new = if s > new { s } else { new };
    }
    let correction = exp(*max - new);
    for s in &mut s {
        *s = exp(*s - new);
    }
    *max = new;
    (s, correction)
}

/// `T` f32 side by side, as the inner loop takes them.
#[inline(always)]
fn bits<const T: usize>(values: &[f32]) -> &[[u32; T]] {
    bytemuck::cast_slice::<f32, u32>(values).as_chunks().0
}
