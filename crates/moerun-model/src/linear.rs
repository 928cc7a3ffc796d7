//! A matrix and perhaps a bias.

use moerun_kernels::{Activations, CpuPool, PackedMatrix};
use ndarray::Array2;

/// `y = x · Wᵀ + b`.
#[derive(Debug)]
pub(crate) struct Linear {
    /// `[out, in]`.
    pub(crate) weight: PackedMatrix,
    /// `[out]`.
    pub(crate) bias: Option<Vec<f32>>,
}

impl Linear {
    /// `[tokens, in]` → `[tokens, out]`.
    pub(crate) fn forward(&self, pool: &CpuPool, x: &Activations) -> Array2<f32> {
        let mut out = Array2::zeros((x.rows(), self.weight.rows()));
        self.weight.matmul(pool, x, out.view_mut());
        if let Some(bias) = &self.bias {
            for mut row in out.rows_mut() {
                row.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
            }
        }
        out
    }
}
