//! Experts in worker processes: [`RemoteExperts`].

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;

use moerun_kernels::Activations;
use moerun_process::{DataPlane, spin_then_wait};
use moerun_proto::{HeldExpert, MAX_EXECUTE_BYTES, encode_request, request_cost_bytes, v1};
use moerun_routing::{Placement, WorkerBatch};
use moerun_transport::ClientProtection;
use moerun_types::{ExpertSlice, LayerId, Numerics};
use moerun_weights::Checkpoint;
use tokio::{
    sync::mpsc::{self, error::TrySendError},
    task::{JoinSet, yield_now},
    time::{sleep, timeout},
};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    DispatchError, ExpertBackend, ExpertRequest, PendingExperts,
    admission::{Admission, check_agreement, check_unchanged},
    link::{Arrival, Connected, Link, Waiter},
    pending::{Driver, Part, PendingRemote},
    session::{Endpoint, Session, SessionError, endpoint, open},
};

/// Between attempts to reach a worker at start-up.
const START_RETRY: Duration = Duration::from_millis(100);
/// Between attempts to reach a worker that is gone: the first pause, doubled up to the last.
const FIRST_RECONNECT: Duration = Duration::from_millis(50);
const LAST_RECONNECT: Duration = Duration::from_secs(1);

/// Rows up to this many bytes, to all workers together, are written by the thread that dispatches. More would not fit the
/// sockets' buffers at once.
const MAX_CALLER_DRIVEN_BYTES: usize = 64 << 10;

/// Which workers, and how long to wait for them.
#[derive(Debug, Clone)]
pub struct RemoteConfig {
    /// `host:port` or `unix:/path` of each.
    pub workers: Vec<String>,
    /// How connections to them are protected, and who they must be.
    pub protection: ClientProtection,
    /// How long workers may take to come up, loading included.
    pub startup_timeout: Duration,
    /// How long one dispatch may take, from submit to the last answer.
    pub dispatch_deadline: Duration,
    /// How long to look for an answer before sleeping.
    pub patience: Duration,
}

impl RemoteConfig {
    /// These workers, with the usual patience.
    pub fn new(workers: Vec<String>) -> Self {
        Self {
            workers,
            protection: ClientProtection::default(),
            startup_timeout: Duration::from_secs(120),
            dispatch_deadline: Duration::from_secs(30),
            patience: Duration::ZERO,
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
    /// What it announced when it was admitted.
    pub held: Vec<ExpertSlice>,
}

/// Experts held by workers, each reached over one long-lived stream. A worker that goes away is looked for until it is
/// back; what needs it fails at once until then.
///
/// [`ExpertBackend::submit`] and [`PendingExperts::wait`] block and must not be called on a thread of an async runtime.
#[derive(Debug)]
pub struct RemoteExperts {
    admission: Arc<Admission>,
    numerics: Numerics,
    placement: Placement,
    workers: Vec<Member>,
    dispatch_deadline: Duration,
    patience: Duration,
    /// Ends the connections, and so tells whoever still waits on one.
    _connections: DropGuard,
    data_plane: Arc<DataPlane>,
}

#[derive(Debug)]
struct Member {
    link: Arc<Link>,
    held: Vec<ExpertSlice>,
}

/// One worker during start-up.
struct Candidate {
    worker: String,
    endpoint: Endpoint,
    session: Session,
}

impl RemoteExperts {
    /// Connects to all workers, compares each with `checkpoint` and `numerics` and all with each other, and checks that
    /// they hold the whole model between them.
    ///
    /// A worker that cannot be reached or is still loading is waited for until the start-up timeout; one that differs is
    /// refused at once. `checkpoint` need not have any expert; where it has one, a worker's copy of it is compared.
    pub fn connect(
        config: RemoteConfig,
        checkpoint: Arc<Checkpoint>,
        numerics: Numerics,
    ) -> Result<Self, DispatchError> {
        let mut endpoints = Vec::with_capacity(config.workers.len());
        let mut seen = HashSet::new();
        for worker in &config.workers {
            if !seen.insert(worker) {
                let reason = "given twice".to_owned();
                return Err(DispatchError::Address {
                    worker: worker.clone(),
                    reason,
                });
            }
            endpoints.push((worker.clone(), endpoint(worker, &config.protection)?));
        }
        let data_plane = DataPlane::start("moerun-dispatch").map_err(|error| DispatchError::Start {
            reason: error.to_string(),
        })?;
        let model = checkpoint.config().clone();
        let admission = Arc::new(Admission::new(checkpoint, numerics));

        let connecting = connect_all(endpoints, Arc::clone(&admission), config.startup_timeout);
        // Spawned, not blocked on here: its timers and sockets belong to the data plane's thread.
        let candidates = data_plane.handle().block_on(data_plane.handle().spawn(connecting));
        let candidates = candidates.map_err(|error| DispatchError::Start {
            reason: error.to_string(),
        })??;
        check_agreement(
            candidates
                .iter()
                .map(|it| (it.worker.as_str(), it.session.identity.held.as_slice())),
        )?;
        let held: Vec<Vec<ExpertSlice>> = candidates.iter().map(|it| slices(&it.session.identity.held)).collect();
        let placement = Placement::new(&model, admission.limits().num_blocks, &held)
            .map_err(|error| DispatchError::Placement(Arc::new(error)))?;

        let end = CancellationToken::new();
        let mut workers = Vec::with_capacity(held.len());
        for (
            Candidate {
                worker,
                endpoint,
                session,
            },
            held,
        ) in candidates.into_iter().zip(held)
        {
            let link = Arc::new(Link::new(worker));
            let announced = session.identity.held.clone();
            let connected = link.connect(session);
            let keeping = keep_connected(
                Arc::clone(&link),
                connected,
                endpoint,
                announced,
                Arc::clone(&admission),
            );
            data_plane
                .handle()
                .spawn(end.clone().run_until_cancelled_owned(keeping));
            workers.push(Member { link, held });
        }
        Ok(Self {
            admission,
            numerics,
            placement,
            workers,
            dispatch_deadline: config.dispatch_deadline,
            patience: config.patience,
            _connections: end.drop_guard(),
            data_plane: Arc::new(data_plane),
        })
    }

    /// The workers as they are now, in the order given.
    pub fn workers(&self) -> Vec<WorkerStatus> {
        let status = |member: &Member| WorkerStatus {
            address: member.link.worker().to_owned(),
            down: member.link.down_reason(),
            held: member.held.clone(),
        };
        self.workers.iter().map(status).collect()
    }

    /// Cuts what each worker is asked into messages; one of each worker first, so that none waits for another's long one.
    fn cut(&self, activations: &Activations, batches: Vec<WorkerBatch>) -> Vec<WorkerBatch> {
        let mut parts: Vec<(usize, WorkerBatch)> = Vec::with_capacity(batches.len());
        for batch in batches {
            let mut most_assignments = 0;
            for same_row in batch.assignments.chunk_by(|one, next| one.row == next.row) {
                most_assignments = most_assignments.max(same_row.len());
            }
            let row_bytes = request_cost_bytes(activations.format(), activations.cols(), most_assignments);
            let max_rows = (MAX_EXECUTE_BYTES / row_bytes.max(1)).clamp(1, self.admission.limits().max_rows);
            parts.extend(batch.split(max_rows).into_iter().enumerate());
        }
        parts.sort_by_key(|&(turn, _)| turn);
        parts.into_iter().map(|(_, part)| part).collect()
    }

    /// Sends `bytes` to a worker, by its place in the order given, over the stream that experts are asked on, and returns
    /// what comes back: what a round trip costs. Blocks for at most the dispatch deadline. Panics if there is no such worker.
    pub fn echo(&self, worker: usize, bytes: Bytes) -> Result<Bytes, DispatchError> {
        let link = &self.workers[worker].link;
        let gone = |reason: String| DispatchError::WorkerGone {
            worker: link.worker().to_owned(),
            reason,
        };
        let (arrivals, mut arrived) = mpsc::channel(1);
        let (request_id, requests) = link.register(Waiter { part: 0, arrivals }).map_err(gone)?;
        let request = v1::ExecuteRequest {
            request_id,
            echo: bytes,
            ..Default::default()
        };
        let (deadline, patience) = (self.dispatch_deadline, self.patience);
        let asking = async {
            // When the connection has just ended, the waiter has been told, or is being told, why.
            let _ = requests.send(request).await;
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
                link.forget(request_id);
                Err(gone(format!("no echo within {deadline:?}")))
            }
        }
    }

    /// Hands all requests to their connections, and waits, up to the deadline, only if a queue is full.
    fn send_all(&self, pending: &PendingRemote, requests: Vec<Outgoing>) -> Result<(), DispatchError> {
        if pending.driver == Driver::DataPlane {
            self.data_plane.hand_back();
            for (part, (queue, request)) in requests.into_iter().enumerate() {
                self.send(pending, part, &queue, request)?;
            }
            return Ok(());
        }
        self.data_plane.drive(async {
            for (part, (queue, request)) in requests.into_iter().enumerate() {
                if timeout(pending.remaining(), queue.send(request)).await.is_err() {
                    return Err(pending.deadline_exceeded(part));
                }
            }
            // Two turns of the runtime: the streams take the messages, the connections write them.
            yield_now().await;
            yield_now().await;
            Ok(())
        })
    }

    /// Hands a request to the connection; waits, up to the deadline, only if its queue is full.
    fn send(
        &self,
        pending: &PendingRemote,
        part: usize,
        requests: &mpsc::Sender<v1::ExecuteRequest>,
        request: v1::ExecuteRequest,
    ) -> Result<(), DispatchError> {
        let request = match requests.try_send(request) {
            // When the connection has just ended, the waiter has been told, or is being told, why.
            Ok(()) | Err(TrySendError::Closed(_)) => return Ok(()),
            Err(TrySendError::Full(request)) => request,
        };
        let sending = async { timeout(pending.remaining(), requests.send(request)).await };
        match self.data_plane.handle().block_on(sending) {
            Ok(_) => Ok(()),
            Err(_) => Err(pending.deadline_exceeded(part)),
        }
    }
}

impl ExpertBackend for RemoteExperts {
    fn computes_elsewhere(&self) -> bool {
        true
    }

    fn submit(&self, request: ExpertRequest) -> Result<Box<dyn PendingExperts>, DispatchError> {
        let begun = Instant::now();
        let ExpertRequest {
            layer,
            activations,
            routing,
        } = request;
        if !self.admission.limits().is_moe_layer(layer) {
            return Err(DispatchError::NotMoe { layer });
        }
        let batches = self.cut(&activations, self.placement.plan_layer(layer, &routing));
        let row_bytes = activations.format().row_bytes(activations.cols());
        let sent_bytes: usize = batches.iter().map(|batch| batch.rows.len() * row_bytes).sum();
        // At least one place: a dispatch without rows has no parts.
        let (arrive, arrivals) = mpsc::channel(batches.len().max(1));
        let mut pending = PendingRemote {
            layer,
            tokens: activations.rows(),
            hidden: activations.cols(),
            mode: self.numerics.combine,
            begun,
            deadline: self.dispatch_deadline,
            parts: Vec::with_capacity(batches.len()),
            arrivals,
            data_plane: Arc::clone(&self.data_plane),
            driver: if sent_bytes <= MAX_CALLER_DRIVEN_BYTES {
                Driver::Caller
            } else {
                Driver::DataPlane
            },
            patience: self.patience,
        };
        let mut outgoing = Vec::with_capacity(batches.len());
        for (index, batch) in batches.into_iter().enumerate() {
            let link = &self.workers[batch.worker].link;
            let (request_id, requests) = link
                .register(Waiter {
                    part: index,
                    arrivals: arrive.clone(),
                })
                .map_err(|reason| worker_down(link, layer, reason))?;
            let WorkerBatch { rows, assignments, .. } = batch;
            let remaining = pending.remaining();
            let request = encode_request(request_id, layer, &activations, &rows, &assignments, remaining);
            pending.parts.push(Part {
                link: Arc::clone(link),
                request_id,
                rows,
                answered: false,
            });
            outgoing.push((requests, request));
        }
        self.send_all(&pending, outgoing)?;
        Ok(Box::new(pending))
    }
}

/// A request and the queue of its connection.
type Outgoing = (mpsc::Sender<v1::ExecuteRequest>, v1::ExecuteRequest);

fn worker_down(link: &Link, layer: LayerId, reason: String) -> DispatchError {
    DispatchError::WorkerDown {
        worker: link.worker().to_owned(),
        layer,
        reason,
    }
}

fn slices(held: &[HeldExpert]) -> Vec<ExpertSlice> {
    held.iter().map(|held| held.slice).collect()
}

async fn connect_all(
    endpoints: Vec<(String, Endpoint)>,
    admission: Arc<Admission>,
    startup_timeout: Duration,
) -> Result<Vec<Candidate>, DispatchError> {
    let mut connecting = JoinSet::new();
    let count = endpoints.len();
    for (index, (worker, endpoint)) in endpoints.into_iter().enumerate() {
        let admission = Arc::clone(&admission);
        connecting.spawn(async move {
            let session = open_by(&worker, &endpoint, &admission, startup_timeout).await?;
            Ok::<_, DispatchError>((
                index,
                Candidate {
                    worker,
                    endpoint,
                    session,
                },
            ))
        });
    }
    let mut candidates: Vec<(usize, Candidate)> = Vec::with_capacity(count);
    // The first refusal ends it; dropping the set ends the other attempts.
    while let Some(joined) = connecting.join_next().await {
        candidates.push(joined.map_err(|error| DispatchError::Start {
            reason: error.to_string(),
        })??);
    }
    candidates.sort_by_key(|&(index, _)| index);
    Ok(candidates.into_iter().map(|(_, candidate)| candidate).collect())
}

async fn open_by(
    worker: &str,
    endpoint: &Endpoint,
    admission: &Arc<Admission>,
    startup_timeout: Duration,
) -> Result<Session, DispatchError> {
    let begun = Instant::now();
    let mut told = false;
    loop {
        match open(worker, endpoint, admission).await {
            Ok(session) => return Ok(session),
            Err(SessionError::Refused(error)) => return Err(error),
            Err(SessionError::NotYet(reason)) if begun.elapsed() + START_RETRY >= startup_timeout => {
                return Err(DispatchError::Unreachable {
                    worker: worker.to_owned(),
                    waited: startup_timeout,
                    reason,
                });
            }
            Err(SessionError::NotYet(reason)) => {
                if !told {
                    tracing::info!(worker, "waiting for it: {reason}");
                    told = true;
                }
                sleep(START_RETRY).await;
            }
        }
    }
}

/// Runs a worker's connection, and after it the next, for as long as the gateway runs.
async fn keep_connected(
    link: Arc<Link>,
    mut connected: Connected,
    endpoint: Endpoint,
    announced: Vec<HeldExpert>,
    admission: Arc<Admission>,
) {
    loop {
        let reason = connected.run().await;
        tracing::warn!(worker = link.worker(), "worker is gone: {reason}");
        let session = reconnect(&link, &endpoint, &admission, &announced).await;
        connected = link.connect(session);
        tracing::info!(worker = link.worker(), "worker is back");
    }
}

/// Tries until it succeeds; meanwhile the link says what the last attempt met.
async fn reconnect(link: &Link, endpoint: &Endpoint, admission: &Arc<Admission>, held: &[HeldExpert]) -> Session {
    let worker = link.worker();
    let mut pause = FIRST_RECONNECT;
    let mut last_refusal = String::new();
    loop {
        sleep(pause).await;
        pause = (pause * 2).min(LAST_RECONNECT);
        let opened = open(worker, endpoint, admission).await.and_then(|session| {
            check_unchanged(worker, held, &session.identity.held).map_err(SessionError::Refused)?;
            Ok(session)
        });
        match opened {
            Ok(session) => return session,
            Err(SessionError::NotYet(reason)) => {
                tracing::debug!(worker, "still gone: {reason}");
                link.still_down(reason);
            }
            Err(SessionError::Refused(error)) => {
                let refusal = error.to_string();
                if refusal != last_refusal {
                    tracing::error!(worker, "what came back is not what went away: {refusal}");
                    last_refusal.clone_from(&refusal);
                }
                link.still_down(refusal);
            }
        }
    }
}
