//! Keys and values of one layer in pages, each page laid out as the two panels that attention multiplies with.

use std::ops::Range;

use crate::lines::{LANES, Line, Lines};

/// Tokens in a page of the cache, and keys in a tile of the softmax: aligned to absolute position.
pub const KV_PAGE_TOKENS: usize = LANES;

/// One layer's keys and values.
///
/// `[kv_heads, num_pages]` of `[key_dim, 16]` keys (lane = token, as a panel of the product with a query) followed by
/// `[value_dim / 16, 16, 16]` values (a line = sixteen dimensions of one token), f32, the last dimensions filled up
/// with zeroes. Heads are outermost because one head's pages are read one after another.
#[derive(Debug, Clone)]
pub struct KvPages {
    num_pages: usize,
    kv_heads: usize,
    key_dim: usize,
    value_dim: usize,
    lines: Lines,
}

impl KvPages {
    /// Room for `num_pages` pages of [`KV_PAGE_TOKENS`] tokens; keys are `[kv_heads, key_dim]` a token, values
    /// `[kv_heads, value_dim]`. Memory is touched only when written.
    pub fn new(num_pages: usize, kv_heads: usize, key_dim: usize, value_dim: usize) -> Self {
        let lines = (kv_heads * head_lines(key_dim, value_dim))
            .checked_mul(num_pages)
            .expect("fits the address space");
        Self {
            num_pages,
            kv_heads,
            key_dim,
            value_dim,
            lines: Lines::zeroed(lines),
        }
    }

    /// Bytes a page takes in one layer.
    pub fn page_bytes(kv_heads: usize, key_dim: usize, value_dim: usize) -> usize {
        kv_heads * head_lines(key_dim, value_dim) * size_of::<Line>()
    }

    /// Stores one token's keys `[kv_heads * key_dim]` and values `[kv_heads * value_dim]` at slot `slot` of `page`.
    /// Panics if there is no such slot or a length differs.
    pub fn write(&mut self, page: u32, slot: usize, keys: &[f32], values: &[f32]) {
        assert!(slot < KV_PAGE_TOKENS, "slot {slot} of {KV_PAGE_TOKENS}");
        assert_eq!(keys.len(), self.kv_heads * self.key_dim, "length of a token's keys");
        assert_eq!(
            values.len(),
            self.kv_heads * self.value_dim,
            "length of a token's values"
        );
        for head in 0..self.kv_heads {
            let keys = &keys[head * self.key_dim..][..self.key_dim];
            let values = &values[head * self.value_dim..][..self.value_dim];
            let range = self.head_range(page, head);
            let (key_lines, value_lines) = self.lines.as_mut_slice()[range].split_at_mut(self.key_dim);
            for (line, key) in key_lines.iter_mut().zip(keys) {
                line[slot] = key.to_bits();
            }
            for (panel, values) in value_lines.chunks_mut(KV_PAGE_TOKENS).zip(values.chunks(LANES)) {
                panel[slot]
                    .iter_mut()
                    .zip(values)
                    .for_each(|(word, value)| *word = value.to_bits());
            }
        }
    }

    pub(crate) fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    pub(crate) fn key_dim(&self) -> usize {
        self.key_dim
    }

    pub(crate) fn value_dim(&self) -> usize {
        self.value_dim
    }

    /// Keys and values of one head in one page: `[key_dim]` lines and `[value_dim / 16 * 16]` lines. Panics if there is
    /// no such page.
    #[inline(always)]
    pub(crate) fn head(&self, page: u32, head: usize) -> (&[Line], &[Line]) {
        self.stored(page, head).split_at(self.key_dim)
    }

    /// The memory of one head in one page. Panics if there is no such page.
    #[inline(always)]
    pub(crate) fn stored(&self, page: u32, head: usize) -> &[Line] {
        &self.lines.as_slice()[self.head_range(page, head)]
    }

    #[inline(always)]
    fn head_range(&self, page: u32, head: usize) -> Range<usize> {
        assert!((page as usize) < self.num_pages, "page {page} of {}", self.num_pages);
        let lines = head_lines(self.key_dim, self.value_dim);
        let first = (head * self.num_pages + page as usize) * lines;
        first..first + lines
    }
}

/// Lines that one head takes in one page.
fn head_lines(key_dim: usize, value_dim: usize) -> usize {
    key_dim + value_dim.div_ceil(LANES) * KV_PAGE_TOKENS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_take_the_bytes_that_are_said_and_hold_what_was_written() {
        let mut kv = KvPages::new(3, 2, 5, 18);
        assert_eq!(kv.lines.bytes(), 3 * KvPages::page_bytes(2, 5, 18));
        let (keys, values): (Vec<f32>, Vec<f32>) = (
            (0..10).map(|i| i as f32).collect(),
            (0..36).map(|i| -i as f32).collect(),
        );
        kv.write(2, 7, &keys, &values);
        for head in 0..2 {
            let (key_lines, value_lines) = kv.head(2, head);
            for dim in 0..5 {
                assert_eq!(f32::from_bits(key_lines[dim][7]), keys[head * 5 + dim]);
                assert_eq!(
                    key_lines[dim].iter().filter(|&&word| word != 0).count(),
                    usize::from(head + dim > 0)
                );
            }
            for dim in 0..18 {
                let line = value_lines[dim / LANES * KV_PAGE_TOKENS + 7];
                assert_eq!(f32::from_bits(line[dim % LANES]), values[head * 18 + dim]);
            }
            assert!(
                kv.head(0, head)
                    .0
                    .iter()
                    .chain(kv.head(0, head).1)
                    .flatten()
                    .all(|&word| word == 0)
            );
        }
    }

    #[test]
    #[should_panic(expected = "page 3 of 3")]
    fn a_page_beyond_the_last_is_refused() {
        KvPages::new(3, 2, 1, 1).write(3, 0, &[0.0; 2], &[0.0; 2]);
    }
}
