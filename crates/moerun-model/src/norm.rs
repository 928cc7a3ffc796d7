//! Normalisation of the residual stream and of queries and keys.

use moerun_kernels::{CpuPool, Workspace, layer_norm, rms_norm, rms_norm_weightless};
use moerun_types::{NormConfig, NormKind};
use moerun_weights::{LayerTensor, TensorRole};
use ndarray::{ArrayView2, ArrayViewMut2, Axis};

use crate::{
    ModelError,
    loader::{LayerLoader, Loader},
    parallel,
};

/// RMS norm, or layer norm where there is a bias.
#[derive(Debug)]
pub(crate) struct Norm {
    /// `[hidden]`.
    weight: Vec<f32>,
    /// `[hidden]`; only a layer norm has one.
    bias: Option<Vec<f32>>,
    epsilon: f32,
}

impl Norm {
    /// The norm after the last layer.
    pub(crate) fn load_final(loader: &mut Loader<'_>) -> Result<Self, ModelError> {
        let NormConfig { kind, epsilon } = loader.config().norm;
        let weight = loader.vector(TensorRole::FinalNorm)?;
        let bias = loader.vector_if(kind == NormKind::LayerNorm, TensorRole::FinalNormBias)?;
        Ok(Norm { weight, bias, epsilon })
    }

    /// A norm of a layer.
    pub(crate) fn load(
        loader: &mut LayerLoader<'_, '_>,
        weight: LayerTensor,
        bias: LayerTensor,
    ) -> Result<Self, ModelError> {
        let NormConfig { kind, epsilon } = loader.config().norm;
        let weight = loader.vector(weight)?;
        let bias = loader.vector_if(kind == NormKind::LayerNorm, bias)?;
        Ok(Norm { weight, bias, epsilon })
    }

    /// An RMS norm with an epsilon of its own.
    pub(crate) fn rms(weight: Vec<f32>, epsilon: f32) -> Self {
        Norm {
            weight,
            bias: None,
            epsilon,
        }
    }

    /// `[tokens, hidden]` → `[tokens, hidden]`, rows spread over the pool.
    pub(crate) fn forward<'w>(&self, workspace: &'w Workspace<'_>, x: ArrayView2<'_, f32>) -> ArrayViewMut2<'w, f32> {
        let mut out = workspace.matrix(x.nrows(), x.ncols());
        self.forward_into(workspace.pool(), x, out.view_mut());
        out
    }

    /// [`Norm::forward`] into `out`.
    pub(crate) fn forward_into(&self, pool: &CpuPool, x: ArrayView2<'_, f32>, mut out: ArrayViewMut2<'_, f32>) {
        let rows = parallel::rows_per_task(pool, x.nrows(), x.ncols());
        let workspace = pool.workspace();
        let parts = x
            .axis_chunks_iter(Axis(0), rows)
            .zip(out.axis_chunks_iter_mut(Axis(0), rows));
        pool.for_each(workspace.collect(parts), |(x, out)| {
            self.normalize(x.view(), out.view_mut())
        });
    }

    fn normalize(&self, x: ArrayView2<'_, f32>, out: ArrayViewMut2<'_, f32>) {
        match &self.bias {
            Some(bias) => layer_norm(x, &self.weight, bias, self.epsilon, out),
            None => rms_norm(x, &self.weight, self.epsilon, out),
        }
    }
}

/// RMS norm in place of each run of `weight.len()` elements of `row`: of each head, or of the whole row.
pub(crate) fn rms_norm_runs(row: &mut [f32], weight: &[f32], epsilon: f32) {
    rms_norm_heads(row, weight.len(), epsilon);
    for run in row.chunks_exact_mut(weight.len()) {
        run.iter_mut().zip(weight).for_each(|(value, weight)| *value *= weight);
    }
}

/// RMS norm without weights, in place, of each run of `head_dim` elements of `row`.
pub(crate) fn rms_norm_heads(row: &mut [f32], head_dim: usize, epsilon: f32) {
    let heads =
        ArrayViewMut2::from_shape((row.len() / head_dim, head_dim), row).expect("a row is a whole number of heads");
    rms_norm_weightless(heads, epsilon);
}

#[cfg(test)]
mod tests {
    use ndarray::{Array2, s};

    use super::*;

    #[test]
    fn rows_spread_over_the_pool_have_the_bits_of_rows_normed_alone() {
        let (rows, hidden) = (1000, 50); // several runs of rows
        let value = |(row, column)| ((row * 31 + column * 17) % 101) as f32 / 7.0 - 5.0;
        let x = Array2::from_shape_fn((rows, hidden), value);
        let weight: Vec<f32> = (0..hidden).map(|index| 0.5 + index as f32 / 64.0).collect();
        let bias = Some(weight.iter().map(|weight| 1.0 - weight).collect());
        let layer_norm = Norm {
            weight: weight.clone(),
            bias,
            epsilon: 1e-5,
        };
        for norm in [Norm::rms(weight, 1e-6), layer_norm] {
            let pool = CpuPool::new(3);
            let workspace = pool.workspace();
            let spread = norm.forward(&workspace, x.view());
            for row in [0, 1, 499, 999] {
                let alone = norm.forward(&workspace, x.slice(s![row..row + 1, ..]));
                let bits = |value: &f32| value.to_bits();
                assert!(alone.iter().map(bits).eq(spread.row(row).iter().map(bits)), "row {row}");
            }
        }
    }

    #[test]
    fn runs_of_a_row_are_normed_apart() {
        let mut row = [3.0, 4.0, 0.0, 2.0];
        rms_norm_runs(&mut row, &[1.0, 10.0], 0.0);
        let root = |mean_square: f32| mean_square.sqrt();
        for (found, wanted) in row
            .iter()
            .zip([3.0 / root(12.5), 40.0 / root(12.5), 0.0, 20.0 / root(2.0)])
        {
            assert!((found - wanted).abs() < 1e-5, "wanted {wanted}, found {found}");
        }
    }
}
