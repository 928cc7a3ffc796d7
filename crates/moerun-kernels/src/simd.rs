//! Sixteen lanes of f32 on each instruction set; [`Portable`] is the definition of what each operation gives.

#[cfg(target_arch = "x86_64")]
use core::arch::x86_64::*;

#[cfg(target_arch = "x86_64")]
use crate::isa::{run_avx2, run_avx512};
use crate::{
    isa::{Kernel, run_portable},
    lines::{LANES, Line},
};

/// Sixteen f32 lanes. A value of the implementing type is the proof that its instructions can run.
pub(crate) trait Simd: Copy {
    /// Sixteen f32 in registers.
    type F32s: Copy;

    /// A line of pairs of bfloat16, one pair per lane.
    type Bf16Pairs: Copy;
    /// A line of signed bytes, four per lane.
    type I8Quads: Copy;
    /// Sixty-four small bytes (at most 127), four per lane.
    type U8Quads: Copy;
    /// Sixteen i32 in registers.
    type I32s: Copy;
    /// Sixteen i64 in registers.
    type I64s: Copy;

    /// Rows of a product that are computed together, largest first, down to one.
    const TILE_ROWS: &'static [usize];
    /// The same where the weights are blocks of codes: these need registers for the integer sums too.
    const BLOCK_TILE_ROWS: &'static [usize];
    /// What [`Simd::dot_i8`] adds to each weight.
    const I8_BIAS: i32;

    /// Whether the registers hold two panels beside up to twelve rows; else one panel beside up to six.
    const WIDE: bool;

    /// Runs `kernel` in a function of its own, compiled for this instruction set once, whoever calls it.
    fn call<K: Kernel>(self, kernel: K) -> K::Output;

    /// Asks for the cache line `ahead` lines behind `line`, wherever that is.
    #[inline(always)]
    fn prefetch(self, line: &Line, ahead: usize) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a prefetch reads nothing that the program can see, and does not fault.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(line).wrapping_add(ahead).cast());
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (line, ahead);
    }

    /// `value` in each lane.
    fn splat(self, value: f32) -> Self::F32s;
    /// Lane `i` is `values[i]`.
    fn load(self, values: &[f32; LANES]) -> Self::F32s;
    /// Lane `i` has the bits `line[i]`.
    fn load_bits(self, line: &Line) -> Self::F32s;
    /// The lanes as an array.
    fn store(self, lanes: Self::F32s) -> [f32; LANES];
    /// `a + b`.
    fn add(self, a: Self::F32s, b: Self::F32s) -> Self::F32s;
    /// `a * b`.
    fn mul(self, a: Self::F32s, b: Self::F32s) -> Self::F32s;
    /// `a * b + c`, rounded once.
    fn mul_add(self, a: Self::F32s, b: Self::F32s, c: Self::F32s) -> Self::F32s;

    /// Lane `i` is the pair of bfloat16 in `line[i]`.
    fn load_bf16_pairs(self, line: &Line) -> Self::Bf16Pairs;
    /// Two fused multiply-adds onto `sum`, the pairs' upper halves first: `weights` times `x`, a pair for all lanes.
    fn dot_bf16(self, weights: Self::Bf16Pairs, x: u32, sum: Self::F32s) -> Self::F32s;

    /// Zeroes.
    fn zero_i64(self) -> Self::I64s;
    /// `sums` and `values`, each rounded to the nearest integer, ties to even, added with wrapping. What is not below
    /// 2^63 in magnitude adds anything.
    fn add_rounded(self, sums: Self::I64s, values: Self::F32s) -> Self::I64s;
    /// Adds `sums` to `out` with wrapping.
    fn add_to(self, sums: Self::I64s, out: &mut [i64; LANES]);
    /// Whether all `values` are below `limit` in magnitude; a NaN is not.
    fn all_below(self, values: Self::F32s, limit: Self::F32s) -> bool;

    /// `value` in each lane.
    fn splat_i32(self, value: i32) -> Self::I32s;
    /// The lanes as f32; exact below 2^24.
    fn to_f32(self, lanes: Self::I32s) -> Self::F32s;
    /// Signed bytes, stored with 128 added.
    fn load_i8_quads(self, line: &Line) -> Self::I8Quads;
    /// `sum` and, lane by lane, the four products of `weights + I8_BIAS` with the four signed bytes of `x`, which are
    /// not -128.
    fn dot_i8(self, weights: Self::I8Quads, x: u32, sum: Self::I32s) -> Self::I32s;
    /// The lower half of every byte.
    fn load_low_nibbles(self, line: &Line) -> Self::U8Quads;
    /// The upper half of every byte.
    fn load_high_nibbles(self, line: &Line) -> Self::U8Quads;
    /// `table[code]` for every code, all below 16.
    fn look_up(self, table: &[u8; 16], codes: Self::U8Quads) -> Self::U8Quads;
    /// `sum` and, lane by lane, the four products of `weights`, at most 127, with the four signed bytes of `x`.
    fn dot_u8(self, weights: Self::U8Quads, x: u32, sum: Self::I32s) -> Self::I32s;
    /// Sixteen f16 from one half of a line: lanes `2 i` and `2 i + 1` in word `8 * half + i`.
    fn load_f16(self, line: &Line, half: usize) -> Self::F32s;
    /// Sixteen powers of two from a quarter of a line, a biased exponent in a byte each: byte `i` of the quarter is
    /// lane `i`; an exponent of 0 gives 0.
    fn load_e8m0(self, line: &Line, quarter: usize) -> Self::F32s;
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

/// The integer nearest to `value`, ties to even, for `|value| < 2^63`.
///
/// In two halves, because not every instruction set converts f64 to i64: the multiple of 2^32 nearest to the value, and
/// the rest, which is exact and at most 2^31. Adding 1.5 * 2^52 to an f64 leaves the nearest integer, ties to even, in
/// its low bits; the multiple of 2^32 is even, so the tie goes the same way as that of the whole.
#[inline(always)]
fn nearest(value: f32) -> i64 {
    const ROUND: f64 = 6_755_399_441_055_744.0;
    const TWO_32: f64 = (1_u64 << 32) as f64;
    let value = f64::from(value);
    let upper_shifted = value * (1.0 / TWO_32) + ROUND;
    let upper = upper_shifted - ROUND;
    let lower_shifted = (value - upper * TWO_32) + ROUND;
    let upper = (upper_shifted.to_bits() as i64).wrapping_sub(ROUND.to_bits() as i64);
    let lower = (lower_shifted.to_bits() as i64).wrapping_sub(ROUND.to_bits() as i64);
    (upper << 32).wrapping_add(lower)
}

/// No instruction beyond the target's baseline.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Portable;

impl Simd for Portable {
    type F32s = [f32; LANES];
    type Bf16Pairs = Line;
    type I8Quads = Line;
    type U8Quads = Line;
    type I32s = [i32; LANES];
    type I64s = [i64; LANES];
    const TILE_ROWS: &'static [usize] = &[4, 2, 1];
    const BLOCK_TILE_ROWS: &'static [usize] = &[4, 2, 1];
    const I8_BIAS: i32 = 0;
    const WIDE: bool = false;

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        run_portable(kernel)
    }

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
    fn load_bf16_pairs(self, line: &Line) -> Line {
        *line
    }

    #[inline(always)]
    fn dot_bf16(self, weights: Line, x: u32, sum: [f32; LANES]) -> [f32; LANES] {
        let (x_high, x_low) = (f32::from_bits(x & 0xffff_0000), f32::from_bits(x << 16));
        std::array::from_fn(|lane| {
            let high = x_high.mul_add(f32::from_bits(weights[lane] & 0xffff_0000), sum[lane]);
            x_low.mul_add(f32::from_bits(weights[lane] << 16), high)
        })
    }

    #[inline(always)]
    fn zero_i64(self) -> [i64; LANES] {
        [0; LANES]
    }

    #[inline(always)]
    fn add_rounded(self, sums: [i64; LANES], values: [f32; LANES]) -> [i64; LANES] {
        let mut sums = sums;
        for (sum, value) in sums.iter_mut().zip(self.store(values)) {
            *sum = sum.wrapping_add(nearest(value));
        }
        sums
    }

    #[inline(always)]
    fn add_to(self, sums: [i64; LANES], out: &mut [i64; LANES]) {
        out.iter_mut()
            .zip(sums)
            .for_each(|(out, sum)| *out = out.wrapping_add(sum));
    }

    #[inline(always)]
    fn all_below(self, values: [f32; LANES], limit: [f32; LANES]) -> bool {
        let mut all = true;
        for (value, limit) in self.store(values).into_iter().zip(self.store(limit)) {
            all &= value.abs() < limit;
        }
        all
    }

    #[inline(always)]
    fn splat_i32(self, value: i32) -> [i32; LANES] {
        [value; LANES]
    }

    #[inline(always)]
    fn to_f32(self, lanes: [i32; LANES]) -> [f32; LANES] {
        lanes.map(|lane| lane as f32)
    }

    #[inline(always)]
    fn load_i8_quads(self, line: &Line) -> Line {
        line.map(|word| word ^ 0x8080_8080)
    }

    #[inline(always)]
    fn dot_i8(self, weights: Line, x: u32, sum: [i32; LANES]) -> [i32; LANES] {
        let byte = |word: u32, index: u32| i32::from((word >> (8 * index)) as u8 as i8);
        std::array::from_fn(|lane| (0..4).fold(sum[lane], |sum, i| sum + byte(weights[lane], i) * byte(x, i)))
    }

    #[inline(always)]
    fn load_low_nibbles(self, line: &Line) -> Line {
        line.map(|word| word & 0x0f0f_0f0f)
    }

    #[inline(always)]
    fn load_high_nibbles(self, line: &Line) -> Line {
        line.map(|word| (word >> 4) & 0x0f0f_0f0f)
    }

    #[inline(always)]
    fn look_up(self, table: &[u8; 16], codes: Line) -> Line {
        codes.map(|word| u32::from_le_bytes(word.to_le_bytes().map(|code| table[usize::from(code & 15)])))
    }

    #[inline(always)]
    fn dot_u8(self, weights: Line, x: u32, sum: [i32; LANES]) -> [i32; LANES] {
        self.dot_i8(weights, x, sum)
    }

    #[inline(always)]
    fn load_f16(self, line: &Line, half: usize) -> [f32; LANES] {
        std::array::from_fn(|lane| {
            half::f16::from_bits((line[8 * half + lane / 2] >> (16 * (lane % 2))) as u16).to_f32()
        })
    }

    #[inline(always)]
    fn load_e8m0(self, line: &Line, quarter: usize) -> [f32; LANES] {
        std::array::from_fn(|lane| f32::from_bits((line[4 * quarter + lane / 4] >> (8 * (lane % 4)) & 0xff) << 23))
    }
}

/// AVX2 with FMA and F16C: two registers of eight lanes.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx2(());

#[cfg(target_arch = "x86_64")]
impl Avx2 {
    /// # Safety
    /// The processor must have AVX2, FMA and F16C.
    pub(crate) unsafe fn assume_available() -> Self {
        Avx2(())
    }
}

// In each block below: a value of `Avx2` exists only where AVX2, FMA and F16C do, and every pointer comes from a
// reference to sixteen elements.
#[cfg(target_arch = "x86_64")]
impl Simd for Avx2 {
    type F32s = [__m256; 2];
    /// Upper and lower halves, widened.
    type Bf16Pairs = [[__m256; 2]; 2];
    /// The bytes and their magnitudes: an instruction that multiplies two signed bytes does not exist.
    type I8Quads = [[__m256i; 2]; 2];
    type U8Quads = [__m256i; 2];
    type I32s = [__m256i; 2];
    type I64s = [i64; LANES];
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
    fn zero_i64(self) -> [i64; LANES] {
        [0; LANES]
    }

    #[inline(always)]
    fn add_rounded(self, sums: [i64; LANES], values: [__m256; 2]) -> [i64; LANES] {
        let mut sums = sums;
        for (sum, value) in sums.iter_mut().zip(self.store(values)) {
            *sum = sum.wrapping_add(nearest(value));
        }
        sums
    }

    #[inline(always)]
    fn add_to(self, sums: [i64; LANES], out: &mut [i64; LANES]) {
        out.iter_mut()
            .zip(sums)
            .for_each(|(out, sum)| *out = out.wrapping_add(sum));
    }

    #[inline(always)]
    fn all_below(self, values: [__m256; 2], limit: [__m256; 2]) -> bool {
        let mut all = true;
        for (value, limit) in self.store(values).into_iter().zip(self.store(limit)) {
            all &= value.abs() < limit;
        }
        all
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
}

/// AVX-512 F, BW, VL, DQ, BF16 and VNNI: one register of sixteen lanes.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512(());

#[cfg(target_arch = "x86_64")]
impl Avx512 {
    /// # Safety
    /// The processor must have AVX-512 F, BW, VL, DQ, BF16 and VNNI, AVX2, FMA and F16C.
    pub(crate) unsafe fn assume_available() -> Self {
        Avx512(())
    }
}

// In each block below: a value of `Avx512` exists only where AVX-512 does, and every pointer comes from a reference to
// sixteen elements.
#[cfg(target_arch = "x86_64")]
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Isa, test_data::Rng};

    /// `values` rounded and added to 7.
    struct Rounded<'a>(&'a [f32; LANES]);

    impl Kernel for Rounded<'_> {
        type Output = [i64; LANES];

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> [i64; LANES] {
            let mut out = [7; LANES];
            simd.add_to(simd.add_rounded(simd.zero_i64(), simd.load(self.0)), &mut out);
            out
        }
    }

    #[test]
    fn rounding_is_to_the_nearest_integer_with_ties_to_even() {
        let mut rng = Rng::new(1);
        let largest = 2.0_f32.powi(63).next_down();
        let special = [
            0.0,
            0.5,
            1.5,
            2.5,
            -0.5,
            -1.5,
            largest,
            -largest,
            2.0_f32.powi(32),
            0.49,
            1e-30,
            -2.5,
        ];
        for round in 0..20_000 {
            let values: [f32; LANES] = std::array::from_fn(|lane| match special.get(lane) {
                Some(&value) if round == 0 => value,
                _ => rng.value() * 2.0_f32.powi(rng.below(75) as i32 - 12),
            });
            let wanted = values.map(|value| f64::from(value).round_ties_even() as i64 + 7);
            for isa in Isa::all_available() {
                assert_eq!(isa.dispatch(Rounded(&values)), wanted, "{values:?}, {isa}");
            }
        }
    }

    /// Whether all of the values are below 2.
    struct Below2([f32; LANES]);

    impl Kernel for Below2 {
        type Output = bool;

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> bool {
            simd.all_below(simd.load(&self.0), simd.splat(2.0))
        }
    }

    #[test]
    fn a_value_at_the_limit_or_not_a_number_is_not_below_it() {
        for isa in Isa::all_available() {
            assert!(isa.dispatch(Below2([-1.999; LANES])), "{isa}");
            for bad in [2.0, -2.0, f32::INFINITY, f32::NAN] {
                for lane in [0, 7, 8, 15] {
                    let mut values = [1.0; LANES];
                    values[lane] = bad;
                    assert!(!isa.dispatch(Below2(values)), "{isa}, {bad} in lane {lane}");
                }
            }
        }
    }
}
