//! The gate of a MoE layer: normed rows → router logits → experts and weights.

use moerun_kernels::{Activations, CpuPool};
use moerun_routing::{GateError, Routing, select_experts};
use moerun_types::{ActivationFormat, GateConfig, MoeConfig};
use moerun_weights::LayerTensor;
use ndarray::Array2;

use crate::{ModelError, linear::Linear, loader::LayerLoader};

/// Router and choice.
#[derive(Debug)]
pub(crate) struct Gate {
    /// `[num_experts, hidden]`, always f32 and fed unrounded rows: a choice must not hang on the weights' format.
    router: Linear,
    /// `[num_experts]`, for the choice only.
    correction_bias: Option<Vec<f32>>,
    config: GateConfig,
    top_k: usize,
}

impl Gate {
    pub(crate) fn load(loader: &mut LayerLoader<'_, '_>, moe: &MoeConfig) -> Result<Self, ModelError> {
        let weight = loader.matrix(LayerTensor::Router)?;
        let bias = loader.vector_if(moe.gate.router_bias, LayerTensor::RouterBias)?;
        let correction_bias = loader.vector_if(moe.gate.correction_bias, LayerTensor::CorrectionBias)?;
        Ok(Gate {
            router: Linear { weight, bias },
            correction_bias,
            config: moe.gate.clone(),
            top_k: moe.top_k,
        })
    }

    /// Router logits, `[tokens, num_experts]`, and the choice made from them.
    pub(crate) fn forward(&self, pool: &CpuPool, x: &Array2<f32>) -> Result<(Array2<f32>, Routing), GateError> {
        let router_logits = self
            .router
            .forward(pool, &Activations::round(ActivationFormat::F32, x.view()));
        let correction_bias = self.correction_bias.as_deref();
        let routing = select_experts(router_logits.view(), &self.config, self.top_k, correction_bias)?;
        Ok((router_logits, routing))
    }
}
