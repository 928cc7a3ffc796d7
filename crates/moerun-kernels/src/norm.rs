//! RMS norm and layer norm.
//!
//! Sums over a row are made in one order: element `i` goes to partial sum `i % 16`, ascending, then the sixteen sums
//! are added upper half onto lower half.

use ndarray::{ArrayView2, ArrayViewMut2};

use crate::{
    Isa,
    isa::Kernel,
    lines::LANES,
    simd::{Simd, sum_lanes},
};

/// Root-mean-square norm of each row: `x / sqrt(mean(x^2) + epsilon) * weight`, `[tokens, n]`, `weight` `[n]`.
/// Panics if shapes differ.
pub fn rms_norm(x: ArrayView2<'_, f32>, weight: &[f32], epsilon: f32, out: ArrayViewMut2<'_, f32>) {
    assert_eq!(weight.len(), x.ncols(), "length of the norm's weight");
    each_row(x, out, Norm::Rms { weight, epsilon });
}

/// RMS norm without weights, in place over each row.
pub fn rms_norm_weightless(mut x: ArrayViewMut2<'_, f32>, epsilon: f32) {
    for mut row in x.rows_mut() {
        match row.as_slice_mut() {
            Some(row) => Isa::current().dispatch(RmsInPlace { row, epsilon }),
            None => {
                let mut copy = row.to_vec();
                let (row_copy, epsilon) = (&mut copy[..], epsilon);
                Isa::current().dispatch(RmsInPlace { row: row_copy, epsilon });
                row.iter_mut().zip(copy).for_each(|(out, value)| *out = value);
            }
        }
    }
}

struct RmsInPlace<'a> {
    row: &'a mut [f32],
    epsilon: f32,
}

impl Kernel for RmsInPlace<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let scale = rms_scale(simd, self.row, self.epsilon);
        self.row.iter_mut().for_each(|value| *value *= scale);
    }
}

/// Layer norm of each row: `(x - mean) / sqrt(var + epsilon) * weight + bias`. Panics if shapes differ.
pub fn layer_norm(x: ArrayView2<'_, f32>, weight: &[f32], bias: &[f32], epsilon: f32, out: ArrayViewMut2<'_, f32>) {
    assert_eq!(
        (weight.len(), bias.len()),
        (x.ncols(), x.ncols()),
        "length of the norm's weight and bias"
    );
    each_row(x, out, Norm::Layer { weight, bias, epsilon });
}

fn each_row(x: ArrayView2<'_, f32>, mut out: ArrayViewMut2<'_, f32>, norm: Norm<'_>) {
    assert_eq!(x.dim(), out.dim(), "shapes of input and output of a norm");
    for (x, mut out) in x.rows().into_iter().zip(out.rows_mut()) {
        let x = x
            .to_slice()
            .map_or_else(|| x.to_vec().into(), std::borrow::Cow::Borrowed);
        match out.as_slice_mut() {
            Some(out) => norm.row(Isa::current(), &x, out),
            None => {
                let mut normed = vec![0.0; x.len()];
                norm.row(Isa::current(), &x, &mut normed);
                out.iter_mut().zip(normed).for_each(|(out, value)| *out = value);
            }
        }
    }
}

#[derive(Clone, Copy)]
enum Norm<'a> {
    Rms {
        weight: &'a [f32],
        epsilon: f32,
    },
    Layer {
        weight: &'a [f32],
        bias: &'a [f32],
        epsilon: f32,
    },
}

impl Norm<'_> {
    fn row(self, isa: Isa, x: &[f32], out: &mut [f32]) {
        isa.dispatch(NormRow { norm: self, x, out });
    }
}

struct NormRow<'a> {
    norm: Norm<'a>,
    x: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for NormRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { norm, x, out } = self;
        match norm {
            Norm::Rms { weight, epsilon } => {
                let scale = rms_scale(simd, x, epsilon);
                for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
                    *out = x * scale * weight;
                }
            }
            Norm::Layer { weight, bias, epsilon } => {
                let n = x.len() as f32;
                let mean = sum(simd, x) / n;
                let scale = 1.0 / (sum_of_squares(simd, x, mean) / n + epsilon).sqrt();
                for (((out, &x), &weight), &bias) in out.iter_mut().zip(x).zip(weight).zip(bias) {
                    *out = ((x - mean) * scale).mul_add(weight, bias);
                }
            }
        }
    }
}

/// `1 / sqrt(mean(x^2) + epsilon)`.
#[inline(always)]
fn rms_scale<S: Simd>(simd: S, x: &[f32], epsilon: f32) -> f32 {
    1.0 / (sum_of_squares(simd, x, 0.0) / x.len() as f32 + epsilon).sqrt()
}

#[inline(always)]
fn sum<S: Simd>(simd: S, x: &[f32]) -> f32 {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut sums = simd.splat(0.0);
    for chunk in chunks {
        sums = simd.add(sums, simd.load(chunk));
    }
    let mut sums = simd.store(sums);
    for (sum, value) in sums.iter_mut().zip(rest) {
        *sum += value;
    }
    sum_lanes(sums)
}

/// Sum of `(x - mean)^2`.
#[inline(always)]
fn sum_of_squares<S: Simd>(simd: S, x: &[f32], mean: f32) -> f32 {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut sums = simd.splat(0.0);
    for chunk in chunks {
        let difference = simd.add(simd.load(chunk), simd.splat(-mean));
        sums = simd.mul_add(difference, difference, sums);
    }
    let mut sums = simd.store(sums);
    for (sum, value) in sums.iter_mut().zip(rest) {
        let difference = value - mean;
        *sum = difference.mul_add(difference, *sum);
    }
    sum_lanes(sums)
}

#[cfg(test)]
mod tests {
    use ndarray::{Array2, s};

    use super::*;
    use crate::test_data::Rng;

    #[test]
    fn norms_agree_with_double_precision_and_have_the_same_bits_on_every_isa() {
        for seed in 0..80 {
            let mut rng = Rng::new(seed);
            let len = 1 + rng.below(100);
            let offset = rng.value() * 3.0;
            let x: Vec<f32> = rng.vec(len).iter().map(|value| value + offset).collect();
            let (weight, bias) = (rng.vec(len), rng.vec(len));
            let n = len as f64;
            let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
            let variance = x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n;
            let mean_square = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n;
            let norms = [
                Norm::Rms {
                    weight: &weight,
                    epsilon: 1e-5,
                },
                Norm::Layer {
                    weight: &weight,
                    bias: &bias,
                    epsilon: 1e-5,
                },
            ];
            for (kind, norm) in norms.into_iter().enumerate() {
                let mut expected = vec![f32::NAN; len];
                norm.row(Isa::Portable, &x, &mut expected);
                for index in 0..len {
                    let (x, weight, bias) = (f64::from(x[index]), f64::from(weight[index]), f64::from(bias[index]));
                    let truth = match kind {
                        0 => x / (mean_square + 1e-5).sqrt() * weight,
                        _ => (x - mean) / (variance + 1e-5).sqrt() * weight + bias,
                    };
                    let found = f64::from(expected[index]);
                    assert!(
                        (found - truth).abs() < 2e-5 + 1e-5 * truth.abs(),
                        "seed {seed}: {found}, not {truth}"
                    );
                }
                for isa in Isa::all_available() {
                    let mut found = vec![f32::NAN; len];
                    norm.row(isa, &x, &mut found);
                    assert!(
                        found.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits()),
                        "seed {seed} {isa}"
                    );
                }
            }
        }
    }

    #[test]
    fn views_of_any_layout_are_normed_row_by_row() {
        let mut rng = Rng::new(1);
        let (x, weight, bias) = (rng.array(4, 20), rng.vec(20), rng.vec(20));
        let mut expected = Array2::zeros((4, 20));
        layer_norm(x.view(), &weight, &bias, 1e-6, expected.view_mut());
        let transposed = x.t().as_standard_layout().into_owned();
        let mut out = Array2::zeros((20, 4));
        layer_norm(transposed.t(), &weight, &bias, 1e-6, out.view_mut().reversed_axes());
        assert_eq!(out.t(), expected);

        let mut normed = Array2::zeros((4, 20));
        rms_norm(x.view(), &[1.0; 20], 1e-6, normed.view_mut());
        let mut in_place = x.clone();
        rms_norm_weightless(in_place.view_mut(), 1e-6);
        assert_eq!(in_place, normed);
        let mut columns = transposed;
        rms_norm_weightless(columns.view_mut().reversed_axes(), 1e-6);
        assert_eq!(columns.t(), normed);
        rms_norm(x.slice(s![..0, ..]), &weight, 1e-6, normed.slice_mut(s![..0, ..]));
    }
}
