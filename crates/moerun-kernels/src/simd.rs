//! Sixteen lanes of f32 on each instruction set; [`Portable`] is the definition of what each operation gives.

#[cfg(target_arch = "x86_64")]
use core::arch::x86_64::*;

use crate::{
    exponential::{ROUND, power_factors},
    lines::{LANES, Line},
};

/// Sixteen f32 lanes. A value of the implementing type is the proof that its instructions can run.
pub(crate) trait Simd: Copy {
    /// Sixteen f32 in registers.
    type F32s: Copy;

    /// Rows of a product that are computed together, largest first, down to one.
    const TILE_ROWS: &'static [usize];

    /// Whether the registers hold two panels beside up to twelve rows; else one panel beside up to six.
    const WIDE: bool;

    /// `value` in each lane.
    fn splat(self, value: f32) -> Self::F32s;
    /// Lane `i` is `values[i]`.
    fn load(self, values: &[f32; LANES]) -> Self::F32s;
    /// Lane `i` has the bits `line[i]`.
    fn load_bits(self, line: &Line) -> Self::F32s;
    /// Lane `i` is the bfloat16 in the lower half of `line[i]`.
    fn load_low_bf16(self, line: &Line) -> Self::F32s;
    /// Lane `i` is the bfloat16 in the upper half of `line[i]`.
    fn load_high_bf16(self, line: &Line) -> Self::F32s;
    /// The lanes as an array.
    fn store(self, lanes: Self::F32s) -> [f32; LANES];
    /// `a + b`.
    fn add(self, a: Self::F32s, b: Self::F32s) -> Self::F32s;
    /// `a * b`.
    fn mul(self, a: Self::F32s, b: Self::F32s) -> Self::F32s;
    /// `a * b + c`, rounded once.
    fn mul_add(self, a: Self::F32s, b: Self::F32s, c: Self::F32s) -> Self::F32s;

    // What attention needs besides.

    /// `a - b`.
    fn sub(self, a: Self::F32s, b: Self::F32s) -> Self::F32s;
    /// `a / b`.
    fn div(self, a: Self::F32s, b: Self::F32s) -> Self::F32s;
    /// `if a > b { a } else { b }`.
    fn greater(self, a: Self::F32s, b: Self::F32s) -> Self::F32s;
    /// `if a > b { then } else { otherwise }`.
    fn if_greater(self, a: Self::F32s, b: Self::F32s, then: Self::F32s, otherwise: Self::F32s) -> Self::F32s;
    /// Two factors of `2^n`, where `shifted` is `1.5 * 2^23 + n`: see [`power_factors`].
    fn power_factors(self, shifted: Self::F32s) -> [Self::F32s; 2];
    /// Lane `i` of row `j` of the result is lane `j` of `rows[i]`.
    fn transpose(self, rows: [Self::F32s; LANES]) -> [Self::F32s; LANES];
    /// Lane `i` is the signed byte `index` of `line[i]`, the lowest being byte 0.
    fn load_byte(self, line: &Line, index: usize) -> Self::F32s;
    /// Asks for `line` to be brought near; changes nothing.
    fn prefetch(self, line: &Line);
}

/// Adds up sixteen lanes: upper half onto lower half, four times.
#[inline(always)]
pub(crate) fn sum_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// No instruction beyond the target's baseline.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Portable;

impl Simd for Portable {
    type F32s = [f32; LANES];
    const TILE_ROWS: &'static [usize] = &[4, 2, 1];
    const WIDE: bool = false;

    #[inline(always)]
    fn splat(self, value: f32) -> [f32; LANES] {
        [value; LANES]
    }

    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> [f32; LANES] {
        *values
    }

    #[inline(always)]
    fn load_bits(self, line: &Line) -> [f32; LANES] {
        line.map(f32::from_bits)
    }

    #[inline(always)]
    fn load_low_bf16(self, line: &Line) -> [f32; LANES] {
        line.map(|word| f32::from_bits(word << 16))
    }

    #[inline(always)]
    fn load_high_bf16(self, line: &Line) -> [f32; LANES] {
        line.map(|word| f32::from_bits(word & 0xffff_0000))
    }

    #[inline(always)]
    fn store(self, lanes: [f32; LANES]) -> [f32; LANES] {
        lanes
    }

    #[inline(always)]
    fn add(self, a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|lane| a[lane] + b[lane])
    }

    #[inline(always)]
    fn mul(self, a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|lane| a[lane] * b[lane])
    }

    #[inline(always)]
    fn mul_add(self, a: [f32; LANES], b: [f32; LANES], c: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|lane| a[lane].mul_add(b[lane], c[lane]))
    }

    #[inline(always)]
    fn sub(self, a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|lane| a[lane] - b[lane])
    }

    #[inline(always)]
    fn div(self, a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|lane| a[lane] / b[lane])
    }

    #[inline(always)]
    fn greater(self, a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        self.if_greater(a, b, a, b)
    }

    #[inline(always)]
    fn if_greater(self, a: [f32; LANES], b: [f32; LANES], then: [f32; LANES], otherwise: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|lane| if a[lane] > b[lane] { then[lane] } else { otherwise[lane] })
    }

    #[inline(always)]
    fn power_factors(self, shifted: [f32; LANES]) -> [[f32; LANES]; 2] {
        [0, 1].map(|factor| shifted.map(|shifted| power_factors(shifted)[factor]))
    }

    #[inline(always)]
    fn transpose(self, rows: [[f32; LANES]; LANES]) -> [[f32; LANES]; LANES] {
        std::array::from_fn(|lane| rows.map(|row| row[lane]))
    }

    #[inline(always)]
    fn load_byte(self, line: &Line, index: usize) -> [f32; LANES] {
        line.map(|word| f32::from((word >> (8 * index)) as i8))
    }

    #[inline(always)]
    fn prefetch(self, _line: &Line) {}
}

/// AVX2 with FMA: two registers of eight lanes.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx2(());

#[cfg(target_arch = "x86_64")]
impl Avx2 {
    /// # Safety
    /// The processor must have AVX2 and FMA.
    pub(crate) unsafe fn assume_available() -> Self {
        Avx2(())
    }
}

// In each block below: a value of `Avx2` exists only where AVX2 and FMA do, and every pointer comes from a reference
// to sixteen elements.
#[cfg(target_arch = "x86_64")]
impl Simd for Avx2 {
    type F32s = [__m256; 2];
    const TILE_ROWS: &'static [usize] = &[6, 4, 2, 1];
    const WIDE: bool = false;

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

    #[inline(always)]
    fn prefetch(self, line: &Line) {
        // SAFETY: every processor with AVX has SSE; nothing is read.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) }
    }
}

/// Eight rows of eight lanes, turned over: pairs of rows, then fours in each half of a register, then the halves.
///
/// # Safety
/// The processor must have AVX.
#[cfg(target_arch = "x86_64")]
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

/// AVX-512 F, BW, VL and DQ: one register of sixteen lanes.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512(());

#[cfg(target_arch = "x86_64")]
impl Avx512 {
    /// # Safety
    /// The processor must have AVX-512 F, BW, VL and DQ, AVX2 and FMA.
    pub(crate) unsafe fn assume_available() -> Self {
        Avx512(())
    }
}

// In each block below: a value of `Avx512` exists only where AVX-512 does, and every pointer comes from a reference to
// sixteen elements.
#[cfg(target_arch = "x86_64")]
impl Simd for Avx512 {
    type F32s = __m512;
    const TILE_ROWS: &'static [usize] = &[12, 8, 4, 2, 1];
    const WIDE: bool = true;

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

    #[inline(always)]
    fn prefetch(self, line: &Line) {
        // SAFETY: every processor with AVX has SSE; nothing is read.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) }
    }
}
