//! Why a worker did not start, or ended badly.

use std::io;

/// Why a worker did not start, or ended badly.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkerError {
    /// The checkpoint was refused.
    #[error(transparent)]
    Weights(#[from] moerun_weights::WeightsError),
    /// The experts could not be loaded.
    #[error(transparent)]
    Model(#[from] moerun_model::ModelError),
    /// The shard does not fit the model.
    #[error(transparent)]
    Shard(#[from] moerun_routing::ShardError),
    /// The number format cannot have that combine block.
    #[error(transparent)]
    Numerics(#[from] moerun_types::NumericsError),
    /// A setting makes no sense.
    #[error("{setting}: wanted {wanted}, found {found}")]
    Setting {
        /// Its name.
        setting: &'static str,
        /// Wanted, in words.
        wanted: &'static str,
        /// What was given.
        found: String,
    },
    /// There is nothing for a worker to do.
    #[error("the model has no experts, so no worker can hold any")]
    DenseModel,
    /// The shard does not fit in memory; nothing has been read.
    #[error(
        "{slices} expert slices in {format} take {needed_bytes} bytes ({expert_bytes} a whole expert), \
         but only {available_bytes} bytes of memory are available"
    )]
    OutOfMemory {
        /// Slices to hold.
        slices: usize,
        /// How weights are held.
        format: moerun_types::NumberFormat,
        /// Bytes of one whole expert.
        expert_bytes: u64,
        /// Bytes of all slices.
        needed_bytes: u64,
        /// What the machine and the control group leave.
        available_bytes: u64,
    },
    /// The door could not be opened as it was to be.
    #[error(transparent)]
    Transport(#[from] moerun_transport::TransportError),
    /// The address makes no sense.
    #[error("listen on {address}: {source}")]
    Listen {
        /// As given.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// A thread or runtime could not be started.
    #[error("start {what}: {source}")]
    Start {
        /// Which.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The server ended by itself.
    #[error("gRPC server: {reason}")]
    Server {
        /// Why.
        reason: String,
    },
    /// The drain took too long.
    #[error("drained for {seconds} s, {outstanding} requests were abandoned")]
    DrainTimeout {
        /// What was allowed.
        seconds: u64,
        /// What was left.
        outstanding: usize,
    },
}
