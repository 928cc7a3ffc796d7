//! Experts in worker processes: [`RemoteExperts`], the blocking façade of the dispatch.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use moerun_kernels::CpuPool;
use moerun_process::{DataPlane, spin_then_wait};
use moerun_proto::v1;
use moerun_transport::ClientProtection;
use moerun_types::{ExpertSlice, Numerics};
use moerun_weights::Checkpoint;
use parking_lot::Mutex;
use tokio::{
    sync::mpsc,
    task::yield_now,
    time::{Instant, timeout},
};

use crate::{
    Combined, Connector, DispatchError, DispatchStats, ExpertBackend, ExpertRequest, OnExpertLoss, PendingExperts,
    admission::Admission,
    canary::Canary,
    core::Core,
    dispatch::{Dispatch, Progress},
    link::{Arrival, Waiter},
    live::{DrainReport, Follow, Live, PlacementPolicy, PlacementStatus, RebalanceReport},
    local_resort::LocalResort,
    membership::{Membership, News, endpoints},
    run_plan::RunPlan,
};

/// Rows up to this many bytes, to all workers together, are written by the thread that dispatches. More would not fit the
/// sockets' buffers at once.
const MAX_CALLER_DRIVEN_BYTES: usize = 64 << 10;

/// Which workers, how long to wait for them, and what to do without them.
#[derive(Debug, Clone)]
pub struct RemoteConfig {
    /// `host:port` or `unix:/path` of each.
    pub workers: Vec<String>,
    /// Whether others come and go by [`RemoteExperts::set_workers`] from the start on, and `workers` may be empty.
    pub found_later: bool,
    /// How connections to them are protected, and who they must be.
    pub protection: ClientProtection,
    /// How long workers may take to come up, loading included.
    pub startup_timeout: Duration,
    /// How long one dispatch may take at most, from submit to the last answer. One that hangs is asked of another holder
    /// much sooner.
    pub dispatch_deadline: Duration,
    /// How long to look for an answer before sleeping.
    pub patience: Duration,
    /// What to do when no holder of an expert is left.
    pub on_expert_loss: OnExpertLoss,
    /// With what this process computes experts itself; `None` = it does not.
    pub local: Option<LocalConfig>,
    /// How often each worker is asked with a known input.
    pub canary_interval: Duration,
    /// Decides between holders that seem equal.
    pub seed: u64,
    /// Opens transports.
    pub connector: Connector,
    /// Who says who holds what.
    pub placement: PlacementPolicy,
}

/// With what this process computes experts that no worker can.
#[derive(Debug, Clone)]
pub struct LocalConfig {
    /// Computes.
    pub pool: Arc<CpuPool>,
    /// Most bytes of packed experts that are kept for the next time.
    pub max_bytes: u64,
}

impl RemoteConfig {
    /// These workers, with the usual patience; when all holders of an expert are gone, dispatches fail.
    pub fn new(workers: Vec<String>) -> Self {
        Self {
            workers,
            found_later: false,
            protection: ClientProtection::default(),
            startup_timeout: Duration::from_secs(120),
            dispatch_deadline: Duration::from_secs(30),
            patience: Duration::ZERO,
            on_expert_loss: OnExpertLoss::Fail,
            local: None,
            canary_interval: Duration::from_secs(60),
            seed: 0,
            connector: Connector::sockets(),
            placement: PlacementPolicy::default(),
        }
    }
}

/// A worker as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerStatus {
    /// Its address.
    pub address: String,
    /// Why it is down, if it is.
    pub down: Option<String>,
    /// What it announced when it was admitted; nothing before that.
    pub held: Vec<ExpertSlice>,
}

/// Experts held by workers, each reached over one long-lived stream. What a worker fails to answer is asked of another
/// holder; a worker that goes away is looked for until it is back.
///
/// [`ExpertBackend::submit`] and [`PendingExperts::wait`] block and must not be called on a thread of an async runtime.
#[derive(Debug)]
pub struct RemoteExperts {
    core: Arc<Core>,
    membership: Membership,
    live: Arc<Live>,
    /// Whether experts are moved once the start is over.
    follows: bool,
    protection: ClientProtection,
    patience: Duration,
    data_plane: Arc<DataPlane>,
    /// What [`RemoteExperts::wait_until_held`] waits for; nothing once it has.
    starting: Mutex<Option<mpsc::Receiver<News>>>,
    startup_timeout: Duration,
}

impl RemoteExperts {
    /// Connects to the workers, compares each with `checkpoint` and `numerics` and all with each other, and returns when
    /// those that are there hold the whole model between them, or this process can compute the rest.
    ///
    /// A worker that cannot be reached or is still loading is waited for until the start-up timeout if it is needed, and
    /// dialled on in any case; one that differs is refused at once. `checkpoint` need not have any expert; where it has
    /// one, a worker's copy of it is compared.
    pub fn connect(
        config: RemoteConfig,
        checkpoint: Arc<Checkpoint>,
        numerics: Numerics,
    ) -> Result<Self, DispatchError> {
        let experts = Self::open(config, checkpoint, numerics)?;
        experts.wait_until_held()?;
        Ok(experts)
    }

    /// As [`RemoteExperts::connect`], but returns as soon as the workers are being dialled: for those that are found out
    /// meanwhile. Nothing may be submitted before [`RemoteExperts::wait_until_held`] has returned.
    pub fn open(config: RemoteConfig, checkpoint: Arc<Checkpoint>, numerics: Numerics) -> Result<Self, DispatchError> {
        let endpoints = endpoints(&config.workers, &config.protection)?;
        let data_plane = DataPlane::start("moerun-dispatch").map_err(|error| start_error(&error))?;
        let admission = Arc::new(Admission::new(Arc::clone(&checkpoint), numerics));
        let num_blocks = admission.limits().num_blocks;
        if let Follow::Plan(file) = &config.placement.follow {
            admission.resolve(file)?; // one for something else is refused before anybody is dialled
        }
        let canary = Canary::new(
            Arc::clone(&checkpoint),
            numerics,
            num_blocks,
            config.canary_interval,
            config.connector.clone(),
        );
        let local = config.local.map(|LocalConfig { pool, max_bytes }| {
            Arc::new(LocalResort::new(checkpoint, numerics, num_blocks, pool, max_bytes))
        });
        let nobody = RunPlan::new(0, admission.config(), num_blocks, Vec::new())
            .map_err(|error| DispatchError::Placement(Arc::new(error)))?;
        let core = Arc::new(Core::new(
            admission,
            nobody,
            config.seed,
            config.dispatch_deadline,
            config.on_expert_loss,
            local,
        ));
        let (membership, starting) = Membership::start(
            Arc::clone(&core),
            canary,
            config.connector,
            data_plane.handle().clone(),
            endpoints,
            config.found_later,
        );
        let follows = !matches!(config.placement.follow, Follow::AsHeld);
        let live = Arc::new(Live::new(Arc::clone(membership.shared()), config.placement));
        Ok(Self {
            core,
            membership,
            live,
            follows,
            protection: config.protection,
            patience: config.patience,
            data_plane: Arc::new(data_plane),
            starting: Mutex::new(Some(starting)),
            startup_timeout: config.startup_timeout,
        })
    }

    /// Blocks until the workers hold the whole model between them, or this process can compute the rest. With workers that
    /// are found out, what is missing is computed here only when the start-up timeout is over. Called once.
    pub fn wait_until_held(&self) -> Result<(), DispatchError> {
        let Some(starting) = self.starting.lock().take() else {
            return Ok(());
        };
        let assembled = self.membership.assembled(starting, self.startup_timeout);
        // Spawned, not blocked on here: its timers and sockets belong to the data plane's thread.
        let runtime = self.data_plane.handle();
        let assembled = runtime.block_on(runtime.spawn(assembled));
        assembled.map_err(|error| start_error(&error))??;
        if self.follows {
            let keeping = Arc::clone(&self.live).keep();
            self.membership.run(async move { match keeping.await {} });
        }
        Ok(())
    }

    /// The workers as they are now, in the order given.
    pub fn workers(&self) -> Vec<WorkerStatus> {
        let members = self.membership.members();
        let status = |member: &Arc<crate::member::Member>| WorkerStatus {
            address: member.address().to_owned(),
            down: member.link.down_reason(),
            held: member.held(),
        };
        members.iter().map(status).collect()
    }

    /// What has happened so far.
    pub fn stats(&self) -> DispatchStats {
        self.core.stats()
    }

    /// Replaces the workers while dispatches go on: newcomers are dialled, and asked once they are admitted; those that are
    /// not in the list any more get no new work, and are let go when they have answered. Returns the epoch of the new plan.
    pub fn set_workers(&self, workers: &[String]) -> Result<u64, DispatchError> {
        self.membership.replace(endpoints(workers, &self.protection)?)
    }

    /// How the placement is, and each worker with what it holds.
    pub fn placement(&self) -> PlacementStatus {
        self.live.status()
    }

    /// Moves off the worker with that address what it alone holds, while dispatches go on, and gives it no more calls; it
    /// stays a member. Returns when it owes no answer any more. Goes on to its end though nobody waits for it, like each
    /// of these changes; they are made one at a time.
    pub async fn drain_worker(&self, worker: &str) -> Result<DrainReport, DispatchError> {
        let (live, worker) = (Arc::clone(&self.live), worker.to_owned());
        self.change(async move { live.drain(&worker).await }).await
    }

    /// Gives a drained worker calls again. Returns the epoch of the new plan.
    pub async fn resume_worker(&self, worker: &str) -> Result<u64, DispatchError> {
        let (live, worker) = (Arc::clone(&self.live), worker.to_owned());
        self.change(async move { live.resume(&worker).await }).await
    }

    /// Plans over the loads of late, or takes the plan that is followed, and moves experts accordingly while dispatches go
    /// on; with `dry_run` only says what would move.
    pub async fn rebalance(&self, dry_run: bool) -> Result<RebalanceReport, DispatchError> {
        let live = Arc::clone(&self.live);
        self.change(async move { live.rebalance(dry_run).await }).await
    }

    /// On the data plane's runtime, to which connections and timers belong.
    async fn change<T: Send + 'static>(
        &self,
        change: impl Future<Output = Result<T, DispatchError>> + Send + 'static,
    ) -> Result<T, DispatchError> {
        let changed = self.data_plane.handle().spawn(change).await;
        changed.map_err(|error| start_error(&error))?
    }

    /// Sends `bytes` to a worker, by its place in the order given, over the stream that experts are asked on, and returns
    /// what comes back: what a round trip costs. Blocks for at most the dispatch deadline. Panics if there is no such worker.
    pub fn echo(&self, worker: usize, bytes: Bytes) -> Result<Bytes, DispatchError> {
        let plan = self.core.plan.load();
        let member = &plan.members[worker];
        let gone = |reason: String| DispatchError::WorkerGone {
            worker: member.address().to_owned(),
            reason,
        };
        let (arrivals, mut arrived) = mpsc::channel(1);
        let registered = member.link.register(Waiter { call: 0, arrivals }).map_err(gone)?;
        let request_id = registered.request_id;
        let request = v1::ExecuteRequest {
            request_id,
            echo: bytes,
            ..Default::default()
        };
        let (deadline, patience) = (self.core.dispatch_deadline, self.patience);
        let asking = async {
            // When the connection has just ended, the waiter has been told, or is being told, why.
            let _ = registered.requests.send(request).await;
            spin_then_wait(patience, arrived.recv()).await
        };
        let answer = self.data_plane.drive(async { timeout(deadline, asking).await });
        match answer {
            Ok(Some(Arrival {
                outcome: Ok(response), ..
            })) => Ok(response.echo),
            Ok(Some(Arrival {
                outcome: Err(reason), ..
            })) => Err(gone(reason)),
            Ok(None) => Err(gone("the connection was dropped".to_owned())),
            Err(_) => {
                member.link.forget(request_id);
                Err(gone(format!("no echo within {deadline:?}")))
            }
        }
    }
}

fn start_error(error: &dyn std::error::Error) -> DispatchError {
    DispatchError::Start {
        reason: error.to_string(),
    }
}

impl ExpertBackend for RemoteExperts {
    fn computes_elsewhere(&self) -> bool {
        true
    }

    fn submit(&self, request: ExpertRequest) -> Result<Box<dyn PendingExperts>, DispatchError> {
        let mut dispatch = Dispatch::begin(&self.core, request)?;
        let driver = if dispatch.outgoing_bytes() <= MAX_CALLER_DRIVEN_BYTES {
            Driver::Caller
        } else {
            Driver::DataPlane
        };
        match driver {
            Driver::DataPlane => {
                self.data_plane.hand_back();
                dispatch.flush();
            }
            Driver::Caller => self.data_plane.drive(async {
                dispatch.flush();
                // Two turns of the runtime: the streams take the messages, the connections write them.
                yield_now().await;
                yield_now().await;
            }),
        }
        Ok(Box::new(PendingRemote {
            dispatch,
            local: self.core.local.clone(),
            data_plane: Arc::clone(&self.data_plane),
            driver,
            patience: self.patience,
        }))
    }
}

/// Who writes and reads the sockets of a dispatch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Driver {
    /// The thread that dispatches: no other is woken. For messages that are written at once.
    Caller,
    /// The data plane's own thread, while the caller computes or adds up what has come.
    DataPlane,
}

/// A dispatch under way, and who drives it.
#[derive(Debug)]
struct PendingRemote {
    dispatch: Dispatch,
    local: Option<Arc<LocalResort>>,
    data_plane: Arc<DataPlane>,
    driver: Driver,
    patience: Duration,
}

impl PendingExperts for PendingRemote {
    fn wait(mut self: Box<Self>) -> Result<Combined, DispatchError> {
        loop {
            let advancing = self.dispatch.advance(self.patience);
            let progress = match self.driver {
                Driver::Caller => self.data_plane.drive(advancing),
                Driver::DataPlane => {
                    // Another dispatch may have been driven meanwhile.
                    self.data_plane.hand_back();
                    self.data_plane.handle().block_on(advancing)
                }
            };
            match progress? {
                Progress::Done => return Ok(self.dispatch.combined()),
                Progress::Local(work) => {
                    // Outside the runtime: its own thread goes on with answers and pings.
                    self.data_plane.hand_back();
                    let (Some(local), begun) = (&self.local, Instant::now()) else {
                        unreachable!("work comes here only if there is somebody to compute it");
                    };
                    let layer = self.dispatch.layer();
                    let sums = local.run(layer, self.dispatch.activations(), &work)?;
                    tracing::debug!(
                        layer = layer.0,
                        assignments = work.len(),
                        kept_bytes = local.kept_bytes(),
                        "computed here in {:?}",
                        begun.elapsed()
                    );
                    self.dispatch.add_local(&work, &sums)?;
                }
            }
        }
    }
}
