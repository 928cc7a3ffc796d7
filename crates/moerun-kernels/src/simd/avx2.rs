//! AVX2: two registers of eight lanes.

use core::arch::x86_64::*;

use super::{ROUND_F64, Simd, TWO_32};
use crate::{
    exponential::ROUND,
    isa::{Kernel, run_avx2},
    lines::{LANES, Line},
};

/// AVX2 with FMA and F16C: two registers of eight lanes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// # Safety
    /// The processor must have AVX2, FMA and F16C.
    pub(crate) unsafe fn assume_available() -> Self {
        Avx2(())
    }
}

// In each block below: a value of `Avx2` exists only where AVX2, FMA and F16C do, and every pointer comes from a
// reference to sixteen elements.
impl Simd for Avx2 {
    type F32s = [__m256; 2];
    /// Upper and lower halves, widened.
    type Bf16Pairs = [[__m256; 2]; 2];
    /// The bytes and their magnitudes: an instruction that multiplies two signed bytes does not exist.
    type I8Quads = [[__m256i; 2]; 2];
    type U8Quads = [__m256i; 2];
    type I32s = [__m256i; 2];
    type I64s = [__m256i; 4];
    const TILE_ROWS: &'static [usize] = &[6, 4, 2, 1];
    const BLOCK_TILE_ROWS: &'static [usize] = &[4, 2, 1];
    const I8_BIAS: i32 = 0;
    const WIDE: bool = false;

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: `self` proves its features.
        unsafe { run_avx2(kernel) }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> [__m256; 2] {
        // SAFETY: `self` proves AVX.
        unsafe { [_mm256_set1_ps(value); 2] }
    }

    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> [__m256; 2] {
        // SAFETY: `self` proves AVX; sixteen f32 are readable.
        unsafe {
            [
                _mm256_loadu_ps(values.as_ptr()),
                _mm256_loadu_ps(values.as_ptr().add(8)),
            ]
        }
    }

    #[inline(always)]
    fn load_bits(self, line: &Line) -> [__m256; 2] {
        // SAFETY: `self` proves AVX; sixteen words are readable.
        unsafe {
            [
                _mm256_loadu_ps(line.as_ptr().cast()),
                _mm256_loadu_ps(line.as_ptr().add(8).cast()),
            ]
        }
    }

    #[inline(always)]
    fn store(self, lanes: [__m256; 2]) -> [f32; LANES] {
        let mut values = [0.0; LANES];
        // SAFETY: `self` proves AVX; sixteen f32 are writable.
        unsafe {
            _mm256_storeu_ps(values.as_mut_ptr(), lanes[0]);
            _mm256_storeu_ps(values.as_mut_ptr().add(8), lanes[1]);
        }
        values
    }

    #[inline(always)]
    fn add(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: `self` proves AVX.
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn mul(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: `self` proves AVX.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn mul_add(self, a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: `self` proves FMA.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }

    #[inline(always)]
    fn load_bf16_pairs(self, line: &Line) -> [[__m256; 2]; 2] {
        // SAFETY: `self` proves AVX2; sixteen words are readable.
        unsafe {
            let mask = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
            let first = _mm256_loadu_si256(line.as_ptr().cast());
            let second = _mm256_loadu_si256(line.as_ptr().add(8).cast());
            [
                [first, second].map(|words| _mm256_castsi256_ps(_mm256_and_si256(words, mask))),
                [first, second].map(|words| _mm256_castsi256_ps(_mm256_slli_epi32(words, 16))),
            ]
        }
    }

    #[inline(always)]
    fn dot_bf16(self, [high, low]: [[__m256; 2]; 2], x: u32, sum: [__m256; 2]) -> [__m256; 2] {
        let sum = self.mul_add(self.splat(f32::from_bits(x & 0xffff_0000)), high, sum);
        self.mul_add(self.splat(f32::from_bits(x << 16)), low, sum)
    }

    #[inline(always)]
    fn zero_i64(self) -> [__m256i; 4] {
        // SAFETY: `self` proves AVX.
        unsafe { [_mm256_setzero_si256(); 4] }
    }

    /// [`super::nearest`], four lanes at a time.
    #[inline(always)]
    fn add_rounded(self, sums: [__m256i; 4], values: [__m256; 2]) -> [__m256i; 4] {
        let mut sums = sums;
        // SAFETY: `self` proves AVX2.
        unsafe {
            let quarters = [
                _mm256_castps256_ps128(values[0]),
                _mm256_extractf128_ps::<1>(values[0]),
                _mm256_castps256_ps128(values[1]),
                _mm256_extractf128_ps::<1>(values[1]),
            ];
            let (round, two_32) = (_mm256_set1_pd(ROUND_F64), _mm256_set1_pd(TWO_32));
            let integer = |shifted| _mm256_sub_epi64(_mm256_castpd_si256(shifted), _mm256_castpd_si256(round));
            for (sum, quarter) in sums.iter_mut().zip(quarters) {
                let value = _mm256_cvtps_pd(quarter);
                let upper_shifted = _mm256_add_pd(_mm256_mul_pd(value, _mm256_set1_pd(1.0 / TWO_32)), round);
                let upper = _mm256_sub_pd(upper_shifted, round);
                let lower_shifted = _mm256_add_pd(_mm256_sub_pd(value, _mm256_mul_pd(upper, two_32)), round);
                let nearest = _mm256_add_epi64(_mm256_slli_epi64::<32>(integer(upper_shifted)), integer(lower_shifted));
                *sum = _mm256_add_epi64(*sum, nearest);
            }
        }
        sums
    }

    #[inline(always)]
    fn add_to(self, sums: [__m256i; 4], out: &mut [i64; LANES]) {
        let (quarters, _) = out.as_chunks_mut::<4>();
        for (out, sum) in quarters.iter_mut().zip(sums) {
            // SAFETY: `self` proves AVX2; four i64 are readable and writable.
            unsafe {
                let before = _mm256_loadu_si256(out.as_ptr().cast());
                _mm256_storeu_si256(out.as_mut_ptr().cast(), _mm256_add_epi64(before, sum));
            }
        }
    }

    #[inline(always)]
    fn larger_magnitude(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        let larger = |half: usize| {
            // SAFETY: `self` proves AVX2. Magnitudes compare like their bits, and a NaN's are above all others.
            unsafe {
                let b = _mm256_castps_si256(_mm256_andnot_ps(_mm256_set1_ps(-0.0), b[half]));
                _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a[half]), b))
            }
        };
        [larger(0), larger(1)]
    }

    #[inline(always)]
    fn all_below(self, values: [__m256; 2], limit: [__m256; 2]) -> bool {
        // SAFETY: `self` proves AVX.
        unsafe {
            let sign = _mm256_set1_ps(-0.0);
            let below = |half: usize| {
                let magnitude = _mm256_andnot_ps(sign, values[half]);
                _mm256_cmp_ps::<_CMP_LT_OQ>(magnitude, limit[half])
            };
            _mm256_movemask_ps(_mm256_and_ps(below(0), below(1))) == 0xff
        }
    }

    #[inline(always)]
    fn splat_i32(self, value: i32) -> [__m256i; 2] {
        // SAFETY: `self` proves AVX.
        unsafe { [_mm256_set1_epi32(value); 2] }
    }

    #[inline(always)]
    fn to_f32(self, lanes: [__m256i; 2]) -> [__m256; 2] {
        // SAFETY: `self` proves AVX.
        unsafe { [_mm256_cvtepi32_ps(lanes[0]), _mm256_cvtepi32_ps(lanes[1])] }
    }

    #[inline(always)]
    fn load_i8_quads(self, line: &Line) -> [[__m256i; 2]; 2] {
        // SAFETY: `self` proves AVX2; sixteen words are readable.
        unsafe {
            let sign = _mm256_set1_epi8(-128);
            let bytes = [
                _mm256_xor_si256(_mm256_loadu_si256(line.as_ptr().cast()), sign),
                _mm256_xor_si256(_mm256_loadu_si256(line.as_ptr().add(8).cast()), sign),
            ];
            [bytes, [_mm256_abs_epi8(bytes[0]), _mm256_abs_epi8(bytes[1])]]
        }
    }

    /// Two products of a magnitude of at most 128 with a byte of at most 127 fit 16 bits, so nothing saturates.
    #[inline(always)]
    fn dot_i8(self, [bytes, magnitudes]: [[__m256i; 2]; 2], x: u32, sum: [__m256i; 2]) -> [__m256i; 2] {
        // SAFETY: `self` proves AVX2.
        unsafe {
            let ones = _mm256_set1_epi16(1);
            let x = _mm256_set1_epi32(x.cast_signed());
            let half = |half: usize| {
                let pairs = _mm256_maddubs_epi16(magnitudes[half], _mm256_sign_epi8(x, bytes[half]));
                _mm256_add_epi32(sum[half], _mm256_madd_epi16(pairs, ones))
            };
            [half(0), half(1)]
        }
    }

    #[inline(always)]
    fn load_low_nibbles(self, line: &Line) -> [__m256i; 2] {
        // SAFETY: `self` proves AVX2; sixteen words are readable.
        unsafe {
            let mask = _mm256_set1_epi8(15);
            [
                _mm256_and_si256(_mm256_loadu_si256(line.as_ptr().cast()), mask),
                _mm256_and_si256(_mm256_loadu_si256(line.as_ptr().add(8).cast()), mask),
            ]
        }
    }

    #[inline(always)]
    fn load_high_nibbles(self, line: &Line) -> [__m256i; 2] {
        // SAFETY: `self` proves AVX2; sixteen words are readable.
        unsafe {
            let mask = _mm256_set1_epi8(15);
            let upper = |words| _mm256_and_si256(_mm256_srli_epi32(words, 4), mask);
            [
                upper(_mm256_loadu_si256(line.as_ptr().cast())),
                upper(_mm256_loadu_si256(line.as_ptr().add(8).cast())),
            ]
        }
    }

    #[inline(always)]
    fn look_up(self, table: &[u8; 16], codes: [__m256i; 2]) -> [__m256i; 2] {
        // SAFETY: `self` proves AVX2; sixteen bytes are readable.
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            [
                _mm256_shuffle_epi8(table, codes[0]),
                _mm256_shuffle_epi8(table, codes[1]),
            ]
        }
    }

    #[inline(always)]
    fn dot_u8(self, weights: [__m256i; 2], x: u32, sum: [__m256i; 2]) -> [__m256i; 2] {
        // SAFETY: `self` proves AVX2.
        unsafe {
            let ones = _mm256_set1_epi16(1);
            let x = _mm256_set1_epi32(x.cast_signed());
            let half = |half: usize| {
                let pairs = _mm256_maddubs_epi16(weights[half], x);
                _mm256_add_epi32(sum[half], _mm256_madd_epi16(pairs, ones))
            };
            [half(0), half(1)]
        }
    }

    #[inline(always)]
    fn load_f16(self, line: &Line, half: usize) -> [__m256; 2] {
        let words: &[u32; 8] = line[8 * half..][..8].try_into().expect("half a line");
        // SAFETY: `self` proves F16C; eight words are readable.
        unsafe {
            [
                _mm256_cvtph_ps(_mm_loadu_si128(words.as_ptr().cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(words.as_ptr().add(4).cast())),
            ]
        }
    }

    #[inline(always)]
    fn load_e8m0(self, line: &Line, quarter: usize) -> [__m256; 2] {
        let words: &[u32; 4] = line[4 * quarter..][..4].try_into().expect("a quarter of a line");
        // SAFETY: `self` proves AVX2; sixteen bytes are readable.
        unsafe {
            let exponents = |bytes| _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu8_epi32(bytes), 23));
            [
                exponents(_mm_loadl_epi64(words.as_ptr().cast())),
                exponents(_mm_loadl_epi64(words.as_ptr().add(2).cast())),
            ]
        }
    }

    #[inline(always)]
    fn load_low_bf16(self, line: &Line) -> [__m256; 2] {
        // SAFETY: `self` proves AVX2; sixteen words are readable.
        unsafe {
            let low = _mm256_loadu_si256(line.as_ptr().cast());
            let high = _mm256_loadu_si256(line.as_ptr().add(8).cast());
            [
                _mm256_castsi256_ps(_mm256_slli_epi32(low, 16)),
                _mm256_castsi256_ps(_mm256_slli_epi32(high, 16)),
            ]
        }
    }

    #[inline(always)]
    fn load_high_bf16(self, line: &Line) -> [__m256; 2] {
        // SAFETY: `self` proves AVX2; sixteen words are readable.
        unsafe {
            let mask = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
            let low = _mm256_loadu_si256(line.as_ptr().cast());
            let high = _mm256_loadu_si256(line.as_ptr().add(8).cast());
            [
                _mm256_castsi256_ps(_mm256_and_si256(low, mask)),
                _mm256_castsi256_ps(_mm256_and_si256(high, mask)),
            ]
        }
    }

    #[inline(always)]
    fn sub(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: `self` proves AVX.
        unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn div(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: `self` proves AVX.
        unsafe { [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn greater(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: `self` proves AVX. The instruction gives its second operand unless the first is greater.
        unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn if_greater(self, a: [__m256; 2], b: [__m256; 2], then: [__m256; 2], otherwise: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: `self` proves AVX.
        [0, 1].map(|half| unsafe {
            let greater = _mm256_cmp_ps::<_CMP_GT_OQ>(a[half], b[half]);
            _mm256_blendv_ps(otherwise[half], then[half], greater)
        })
    }

    #[inline(always)]
    fn power_factors(self, shifted: [__m256; 2]) -> [[__m256; 2]; 2] {
        let mut factors = [shifted; 2];
        for half in 0..2 {
            // SAFETY: `self` proves AVX2.
            unsafe {
                let round = _mm256_set1_epi32(ROUND.to_bits().cast_signed());
                let n = _mm256_sub_epi32(_mm256_castps_si256(shifted[half]), round);
                let low = _mm256_srai_epi32::<1>(n);
                for (factor, n) in factors.iter_mut().zip([low, _mm256_sub_epi32(n, low)]) {
                    let biased = _mm256_add_epi32(n, _mm256_set1_epi32(127));
                    factor[half] = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased));
                }
            }
        }
        factors
    }

    #[inline(always)]
    fn transpose(self, rows: [[__m256; 2]; LANES]) -> [[__m256; 2]; LANES] {
        let mut out = rows;
        for (from, to) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let square: [__m256; 8] = std::array::from_fn(|row| rows[8 * from + row][to]);
            // SAFETY: `self` proves AVX.
            let square = unsafe { transpose_8(square) };
            for (row, lanes) in square.into_iter().enumerate() {
                out[8 * to + row][from] = lanes;
            }
        }
        out
    }

    #[inline(always)]
    fn load_byte(self, line: &Line, index: usize) -> [__m256; 2] {
        // SAFETY: `self` proves AVX2; sixteen words are readable.
        [0, 8].map(|first| unsafe {
            let words = _mm256_loadu_si256(line.as_ptr().add(first).cast());
            let high = _mm256_sll_epi32(words, _mm_cvtsi32_si128(24 - 8 * index as i32));
            _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(high))
        })
    }
}

/// Eight rows of eight lanes, turned over: pairs of rows, then fours in each half of a register, then the halves.
///
/// # Safety
/// The processor must have AVX.
#[inline(always)]
unsafe fn transpose_8(rows: [__m256; 8]) -> [__m256; 8] {
    let mut out = rows;
    // SAFETY: as the caller promises.
    unsafe {
        let mut fours = rows;
        for first in [0, 4] {
            let [a, b, c, d] = [rows[first], rows[first + 1], rows[first + 2], rows[first + 3]];
            let low = [_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d)].map(|pair| _mm256_castps_pd(pair));
            let high = [_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d)].map(|pair| _mm256_castps_pd(pair));
            fours[first] = _mm256_castpd_ps(_mm256_unpacklo_pd(low[0], low[1]));
            fours[first + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low[0], low[1]));
            fours[first + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(high[0], high[1]));
            fours[first + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(high[0], high[1]));
        }
        for lane in 0..4 {
            out[lane] = _mm256_permute2f128_ps::<0x20>(fours[lane], fours[4 + lane]);
            out[4 + lane] = _mm256_permute2f128_ps::<0x31>(fours[lane], fours[4 + lane]);
        }
    }
    out
}
