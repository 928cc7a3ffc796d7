//! Which workers there are: a fixed list, the records of a DNS name, workers that register with the gateway, or keys in
//! etcd. Whatever a source fails to say, what it said last stays: [`Discovery`] hands on lists that never become empty.
//!
//! A list and DNS need no service but the one that every network has; registration needs none at all.
#![forbid(unsafe_code)]

mod error;
mod spec;

mod discovery;
mod known;
mod metrics;
mod source;

mod dns;
#[cfg(feature = "etcd")]
pub mod etcd;

mod registration;
mod registry;

pub use discovery::{Discovery, DiscoveryConfig, RegistryDoor, SourceStats};
pub use error::DiscoveryError;
pub use metrics::DiscoveryFigures;
pub use registration::{Registration, RegistrationConfig};
pub use spec::{EtcdSpec, RegisterAt, SourceSpec};
