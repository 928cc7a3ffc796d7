//! A matrix and perhaps a bias.

use moerun_kernels::{ActivationRows, PackedMatrix, Workspace};
use ndarray::ArrayViewMut2;

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
    pub(crate) fn forward<'w>(&self, workspace: &'w Workspace<'_>, x: ActivationRows<'_>) -> ArrayViewMut2<'w, f32> {
        let mut out = workspace.matrix(x.rows(), self.weight.rows());
        self.forward_into(workspace, x, out.view_mut());
        out
    }

    /// [`Linear::forward`] into `out`.
    pub(crate) fn forward_into(
        &self,
        workspace: &Workspace<'_>,
        x: ActivationRows<'_>,
        mut out: ArrayViewMut2<'_, f32>,
    ) {
        self.weight.matmul(workspace.pool(), x, out.view_mut());
        self.add_bias(out);
    }

    /// [`Linear::forward`] of several of one format and width at once.
    pub(crate) fn forward_all<'w, const N: usize>(
        linears: [&Linear; N],
        workspace: &'w Workspace<'_>,
        x: ActivationRows<'_>,
    ) -> [ArrayViewMut2<'w, f32>; N] {
        let mut outs = linears.map(|linear| workspace.matrix(x.rows(), linear.weight.rows()));
        let mut slices = outs
            .each_mut()
            .map(|out| out.as_slice_mut().expect("a new matrix is contiguous"));
        let products = linears.map(|linear| (&linear.weight, x));
        PackedMatrix::matmul_all(workspace.pool(), &products, &mut slices);
        for (linear, out) in linears.iter().zip(&mut outs) {
            linear.add_bias(out.view_mut());
        }
        outs
    }

    fn add_bias(&self, mut out: ArrayViewMut2<'_, f32>) {
        if let Some(bias) = &self.bias {
            for mut row in out.rows_mut() {
                row.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
            }
        }
    }
}
