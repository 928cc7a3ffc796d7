//! The few formulas that everything is made of.

use super::weights::Matrix;

/// `weight · x + bias`.
pub(crate) fn linear(weight: &Matrix, bias: Option<&[f64]>, x: &[f64]) -> Vec<f64> {
    let mut out: Vec<f64> = weight.rows().map(|row| dot(row, x)).collect();
    if let Some(bias) = bias {
        for (value, bias) in out.iter_mut().zip(bias) {
            *value += bias;
        }
    }
    out
}

pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `x / sqrt(mean(x²) + ε) · weight`.
pub(crate) fn rms_norm(x: &[f64], weight: Option<&[f64]>, epsilon: f64) -> Vec<f64> {
    let mean_square = dot(x, x) / x.len() as f64;
    let scale = 1.0 / (mean_square + epsilon).sqrt();
    x.iter()
        .enumerate()
        .map(|(i, value)| value * scale * weight.map_or(1.0, |weight| weight[i]))
        .collect()
}

/// `(x − mean) / sqrt(variance + ε) · weight + bias`.
pub(crate) fn layer_norm(x: &[f64], weight: &[f64], bias: &[f64], epsilon: f64) -> Vec<f64> {
    let count = x.len() as f64;
    let mean = x.iter().sum::<f64>() / count;
    let variance = x.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / count;
    let scale = 1.0 / (variance + epsilon).sqrt();
    x.iter()
        .enumerate()
        .map(|(i, value)| (value - mean) * scale * weight[i] + bias[i])
        .collect()
}

/// Softmax; −∞ becomes 0.
pub(crate) fn softmax(x: &[f64]) -> Vec<f64> {
    let largest = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exponentials: Vec<f64> = x.iter().map(|value| (value - largest).exp()).collect();
    let sum: f64 = exponentials.iter().sum();
    exponentials.iter().map(|value| value / sum).collect()
}

pub(crate) fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Index of the largest value, the first of equals.
pub(crate) fn argmax(x: &[f64]) -> usize {
    let mut best = 0;
    for (i, value) in x.iter().enumerate() {
        if *value > x[best] {
            best = i;
        }
    }
    best
}

/// Error function, by its Taylor series (|x| < 3) or the continued fraction of its complement.
pub(crate) fn erf(x: f64) -> f64 {
    if x < 0.0 {
        return -erf(-x);
    }
    let gaussian = (-x * x).exp() / std::f64::consts::PI.sqrt();
    if x < 3.0 {
        let mut term = x;
        let mut sum = x;
        for n in 1..200 {
            term *= 2.0 * x * x / (2 * n + 1) as f64;
            sum += term;
        }
        return 2.0 * gaussian * sum;
    }
    let mut fraction = x;
    for n in (1..100).rev() {
        fraction = x + 0.5 * n as f64 / fraction;
    }
    1.0 - gaussian / fraction
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn erf_has_the_tabulated_values() {
        for (x, wanted) in [
            (0.0, 0.0),
            (0.5, 0.520_499_877_813_046_5),
            (1.0, 0.842_700_792_949_714_9),
            (2.0, 0.995_322_265_018_952_7),
            (3.5, 0.999_999_256_901_627_7),
        ] {
            assert!((erf(x) - wanted).abs() < 1e-14, "erf({x})");
            assert_eq!(erf(-x), -erf(x));
        }
    }

    #[test]
    fn softmax_sums_to_one_and_ignores_minus_infinity() {
        let weights = softmax(&[1.0, f64::NEG_INFINITY, 3.0]);
        assert_eq!(weights[1], 0.0);
        assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-15);
    }
}
