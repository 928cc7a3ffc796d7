//! The gate of a MoE layer: normed rows → router logits → experts and weights.

use moerun_kernels::{ActivationRows, CpuPool};
use moerun_routing::{GateError, GateMemory, Routing, select_experts_into};
use moerun_types::{ActivationFormat, GateConfig, MoeConfig};
use moerun_weights::LayerTensor;
use ndarray::Array2;

use crate::{ModelError, linear::Linear, loader::LayerLoader, memory::reshape};

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

    /// Router logits of `x`, `[tokens, num_experts]`, and the choice made from them.
    pub(crate) fn forward(
        &self,
        pool: &CpuPool,
        x: &Array2<f32>,
        router_logits: &mut Array2<f32>,
        memory: &mut GateMemory,
        routing: &mut Routing,
    ) -> Result<(), GateError> {
        let workspace = pool.workspace();
        let x = ActivationRows::round(&workspace, ActivationFormat::F32, x.view());
        reshape(router_logits, x.rows(), self.router.weight.rows());
        self.router.forward_into(&workspace, x, router_logits.view_mut());
        let correction_bias = self.correction_bias.as_deref();
        let logits = router_logits.view();
        select_experts_into(logits, &self.config, self.top_k, correction_bias, memory, routing)
    }
}
