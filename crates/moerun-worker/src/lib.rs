//! A process that holds experts and answers for them.
//!
//! Two threads matter: the data plane's, which reads requests and writes answers, and the compute thread, which runs
//! one request after another on the CPU pool. A bounded queue lies between them, and nothing is computed on the former.
#![forbid(unsafe_code)]

mod compute;
mod config;
mod error;
mod identity;
mod memory;
mod server;
mod service;
mod worker;

pub use config::WorkerConfig;
pub use error::WorkerError;
pub use identity::identify;
pub use worker::{ServeOptions, Worker};
