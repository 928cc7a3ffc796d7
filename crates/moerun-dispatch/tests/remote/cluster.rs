//! Workers in this process, listening on loopback, and requests for them.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use moerun_dispatch::{DispatchError, ExpertBackend, ExpertRequest, LocalExperts, RemoteConfig, RemoteExperts};
use moerun_kernels::{Activations, CpuPool};
use moerun_model::ExpertBank;
use moerun_process::Shutdown;
use moerun_routing::{Routing, ShardSpec};
use moerun_testkit::{Family, TinyCheckpoint};
use moerun_types::{CombineMode, ExpertId, LayerId, ModelConfig, NumberFormat, Numerics};
use moerun_weights::{Checkpoint, Needs};
use moerun_worker::{ServeOptions, Worker, identify};
use ndarray::Array2;
use rand::{RngExt, SeedableRng, rngs::StdRng};

/// Short blocks, so that every small model is really sliced; quantised formats have whole blocks of codes.
pub(crate) const COMBINE_BLOCK: usize = 8;

pub(crate) fn golden(family: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden")).join(family)
}

/// A random checkpoint whose experts have three blocks of codes, the last one short.
pub(crate) fn wide(family: Family) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let tiny = TinyCheckpoint {
        hidden: 72,
        head_dim: 12,
        expert_intermediate: 80,
        top_k: if family == Family::Llama4Text { 1 } else { 3 },
        ..TinyCheckpoint::new(family, 3)
    };
    tiny.write(dir.path()).unwrap();
    dir
}

pub(crate) fn numerics(format: NumberFormat) -> Numerics {
    Numerics {
        format,
        combine: CombineMode::Exact,
        combine_block: COMBINE_BLOCK.max(format.column_unit()),
    }
}

pub(crate) fn open(dir: &Path, needs: Needs) -> Arc<Checkpoint> {
    Arc::new(Checkpoint::open(dir, needs).expect("a good checkpoint"))
}

pub(crate) fn options(listen: &str) -> ServeOptions {
    ServeOptions {
        listen: listen.to_owned(),
        protection: Default::default(),
        admin_addr: None,
        threads: 1,
        max_queue: 64,
        drain_timeout: Duration::from_secs(5),
        inline_rows: 4,
        patience: Duration::ZERO,
    }
}

pub(crate) fn start(checkpoint: &Checkpoint, shard: &ShardSpec, numerics: Numerics, listen: &str) -> Worker {
    let slices = shard.resolve(checkpoint.config(), &numerics).unwrap();
    let identity = identify(checkpoint, &slices, numerics, &mut |_, _| {}).unwrap();
    let bank = ExpertBank::load(checkpoint, &slices, numerics, &mut |_, _| {}).unwrap();
    Worker::serve(bank, &identity, options(listen), Shutdown::new()).unwrap()
}

pub(crate) fn start_all(checkpoint: &Checkpoint, shards: &[ShardSpec], numerics: Numerics) -> Vec<Worker> {
    shards
        .iter()
        .map(|shard| start(checkpoint, shard, numerics, "127.0.0.1:0"))
        .collect()
}

pub(crate) fn config(workers: &[Worker]) -> RemoteConfig {
    let mut config = RemoteConfig::new(workers.iter().map(|worker| worker.address().to_string()).collect());
    config.startup_timeout = Duration::from_secs(10);
    config.dispatch_deadline = Duration::from_secs(10);
    config
}

pub(crate) fn local(checkpoint: &Checkpoint, numerics: Numerics) -> LocalExperts {
    let slices = ShardSpec::All.resolve(checkpoint.config(), &numerics).unwrap();
    let bank = ExpertBank::load(checkpoint, &slices, numerics, &mut |_, _| {}).unwrap();
    LocalExperts::new(Arc::new(bank), Arc::new(CpuPool::new(1)))
}

/// Random rows and a random choice of distinct experts.
pub(crate) fn request(
    model: &ModelConfig,
    format: NumberFormat,
    layer: LayerId,
    tokens: usize,
    seed: u64,
) -> ExpertRequest {
    let moe = model.moe.as_ref().unwrap();
    let mut random = StdRng::seed_from_u64(seed);
    let rows = Array2::from_shape_simple_fn((tokens, model.hidden), || random.random_range(-2.0f32..2.0));
    let mut expert_ids = Vec::with_capacity(tokens * moe.top_k);
    for _ in 0..tokens {
        let first = random.random_range(0..moe.num_experts);
        expert_ids.extend((0..moe.top_k).map(|k| ExpertId(((first + k) % moe.num_experts) as u16)));
    }
    let routing_weights = expert_ids.iter().map(|_| random.random_range(0.05f32..0.9)).collect();
    let routing = Routing {
        top_k: moe.top_k,
        expert_ids,
        routing_weights,
    };
    ExpertRequest {
        layer,
        activations: Activations::round(format.activations(), rows.view()),
        routing,
    }
}

pub(crate) fn run(experts: &dyn ExpertBackend, request: &ExpertRequest) -> Result<Vec<u32>, DispatchError> {
    let combined = experts.submit(request.clone())?.wait()?;
    Ok(combined.hidden_states.iter().map(|value| value.to_bits()).collect())
}

pub(crate) fn connect(
    workers: &[Worker],
    checkpoint: &Arc<Checkpoint>,
    numerics: Numerics,
) -> Result<RemoteExperts, DispatchError> {
    RemoteExperts::connect(config(workers), Arc::clone(checkpoint), numerics)
}

/// Whether something becomes so within a few seconds.
pub(crate) fn wait_for(condition: impl Fn() -> bool) -> bool {
    let until = Instant::now() + Duration::from_secs(10);
    while Instant::now() < until {
        if condition() {
            return true;
        }
        thread::sleep(Duration::from_millis(20));
    }
    false
}
