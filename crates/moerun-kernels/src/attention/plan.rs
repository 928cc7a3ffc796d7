//! Which vectors are computed together, and on which thread.

use std::ops::Range;

use super::AttentionRow;
use crate::{Isa, KV_PAGE_TOKENS, Workspace};

/// Most blocks of vectors that pass over the same pages before the next pages: so many that a page is often found in
/// the second-level cache, so few that their sums stay in it too.
const BLOCKS_TOGETHER: usize = 8;

/// Tasks per thread when there is enough work: the last one to end keeps the others waiting a short while only.
const TASKS_PER_THREAD: usize = 16;

/// Vectors computed together, largest first, down to one: as many as the registers hold.
pub(super) fn block_sizes(isa: Isa) -> &'static [usize] {
    match isa {
        Isa::Avx512 => &[12, 8, 4, 2, 1],
        Isa::Avx2 => &[6, 4, 2, 1],
        Isa::Portable => &[4, 2, 1],
    }
}

/// Vectors of one sequence and one kv head, `first_vector..end_vector` in order of (row, head): vector `v` is head
/// `v % heads_per_kv_head` of the kv head's, in row `first_row + v / heads_per_kv_head`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unit {
    /// First of the consecutive rows that read the same pages.
    pub(super) first_row: usize,
    pub(super) kv_head: usize,
    pub(super) heads_per_kv_head: usize,
    pub(super) vectors: Range<usize>,
}

impl Unit {
    /// Row and head (of all) of vector `vector`.
    #[inline(always)]
    pub(super) fn row_and_head(&self, vector: usize) -> (usize, usize) {
        let row = self.first_row + vector / self.heads_per_kv_head;
        let head = self.kv_head * self.heads_per_kv_head + vector % self.heads_per_kv_head;
        (row, head)
    }
}

/// All vectors of a call.
#[derive(Debug)]
pub(super) struct Plan<'w> {
    pub(super) units: &'w [Unit],
    /// Runs of `units` of about equal work.
    pub(super) tasks: &'w [Range<usize>],
}

impl<'w> Plan<'w> {
    /// A plan for `threads` threads, in `workspace`.
    pub(super) fn new(
        isa: Isa,
        workspace: &'w Workspace<'_>,
        threads: usize,
        rows: &[AttentionRow<'_>],
        heads_per_kv_head: usize,
        kv_heads: usize,
    ) -> Self {
        let total: usize = rows.iter().map(row_work).sum::<usize>() * heads_per_kv_head * kv_heads;
        let target = total.div_ceil(threads * TASKS_PER_THREAD).max(1);
        let block = block_sizes(isa)[0];
        // Where there are fewer kv heads than threads, vectors of one kv head must be shared out even if they fit a block.
        let shares = threads.div_ceil(page_sharing_runs(rows).count() * kv_heads);
        let units = page_sharing_runs(rows).flat_map(|run| {
            let vectors = run.len() * heads_per_kv_head;
            let cut = Cut {
                rows: &rows[run.clone()],
                heads_per_kv_head,
                block,
                most: vectors.div_ceil(shares).min(BLOCKS_TOGETHER * block),
                target,
            };
            (0..kv_heads).flat_map(move |kv_head| {
                cut.vectors().map(move |vectors| Unit {
                    first_row: run.start,
                    kv_head,
                    heads_per_kv_head,
                    vectors,
                })
            })
        });
        let units = &*workspace.collect(units);
        let mut first = 0;
        let tasks = std::iter::from_fn(|| {
            let start = first;
            let mut work = 0;
            while first < units.len() && work < target {
                let unit = &units[first];
                let vectors = unit.vectors.clone();
                work += vectors
                    .map(|vector| row_work(&rows[unit.row_and_head(vector).0]))
                    .sum::<usize>();
                first += 1;
            }
            (start < first).then_some(start..first)
        });
        let tasks = workspace.collect(tasks);
        Self { units, tasks }
    }
}

/// How the vectors of one kv head and some rows that read the same pages are cut into units.
#[derive(Clone, Copy)]
struct Cut<'a> {
    rows: &'a [AttentionRow<'a>],
    heads_per_kv_head: usize,
    /// Vectors are added by as many as this.
    block: usize,
    /// Most vectors of a unit.
    most: usize,
    /// Work at which a unit ends.
    target: usize,
}

impl<'a> Cut<'a> {
    fn vectors(self) -> impl Iterator<Item = Range<usize>> + 'a {
        let vectors = self.rows.len() * self.heads_per_kv_head;
        let mut end = 0;
        std::iter::from_fn(move || {
            let first = end;
            let mut work = 0;
            while end < vectors && end - first < self.most && work < self.target {
                let next = (end + self.block).min(first + self.most).min(vectors);
                work += (end..next)
                    .map(|vector| row_work(&self.rows[vector / self.heads_per_kv_head]))
                    .sum::<usize>();
                end = next;
            }
            (first < end).then_some(first..end)
        })
    }
}

/// Tiles that a vector of the row passes, and one for what is done once.
fn row_work(row: &AttentionRow<'_>) -> usize {
    1 + row.end_key.div_ceil(KV_PAGE_TOKENS) - row.first_key / KV_PAGE_TOKENS
}

/// Cuts `rows` where the next row reads other pages.
fn page_sharing_runs<'a>(rows: &'a [AttentionRow<'_>]) -> impl Iterator<Item = Range<usize>> + 'a {
    let mut end = 0;
    rows.chunk_by(|a, b| std::ptr::eq(a.pages, b.pages)).map(move |run| {
        let start = end;
        end += run.len();
        start..end
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CpuPool;

    fn row(pages: &[u32], end_key: usize) -> AttentionRow<'_> {
        AttentionRow {
            pages,
            first_key: 0,
            end_key,
        }
    }

    #[test]
    fn every_vector_is_in_one_unit_and_every_unit_in_one_task() {
        let pages: [Vec<u32>; 3] = [vec![0; 40], vec![1; 3], vec![2; 300]];
        let mut rows: Vec<_> = (0..100).map(|position| row(&pages[0], position + 1)).collect();
        rows.push(row(&pages[1], 0));
        rows.extend((0..30).map(|position| row(&pages[2], 4000 + position)));
        for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512] {
            for (threads, heads, kv_heads) in [(1, 1, 1), (2, 1, 16), (3, 16, 1), (2, 5, 4), (64, 3, 2)] {
                let pool = CpuPool::new(1);
                let workspace = pool.workspace();
                let plan = Plan::new(isa, &workspace, threads, &rows, heads, kv_heads);
                let mut seen = vec![0; rows.len() * heads * kv_heads];
                for unit in plan.tasks.iter().flat_map(|task| &plan.units[task.clone()]) {
                    for vector in unit.vectors.clone() {
                        let (row, head) = unit.row_and_head(vector);
                        assert!(std::ptr::eq(rows[row].pages, rows[unit.first_row].pages));
                        assert_eq!(head / heads, unit.kv_head);
                        seen[row * heads * kv_heads + head] += 1;
                    }
                }
                assert!(seen.iter().all(|&times| times == 1), "{isa}, {threads} threads");
                assert!(plan.tasks.windows(2).all(|pair| pair[0].end == pair[1].start));
            }
        }
    }

    #[test]
    fn tasks_are_about_equal_whatever_the_skew() {
        let pages = vec![0; 300];
        let rows: Vec<_> = (0..4000).map(|position| row(&pages, position + 1)).collect();
        let pool = CpuPool::new(1);
        let workspace = pool.workspace();
        let plan = Plan::new(Isa::Avx512, &workspace, 2, &rows, 1, 16);
        let works: Vec<usize> = plan
            .tasks
            .iter()
            .map(|task| {
                let vectors = plan.units[task.clone()].iter().flat_map(|unit| unit.vectors.clone());
                vectors.map(|vector| row_work(&rows[vector])).sum()
            })
            .collect();
        let (most, total) = (works.iter().max().copied().unwrap_or(0), works.iter().sum::<usize>());
        assert!(works.len() >= 30, "{} tasks", works.len());
        assert!(most * 16 <= total, "{most} of {total}");
    }

    #[test]
    fn heads_of_one_kv_head_are_shared_out_when_there_is_nothing_else_to_share() {
        let pages = vec![0; 300];
        let pool = CpuPool::new(1);
        let workspace = pool.workspace();
        let plan = Plan::new(Isa::Avx512, &workspace, 2, &[row(&pages, 4000)], 16, 1);
        let vectors: Vec<_> = plan.units.iter().map(|unit| unit.vectors.clone()).collect();
        assert_eq!(vectors, [0..8, 8..16]);
        assert_eq!(plan.tasks, [0..1, 1..2]);
    }
}
