//! Load that does not wait for the server, the history of what came back, and what that history must satisfy.
//!
//! [`send`] runs a [`Workload`] against a [`Target`] at times fixed beforehand (no coordinated omission), and notes each
//! request's tokens and end. [`History`] holds those records with the faults, figures and log lines of the same run, as
//! JSON lines. [`check`] judges a history by the six invariants and knows nothing of how it came about, so that one
//! checker serves every test. [`chaos`] makes such a history: real processes, a seeded schedule of faults, a report.
#![forbid(unsafe_code)]

mod clock;
mod error;
mod schedule;
mod workload;

mod history;

mod grpc_target;
mod sender;

mod check;
mod figures;

pub mod chaos;

pub use check::{Limits, Verdict, check};
pub use clock::RunClock;
pub use error::LoadError;
pub use figures::{Gaps, Latencies, RunFigures, Window};
pub use grpc_target::GrpcTarget;
pub use history::{
    Entry, Evidence, FaultRecord, History, LogLine, Micros, Outcome, Phase, Reference, RequestRecord, RunInfo, Sample,
    Terminal,
};
pub use schedule::{Arrivals, send_times};
pub use sender::{Attempt, Target, send};
pub use workload::{Case, Workload};
