//! [`v1::admin_service_server::AdminService`] of a worker: what it is doing, in figures.

use std::{
    net::TcpListener,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use moerun_process::{OwnFigures, Shutdown};
use moerun_proto::v1::{
    self,
    admin_service_server::{AdminService, AdminServiceServer},
    get_stats_response::Role,
};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tonic::{
    Request, Response, Status,
    transport::{Server, server::TcpIncoming},
};

use crate::service::Loaded;

/// Values of `ExecuteStatus`.
const STATUSES: usize = v1::ExecuteStatus::Corrupted as usize + 1;

/// What the streams of gateways have come to since the start.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) streams: AtomicU64,
    pub(crate) streams_opened: AtomicU64,
    pub(crate) executed: AtomicU64,
    /// What requests executed waited for the computation, and took it.
    pub(crate) queue_micros: AtomicU64,
    pub(crate) compute_micros: AtomicU64,
    /// By status.
    pub(crate) failed: [AtomicU64; STATUSES],
}

impl Counts {
    /// Notes an answer that goes out.
    pub(crate) fn answered(&self, response: &v1::ExecuteResponse) {
        if !response.echo.is_empty() {
            return;
        }
        match response.status() {
            v1::ExecuteStatus::Ok => {
                self.executed.fetch_add(1, Relaxed);
                self.queue_micros.fetch_add(response.queue_micros.into(), Relaxed);
                self.compute_micros.fetch_add(response.compute_micros.into(), Relaxed);
            }
            status => {
                self.failed[status as usize].fetch_add(1, Relaxed);
            }
        }
    }
}

/// A stream that is open; counted until it is dropped.
#[derive(Debug)]
pub(crate) struct OpenStream(Arc<Counts>);

impl OpenStream {
    /// One more.
    pub(crate) fn new(counts: Arc<Counts>) -> Self {
        counts.streams.fetch_add(1, Relaxed);
        counts.streams_opened.fetch_add(1, Relaxed);
        Self(counts)
    }

    /// Of all streams.
    pub(crate) fn counts(&self) -> &Counts {
        &self.0
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Relaxed);
    }
}

/// Answers with the figures of this process.
#[derive(Debug, Clone)]
pub(crate) struct AdminDoor {
    /// Filled when the experts are loaded.
    pub(crate) loaded: Arc<OnceLock<Loaded>>,
    /// Tells whether the worker drains.
    pub(crate) shutdown: Shutdown,
    /// Of all streams.
    pub(crate) counts: Arc<Counts>,
}

#[tonic::async_trait]
impl AdminService for AdminDoor {
    async fn get_stats(&self, _: Request<v1::GetStatsRequest>) -> Result<Response<v1::GetStatsResponse>, Status> {
        let own = OwnFigures::now();
        let loaded = self.loaded.get();
        let worker = v1::WorkerStats {
            ready: loaded.is_some(),
            draining: self.shutdown.is_draining(),
            streams: self.counts.streams.load(Relaxed),
            outstanding_requests: loaded.map_or(0, |loaded| loaded.compute.outstanding() as u64),
            requests_executed: self.counts.executed.load(Relaxed),
            requests_failed: self.counts.failed.iter().map(|count| count.load(Relaxed)).sum(),
            streams_opened: self.counts.streams_opened.load(Relaxed),
            held_slices: loaded.map_or(0, |loaded| loaded.holdings.now().identity.held.len() as u64),
        };
        Ok(Response::new(v1::GetStatsResponse {
            process: Some(v1::ProcessStats {
                build: env!("CARGO_PKG_VERSION").to_owned(),
                pid: own.pid,
                uptime_millis: u64::try_from(own.uptime.as_millis()).unwrap_or(u64::MAX),
                resident_bytes: own.resident_bytes,
                open_files: own.open_files,
                threads: own.threads,
                async_tasks: Handle::current().metrics().num_alive_tasks() as u64,
                panics: own.panics,
                dropped_log_lines: own.dropped_log_lines,
            }),
            role: Some(Role::Worker(worker)),
        }))
    }

    async fn get_placement(
        &self,
        _: Request<v1::GetPlacementRequest>,
    ) -> Result<Response<v1::GetPlacementResponse>, Status> {
        Err(not_a_gateway())
    }

    async fn drain_worker(
        &self,
        _: Request<v1::DrainWorkerRequest>,
    ) -> Result<Response<v1::DrainWorkerResponse>, Status> {
        Err(not_a_gateway())
    }

    async fn resume_worker(
        &self,
        _: Request<v1::ResumeWorkerRequest>,
    ) -> Result<Response<v1::ResumeWorkerResponse>, Status> {
        Err(not_a_gateway())
    }

    async fn rebalance(&self, _: Request<v1::RebalanceRequest>) -> Result<Response<v1::RebalanceResponse>, Status> {
        Err(not_a_gateway())
    }
}

fn not_a_gateway() -> Status {
    Status::failed_precondition("this is a worker, which knows of no other: wanted the admin address of a gateway")
}

/// Serves the figures on a port of their own until `closing`.
pub(crate) async fn serve(listener: TcpListener, door: AdminDoor, closing: CancellationToken) {
    let listening = || {
        listener.set_nonblocking(true)?;
        tokio::net::TcpListener::from_std(listener)
    };
    let serving = match listening() {
        Ok(listener) => {
            Server::builder()
                .add_service(AdminServiceServer::new(door))
                .serve_with_incoming_shutdown(TcpIncoming::from(listener), closing.cancelled_owned())
                .await
        }
        Err(error) => return tracing::error!("the admin service cannot listen: {error}"),
    };
    if let Err(error) = serving {
        tracing::error!("the admin service ended: {error:?}");
    }
}
