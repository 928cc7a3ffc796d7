//! What a worker is told.

use std::{path::PathBuf, time::Duration};

use moerun_routing::ShardSpec;
use moerun_transport::{ClientProtection, ServerProtection};
use moerun_types::{CombineMode, NumberFormat};
use moerun_weights::Load;

/// What a worker is told.
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    /// Checkpoint directory; only the expert tensors need be there.
    pub model_dir: PathBuf,
    /// `host:port` to listen on, where port 0 takes a free one, or `unix:/path`.
    pub listen: String,
    /// Who may connect, and how.
    pub protection: ServerProtection,
    /// `host:port` on the loopback interface for the admin service; `None` = beside the experts, if those are reached from
    /// this host only.
    pub admin_addr: Option<String>,
    /// Which experts, or slices of them, to hold.
    pub shard: ShardSpec,
    /// How weights are held; `None` = the checkpoint's own type.
    pub weights: Option<NumberFormat>,
    /// How partial sums are added.
    pub combine: CombineMode,
    /// Block of the exact combine; `None` = by the experts' width.
    pub combine_block: Option<usize>,
    /// How packed weights come into memory.
    pub load: Load,
    /// Most bytes that experts may take, those that are loaded later included; `None` = what the system has.
    pub max_expert_bytes: Option<u64>,
    /// How connections to other workers are protected, which hand over experts that the checkpoint lacks.
    pub dial: ClientProtection,
    /// Threads that compute, at least 1.
    pub threads: usize,
    /// Most requests that wait to be computed, of all gateways together; one more is answered `OVERLOADED`.
    pub max_queue: usize,
    /// How long a drain may take before what is left is abandoned.
    pub drain_timeout: Duration,
    /// How long the data plane looks for the next request before it sleeps.
    pub patience: Duration,
}

impl WorkerConfig {
    /// Everything but what must be told.
    pub fn new(model_dir: impl Into<PathBuf>, listen: impl Into<String>, shard: ShardSpec) -> Self {
        Self {
            model_dir: model_dir.into(),
            listen: listen.into(),
            protection: ServerProtection::default(),
            admin_addr: None,
            shard,
            weights: None,
            combine: CombineMode::Exact,
            combine_block: None,
            load: Load::default(),
            max_expert_bytes: None,
            dial: ClientProtection::default(),
            threads: moerun_process::available_threads(),
            max_queue: 256,
            drain_timeout: Duration::from_secs(30),
            patience: Duration::ZERO,
        }
    }
}
