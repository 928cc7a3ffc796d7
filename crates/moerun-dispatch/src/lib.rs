//! Carries a plan to the experts and back: the one seam, [`ExpertBackend`], and what stands behind it.
//!
//! [`LocalExperts`] runs the experts of this process, [`RemoteExperts`] asks the workers that hold them. Callers are
//! plain threads; what waits for sockets lives on a data-plane thread inside.
#![forbid(unsafe_code)]

mod backend;
mod error;
mod local;

mod remote;

mod core;
mod dispatch;
mod expert_loss;
mod local_resort;

mod run_plan;

mod membership;

mod canary;
mod member;

mod budget;
mod health;
mod metrics;
mod stats;

mod held_watch;
mod link;
mod live;
mod load_averages;

mod connector;
mod session;

mod admission;
mod examine;

mod local_shards;
mod local_workers;

#[cfg(test)]
mod simulation;

pub use backend::{Combined, ExpertBackend, ExpertRequest, PendingExperts};
pub use connector::Connector;
pub use error::DispatchError;
pub use examine::{Examination, examine};
pub use expert_loss::OnExpertLoss;
pub use live::{
    DrainReport, Follow, PlacementPolicy, PlacementStatus, Promise, RebalanceReport, WorkerMoves, WorkerPlacement,
    cost_model, expert_size,
};
pub use local::LocalExperts;
pub use local_shards::local_shards;
pub use local_workers::{LocalWorkers, LocalWorkersConfig, LocalWorkersError};
pub use metrics::DispatchFigures;
pub use remote::{LocalConfig, RemoteConfig, RemoteExperts, WorkerStatus};
pub use stats::{DispatchStats, FailureReason, LatencyHistogram, WorkerStats};
