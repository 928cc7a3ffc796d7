//! How the placement is, and what became of changes to it.

use std::time::Duration;

use moerun_routing::planner::{ExpertLoads, Prediction, expert_list};
use moerun_types::ExpertSlice;
use tokio::time::Instant;

use super::{Follow, PlacementPolicy};
use crate::{member::Member, membership::Shared, stats::WorkerStats};

/// How the placement is.
#[derive(Debug, Clone, PartialEq)]
pub struct PlacementStatus {
    /// Of the plan that new dispatches take.
    pub epoch: u64,
    /// Whose word counts: `held`, `auto`, or `plan` and its epoch.
    pub follow: String,
    /// BLAKE3 (hex) of the model's config.
    pub config_hash: String,
    /// Number format, combine mode and block.
    pub numerics: String,
    /// Live holders of the block that has fewest; 0 = only this process could compute it.
    pub fewest_holders: usize,
    /// Moving averages of how often each expert is chosen.
    pub loads: ExpertLoads,
    /// Moving average of dispatches of a layer in a second.
    pub dispatches_per_second: f64,
    /// In the order given.
    pub workers: Vec<WorkerPlacement>,
}

/// One worker.
#[derive(Debug, Clone, PartialEq)]
pub struct WorkerPlacement {
    /// Whether it gets no calls because the operator said so.
    pub drained: bool,
    /// Version of its binary; empty while it is not connected.
    pub build: String,
    /// Protocol that it speaks; 0 while it is not connected.
    pub protocol_version: u32,
    /// What it holds.
    pub held: Vec<ExpertSlice>,
    /// The same as `moerun worker --experts` takes it.
    pub experts: String,
    /// Counts its changes; `None` where it does not tell.
    pub held_epoch: Option<u64>,
    /// Bytes that its experts take.
    pub held_bytes: Option<u64>,
    /// Bytes that more may take.
    pub free_bytes: Option<u64>,
    /// Connection, health, calls.
    pub stats: WorkerStats,
}

/// What became of a drain.
#[derive(Debug, Clone, PartialEq)]
pub struct DrainReport {
    /// The worker's address.
    pub worker: String,
    /// Of the plan that does not ask it.
    pub epoch: u64,
    /// Slices that it alone held, which others hold now too.
    pub moved_slices: usize,
    /// Bytes of them.
    pub moved_bytes: u64,
    /// Assignments that it still owes; more than 0 only if it did not answer within a dispatch's deadline.
    pub in_flight: u64,
    /// How long it took.
    pub took: Duration,
}

/// What a plan comes to, and what became of it.
#[derive(Debug, Clone, PartialEq)]
pub struct RebalanceReport {
    /// Of the plan that is in force afterwards.
    pub epoch: u64,
    /// Whether experts were moved, if there were any to move.
    pub carried_out: bool,
    /// Whether the gateway would have moved them by itself for balance alone.
    pub worthwhile: bool,
    /// Why, in words with the numbers.
    pub reason: String,
    /// How experts are cut.
    pub layout: String,
    /// Holders of every block.
    pub replicas: usize,
    /// What was promised before; `None` if some block had no holder, or nobody reckoned.
    pub present: Option<Promise>,
    /// What the plan promises.
    pub planned: Promise,
    /// What each worker loads and lets go.
    pub workers: Vec<WorkerMoves>,
}

/// What a placement promises.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Promise {
    /// Mean over max of the workers' loads.
    pub balance: f64,
    /// … after the worst single death; `None` with one worker.
    pub after_worst_death: Option<f64>,
    /// Time of one layer's experts; `None` where nobody reckoned.
    pub dispatch_seconds: Option<f64>,
}

/// One worker's part of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerMoves {
    /// Its address.
    pub address: String,
    /// Slices that it is to hold and does not.
    pub load_slices: usize,
    /// Bytes of them.
    pub load_bytes: u64,
    /// Slices that it is not to hold and does.
    pub unload_slices: usize,
    /// Bytes of them.
    pub unload_bytes: u64,
}

impl Promise {
    pub(super) fn of(prediction: &Prediction) -> Self {
        Self {
            balance: prediction.balance,
            after_worst_death: prediction.after_worst_death.map(|death| death.balance),
            dispatch_seconds: Some(prediction.cost.seconds),
        }
    }
}

pub(super) fn status(shared: &Shared, policy: &PlacementPolicy) -> PlacementStatus {
    let now = Instant::now();
    let (loads, dispatches_per_second) = {
        let mut averages = shared.core.loads.lock();
        (averages.at(now), averages.dispatches_per_second(now))
    };
    let plan = shared.core.plan.load();
    PlacementStatus {
        epoch: plan.epoch,
        follow: match &policy.follow {
            Follow::AsHeld => "held".to_owned(),
            Follow::Auto => "auto".to_owned(),
            Follow::Plan(file) => format!("plan {}", file.epoch),
        },
        config_hash: shared.core.admission.config_hash().to_owned(),
        numerics: shared.core.numerics.id(),
        fewest_holders: plan
            .placement
            .fewest_holders(|worker| plan.members[worker].link.is_up()),
        loads,
        dispatches_per_second,
        workers: shared
            .members()
            .iter()
            .map(|member| of_worker(shared, member, now))
            .collect(),
    }
}

fn of_worker(shared: &Shared, member: &Member, now: Instant) -> WorkerPlacement {
    let (told, held) = (member.told(), member.held());
    let (build, protocol_version) = member.version();
    WorkerPlacement {
        drained: member.is_drained(),
        build,
        protocol_version,
        experts: expert_list(&held, shared.core.admission.config(), &shared.core.numerics),
        held,
        held_epoch: told.as_ref().map(|told| told.epoch),
        held_bytes: told.as_ref().map(|told| told.held_bytes),
        free_bytes: told.and_then(|told| told.free_bytes),
        stats: member.stats(now),
    }
}
