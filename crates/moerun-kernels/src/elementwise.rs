//! Softmax and sigmoid.

use crate::{
    Isa,
    exponential::{exp, logistic},
    isa::Kernel,
    lines::LANES,
    simd::{Simd, sum_lanes},
};

/// Softmax of one row in place; the maximum is subtracted first.
///
/// Element `i` is added to partial sum `i % 16` in ascending order, the sixteen sums upper half onto lower half. A row
/// with a NaN, with +∞ or with nothing but -∞ becomes NaN.
pub fn softmax(row: &mut [f32]) {
    softmax_on(Isa::current(), row);
}

pub(crate) fn softmax_on(isa: Isa, row: &mut [f32]) {
    isa.dispatch(Softmax { row });
}

/// `1 / (1 + exp(-x))`.
pub fn sigmoid(x: f32) -> f32 {
    logistic(x)
}

struct Softmax<'a> {
    row: &'a mut [f32],
}

impl Kernel for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        let max = max_of(self.row);
        for value in self.row.iter_mut() {
            *value = exp(*value - max);
        }
        let (chunks, rest) = self.row.as_chunks::<LANES>();
        let mut sums = [0.0; LANES];
        for chunk in chunks {
            for lane in 0..LANES {
                sums[lane] += chunk[lane];
            }
        }
        for (sum, value) in sums.iter_mut().zip(rest) {
            *sum += value;
        }
        let sum = sum_lanes(sums);
        for value in self.row.iter_mut() {
            *value /= sum;
        }
    }
}

/// The largest value; NaNs are passed over. Compared, not `f32::max`ed: one instruction, and the same one everywhere.
#[inline(always)]
fn max_of(row: &[f32]) -> f32 {
    let (chunks, rest) = row.as_chunks::<LANES>();
    let mut max = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for lane in 0..LANES {
            max[lane] = if chunk[lane] > max[lane] {
                chunk[lane]
            } else {
                max[lane]
            };
        }
    }
    max.iter()
        .chain(rest)
        .fold(f32::NEG_INFINITY, |max, &value| if value > max { value } else { max })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_data::Rng;

    #[test]
    fn softmax_agrees_with_double_precision_and_has_the_same_bits_on_every_isa() {
        for seed in 0..60 {
            let mut rng = Rng::new(seed);
            let len = 1 + rng.below(100);
            let scale = [1.0, 10.0, 100.0][rng.below(3)];
            let row: Vec<f32> = rng.vec(len).iter().map(|value| value * scale).collect();
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let exps: Vec<f64> = row
                .iter()
                .map(|&value| (f64::from(value) - f64::from(max)).exp())
                .collect();
            let sum: f64 = exps.iter().sum();
            let mut expected = row.clone();
            softmax_on(Isa::Portable, &mut expected);
            for (found, exp) in expected.iter().zip(&exps) {
                assert!((f64::from(*found) - exp / sum).abs() < 1e-6, "seed {seed}");
            }
            for isa in Isa::all_available() {
                let mut found = row.clone();
                softmax_on(isa, &mut found);
                let same = found.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "seed {seed}, {isa}");
            }
        }
    }

    #[test]
    fn masked_elements_weigh_nothing_and_a_nan_is_not_swallowed() {
        let mut row = [f32::NEG_INFINITY, 1.0, f32::NEG_INFINITY, 1.0];
        softmax(&mut row);
        assert_eq!(row, [0.0, 0.5, 0.0, 0.5]);
        let mut row = [0.0, f32::NAN, 1.0];
        softmax(&mut row);
        assert!(row.iter().all(|value| value.is_nan()));
        softmax(&mut []);
    }

    #[test]
    fn sigmoid_has_the_bits_of_its_vector_form() {
        struct Each<'a>(&'a mut [f32]);
        impl Kernel for Each<'_> {
            type Output = ();
            #[inline(always)]
            fn run<S: Simd>(self, _simd: S) {
                for value in self.0.iter_mut() {
                    *value = logistic(*value);
                }
            }
        }
        let x: Vec<f32> = Rng::new(3).vec(1000).iter().map(|value| value * 20.0).collect();
        for isa in Isa::all_available() {
            let mut found = x.clone();
            isa.dispatch(Each(&mut found));
            assert!(
                found
                    .iter()
                    .zip(&x)
                    .all(|(found, &x)| found.to_bits() == sigmoid(x).to_bits()),
                "{isa}"
            );
        }
    }
}
