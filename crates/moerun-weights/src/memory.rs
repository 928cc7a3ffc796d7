//! What a model needs in memory, and how many parameters it has.

use std::ops::Range;

use moerun_types::{BlockRange, ModelConfig, MoeConfig, NumberFormat, Numerics};

use crate::{
    TensorRole,
    dense_tensors::dense_tensors,
    packed::{Part, dense_parts, expert_parts},
};

/// Bytes that a model's parts take in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryNeed {
    /// Everything that is not an expert (embedding, attention, routers in f32, shared experts, head).
    pub gateway_bytes: u64,
    /// Of that, the embedding: a token reads one row of it, or all where the head is tied to it.
    pub embedding_bytes: u64,
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
    /// Computes the need of `config` with experts held in `format`: other matrices in [`NumberFormat::for_dense`],
    /// embedding and head in [`NumberFormat::for_vocabulary`], all as large as they are packed; norms, biases and
    /// routers in f32.
    pub fn of(config: &ModelConfig, format: NumberFormat) -> Self {
        let gateway_bytes = dense_tensors(config)
            .iter()
            .map(|(role, shape)| memory_bytes(dense_parts(config, *role, shape, format)))
            .sum();
        let expert_bytes = config
            .moe
            .as_ref()
            .map_or(0, |moe| slice_bytes(config, moe, format, 0..moe.intermediate));
        let num_experts = config.moe.as_ref().map_or(0, |moe| moe.num_experts) as u64;
        let embedding = [config.vocab_size, config.hidden];
        let embedding_bytes = memory_bytes(dense_parts(config, TensorRole::Embedding, &embedding, format));
        MemoryNeed {
            gateway_bytes,
            embedding_bytes,
            expert_bytes,
            all_experts_bytes: expert_bytes * num_experts * config.moe_layers().len() as u64,
        }
    }

    /// Bytes that some blocks of one expert take.
    pub fn of_slice(config: &ModelConfig, numerics: &Numerics, blocks: BlockRange) -> u64 {
        config.moe.as_ref().map_or(0, |moe| {
            let column = |block: u16| {
                usize::from(block)
                    .saturating_mul(numerics.combine_block)
                    .min(moe.intermediate)
            };
            slice_bytes(config, moe, numerics.format, column(blocks.first)..column(blocks.end))
        })
    }

    /// Bytes of some blocks of one expert that a process takes of its own where packed weights are mapped: biases, and
    /// for a part of an expert the columns that are cut out of down. Where the part does not begin and end between panels
    /// of 16 rows, gate and up are cut too.
    pub fn of_mapped_slice(config: &ModelConfig, numerics: &Numerics, blocks: BlockRange) -> u64 {
        const PANEL: usize = 16;
        let Some(moe) = &config.moe else { return 0 };
        let column = |block: u16| {
            usize::from(block)
                .saturating_mul(numerics.combine_block)
                .min(moe.intermediate)
        };
        let held = column(blocks.first)..column(blocks.end);
        let is_whole = held == (0..moe.intermediate);
        let between_panels =
            held.start.is_multiple_of(PANEL) && (held.end.is_multiple_of(PANEL) || held.end == moe.intermediate);
        let owned = |(index, part): (usize, Part)| match (part, index) {
            (Part::Vector { .. }, _) => part.memory_bytes(),
            (Part::Matrix { .. }, _) if is_whole => 0,
            (Part::Matrix { .. }, 0 | 1) if between_panels => 0,
            (Part::Matrix { .. }, _) => part.memory_bytes(),
        };
        let parts = expert_parts(config, moe, numerics.format, held);
        parts.into_iter().enumerate().map(owned).fold(0, u64::saturating_add)
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

/// Bytes of one expert's matrices and biases that the columns `held` of its intermediate dimension take.
fn slice_bytes(config: &ModelConfig, moe: &MoeConfig, format: NumberFormat, held: Range<usize>) -> u64 {
    memory_bytes(expert_parts(config, moe, format, held))
}

fn memory_bytes(parts: Vec<Part>) -> u64 {
    parts.into_iter().map(Part::memory_bytes).fold(0, u64::saturating_add)
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
