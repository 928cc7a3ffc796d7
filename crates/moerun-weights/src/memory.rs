//! What a model needs in memory, and how many parameters it has.

use moerun_types::{ModelConfig, MoeConfig, NumberFormat};

use crate::{LayerTensor, TensorRole, dense_tensors::dense_tensors};

/// Rows of a panel: packed matrices are padded to whole panels.
const PANEL_ROWS: u64 = 16;

/// Bytes that a model's parts take in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryNeed {
    /// Everything that is not an expert (embedding, attention, routers in f32, shared experts, head).
    pub gateway_bytes: u64,
    /// One expert.
    pub expert_bytes: u64,
    /// All experts of all layers.
    pub all_experts_bytes: u64,
}

/// How many parameters a model has. A tied head counts once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParameterCounts {
    /// All of them.
    pub total: u64,
    /// Those that one token passes: all outside the experts, and those of `top_k` experts in every MoE layer.
    pub active: u64,
    /// Those of all experts of all layers, shared experts not counted.
    pub experts: u64,
    /// Those of one expert.
    pub per_expert: u64,
}

impl MemoryNeed {
    /// Computes the need of `config` with weights held in `format`: matrices in that format, padded to whole panels;
    /// norms, biases and routers in f32.
    pub fn of(config: &ModelConfig, format: NumberFormat) -> Self {
        let gateway_bytes = dense_tensors(config)
            .iter()
            .map(|(role, shape)| dense_bytes(*role, shape, format))
            .sum();
        let expert_bytes = config.moe.as_ref().map_or(0, |moe| expert_bytes(config, moe, format));
        let num_experts = config.moe.as_ref().map_or(0, |moe| moe.num_experts) as u64;
        MemoryNeed {
            gateway_bytes,
            expert_bytes,
            all_experts_bytes: expert_bytes * num_experts * config.moe_layers().len() as u64,
        }
    }
}

impl ParameterCounts {
    /// Counts the parameters of `config`.
    pub fn of(config: &ModelConfig) -> Self {
        let dense: u64 = dense_tensors(config).iter().map(|(_, shape)| elements(shape)).sum();
        let (per_expert, num_experts, top_k) = match &config.moe {
            Some(moe) => (expert_parameters(config, moe), moe.num_experts as u64, moe.top_k as u64),
            None => (0, 0, 0),
        };
        let in_layers = per_expert * config.moe_layers().len() as u64;
        let experts = in_layers * num_experts;
        ParameterCounts {
            total: dense + experts,
            active: dense + in_layers * top_k,
            experts,
            per_expert,
        }
    }
}

fn elements(shape: &[usize]) -> u64 {
    shape.iter().map(|&dim| dim as u64).product()
}

fn dense_bytes(role: TensorRole, shape: &[usize], format: NumberFormat) -> u64 {
    use LayerTensor::{CorrectionBias, Router, SharedExpertGate};
    match (role, shape) {
        (TensorRole::Layer(_, Router | CorrectionBias | SharedExpertGate), _) => 4 * elements(shape),
        (_, &[rows, cols]) => packed_bytes(rows, cols, format),
        _ => 4 * elements(shape),
    }
}

/// Columns are packed in pairs in bf16.
fn packed_bytes(rows: usize, cols: usize, format: NumberFormat) -> u64 {
    let rows = (rows as u64).next_multiple_of(PANEL_ROWS);
    let cols = match format {
        NumberFormat::F32 => cols as u64,
        NumberFormat::Bf16 => (cols as u64).next_multiple_of(2),
    };
    rows * cols * format.bytes() as u64
}

fn expert_bytes(config: &ModelConfig, moe: &MoeConfig, format: NumberFormat) -> u64 {
    let up = packed_bytes(moe.intermediate, config.hidden, format);
    let down = packed_bytes(config.hidden, moe.intermediate, format);
    2 * up + down + 4 * expert_biases(config, moe)
}

fn expert_biases(config: &ModelConfig, moe: &MoeConfig) -> u64 {
    let gate_up = if moe.gate_up_bias {
        2 * moe.intermediate as u64
    } else {
        0
    };
    let down = if moe.down_bias { config.hidden as u64 } else { 0 };
    gate_up + down
}

fn expert_parameters(config: &ModelConfig, moe: &MoeConfig) -> u64 {
    3 * config.hidden as u64 * moe.intermediate as u64 + expert_biases(config, moe)
}
