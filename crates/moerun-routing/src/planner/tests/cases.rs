//! Requests to plan.

use moerun_types::LayerId;

use crate::planner::{CostModel, ExpertLoads, ExpertSize, Layout, PlanRequest, WorkerSpec, random::Random};

/// Bytes of a block.
pub(super) const BLOCK_BYTES: u64 = 1000;

/// Loads of experts by rank to the power of `-exponent`, in a random order.
pub(super) fn zipf(num_experts: usize, exponent: f64, seed: u64) -> Vec<f64> {
    let mut loads: Vec<f64> = (1..=num_experts).map(|rank| (rank as f64).powf(-exponent)).collect();
    Random::new(seed).shuffle(&mut loads);
    loads
}

pub(super) fn worker(name: &str, memory_bytes: u64) -> WorkerSpec {
    WorkerSpec {
        name: name.to_owned(),
        memory_bytes,
        bandwidth: 2e10,
        round_trip_seconds: 1e-4,
        domain: None,
    }
}

pub(super) fn cost() -> CostModel {
    CostModel {
        batch_tokens: 8,
        expert_ops: 1e6,
        ops_per_second: 1e11,
        row_bytes: 4096.0,
        link_bytes_per_second: 1.25e9,
        message_seconds: 2e-5,
    }
}

/// Layers of the given loads on workers of `slots` whole experts a layer each.
pub(super) fn request(layers: &[Vec<f64>], num_workers: usize, slots: usize, num_blocks: u64) -> PlanRequest {
    let moe_layers: Vec<LayerId> = (0..layers.len() as u32).map(LayerId).collect();
    let memory = BLOCK_BYTES * num_blocks * (slots * layers.len()) as u64;
    PlanRequest {
        num_experts: layers[0].len(),
        top_k: 2.min(layers[0].len()),
        size: ExpertSize::new((1..=num_blocks).map(|blocks| blocks * BLOCK_BYTES).collect()),
        loads: ExpertLoads::from_layers(moe_layers.iter().copied().zip(layers.iter().cloned())),
        moe_layers,
        workers: (0..num_workers)
            .map(|index| worker(&format!("w{index}"), memory))
            .collect(),
        replicas: 1,
        extra_holders: 0,
        layout: Some(Layout::Whole),
        present: Vec::new(),
        stability: 0.1,
        seed: 0,
        cost: cost(),
    }
}
