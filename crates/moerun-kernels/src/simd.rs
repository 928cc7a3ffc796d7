//! Sixteen lanes of f32 on each instruction set; [`Portable`] is the definition of what each operation gives.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

#[cfg(target_arch = "x86_64")]
use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};

pub(crate) use self::portable::Portable;
#[cfg(target_arch = "x86_64")]
pub(crate) use self::{avx2::Avx2, avx512::Avx512};
use crate::{
    isa::Kernel,
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

    /// Asks for a cache line to be brought near, wherever it is; changes nothing.
    #[inline(always)]
    fn prefetch(self, line: *const Line) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a prefetch reads nothing that the program can see, and does not fault.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(line.cast());
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = line;
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
    /// The larger of `a`, which is not negative, and the magnitude of `b`; a NaN if one of them is.
    fn larger_magnitude(self, a: Self::F32s, b: Self::F32s) -> Self::F32s;
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

    // What attention needs besides.

    /// Lane `i` is the bfloat16 in the lower half of `line[i]`.
    fn load_low_bf16(self, line: &Line) -> Self::F32s;
    /// Lane `i` is the bfloat16 in the upper half of `line[i]`.
    fn load_high_bf16(self, line: &Line) -> Self::F32s;
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

/// `1.5 * 2^52`.
const ROUND_F64: f64 = 6_755_399_441_055_744.0;
const TWO_32: f64 = (1_u64 << 32) as f64;

/// The integer nearest to `value`, ties to even, for `|value| < 2^63`.
///
/// In two halves, because not every instruction set converts f64 to i64: the multiple of 2^32 nearest to the value, and
/// the rest, which is exact and at most 2^31. Adding 1.5 * 2^52 to an f64 leaves the nearest integer, ties to even, in
/// its low bits; the multiple of 2^32 is even, so the tie goes the same way as that of the whole.
#[inline(always)]
fn nearest(value: f32) -> i64 {
    let value = f64::from(value);
    let upper_shifted = value * (1.0 / TWO_32) + ROUND_F64;
    let upper = upper_shifted - ROUND_F64;
    let lower_shifted = (value - upper * TWO_32) + ROUND_F64;
    let upper = (upper_shifted.to_bits() as i64).wrapping_sub(ROUND_F64.to_bits() as i64);
    let lower = (lower_shifted.to_bits() as i64).wrapping_sub(ROUND_F64.to_bits() as i64);
    (upper << 32).wrapping_add(lower)
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

    /// Whether all of the values are below 2 in magnitude, asked of each and of the larger of each and 1.
    struct Below2([f32; LANES]);

    impl Kernel for Below2 {
        type Output = bool;

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> bool {
            let values = simd.load(&self.0);
            let larger = simd.larger_magnitude(simd.larger_magnitude(simd.splat(1.0), values), simd.splat(0.5));
            let all_below = simd.all_below(values, simd.splat(2.0));
            assert_eq!(simd.all_below(larger, simd.splat(2.0)), all_below);
            assert!(!simd.all_below(larger, simd.splat(1.0)), "the larger one stays");
            all_below
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
