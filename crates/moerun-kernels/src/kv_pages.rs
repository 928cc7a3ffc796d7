//! Keys and values of one layer in pages, each page laid out as the two panels that attention multiplies with.

mod stored;

use std::ops::Range;

use moerun_types::KvFormat;

use self::stored::{decode, encode, int8_scale, line, per_word, put, scale_lines};
use crate::{
    lines::{LANES, Line, Lines},
    simd::Simd,
};

/// Tokens in a page of the cache, and keys in a tile of the softmax: aligned to absolute position.
pub const KV_PAGE_TOKENS: usize = LANES;

/// What one token keeps in one layer, in each of `kv_heads` heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// Heads.
    pub kv_heads: usize,
    /// Numbers in a key.
    pub key_dim: usize,
    /// Numbers in a value.
    pub value_dim: usize,
    /// Where values come from.
    pub values: KvValues,
}

/// Where values come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvValues {
    /// They are held beside the keys.
    Own,
    /// A value is the first `value_dim` numbers of its key, as a latent is, and held only there.
    StartOfKey,
}

/// One layer's keys and values.
///
/// `[kv_heads, num_pages]` of `[key_dim, 16]` keys (lane = token, as a panel of the product with a query) followed by
/// `[value_dim / 16, 16, 16]` values of their own (a line = sixteen dimensions of one token), the last dimensions filled
/// up with zeroes. Heads are outermost because one head's pages are read one after another.
///
/// Where a word of 32 bits holds two numbers (bf16) or four (int8), it is those of successive lines, the first one
/// lowest. In int8 two lines of scales follow, a lane per token: of its key and of its value; where values are the start
/// of a key, of that start and of the rest.
#[derive(Debug, Clone)]
pub struct KvPages {
    format: KvFormat,
    shape: KvShape,
    num_pages: usize,
    lines: Lines,
}

impl KvPages {
    /// Room for `num_pages` pages of [`KV_PAGE_TOKENS`] tokens. Memory is touched only when written.
    ///
    /// # Panics
    /// If values are to be the start of keys that are shorter.
    pub fn new(format: KvFormat, num_pages: usize, shape: KvShape) -> Self {
        assert!(
            shape.values == KvValues::Own || shape.value_dim <= shape.key_dim,
            "a value of {} from a key of {}",
            shape.value_dim,
            shape.key_dim
        );
        let lines = (shape.kv_heads * shape.head_lines(format))
            .checked_mul(num_pages)
            .expect("fits the address space");
        Self {
            format,
            shape,
            num_pages,
            lines: Lines::zeroed(lines),
        }
    }

    /// Bytes a page takes in one layer.
    pub fn page_bytes(format: KvFormat, shape: KvShape) -> usize {
        shape.kv_heads * shape.head_lines(format) * size_of::<Line>()
    }

    /// Stores one token's keys `[kv_heads * key_dim]` and values `[kv_heads * value_dim]` (none if they are the start of
    /// the keys) at slot `slot` of `page`. Panics if there is no such slot or a length differs.
    pub fn write(&mut self, page: u32, slot: usize, keys: &[f32], values: &[f32]) {
        let (format, shape) = (self.format, self.shape);
        assert!(slot < KV_PAGE_TOKENS, "slot {slot} of {KV_PAGE_TOKENS}");
        assert_eq!(keys.len(), shape.kv_heads * shape.key_dim, "length of a token's keys");
        let own_values = match shape.values {
            KvValues::Own => shape.value_dim,
            KvValues::StartOfKey => 0,
        };
        assert_eq!(values.len(), shape.kv_heads * own_values, "length of a token's values");
        for head in 0..shape.kv_heads {
            let key = &keys[head * shape.key_dim..][..shape.key_dim];
            let value = &values[head * own_values..][..own_values];
            let range = self.head_range(page, head);
            let lines = &mut self.lines.as_mut_slice()[range];
            let (lines, scale_lines) = lines.split_at_mut(lines.len() - scale_lines(format));
            let mut scales = [1.0; 2];
            if !scale_lines.is_empty() {
                scales = match shape.values {
                    KvValues::Own => [int8_scale(key), int8_scale(value)],
                    KvValues::StartOfKey => {
                        let (start, rest) = key.split_at(shape.value_dim);
                        [int8_scale(start), int8_scale(rest)]
                    }
                };
            }
            for (line, scale) in scale_lines.iter_mut().zip(scales) {
                line[slot] = scale.to_bits();
            }
            let (key_lines, value_lines) = lines.split_at_mut(shape.key_lines(format));
            for (dim, &number) in key.iter().enumerate() {
                let bits = encode(format, number, scales[shape.key_scale(dim)]);
                let word = &mut key_lines[dim / per_word(format)][slot];
                put(format, word, dim % per_word(format), bits);
            }
            let panels = value_lines.chunks_mut(KV_PAGE_TOKENS / per_word(format));
            for (panel, value) in panels.zip(value.chunks(LANES)) {
                let line = &mut panel[slot / per_word(format)];
                for (word, &number) in line.iter_mut().zip(value) {
                    let bits = encode(format, number, scales[1]);
                    put(format, word, slot % per_word(format), bits);
                }
            }
        }
    }

    pub(crate) fn shape(&self) -> KvShape {
        self.shape
    }

    /// Whether keys lie in memory as attention reads them: `[key_dim]` lines of f32 at the start of [`KvPages::stored`].
    #[inline(always)]
    pub(crate) fn keys_lie_ready(&self) -> bool {
        self.format == KvFormat::F32
    }

    /// Whether values do: `[value_dim / 16 * 16]` lines of f32 after the keys.
    #[inline(always)]
    pub(crate) fn values_lie_ready(&self) -> bool {
        self.format == KvFormat::F32 && self.shape.values == KvValues::Own
    }

    /// The memory of one head in one page. Panics if there is no such page.
    #[inline(always)]
    pub(crate) fn stored(&self, page: u32, head: usize) -> &[Line] {
        &self.lines.as_slice()[self.head_range(page, head)]
    }

    /// Keys of one head in one page as attention reads them, `[key_dim]` lines.
    #[inline(always)]
    pub(crate) fn read_keys<S: Simd>(&self, simd: S, page: u32, head: usize, out: &mut [Line]) {
        let stored = self.stored(page, head);
        let scales = stored.last_chunk::<2>();
        let per_word = per_word(self.format);
        for (word, (out, stored)) in out.chunks_mut(per_word).zip(stored).enumerate() {
            for (index, out) in out.iter_mut().enumerate() {
                let mut numbers = decode(simd, self.format, stored, index);
                if let (KvFormat::Int8, Some(scales)) = (self.format, scales) {
                    let scale = &scales[self.shape.key_scale(word * per_word + index)];
                    numbers = simd.mul(numbers, simd.load_bits(scale));
                }
                *out = line(simd, numbers);
            }
        }
    }

    /// Values of one head in one page as attention reads them, `[value_dim / 16 * 16]` lines; `keys` is what attention
    /// reads as the page's keys.
    #[inline(always)]
    pub(crate) fn read_values<S: Simd>(&self, simd: S, page: u32, head: usize, keys: &[Line], out: &mut [Line]) {
        let panels = out.as_chunks_mut::<KV_PAGE_TOKENS>().0;
        if self.shape.values == KvValues::StartOfKey {
            for (panel, keys) in panels.iter_mut().zip(keys.chunks(LANES)) {
                let mut rows = [simd.splat(0.0); LANES];
                for (row, key) in rows.iter_mut().zip(keys) {
                    *row = simd.load_bits(key);
                }
                for (out, lanes) in panel.iter_mut().zip(simd.transpose(rows)) {
                    *out = line(simd, lanes);
                }
            }
            return;
        }
        let stored = self.stored(page, head);
        let scales = stored.last_chunk::<2>();
        let per_word = per_word(self.format);
        let stored = stored[self.shape.key_lines(self.format)..].chunks(KV_PAGE_TOKENS / per_word);
        for (panel, stored) in panels.iter_mut().zip(stored) {
            for (word, (out, stored)) in panel.chunks_mut(per_word).zip(stored).enumerate() {
                for (index, out) in out.iter_mut().enumerate() {
                    let mut numbers = decode(simd, self.format, stored, index);
                    if let (KvFormat::Int8, Some([_, scales])) = (self.format, scales) {
                        let scale = f32::from_bits(scales[word * per_word + index]);
                        numbers = simd.mul(numbers, simd.splat(scale));
                    }
                    *out = line(simd, numbers);
                }
            }
        }
    }

    #[inline(always)]
    fn head_range(&self, page: u32, head: usize) -> Range<usize> {
        assert!((page as usize) < self.num_pages, "page {page} of {}", self.num_pages);
        let lines = self.shape.head_lines(self.format);
        let first = (head * self.num_pages + page as usize) * lines;
        first..first + lines
    }
}

impl KvShape {
    fn key_lines(self, format: KvFormat) -> usize {
        self.key_dim.div_ceil(per_word(format))
    }

    /// Lines that one head takes in one page.
    fn head_lines(self, format: KvFormat) -> usize {
        let values = match self.values {
            KvValues::Own => self.value_dim.div_ceil(LANES) * KV_PAGE_TOKENS / per_word(format),
            KvValues::StartOfKey => 0,
        };
        self.key_lines(format) + values + scale_lines(format)
    }

    /// Which of a token's two scales dimension `dim` of its key has.
    #[inline(always)]
    fn key_scale(self, dim: usize) -> usize {
        usize::from(self.values == KvValues::StartOfKey && dim >= self.value_dim)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Isa, isa::Kernel};

    /// Keys and values of a page as attention reads them.
    struct Read<'a>(&'a KvPages, u32, usize);

    impl Kernel for Read<'_> {
        type Output = [Vec<Line>; 2];

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> Self::Output {
            let Read(kv, page, head) = self;
            let mut keys = vec![[0; LANES]; kv.shape.key_dim];
            kv.read_keys(simd, page, head, &mut keys);
            let mut values = vec![[0; LANES]; kv.shape.value_dim.next_multiple_of(LANES)];
            kv.read_values(simd, page, head, &keys, &mut values);
            [keys, values]
        }
    }

    fn shape(kv_heads: usize, key_dim: usize, value_dim: usize, values: KvValues) -> KvShape {
        KvShape {
            kv_heads,
            key_dim,
            value_dim,
            values,
        }
    }

    #[test]
    fn pages_take_the_bytes_that_are_said_and_hold_what_was_written() {
        for format in KvFormat::ALL {
            for (key_dim, value_dim, values) in [(5, 18, KvValues::Own), (21, 18, KvValues::StartOfKey)] {
                let shape = shape(2, key_dim, value_dim, values);
                let mut kv = KvPages::new(format, 3, shape);
                assert_eq!(kv.lines.bytes(), 3 * KvPages::page_bytes(format, shape));
                // Small integers: exact in bf16, and in int8 with 127 among them in each part.
                let keys: Vec<f32> = (0..2 * key_dim).map(|i| [127.0, i as f32, -1.0][i % 3]).collect();
                let own: Vec<f32> = (0..2 * value_dim).map(|i| [-127.0, -(i as f32)][i % 2]).collect();
                let own = if values == KvValues::Own { own } else { Vec::new() };
                for slot in 0..KV_PAGE_TOKENS {
                    kv.write(2, slot, &vec![f32::NAN; keys.len()], &vec![f32::NAN; own.len()]);
                }
                kv.write(2, 7, &keys, &own);
                for isa in Isa::all_available() {
                    for head in 0..2 {
                        let [key_lines, value_lines] = isa.dispatch(Read(&kv, 2, head));
                        let value = match values {
                            KvValues::Own => &own[head * value_dim..],
                            KvValues::StartOfKey => &keys[head * key_dim..],
                        };
                        for dim in 0..key_dim {
                            let line = key_lines[dim].map(f32::from_bits);
                            assert_eq!(line[7], keys[head * key_dim + dim], "{format} {isa}");
                            assert_eq!(line.iter().filter(|number| number.is_nan()).count(), 15);
                        }
                        for dim in 0..value_dim {
                            let line = |slot| value_lines[dim / LANES * KV_PAGE_TOKENS + slot];
                            assert_eq!(f32::from_bits(line(7)[dim % LANES]), value[dim], "{format} {isa}");
                            assert!(f32::from_bits(line(8)[dim % LANES]).is_nan(), "{format} {isa}");
                        }
                        let [keys, values] = isa.dispatch(Read(&kv, 0, head));
                        assert!(keys.iter().chain(&values).flatten().all(|&word| word == 0));
                    }
                }
            }
        }
    }

    #[test]
    fn narrow_formats_take_half_and_a_quarter_and_a_latent_is_held_once() {
        let own = shape(8, 128, 128, KvValues::Own);
        let latent = shape(1, 576, 512, KvValues::StartOfKey);
        let sizes = |shape| KvFormat::ALL.map(|format| KvPages::page_bytes(format, shape));
        assert_eq!(sizes(own), [8 * 16 * 1024, 8 * 16 * 512, 8 * 16 * (256 + 8)]);
        assert_eq!(sizes(latent), [16 * 576 * 4, 16 * 576 * 2, 16 * (576 + 8)]);
    }

    #[test]
    #[should_panic(expected = "page 3 of 3")]
    fn a_page_beyond_the_last_is_refused() {
        KvPages::new(KvFormat::F32, 3, shape(2, 1, 1, KvValues::Own)).write(3, 0, &[0.0; 2], &[0.0; 2]);
    }
}
