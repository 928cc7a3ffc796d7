//! Router logits → expert choice → plan per worker → combine. Pure functions over values: no sockets, time or threads.
#![forbid(unsafe_code)]

mod gate;
mod slices;

mod shard;

mod placement;

mod plan;

mod combine;

pub mod planner;

#[cfg(test)]
mod testing;

pub use combine::{CombineError, PartialSums, term_limit, terms_per_element};
pub use gate::{GateError, GateMemory, Routing, select_experts, select_experts_into};
pub use placement::{Placement, PlanError};
pub use plan::{Assignment, Candidates, LayerPlan, WorkerBatch, whole_assignments};
pub use shard::{ShardError, ShardItem, ShardSpec};
pub use slices::{merge_slices, subtract_slices};
