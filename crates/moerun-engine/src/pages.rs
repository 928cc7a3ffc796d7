//! Who has which page of the KV cache.

use moerun_kernels::KV_PAGE_TOKENS;

/// Pages that hold the keys and values of `tokens` tokens.
pub(crate) fn pages_for(tokens: usize) -> usize {
    tokens.div_ceil(KV_PAGE_TOKENS)
}

/// Hands out pages, each to one sequence at a time.
#[derive(Debug)]
pub(crate) struct PageAllocator {
    /// A stack: pages used last are used first, so memory that was never written stays untouched.
    free: Vec<u32>,
    total: usize,
}

impl PageAllocator {
    /// All of `0..num_pages` are free.
    pub(crate) fn new(num_pages: u32) -> Self {
        Self {
            free: (0..num_pages).rev().collect(),
            total: num_pages as usize,
        }
    }

    /// Appends `count` free pages to `pages`, or none of them if there are fewer; says whether it did.
    pub(crate) fn take(&mut self, count: usize, pages: &mut Vec<u32>) -> bool {
        let Some(rest) = self.free.len().checked_sub(count) else {
            return false;
        };
        pages.extend(self.free.drain(rest..).rev());
        true
    }

    /// Takes back all of `pages`, which came from [`PageAllocator::take`].
    pub(crate) fn give_back(&mut self, pages: &mut Vec<u32>) {
        self.free.extend(pages.drain(..).rev());
        debug_assert!(self.free.len() <= self.total, "more pages came back than there are");
    }

    /// Pages that nobody has.
    pub(crate) fn num_free(&self) -> usize {
        self.free.len()
    }

    /// Pages that somebody has.
    pub(crate) fn num_used(&self) -> usize {
        self.total - self.free.len()
    }

    /// All pages.
    pub(crate) fn total(&self) -> usize {
        self.total
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use rand::rngs::ChaCha8Rng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    #[test]
    fn no_page_is_lost_or_shared() {
        for seed in 0..50 {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let total = rng.random_range(1..40);
            let mut allocator = PageAllocator::new(total);
            let mut owners: Vec<Vec<u32>> = vec![Vec::new(); 6];
            for _ in 0..300 {
                let index = rng.random_range(0..owners.len());
                if rng.random_bool(0.3) {
                    allocator.give_back(&mut owners[index]);
                } else {
                    let (count, free) = (rng.random_range(0..8), allocator.num_free());
                    let before = owners[index].clone();
                    let taken = allocator.take(count, &mut owners[index]);
                    assert_eq!(taken, count <= free, "seed {seed}");
                    assert_eq!(
                        owners[index].len(),
                        before.len() + if taken { count } else { 0 },
                        "seed {seed}"
                    );
                    assert!(owners[index].starts_with(&before), "seed {seed}");
                }
                let held: Vec<u32> = owners.iter().flatten().copied().collect();
                let distinct: HashSet<u32> = held.iter().copied().collect();
                assert_eq!(distinct.len(), held.len(), "seed {seed}: a page has two owners");
                assert!(held.iter().all(|&page| page < total), "seed {seed}");
                assert_eq!(held.len(), allocator.num_used(), "seed {seed}");
                assert_eq!(
                    allocator.num_used() + allocator.num_free(),
                    allocator.total(),
                    "seed {seed}"
                );
            }
        }
    }

    #[test]
    fn untouched_pages_are_used_last() {
        let mut allocator = PageAllocator::new(8);
        let mut pages = Vec::new();
        assert!(allocator.take(3, &mut pages));
        assert_eq!(pages, [0, 1, 2]);
        allocator.give_back(&mut pages);
        assert!(allocator.take(4, &mut pages));
        assert_eq!(pages, [0, 1, 2, 3]);
    }

    #[test]
    fn a_page_holds_as_many_tokens_as_a_tile() {
        assert_eq!(pages_for(0), 0);
        assert_eq!(pages_for(1), 1);
        assert_eq!(pages_for(KV_PAGE_TOKENS), 1);
        assert_eq!(pages_for(KV_PAGE_TOKENS + 1), 2);
    }
}
