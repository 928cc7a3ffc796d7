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
        self.add_bias(&mut out);
        out
    }

    /// [`Linear::forward`] of several of one format and width at once.
    pub(crate) fn forward_all<const N: usize>(
        linears: [&Linear; N],
        pool: &CpuPool,
        x: &Activations,
    ) -> [Array2<f32>; N] {
        let mut outs = linears.map(|linear| Array2::zeros((x.rows(), linear.weight.rows())));
        let mut slices = outs
            .each_mut()
            .map(|out| out.as_slice_mut().expect("a new array is contiguous"));
        PackedMatrix::matmul_all(pool, x, &linears.map(|linear| &linear.weight), &mut slices);
        for (linear, out) in linears.iter().zip(&mut outs) {
            linear.add_bias(out);
        }
        outs
    }

    fn add_bias(&self, out: &mut Array2<f32>) {
        if let Some(bias) = &self.bias {
            for mut row in out.rows_mut() {
                row.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
            }
        }
    }
}
