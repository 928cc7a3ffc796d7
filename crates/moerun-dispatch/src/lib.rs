//! Carries a plan to the experts and back: the one seam, [`ExpertBackend`], and what stands behind it.
//!
//! [`LocalExperts`] runs the experts of this process, [`RemoteExperts`] asks the workers that hold them. Callers are
//! plain threads; what waits for sockets lives on a data-plane thread inside.
#![forbid(unsafe_code)]

mod backend;
mod error;
mod local;

mod remote;

mod pending;

mod link;

mod session;

mod admission;

mod local_shards;
mod local_workers;

pub use backend::{ExpertBackend, ExpertRequest, PendingExperts};
pub use error::DispatchError;
pub use local::LocalExperts;
pub use local_shards::local_shards;
pub use local_workers::{LocalWorkers, LocalWorkersConfig, LocalWorkersError};
pub use remote::{RemoteConfig, RemoteExperts, WorkerStatus};
