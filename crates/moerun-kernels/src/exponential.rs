//! exp, erf and what is made of them: one polynomial each, the same operations on every instruction set.
//!
//! All are plain f32 functions of one value, written without a branch so that a loop over them becomes vector code;
//! [`exp_lanes`] is [`exp`] where the lanes are in registers already.

use crate::simd::Simd;

/// `1.5 * 2^23`: adding it leaves the nearest integer in the low bits of the sum.
pub(crate) const ROUND: f32 = 12_582_912.0;
const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// ln 2 as an f32 and what is left of it.
const LN_2_HIGH: f32 = std::f32::consts::LN_2;
const LN_2_LOW: f32 = -1.904_654_2e-9;

/// Largest argument whose exponential is finite.
const EXP_MAX: f32 = 88.722_83;
/// Smallest argument whose exponential is not denormal.
const EXP_MIN: f32 = -87.336_54;

/// e^x within 1 unit in the last place. Below the smallest normal number the result is 0 (on any thread, whether it
/// flushes denormals or not), above the largest it is infinite; a NaN stays a NaN.
///
/// Cody and Waite: x = n ln 2 + r with |r| ≤ ln 2 / 2, then 1 + r + r² q(r) with a Chebyshev fit q of degree 4.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let shifted = x.mul_add(LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN_2_HIGH, x);
    let r = n.mul_add(-LN_2_LOW, r);
    let q = 1.392_692_7e-3_f32;
    let q = q.mul_add(r, 8.363_774e-3);
    let q = q.mul_add(r, 4.166_655e-2);
    let q = q.mul_add(r, 1.666_657_3e-1);
    let q = q.mul_add(r, 0.5);
    let q = q.mul_add(r, 1.0);
    let exp_r = q.mul_add(r, 1.0);
    let factors = power_factors(shifted);
    let result = exp_r * factors[0] * factors[1];
    let result = if x > EXP_MAX { f32::INFINITY } else { result };
    if x < EXP_MIN { 0.0 } else { result }
}

/// [`exp`] of sixteen lanes: the same operations, so the same bits.
#[inline(always)]
pub(crate) fn exp_lanes<S: Simd>(simd: S, x: S::F32s) -> S::F32s {
    let fused = |a, b, c: f32| simd.mul_add(a, b, simd.splat(c));
    let shifted = fused(x, simd.splat(LOG2_E), ROUND);
    let n = simd.sub(shifted, simd.splat(ROUND));
    let r = simd.mul_add(n, simd.splat(-LN_2_HIGH), x);
    let r = simd.mul_add(n, simd.splat(-LN_2_LOW), r);
    let q = fused(simd.splat(1.392_692_7e-3), r, 8.363_774e-3);
    let q = fused(q, r, 4.166_655e-2);
    let q = fused(q, r, 1.666_657_3e-1);
    let q = fused(q, r, 0.5);
    let q = fused(q, r, 1.0);
    let exp_r = fused(q, r, 1.0);
    let factors = simd.power_factors(shifted);
    let result = simd.mul(simd.mul(exp_r, factors[0]), factors[1]);
    let result = simd.if_greater(x, simd.splat(EXP_MAX), simd.splat(f32::INFINITY), result);
    simd.if_greater(simd.splat(EXP_MIN), x, simd.splat(0.0), result)
}

/// Two factors of 2^n, where `shifted` is [`ROUND`] + n: 2^128 alone is not finite while its product with a number
/// below 1 may be.
#[inline(always)]
pub(crate) fn power_factors(shifted: f32) -> [f32; 2] {
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = n >> 1;
    [power_of_two(half), power_of_two(n.wrapping_sub(half))]
}

/// 2^n, -126 ≤ n ≤ 127.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// The error function within 2 units in the last place: an odd polynomial near 0, `1 - exp(t g(t))` beyond, both
/// Chebyshev fits.
#[inline(always)]
pub(crate) fn erf(x: f32) -> f32 {
    let s = x * x;
    let u = -6.012_556e-4_f32;
    let u = u.mul_add(s, 4.997_642e-3);
    let u = u.mul_add(s, -2.676_983e-2);
    let u = u.mul_add(s, 1.128_191_1e-1);
    let u = u.mul_add(s, -3.761_250_4e-1);
    let u = u.mul_add(s, 1.283_791_5e-1);
    let near = u.mul_add(x, x);

    let t = x.abs();
    let t = if t > 4.0 { 4.0 } else { t }; // erf(4) rounds to 1
    let g = 1.046_065_7e-6_f32;
    let g = g.mul_add(t, -3.438_850_8e-5);
    let g = g.mul_add(t, 4.988_25e-4);
    let g = g.mul_add(t, -4.303_789e-3);
    let g = g.mul_add(t, 2.513_955e-2);
    let g = g.mul_add(t, -1.078_556_55e-1);
    let g = g.mul_add(t, -6.341_482e-1);
    let g = g.mul_add(t, -1.128_902_8);
    let far = (1.0 - exp(t * g)).copysign(x);

    if x.abs() > 0.92 { far } else { near }
}

/// `1 / (1 + exp(-x))`.
#[inline(always)]
pub(crate) fn logistic(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `x * sigmoid(x)`.
#[inline(always)]
pub(crate) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// `x / 2 * (1 + erf(x / sqrt(2)))`.
#[inline(always)]
pub(crate) fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2))
}

/// `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`, computed as `x * sigmoid(2 ...)`, which is the same.
#[inline(always)]
pub(crate) fn gelu_tanh(x: f32) -> f32 {
    const TWICE_SQRT_2_OVER_PI: f32 = 1.595_769;
    let inner = (0.044_715 * x * x).mul_add(x, x);
    x / (1.0 + exp(-TWICE_SQRT_2_OVER_PI * inner))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Isa, isa::Kernel, lines::LANES};

    /// Distance from the true value in units of the last place of an f32 of that size.
    fn error_in_ulp(found: f32, truth: f64) -> f64 {
        let rounded = truth.abs() as f32;
        let ulp = f64::from(f32::from_bits(rounded.to_bits() + 1)) - f64::from(rounded);
        (f64::from(found) - truth).abs() / ulp
    }

    /// Worst error in units of the last place over `from..to`.
    fn worst(f: fn(f32) -> f32, truth: fn(f64) -> f64, from: f32, to: f32) -> f64 {
        const STEPS: usize = 300_000;
        (0..=STEPS)
            .map(|step| from + (to - from) * (step as f32 / STEPS as f32))
            .map(|x| error_in_ulp(f(x), truth(f64::from(x))))
            .fold(0.0, f64::max)
    }

    /// erf by its Taylor series, in f64.
    fn erf_series(x: f64) -> f64 {
        let mut term = x;
        let mut sum = x;
        for n in 1..200 {
            let n = f64::from(n);
            term *= -x * x / n;
            sum += term / (2.0 * n + 1.0);
        }
        sum * std::f64::consts::FRAC_2_SQRT_PI
    }

    #[test]
    fn exp_is_within_one_unit_in_the_last_place() {
        for (from, to) in [
            (EXP_MIN, EXP_MAX),
            (-1.0, 1.0),
            (-20.0, 20.0),
            (88.0, EXP_MAX),
            (EXP_MIN, -87.0),
        ] {
            let error = worst(exp, f64::exp, from, to);
            assert!(error < 1.0, "{error} in {from}..{to}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
    }

    #[test]
    fn exp_of_what_has_no_finite_normal_result() {
        for (x, wanted) in [
            (f32::NEG_INFINITY, 0.0),
            (-1e30, 0.0),
            (-100.0, 0.0),
            (EXP_MIN.next_down(), 0.0),
            (EXP_MAX.next_up(), f32::INFINITY),
            (1e30, f32::INFINITY),
            (f32::INFINITY, f32::INFINITY),
        ] {
            assert_eq!(exp(x), wanted, "exp({x})");
        }
        assert!(exp(EXP_MIN) >= f32::MIN_POSITIVE && exp(EXP_MAX).is_finite());
        assert!(f64::from(EXP_MAX.next_up()).exp() > f64::from(f32::MAX));
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn erf_is_within_two_units_in_the_last_place() {
        for (from, to) in [(-4.5, 4.5), (0.0, 1.0), (0.9, 0.95), (1e-20, 1e-10)] {
            let error = worst(erf, erf_series, from, to);
            assert!(error < 2.0, "{error} in {from}..{to}");
        }
        assert_eq!((erf(f32::INFINITY), erf(f32::NEG_INFINITY), erf(0.0)), (1.0, -1.0, 0.0));
        assert!(erf(f32::NAN).is_nan());
    }

    #[test]
    fn activations_agree_with_double_precision() {
        type Case = (&'static str, fn(f32) -> f32, fn(f64) -> f64);
        let cases: [Case; 4] = [
            ("sigmoid", logistic, |x| 1.0 / (1.0 + (-x).exp())),
            ("silu", silu, |x| x / (1.0 + (-x).exp())),
            ("gelu", gelu, |x| {
                0.5 * x * (1.0 + erf_series(x / std::f64::consts::SQRT_2))
            }),
            ("gelu_tanh", gelu_tanh, |x| {
                0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
            }),
        ];
        for (name, f, truth) in cases {
            for step in -60_000..=60_000 {
                let x = step as f32 * 1e-4;
                let (found, wanted) = (f64::from(f(x)), truth(f64::from(x)));
                assert!(
                    (found - wanted).abs() <= 3e-7 + 4e-7 * wanted.abs(),
                    "{name}({x}) = {found}, not {wanted}"
                );
            }
            assert!(f(f32::NAN).is_nan(), "{name}");
            assert_eq!(f(-200.0), 0.0, "{name}");
        }
        assert_eq!(
            (silu(200.0), gelu(200.0), gelu_tanh(200.0), logistic(200.0)),
            (200.0, 200.0, 200.0, 1.0)
        );
        assert_eq!(gelu_tanh(1e20), 1e20);
    }

    #[test]
    fn sixteen_lanes_have_the_bits_of_one_on_every_isa() {
        struct Lanes<'a>(&'a [[f32; LANES]]);
        impl Kernel for Lanes<'_> {
            type Output = Vec<[f32; LANES]>;
            #[inline(always)]
            fn run<S: Simd>(self, simd: S) -> Self::Output {
                self.0
                    .iter()
                    .map(|x| simd.store(exp_lanes(simd, simd.load(x))))
                    .collect()
            }
        }
        let special = [
            0.0,
            -0.0,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
            EXP_MAX,
            EXP_MIN,
            EXP_MAX.next_up(),
            EXP_MIN.next_down(),
            1e30,
            -1e30,
            0.5,
            -0.5,
            88.0,
            -87.0,
            1e-30,
        ];
        let mut x = vec![special];
        x.extend((0..20_000).map(|row| std::array::from_fn(|lane| (row * 16 + lane) as f32 * 6e-4 - 100.0)));
        for isa in Isa::all_available() {
            let found = isa.dispatch(Lanes(&x));
            for (&x, found) in x.as_flattened().iter().zip(found.as_flattened()) {
                let wanted = exp(x);
                assert!(
                    found.to_bits() == wanted.to_bits() || found.is_nan() && wanted.is_nan(),
                    "{isa}: {found}, not exp({x}) = {wanted}"
                );
            }
        }
    }
}
