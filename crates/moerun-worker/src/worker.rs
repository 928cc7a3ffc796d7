//! Starts a worker in the order in which it can fail cheaply: settings, shard, memory, address; then load; then ready.

use std::{
    io,
    sync::{Arc, OnceLock},
    thread::JoinHandle,
    time::Duration,
};

use moerun_kernels::CpuPool;
use moerun_model::ExpertBank;
use moerun_process::{Address, DataPlane, LoadProgress, Shutdown, SocketFile, bind_admin};
use moerun_proto::{ModelLimits, WorkerIdentity};
use moerun_transport::{ServerProtection, bind};
use moerun_types::{Numerics, default_combine_block};
use moerun_weights::{Checkpoint, Needs};
use tokio::task::JoinHandle as Task;
use tonic_health::ServingStatus;

use crate::{
    ExpertSource, WorkerConfig, WorkerError, WorkerFigures,
    admin::AdminDoor,
    compute::{Compute, RunExperts},
    holdings::Holdings,
    identity::identify,
    memory,
    server::{self, AdminDoors},
    service::Loaded,
};

/// Rows of a request that is run where it is read: decoding, whose messages are short and whose answer is waited for.
const INLINE_ROWS: usize = 8;

/// What would encrypt a worker's door.
const TLS_FLAGS: &str = "--tls-cert, --tls-key and --tls-ca";

/// A running worker. Dropping it stops it at once; [`Worker::wait`] lets it end in order.
#[derive(Debug)]
pub struct Worker {
    address: Address,
    shutdown: Shutdown,
    figures: AdminDoor,
    server: Option<Task<Result<(), WorkerError>>>,
    compute: Option<JoinHandle<()>>,
    // Before the data plane: no file tells of a door that is closed.
    _socket: Option<SocketFile>,
    data_plane: DataPlane,
}

/// How a worker serves what it holds.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// `host:port`, where port 0 takes a free one, or `unix:/path`.
    pub listen: String,
    /// Who may connect, and how.
    pub protection: ServerProtection,
    /// `host:port` on the loopback interface for the admin service; `None` = beside the experts, if those are reached from
    /// this host only.
    pub admin_addr: Option<String>,
    /// Threads that compute, at least 1.
    pub threads: usize,
    /// Most requests that wait to be computed.
    pub max_queue: usize,
    /// How long a drain may take.
    pub drain_timeout: Duration,
    /// Requests of at most this many rows are run on the data plane's own thread while there are no others: no thread is
    /// woken for them. 0 = none.
    pub inline_rows: usize,
    /// How long to look for a stream's next request before sleeping.
    pub patience: Duration,
}

impl Worker {
    /// Loads what `config` names and serves it; returns when the worker is ready.
    ///
    /// Before anything large is read, the shard is resolved, its memory is reckoned, and the address is taken. While it
    /// loads, health says `NOT_SERVING` and a handshake is answered `UNAVAILABLE`.
    pub fn start(config: &WorkerConfig, shutdown: Shutdown) -> Result<Self, WorkerError> {
        let options = ServeOptions {
            listen: config.listen.clone(),
            protection: config.protection.clone(),
            admin_addr: config.admin_addr.clone(),
            threads: config.threads,
            max_queue: config.max_queue,
            drain_timeout: config.drain_timeout,
            inline_rows: INLINE_ROWS,
            patience: config.patience,
        };
        let needs = match config.shard.names_nothing() {
            true => Needs::Nothing,
            false => Needs::ExpertsOnly,
        };
        let checkpoint = Checkpoint::open(&config.model_dir, needs)?.loading(config.load);
        let model = checkpoint.config();
        let Some(moe) = &model.moe else {
            return Err(WorkerError::DenseModel);
        };
        let numerics = Numerics::checked(
            config.weights.unwrap_or_else(|| checkpoint.default_format()),
            config.combine,
            config
                .combine_block
                .unwrap_or_else(|| default_combine_block(moe.intermediate)),
        )?;
        let slices = config.shard.resolve(model, &numerics)?;
        if slices.is_empty() && needs == Needs::ExpertsOnly {
            tracing::warn!("shard {} holds nothing of this model", config.shard);
        }
        checkpoint.check_format(numerics.format)?;
        memory::check_fits(&checkpoint, &slices, numerics, config.max_expert_bytes)?;
        let listening = Listening::start(options, shutdown)?;

        let mut hashing = LoadProgress::counting("expert hashes");
        let identity = identify(&checkpoint, &slices, numerics, &mut |done, total| {
            hashing.update(done, total)
        })?;
        hashing.finish();
        let mut loading = LoadProgress::new("experts");
        let bank = ExpertBank::load(&checkpoint, &slices, numerics, &mut |done, total| {
            loading.update(done, total)
        })?;
        loading.finish();
        let source = ExpertSource {
            model_dir: config.model_dir.clone(),
            load: config.load,
            max_expert_bytes: config.max_expert_bytes,
            dial: config.dial.clone(),
        };
        listening.serve(bank, &identity, Some(source))
    }

    /// Serves experts that are loaded already, under an identity made by [`identify`]; it never holds others.
    pub fn serve(
        bank: ExpertBank,
        identity: &WorkerIdentity,
        options: ServeOptions,
        shutdown: Shutdown,
    ) -> Result<Self, WorkerError> {
        Listening::start(options, shutdown)?.serve(bank, identity, None)
    }

    /// As [`Worker::serve`], of experts that come from `source`, as more may.
    pub fn serve_from(
        source: ExpertSource,
        bank: ExpertBank,
        identity: &WorkerIdentity,
        options: ServeOptions,
        shutdown: Shutdown,
    ) -> Result<Self, WorkerError> {
        Listening::start(options, shutdown)?.serve(bank, identity, Some(source))
    }

    /// Where it listens.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Where its streams are served; experts of small requests run there too, for milliseconds.
    pub fn runtime(&self) -> &tokio::runtime::Handle {
        self.data_plane.handle()
    }

    /// What it is doing, for Prometheus.
    pub fn figures(&self) -> WorkerFigures {
        WorkerFigures(self.figures.clone())
    }

    /// What ends it.
    pub fn shutdown(&self) -> &Shutdown {
        &self.shutdown
    }

    /// Blocks until the worker has ended, as its shutdown asks.
    pub fn wait(mut self) -> Result<(), WorkerError> {
        let Some(server) = self.server.take() else {
            return Ok(());
        };
        let outcome = self.data_plane.handle().block_on(server);
        let stopped_at_once = self.shutdown.is_stopping();
        let compute = self.compute.take();
        // Ends the tasks that hold the queue, which ends the compute thread.
        drop(self);
        if let Some(compute) = compute
            && !stopped_at_once
            && compute.join().is_err()
        {
            return Err(WorkerError::Server {
                reason: "the compute thread panicked".to_owned(),
            });
        }
        outcome.unwrap_or_else(|error| {
            Err(WorkerError::Server {
                reason: error.to_string(),
            })
        })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shutdown.stop();
    }
}

/// An address that is taken, a server on it, no experts yet.
struct Listening {
    options: ServeOptions,
    address: Address,
    socket: Option<SocketFile>,
    shutdown: Shutdown,
    data_plane: DataPlane,
    loaded: Arc<OnceLock<Loaded>>,
    health: server::Health,
    figures: AdminDoor,
    server: Task<Result<(), WorkerError>>,
}

impl Listening {
    fn start(options: ServeOptions, shutdown: Shutdown) -> Result<Self, WorkerError> {
        at_least_one("threads", options.threads)?;
        at_least_one("max_queue", options.max_queue)?;
        let listen = |source| WorkerError::Listen {
            address: options.listen.clone(),
            source,
        };
        let wanted = Address::parse(&options.listen)
            .map_err(|reason| listen(io::Error::new(io::ErrorKind::InvalidInput, reason)))?;
        let listener = bind(&wanted, &options.protection, TLS_FLAGS)?;
        let address = listener.address().map_err(listen)?;
        if let Address::Unix(path) = &address {
            shutdown.remove_at_end(path.clone());
        }
        let data_plane = DataPlane::start("moerun-data").map_err(|source| WorkerError::Start {
            what: "data plane",
            source,
        })?;
        let admin = match &options.admin_addr {
            Some(admin_addr) => AdminDoors::Own(bind_admin(admin_addr).map_err(|source| WorkerError::Listen {
                address: admin_addr.clone(),
                source,
            })?),
            None if address.is_on_this_host() => AdminDoors::Beside,
            None => AdminDoors::None,
        };
        let preparing = server::prepare(listener, admin, shutdown.clone(), &options);
        let (prepared, socket) = data_plane.handle().block_on(preparing)?;
        let server = data_plane.handle().spawn(prepared.run);
        let (loaded, health, figures) = (prepared.loaded, prepared.health, prepared.figures);
        Ok(Self {
            options,
            address,
            socket,
            shutdown,
            data_plane,
            loaded,
            health,
            figures,
            server,
        })
    }

    fn serve(
        self,
        bank: ExpertBank,
        identity: &WorkerIdentity,
        source: Option<ExpertSource>,
    ) -> Result<Worker, WorkerError> {
        let limits = ModelLimits::new(bank.config(), bank.numerics());
        let pool = CpuPool::new(self.options.threads);
        let holdings = Arc::new(Holdings::new(identity.clone(), Some(bank), source));
        let held = Arc::clone(&holdings);
        let run: RunExperts = Box::new(move |work| match &held.now().bank {
            Some(bank) => bank.execute(&pool, work.layer, &work.activations, &work.assignments),
            None => unreachable!("these holdings were made with a bank, and are never without"),
        });
        self.serve_holdings(run, limits, holdings)
    }

    /// Something that answers for experts.
    #[cfg(test)]
    fn serve_with(
        self,
        run: RunExperts,
        limits: ModelLimits,
        identity: &WorkerIdentity,
    ) -> Result<Worker, WorkerError> {
        self.serve_holdings(run, limits, Arc::new(Holdings::new(identity.clone(), None, None)))
    }

    fn serve_holdings(
        self,
        run: RunExperts,
        limits: ModelLimits,
        holdings: Arc<Holdings>,
    ) -> Result<Worker, WorkerError> {
        let (compute, thread) =
            Compute::start(run, self.options.max_queue, self.options.inline_rows).map_err(|source| {
                WorkerError::Start {
                    what: "compute thread",
                    source,
                }
            })?;
        let identity = holdings.now().identity.clone();
        if self
            .loaded
            .set(Loaded {
                holdings,
                limits,
                compute,
            })
            .is_err()
        {
            unreachable!("`self` is consumed, so the experts are set once");
        }
        if !self.shutdown.is_draining() {
            self.data_plane
                .handle()
                .block_on(self.health.set(ServingStatus::Serving));
        }
        tracing::info!(address = %self.address, slices = identity.held.len(), numerics = %identity.numerics_id, "experts loaded");
        Ok(Worker {
            address: self.address,
            shutdown: self.shutdown,
            figures: self.figures,
            server: Some(self.server),
            compute: Some(thread),
            _socket: self.socket,
            data_plane: self.data_plane,
        })
    }
}

fn at_least_one(setting: &'static str, value: usize) -> Result<(), WorkerError> {
    if value == 0 {
        return Err(WorkerError::Setting {
            setting,
            wanted: "at least 1",
            found: value.to_string(),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
