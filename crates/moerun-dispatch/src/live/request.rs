//! What the planner is asked: the model's sizes, what a dispatch costs, who the workers are.

use moerun_routing::planner::{CostModel, ExpertLoads, ExpertSize, PlanRequest, WorkerSpec};
use moerun_types::{BlockRange, CombineMode, ExpertSlice, ModelConfig, Numerics};
use moerun_weights::{MemoryNeed, ParameterCounts};

use super::PlacementPolicy;

/// Operations per second of a worker that reads as fast as the mean: what a few cores reach on a small batch.
const OPS_PER_SECOND: f64 = 4e11;
/// Time of one message and its answer on the gateway's thread.
const MESSAGE_SECONDS: f64 = 20e-6;
/// Bytes of an element of a reply, packed: exact mode's fixed point, and f32.
const EXACT_REPLY_BYTES: f64 = 5.5;
const FAST_REPLY_BYTES: f64 = 4.0;
/// Bytes read per second where nobody measured them: all workers are then taken to be alike.
const BANDWIDTH: f64 = 20e9;
/// Seconds of an empty round trip: what calls take has their work in it, and is no measure of that.
const ROUND_TRIP_SECONDS: f64 = 100e-6;
/// Rows of the step whose cost is reckoned.
const BATCH_ROWS: usize = 16;
/// Part of a layer's time that must be gained to move all of it.
const STABILITY: f64 = 0.1;

/// What changes from plan to plan.
pub(super) struct Wanted {
    pub(super) loads: ExpertLoads,
    pub(super) present: Vec<(String, Vec<ExpertSlice>)>,
    pub(super) replicas: usize,
}

/// Bytes that runs of blocks of one expert take.
pub fn expert_size(config: &ModelConfig, numerics: &Numerics) -> ExpertSize {
    let moe = config.moe.as_ref();
    let num_blocks = moe.map_or(0, |moe| numerics.num_blocks(moe.intermediate));
    let blocks = (1..=num_blocks).map_while(|end| u16::try_from(end).ok());
    let bytes = |end: u16| MemoryNeed::of_slice(config, numerics, BlockRange { first: 0, end });
    ExpertSize::new(blocks.map(bytes).collect())
}

/// What a step of `batch_tokens` rows costs over links of so many bytes per second.
pub fn cost_model(
    config: &ModelConfig,
    numerics: &Numerics,
    batch_tokens: usize,
    link_bytes_per_second: f64,
) -> CostModel {
    let hidden = config.hidden;
    let reply = match numerics.combine {
        CombineMode::Exact => EXACT_REPLY_BYTES,
        CombineMode::Fast => FAST_REPLY_BYTES,
    };
    CostModel {
        batch_tokens,
        expert_ops: 2.0 * ParameterCounts::of(config).per_expert as f64,
        ops_per_second: OPS_PER_SECOND,
        row_bytes: numerics.format.activations().row_bytes(hidden) as f64 + hidden as f64 * reply,
        link_bytes_per_second,
        message_seconds: MESSAGE_SECONDS,
    }
}

/// Bytes that a slice takes.
pub(super) fn slice_bytes(config: &ModelConfig, numerics: &Numerics, slice: ExpertSlice) -> u64 {
    MemoryNeed::of_slice(config, numerics, slice.blocks)
}

/// A worker as the planner sees it.
pub(super) fn spec(address: &str, memory_bytes: u64) -> WorkerSpec {
    WorkerSpec {
        name: address.to_owned(),
        memory_bytes,
        bandwidth: BANDWIDTH,
        round_trip_seconds: ROUND_TRIP_SECONDS,
        domain: None,
    }
}

pub(super) fn plan_request(
    config: &ModelConfig,
    numerics: &Numerics,
    policy: &PlacementPolicy,
    workers: Vec<WorkerSpec>,
    wanted: Wanted,
) -> PlanRequest {
    let moe = config.moe.as_ref();
    PlanRequest {
        moe_layers: config.moe_layers(),
        num_experts: moe.map_or(0, |moe| moe.num_experts),
        top_k: moe.map_or(0, |moe| moe.top_k),
        size: expert_size(config, numerics),
        loads: wanted.loads,
        workers,
        replicas: wanted.replicas,
        extra_holders: 0,
        layout: policy.layout,
        present: wanted.present,
        stability: STABILITY,
        seed: 0,
        cost: cost_model(config, numerics, BATCH_ROWS, policy.link_bytes_per_second),
    }
}
