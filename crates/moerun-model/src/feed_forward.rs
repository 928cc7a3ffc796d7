//! Feed-forwards that every token takes: of dense layers, and the shared experts of MoE layers.

use moerun_kernels::{ActivationRows, CpuPool, FeedForward, PackedMatrix, dense_feed_forward, sigmoid};
use moerun_types::{ActivationFormat, SharedExpertConfig};
use moerun_weights::LayerTensor;
use ndarray::Array2;

use crate::{ModelError, loader::LayerLoader, memory::reshape};

/// Loads the feed-forward of a dense layer.
pub(crate) fn load_dense(loader: &mut LayerLoader<'_, '_>) -> Result<FeedForward, ModelError> {
    let config = loader.config();
    Ok(FeedForward {
        gate_proj: loader.matrix(LayerTensor::GateProj)?,
        up_proj: loader.matrix(LayerTensor::UpProj)?,
        down_proj: loader.matrix(LayerTensor::DownProj)?,
        gate_bias: loader.vector_if(config.mlp_bias, LayerTensor::GateBias)?,
        up_bias: loader.vector_if(config.mlp_bias, LayerTensor::UpBias)?,
        down_bias: loader.vector_if(config.mlp_bias, LayerTensor::DownBias)?,
        activation: config.activation,
    })
}

/// `[tokens, hidden]` → `[tokens, hidden]`.
pub(crate) fn run(pool: &CpuPool, weights: &FeedForward, x: &Array2<f32>, out: &mut Array2<f32>) {
    let workspace = pool.workspace();
    let rounded = ActivationRows::round(&workspace, weights.gate_proj.format().activations(), x.view());
    reshape(out, x.nrows(), x.ncols());
    dense_feed_forward(pool, weights, rounded, out.view_mut());
}

/// The experts that every token takes, as one feed-forward of their summed width.
#[derive(Debug)]
pub(crate) struct SharedExperts {
    weights: FeedForward,
    /// `[1, hidden]`, f32 as a router is: the output is multiplied by `sigmoid(gate · x)`.
    gate: Option<PackedMatrix>,
}

impl SharedExperts {
    pub(crate) fn load(loader: &mut LayerLoader<'_, '_>, shared: SharedExpertConfig) -> Result<Self, ModelError> {
        let weights = FeedForward {
            gate_proj: loader.matrix(LayerTensor::SharedGateProj)?,
            up_proj: loader.matrix(LayerTensor::SharedUpProj)?,
            down_proj: loader.matrix(LayerTensor::SharedDownProj)?,
            gate_bias: None,
            up_bias: None,
            down_bias: None,
            activation: loader.config().activation,
        };
        let gate = shared
            .sigmoid_gate
            .then(|| loader.matrix(LayerTensor::SharedExpertGate))
            .transpose()?;
        Ok(SharedExperts { weights, gate })
    }

    /// `[tokens, hidden]` → `[tokens, hidden]`.
    pub(crate) fn forward(&self, pool: &CpuPool, x: &Array2<f32>, out: &mut Array2<f32>) {
        run(pool, &self.weights, x, out);
        if let Some(gate) = &self.gate {
            let workspace = pool.workspace();
            let mut logits = workspace.matrix(x.nrows(), 1);
            let unrounded = ActivationRows::round(&workspace, ActivationFormat::F32, x.view());
            gate.matmul(pool, unrounded, logits.view_mut());
            for (mut row, &logit) in out.rows_mut().into_iter().zip(&logits) {
                let factor = sigmoid(logit);
                row.iter_mut().for_each(|value| *value *= factor);
            }
        }
    }
}
