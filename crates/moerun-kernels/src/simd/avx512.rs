//! AVX-512: one register of sixteen lanes.

use core::arch::x86_64::*;

use super::Simd;
use crate::{
    exponential::ROUND,
    isa::{Kernel, run_avx512},
    lines::{LANES, Line},
};

/// AVX-512 F, BW, VL, DQ, BF16 and VNNI: one register of sixteen lanes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// # Safety
    /// The processor must have AVX-512 F, BW, VL, DQ, BF16 and VNNI, AVX2, FMA and F16C.
    pub(crate) unsafe fn assume_available() -> Self {
        Avx512(())
    }
}

// In each block below: a value of `Avx512` exists only where AVX-512 does, and every pointer comes from a reference to
// sixteen elements.
impl Simd for Avx512 {
    type F32s = __m512;
    type Bf16Pairs = __m512i;
    type I8Quads = __m512i;
    type U8Quads = __m512i;
    type I32s = __m512i;
    type I64s = [__m512i; 2];
    const TILE_ROWS: &'static [usize] = &[12, 8, 4, 2, 1];
    const BLOCK_TILE_ROWS: &'static [usize] = &[6, 4, 2, 1];
    const I8_BIAS: i32 = 128;
    const WIDE: bool = true;

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: `self` proves its features.
        unsafe { run_avx512(kernel) }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        // SAFETY: `self` proves AVX-512F.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> __m512 {
        // SAFETY: `self` proves AVX-512F; sixteen f32 are readable.
        unsafe { _mm512_loadu_ps(values.as_ptr()) }
    }

    #[inline(always)]
    fn load_bits(self, line: &Line) -> __m512 {
        // SAFETY: `self` proves AVX-512F; sixteen words are readable.
        unsafe { _mm512_loadu_ps(line.as_ptr().cast()) }
    }

    #[inline(always)]
    fn store(self, lanes: __m512) -> [f32; LANES] {
        let mut values = [0.0; LANES];
        // SAFETY: `self` proves AVX-512F; sixteen f32 are writable.
        unsafe { _mm512_storeu_ps(values.as_mut_ptr(), lanes) };
        values
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512F.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512F.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512F.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn load_bf16_pairs(self, line: &Line) -> __m512i {
        // SAFETY: `self` proves AVX-512F; sixteen words are readable.
        unsafe { _mm512_loadu_si512(line.as_ptr().cast()) }
    }

    #[inline(always)]
    fn dot_bf16(self, weights: __m512i, x: u32, sum: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512 BF16; the types differ in name only.
        unsafe {
            let x = _mm512_set1_epi32(x.cast_signed());
            _mm512_dpbf16_ps(
                sum,
                std::mem::transmute::<__m512i, __m512bh>(weights),
                std::mem::transmute::<__m512i, __m512bh>(x),
            )
        }
    }

    #[inline(always)]
    fn zero_i64(self) -> [__m512i; 2] {
        // SAFETY: `self` proves AVX-512F.
        unsafe { [_mm512_setzero_si512(); 2] }
    }

    #[inline(always)]
    fn add_rounded(self, sums: [__m512i; 2], values: __m512) -> [__m512i; 2] {
        // SAFETY: `self` proves AVX-512 DQ; the rounding mode is never changed from nearest, ties to even.
        unsafe {
            let low = _mm512_cvtps_epi64(_mm512_castps512_ps256(values));
            let high = _mm512_cvtps_epi64(_mm512_extractf32x8_ps(values, 1));
            [_mm512_add_epi64(sums[0], low), _mm512_add_epi64(sums[1], high)]
        }
    }

    #[inline(always)]
    fn add_to(self, sums: [__m512i; 2], out: &mut [i64; LANES]) {
        // SAFETY: `self` proves AVX-512F; sixteen i64 are readable and writable.
        unsafe {
            let out = out.as_mut_ptr();
            for (half, sums) in sums.into_iter().enumerate() {
                let out = out.add(8 * half).cast();
                _mm512_storeu_si512(out, _mm512_add_epi64(_mm512_loadu_si512(out), sums));
            }
        }
    }

    #[inline(always)]
    fn larger_magnitude(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512F. Magnitudes compare like their bits, and a NaN's are above all others.
        unsafe {
            let b = _mm512_castps_si512(_mm512_abs_ps(b));
            _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), b))
        }
    }

    #[inline(always)]
    fn all_below(self, values: __m512, limit: __m512) -> bool {
        // SAFETY: `self` proves AVX-512F.
        unsafe { _mm512_cmp_ps_mask(_mm512_abs_ps(values), limit, _CMP_LT_OQ) == 0xffff }
    }

    #[inline(always)]
    fn splat_i32(self, value: i32) -> __m512i {
        // SAFETY: `self` proves AVX-512F.
        unsafe { _mm512_set1_epi32(value) }
    }

    #[inline(always)]
    fn to_f32(self, lanes: __m512i) -> __m512 {
        // SAFETY: `self` proves AVX-512F.
        unsafe { _mm512_cvtepi32_ps(lanes) }
    }

    #[inline(always)]
    fn load_i8_quads(self, line: &Line) -> __m512i {
        // SAFETY: `self` proves AVX-512F; sixteen words are readable.
        unsafe { _mm512_loadu_si512(line.as_ptr().cast()) }
    }

    #[inline(always)]
    fn dot_i8(self, weights: __m512i, x: u32, sum: __m512i) -> __m512i {
        // SAFETY: `self` proves AVX-512 VNNI.
        unsafe { _mm512_dpbusd_epi32(sum, weights, _mm512_set1_epi32(x.cast_signed())) }
    }

    #[inline(always)]
    fn load_low_nibbles(self, line: &Line) -> __m512i {
        // SAFETY: `self` proves AVX-512 BW; sixteen words are readable.
        unsafe { _mm512_and_si512(_mm512_loadu_si512(line.as_ptr().cast()), _mm512_set1_epi8(15)) }
    }

    #[inline(always)]
    fn load_high_nibbles(self, line: &Line) -> __m512i {
        // SAFETY: `self` proves AVX-512 BW; sixteen words are readable.
        unsafe {
            let upper = _mm512_srli_epi32(_mm512_loadu_si512(line.as_ptr().cast()), 4);
            _mm512_and_si512(upper, _mm512_set1_epi8(15))
        }
    }

    #[inline(always)]
    fn look_up(self, table: &[u8; 16], codes: __m512i) -> __m512i {
        // SAFETY: `self` proves AVX-512 BW; sixteen bytes are readable.
        unsafe {
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
            _mm512_shuffle_epi8(table, codes)
        }
    }

    #[inline(always)]
    fn dot_u8(self, weights: __m512i, x: u32, sum: __m512i) -> __m512i {
        // SAFETY: `self` proves AVX-512 VNNI.
        unsafe { _mm512_dpbusd_epi32(sum, weights, _mm512_set1_epi32(x.cast_signed())) }
    }

    #[inline(always)]
    fn load_f16(self, line: &Line, half: usize) -> __m512 {
        let words: &[u32; 8] = line[8 * half..][..8].try_into().expect("half a line");
        // SAFETY: `self` proves AVX-512F; eight words are readable.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(words.as_ptr().cast())) }
    }

    #[inline(always)]
    fn load_e8m0(self, line: &Line, quarter: usize) -> __m512 {
        let words: &[u32; 4] = line[4 * quarter..][..4].try_into().expect("a quarter of a line");
        // SAFETY: `self` proves AVX-512F; sixteen bytes are readable.
        unsafe {
            let exponents = _mm512_cvtepu8_epi32(_mm_loadu_si128(words.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32(exponents, 23))
        }
    }

    #[inline(always)]
    fn load_low_bf16(self, line: &Line) -> __m512 {
        // SAFETY: `self` proves AVX-512F; sixteen words are readable.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(line.as_ptr().cast()), 16)) }
    }

    #[inline(always)]
    fn load_high_bf16(self, line: &Line) -> __m512 {
        // SAFETY: `self` proves AVX-512F; sixteen words are readable.
        unsafe {
            let mask = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
            _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(line.as_ptr().cast()), mask))
        }
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512F.
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512F.
        unsafe { _mm512_div_ps(a, b) }
    }

    #[inline(always)]
    fn greater(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512F. The instruction gives its second operand unless the first is greater.
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    fn if_greater(self, a: __m512, b: __m512, then: __m512, otherwise: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512F.
        unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b), otherwise, then) }
    }

    #[inline(always)]
    fn power_factors(self, shifted: __m512) -> [__m512; 2] {
        // SAFETY: `self` proves AVX-512F.
        unsafe {
            let round = _mm512_set1_epi32(ROUND.to_bits().cast_signed());
            let n = _mm512_sub_epi32(_mm512_castps_si512(shifted), round);
            let low = _mm512_srai_epi32::<1>(n);
            [low, _mm512_sub_epi32(n, low)].map(|n| {
                let biased = _mm512_add_epi32(n, _mm512_set1_epi32(127));
                _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
            })
        }
    }

    /// Pairs of rows, then fours in each quarter of a register, then the quarters.
    #[inline(always)]
    fn transpose(self, rows: [__m512; LANES]) -> [__m512; LANES] {
        let mut out = rows;
        // SAFETY: `self` proves AVX-512F.
        unsafe {
            let mut fours = rows;
            for first in [0, 4, 8, 12] {
                let [a, b, c, d] = [rows[first], rows[first + 1], rows[first + 2], rows[first + 3]];
                let low = [_mm512_unpacklo_ps(a, b), _mm512_unpacklo_ps(c, d)].map(|pair| _mm512_castps_pd(pair));
                let high = [_mm512_unpackhi_ps(a, b), _mm512_unpackhi_ps(c, d)].map(|pair| _mm512_castps_pd(pair));
                fours[first] = _mm512_castpd_ps(_mm512_unpacklo_pd(low[0], low[1]));
                fours[first + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low[0], low[1]));
                fours[first + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high[0], high[1]));
                fours[first + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high[0], high[1]));
            }
            for lane in 0..4 {
                let [a, b, c, d] = [fours[lane], fours[4 + lane], fours[8 + lane], fours[12 + lane]];
                let even = [_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0x88>(c, d)];
                let odd = [_mm512_shuffle_f32x4::<0xdd>(a, b), _mm512_shuffle_f32x4::<0xdd>(c, d)];
                out[lane] = _mm512_shuffle_f32x4::<0x88>(even[0], even[1]);
                out[4 + lane] = _mm512_shuffle_f32x4::<0x88>(odd[0], odd[1]);
                out[8 + lane] = _mm512_shuffle_f32x4::<0xdd>(even[0], even[1]);
                out[12 + lane] = _mm512_shuffle_f32x4::<0xdd>(odd[0], odd[1]);
            }
        }
        out
    }

    #[inline(always)]
    fn load_byte(self, line: &Line, index: usize) -> __m512 {
        // SAFETY: `self` proves AVX-512F; sixteen words are readable.
        unsafe {
            let words = _mm512_loadu_si512(line.as_ptr().cast());
            let high = _mm512_sll_epi32(words, _mm_cvtsi32_si128(24 - 8 * index as i32));
            _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(high))
        }
    }
}
