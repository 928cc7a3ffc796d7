//! Building the parts of a gateway, bottom up: checkpoint, memory, pool, model, experts, engine, text.

use std::{
    path::Path,
    sync::{Arc, Weak},
    time::Duration,
};

use anyhow::{Context, bail};
use moerun_discovery::{Discovery, DiscoveryFigures};
use moerun_dispatch::{
    DispatchFigures, ExpertBackend, LocalConfig, LocalExperts, LocalWorkers, LocalWorkersConfig, RemoteConfig,
    RemoteExperts, local_shards,
};
use moerun_engine::{Engine, EngineConfig};
use moerun_gateway::{Gateway, GatewayFigures, GatewayParts, TextCodec};
use moerun_kernels::{CpuPool, flush_denormals};
use moerun_metrics::MetricsDoor;
use moerun_model::{ExpertBank, KvCache, Model};
use moerun_process::{Address, LoadProgress, SocketFolder, available_threads, threads_per_worker};
use moerun_transport::ClientProtection;
use moerun_types::{BlockRange, ExpertId, ExpertSlice, ModelConfig, NumberFormat, Numerics, default_combine_block};
use moerun_weights::{Checkpoint, MemoryNeed, Needs, available_memory_bytes};
use tokio::{runtime::Handle, sync::watch};

use crate::{
    settings::{Settings, SettingsError, Switch},
    size::ByteSize,
};

/// How long worker processes that we start may take to load, and workers elsewhere to come up.
const START_UP_TIMEOUT: Duration = Duration::from_secs(600);

/// How long worker processes that we started may take to end before they are killed.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// Bytes of experts that the gateway keeps for lost workers where the system does not tell what is free.
const FALLBACK_LOCAL_BYTES: u64 = 1 << 30;

/// Contexts that the KV cache has room for unless told otherwise, memory permitting.
const DEFAULT_CONTEXTS: u64 = 16;

/// A model and its experts, ready for forward passes. Fields are dropped in order: the backend lets go of its workers
/// before they are stopped.
pub(crate) struct Experts {
    /// Everything but the experts.
    pub(crate) model: Arc<Model>,
    /// The experts, wherever they are.
    pub(crate) backend: Arc<dyn ExpertBackend>,
    /// Computes.
    pub(crate) pool: Arc<CpuPool>,
    /// The backend again, where it is workers.
    remote: Option<Arc<RemoteExperts>>,
    checkpoint: Arc<Checkpoint>,
    numerics: Numerics,
    kv_memory_bytes: u64,
    max_context: usize,
    _workers: Option<StartedWorkers>,
    /// Finds workers for as long as it is here.
    discovery: Option<Arc<Discovery>>,
}

/// Worker processes, and the folder of their sockets, which goes after them.
struct StartedWorkers {
    processes: LocalWorkers,
    _sockets: Option<SocketFolder>,
}

/// Where the experts are.
enum Place {
    Here,
    /// In processes that this one starts.
    Local(usize),
    /// In workers that already run, or will.
    Remote(Vec<String>, Option<Discovery>),
}

impl Experts {
    /// Starts an engine on them.
    pub(crate) fn start_engine(&self, settings: &Settings) -> anyhow::Result<Engine> {
        let config = EngineConfig {
            kv_memory_bytes: self.kv_memory_bytes,
            kv_format: settings.kv_format,
            max_context: self.max_context,
            max_batch_tokens: settings.max_batch_tokens,
            max_queue: settings.max_queue,
            prefix_cache: settings.prefix_cache == Switch::On,
            speculate: settings.speculate,
        };
        Ok(Engine::start(
            Arc::clone(&self.model),
            Arc::clone(&self.backend),
            Arc::clone(&self.pool),
            config,
        )?)
    }

    /// Loads the model and its experts: in this process, or in `settings.workers` processes that it starts.
    pub(crate) fn start(settings: &Settings) -> anyhow::Result<Self> {
        let place = if settings.workers == 0 {
            Place::Here
        } else {
            Place::Local(settings.workers)
        };
        Self::start_at(settings, place, None)
    }

    /// Loads the model and connects to the workers named in `settings.worker`, and to those that are found on `runtime`.
    pub(crate) fn connect(settings: &Settings, runtime: &Handle) -> anyhow::Result<Self> {
        let discovery = if settings.finds_workers() {
            Some(Discovery::start(settings.discovery()?, runtime)?)
        } else {
            None
        };
        let place = Place::Remote(settings.worker.clone(), discovery);
        Self::start_at(settings, place, Some(runtime))
    }

    fn start_at(settings: &Settings, place: Place, runtime: Option<&Handle>) -> anyhow::Result<Self> {
        let dir = settings.model_dir()?;
        let needs = if matches!(place, Place::Remote(..)) {
            Needs::GatewayOnly
        } else {
            Needs::All
        };
        let checkpoint = Arc::new(Checkpoint::open(dir, needs)?.loading(settings.load));
        let config = checkpoint.config();
        let place = match place {
            Place::Local(_) if config.moe.is_none() => {
                tracing::warn!("a dense model has no experts: no worker process is started");
                Place::Here
            }
            Place::Remote(..) if config.moe.is_none() => bail!("{}: a dense model has no experts", dir.display()),
            Place::Remote(workers, None) if workers.is_empty() => {
                let none = "no workers given: wanted --worker ADDR, MOERUN_WORKER or worker = [\"ADDR\"] in --config; or \
                            --discover or --registry-addr, to find them";
                return Err(SettingsError(none.to_owned()).into());
            }
            place => place,
        };
        let numerics = numerics(settings, &checkpoint)?;
        let max_context = max_context(settings, config)?;
        let experts_on_this_machine = !matches!(place, Place::Remote(..));
        checkpoint.check_format(numerics.format)?;
        let weights = Weights {
            need: MemoryNeed::of(config, numerics.format),
            format: numerics.format,
            experts_on_this_machine,
            mapped: checkpoint.is_mapped(),
            kv_bytes_per_token: KvCache::bytes_per_token(config, settings.kv_format),
            packed: checkpoint.packed_format().is_some(),
        };
        let kv_memory_bytes = reckon_memory(settings, weights, max_context, available_memory_bytes())?;

        let workers = match &place {
            Place::Local(count) => Some(start_workers(settings, dir, config, numerics, *count)?),
            Place::Here | Place::Remote(..) => None,
        };
        flush_denormals(); // norms and gates run on this thread where a command drives the model itself
        let pool = Arc::new(CpuPool::new(settings.threads.unwrap_or_else(available_threads)));
        let mut loading = LoadProgress::new("the gateway's tensors");
        let model = Model::load(&checkpoint, numerics.format, &mut |done, total| {
            loading.update(done, total)
        })?;
        loading.finish();
        let (remote, discovery) = match place {
            Place::Here => (None, None),
            Place::Local(_) | Place::Remote(..) => {
                let (addresses, discovery) = match (&workers, place) {
                    (Some(workers), _) => (workers.processes.addresses().to_vec(), None),
                    (None, Place::Remote(addresses, discovery)) => (addresses, discovery.map(Arc::new)),
                    (None, _) => (Vec::new(), None),
                };
                // Our own workers are on this host, whatever certificates others are dialled with.
                let protection = match &workers {
                    Some(_) => ClientProtection::LoopbackOnly,
                    None => settings.dial_protection()?,
                };
                let remote = RemoteConfig {
                    found_later: discovery.is_some(),
                    protection,
                    startup_timeout: START_UP_TIMEOUT,
                    on_expert_loss: settings.on_expert_loss,
                    local: Some(LocalConfig {
                        pool: Arc::clone(&pool),
                        max_bytes: available_memory_bytes().map_or(FALLBACK_LOCAL_BYTES, |bytes| bytes / 4),
                    }),
                    canary_interval: Duration::from_secs(settings.canary_interval),
                    placement: settings.placement_policy()?,
                    patience: settings
                        .spin
                        .patience(computing_threads(settings, &addresses), available_threads()),
                    ..RemoteConfig::new(addresses)
                };
                let remote = Arc::new(RemoteExperts::open(remote, Arc::clone(&checkpoint), numerics)?);
                if let (Some(discovery), Some(runtime)) = (&discovery, runtime) {
                    runtime.spawn(follow(discovery.workers(), Arc::downgrade(&remote)));
                    tracing::info!("waiting until all experts are held");
                }
                remote.wait_until_held()?;
                (Some(remote), discovery)
            }
        };
        let backend: Arc<dyn ExpertBackend> = match &remote {
            Some(remote) => Arc::clone(remote) as Arc<dyn ExpertBackend>,
            None => Arc::new(LocalExperts::new(load_bank(&checkpoint, numerics)?, Arc::clone(&pool))),
        };
        #[cfg(feature = "planted-violations")]
        let backend = crate::planted_experts::plant(backend);
        Ok(Experts {
            model: Arc::new(model),
            backend,
            pool,
            remote,
            checkpoint,
            numerics,
            kv_memory_bytes,
            max_context,
            _workers: workers,
            discovery,
        })
    }
}

/// Makes each list of workers the members, as long as there is somebody to have them.
async fn follow(mut found: watch::Receiver<Vec<String>>, experts: Weak<RemoteExperts>) {
    found.mark_changed(); // what was found before anybody looked
    while found.changed().await.is_ok() {
        let Some(experts) = experts.upgrade() else { return };
        let workers = found.borrow_and_update().clone();
        if let Err(error) = experts.set_workers(&workers) {
            tracing::error!("the workers stay as they were: {error}");
        }
    }
}

/// A gateway with its engine. Fields are dropped in order: the engine before the experts it waits for.
pub(crate) struct Serving {
    /// Text in, text out.
    pub(crate) gateway: Arc<Gateway>,
    _engine: Engine,
    experts: Experts,
}

impl Serving {
    /// Starts the engine on loaded experts, and reads the tokenizer.
    pub(crate) fn start(settings: &Settings, experts: Experts) -> anyhow::Result<Self> {
        let dir = settings.model_dir()?;
        let codec = TextCodec::load(dir)?;
        let engine = experts.start_engine(settings)?;
        let gateway = Gateway::new(GatewayParts {
            engine: engine.handle(),
            codec,
            config: experts.checkpoint.config().clone(),
            generation: experts.checkpoint.generation_config().clone(),
            numerics: experts.numerics,
            config_hash: experts.checkpoint.config_hash(),
            served_name: settings.served_name.clone().unwrap_or_else(|| directory_name(dir)),
            max_context: experts.max_context,
            max_answer_tokens: settings.max_answer_tokens,
            workers: experts.remote.clone(),
        });
        Ok(Serving {
            gateway: Arc::new(gateway),
            _engine: engine,
            experts,
        })
    }
}

impl Serving {
    /// Shows its figures, and those of its workers and their sources.
    pub(crate) fn show(&self, door: &MetricsDoor) {
        door.show(GatewayFigures::new(Arc::clone(&self.gateway)));
        if let Some(experts) = &self.experts.remote {
            door.show(DispatchFigures::new(Arc::clone(experts)));
        }
        if let Some(discovery) = &self.experts.discovery {
            door.show(DiscoveryFigures::new(Arc::clone(discovery)));
        }
    }
}

fn directory_name(dir: &Path) -> String {
    let absolute = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    absolute
        .file_name()
        .map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
}

/// Threads that compute on this host, as far as is known: this process' own, and those of workers here.
fn computing_threads(settings: &Settings, workers: &[String]) -> usize {
    let own = settings.threads.unwrap_or_else(available_threads);
    let is_here = |worker: &&String| Address::parse(worker).is_ok_and(|it| it.is_on_this_host());
    let here = workers.iter().filter(is_here).count();
    let each = match settings.workers {
        0 => 1, // started by someone else: at least one
        count => threads_per_worker(own, count),
    };
    own + here * each
}

/// What gateway and workers must agree on.
pub(crate) fn numerics(settings: &Settings, checkpoint: &Checkpoint) -> Result<Numerics, SettingsError> {
    let intermediate = checkpoint.config().moe.as_ref().map_or(0, |moe| moe.intermediate);
    Numerics::checked(
        settings.weights.unwrap_or_else(|| checkpoint.default_format()),
        settings.combine,
        settings
            .combine_block
            .unwrap_or_else(|| default_combine_block(intermediate)),
    )
    .map_err(|error| SettingsError(error.to_string()))
}

fn max_context(settings: &Settings, config: &ModelConfig) -> anyhow::Result<usize> {
    let supported = config.max_position_embeddings;
    match settings.max_context {
        Some(wanted) if wanted > supported => {
            bail!("max_context: wanted at most the {supported} positions that the checkpoint supports, found {wanted}")
        }
        Some(wanted) => Ok(wanted),
        None => Ok(supported),
    }
}

/// What is to be in memory beside keys and values.
struct Weights {
    need: MemoryNeed,
    format: NumberFormat,
    experts_on_this_machine: bool,
    /// Whether they stay in mapped files, of which the kernel keeps in memory what is used.
    mapped: bool,
    /// Bytes of keys and values per token.
    kv_bytes_per_token: u64,
    /// Whether they could.
    packed: bool,
}

/// Bytes for keys and values; an error with the arithmetic if the model does not fit beside them. Mapped weights need not
/// fit: they leave a quarter of the memory free.
fn reckon_memory(
    settings: &Settings,
    weights: Weights,
    max_context: usize,
    available: Option<u64>,
) -> anyhow::Result<u64> {
    let need = weights.need;
    let experts = if weights.experts_on_this_machine {
        need.all_experts_bytes
    } else {
        0
    };
    let all = need.gateway_bytes.saturating_add(experts);
    let (resident, free) = match available {
        None => (0, u64::MAX),
        Some(available) if weights.mapped => (0, available.saturating_sub(all).max(available / 4)),
        Some(available) => (all, available.saturating_sub(all)),
    };
    let kv = match settings.kv_memory {
        Some(ByteSize(bytes)) => bytes,
        None => {
            let per_token = weights.kv_bytes_per_token;
            let context = per_token.saturating_mul(max_context as u64);
            // At least one page, so that the error below speaks of weights and not of an empty cache.
            context
                .saturating_mul(DEFAULT_CONTEXTS)
                .min(free / 4)
                .max(per_token.saturating_mul(16))
        }
    };
    match available {
        Some(available) if weights.mapped && kv > available => bail!(
            "keys and values do not fit in memory: wanted {}, but {} are available",
            ByteSize(kv),
            ByteSize(available),
        ),
        Some(available) if resident.saturating_add(kv) > available => bail!(
            "the model does not fit in memory: {} for the gateway's tensors + {} for experts in {} + {} for keys \
             and values in {} = {}, but {} are available; {}",
            ByteSize(need.gateway_bytes),
            ByteSize(experts),
            weights.format,
            ByteSize(kv),
            settings.kv_format,
            ByteSize(resident.saturating_add(kv)),
            ByteSize(available),
            if weights.packed {
                "with --load map it need not fit"
            } else {
                "packed by moerun convert it would be mapped and need not fit"
            },
        ),
        _ => Ok(kv),
    }
}

/// All experts, whole, in this process; a dense model has none.
fn load_bank(checkpoint: &Checkpoint, numerics: Numerics) -> anyhow::Result<Arc<ExpertBank>> {
    let config = checkpoint.config();
    let mut slices = Vec::new();
    if let Some(moe) = &config.moe {
        let end = u16::try_from(numerics.num_blocks(moe.intermediate)).context("too many combine blocks")?;
        for layer in config.moe_layers() {
            for expert in 0..u16::try_from(moe.num_experts).context("too many experts")? {
                slices.push(ExpertSlice {
                    layer,
                    expert: ExpertId(expert),
                    blocks: BlockRange { first: 0, end },
                });
            }
        }
    }
    let mut loading = LoadProgress::new("experts");
    let bank = ExpertBank::load(checkpoint, &slices, numerics, &mut |done, total| {
        loading.update(done, total)
    })?;
    loading.finish();
    Ok(Arc::new(bank))
}

/// Starts `count` workers of this binary on Unix sockets and waits until they are ready.
fn start_workers(
    settings: &Settings,
    dir: &Path,
    config: &ModelConfig,
    numerics: Numerics,
    count: usize,
) -> anyhow::Result<StartedWorkers> {
    let intermediate = config.moe.as_ref().map_or(0, |moe| moe.intermediate);
    let threads = threads_per_worker(settings.threads.unwrap_or_else(available_threads), count);
    let computing = settings.threads.unwrap_or_else(available_threads) + threads * count;
    let spin = if settings.spin.patience(computing, available_threads()).is_zero() {
        "off"
    } else {
        "on"
    };
    let common: Vec<String> = [
        "worker",
        "--exit-with-parent",
        "--model",
        dir.to_str()
            .with_context(|| format!("{}: wanted a path in UTF-8", dir.display()))?,
        "--weights",
        &numerics.format.to_string(),
        "--load",
        &settings.load.to_string(),
        "--combine",
        &numerics.combine.to_string(),
        "--combine-block",
        &numerics.combine_block.to_string(),
        "--threads",
        &threads.to_string(),
        "--spin",
        spin,
        "--log-format",
        &settings.log_format.to_string(),
        "--log-level",
        settings.log_level.as_deref().unwrap_or("info"),
    ]
    .map(str::to_owned)
    .to_vec();
    let sockets = SocketFolder::create()
        .inspect_err(|error| tracing::warn!("workers listen on loopback, which is slower than Unix sockets: {error}"))
        .ok();
    let arguments = local_shards(numerics.num_blocks(intermediate), count)
        .iter()
        .enumerate()
        .map(|(index, shard)| {
            let listen = match &sockets {
                Some(sockets) => sockets.address(index),
                None => Address::Tcp("127.0.0.1:0".to_owned()),
            };
            let own = ["--listen", &listen.to_string(), "--shard", &shard.to_string()].map(str::to_owned);
            [common.clone(), own.to_vec()].concat()
        })
        .collect();
    let workers = LocalWorkersConfig {
        program: std::env::current_exe().context("the path of this binary")?,
        arguments,
        ready_timeout: START_UP_TIMEOUT,
        stop_grace: STOP_GRACE,
    };
    Ok(StartedWorkers {
        processes: LocalWorkers::start(workers)?,
        _sockets: sockets,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weights(mapped: bool) -> Weights {
        Weights {
            need: MemoryNeed {
                gateway_bytes: 10_000,
                expert_bytes: 1000,
                all_experts_bytes: 90_000,
                embedding_bytes: 0,
            },
            kv_bytes_per_token: 1,
            format: NumberFormat::Int4,
            experts_on_this_machine: true,
            mapped,
            packed: true,
        }
    }

    #[test]
    fn only_mapped_weights_may_be_larger_than_memory() {
        let settings = Settings::default();
        let reckon = |mapped, available| reckon_memory(&settings, weights(mapped), 4096, Some(available));
        let error = reckon(false, 50_000).unwrap_err().to_string();
        assert!(
            error.contains("--load map") && error.contains("97.7 KiB") && error.contains("48.8 KiB"),
            "{error}"
        );
        assert_eq!(reckon(true, 50_000).unwrap(), 50_000 / 16);
        // What fits is reckoned alike.
        assert_eq!(reckon(false, 140_000).unwrap(), 10_000);
        assert_eq!(reckon(true, 140_000).unwrap(), 10_000);
        let large = Settings {
            kv_memory: Some(ByteSize(60_000)),
            ..Settings::default()
        };
        assert!(reckon_memory(&large, weights(true), 4096, Some(50_000)).is_err());
    }
}
