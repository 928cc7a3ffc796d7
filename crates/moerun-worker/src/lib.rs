//! A process that holds experts and answers for them.
//!
//! Two threads matter: the data plane's, which reads requests and writes answers, and the compute thread, which runs
//! one request after another on the CPU pool, those that wait for one layer together. A bounded queue lies between them.
//! A small request that comes alone is run by the former itself, as a member of the pool: nobody is woken for it.
#![forbid(unsafe_code)]

mod admin;
mod compute;
mod config;
mod connections;
mod error;
mod holding_error;
mod holdings;
mod identity;
mod memory;
mod metrics;
mod placement_door;
mod queue;
mod server;
mod service;
mod transfer;
mod worker;

pub use config::WorkerConfig;
pub use connections::serve_connections;
pub use error::WorkerError;
pub use holding_error::HoldingError;
pub use holdings::ExpertSource;
pub use identity::identify;
pub use metrics::WorkerFigures;
pub use worker::{ServeOptions, Worker};
