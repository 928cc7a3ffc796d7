//! Softmax attention of query rows over a paged key/value cache, in tiles of one page.
//!
//! A *vector* is the query of one row and one head. Vectors that read the same keys, rows of one sequence and heads of
//! one kv head, are computed together in blocks of as many as the registers hold, so that a page is loaded once for all
//! of them; each still does its own arithmetic over its own visible keys, in an order that knows nothing of the others.

mod block;
mod plan;
mod softmax;
#[cfg(test)]
mod tests;
mod unit;

use std::cell::RefCell;

use self::{
    plan::Plan,
    unit::{Scratch, UnitTask},
};
use crate::{CpuPool, Isa, KV_PAGE_TOKENS, KvPages, disjoint::Disjoint};

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
            num_heads.is_multiple_of(kv.shape().kv_heads),
            "{num_heads} query heads on {} kv heads",
            kv.shape().kv_heads
        );
        assert_eq!(
            self.queries.len(),
            rows.len() * num_heads * kv.shape().key_dim,
            "length of the queries"
        );
        assert_eq!(
            out.len(),
            rows.len() * num_heads * kv.shape().value_dim,
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
        let visible: usize = rows.iter().map(|row| row.end_key - row.first_key).sum();
        let work = visible * num_heads * (kv.shape().key_dim + kv.shape().value_dim);
        let workspace = pool.workspace();
        let plan = Plan::new(
            isa,
            &workspace,
            pool.threads(),
            rows,
            num_heads / kv.shape().kv_heads,
            kv.shape().kv_heads,
        );
        let out = Disjoint::new(out);
        pool.run_sized(plan.tasks.len(), work, &|task| {
            SCRATCH.with_borrow_mut(|scratch| {
                isa.dispatch(UnitTask {
                    attention: self,
                    isa,
                    units: &plan.units[plan.tasks[task].clone()],
                    scratch,
                    out: &out,
                });
            });
        });
    }
}

thread_local! {
    /// A computing thread's memory between one task and the next.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}
