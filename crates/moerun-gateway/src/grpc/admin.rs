//! `moerun.v1.AdminService`: what the gateway is doing, in figures.

use std::{net::TcpListener, sync::Arc};

use moerun_dispatch::{DispatchStats, FailureReason, RemoteExperts, WorkerStats, WorkerStatus};
use moerun_process::OwnFigures;
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

use super::placement;
use crate::{Gateway, GatewayError};

/// Answers `AdminService` from a gateway.
#[derive(Debug, Clone)]
pub struct AdminDoor {
    gateway: Arc<Gateway>,
}

impl AdminDoor {
    /// Over this gateway.
    pub fn new(gateway: Arc<Gateway>) -> Self {
        AdminDoor { gateway }
    }
}

impl AdminDoor {
    fn workers(&self) -> Result<&Arc<RemoteExperts>, Status> {
        self.gateway.remote_experts().ok_or_else(|| {
            Status::failed_precondition("this gateway has no workers: its experts are in its own process")
        })
    }
}

#[tonic::async_trait]
impl AdminService for AdminDoor {
    async fn get_stats(&self, _: Request<v1::GetStatsRequest>) -> Result<Response<v1::GetStatsResponse>, Status> {
        let own = OwnFigures::now();
        let (engine, answers) = (self.gateway.stats(), self.gateway.answer_stats());
        let dispatch = self.gateway.dispatch_stats();
        let links = self.gateway.workers().into_iter();
        let workers = links.map(|worker| worker_link(worker, dispatch.as_ref())).collect();
        let total = |of: fn(&DispatchStats) -> u64| dispatch.as_ref().map_or(0, of);
        let gateway = v1::GatewayStats {
            draining: self.gateway.is_draining(),
            running_requests: engine.running as u64,
            waiting_requests: engine.waiting as u64,
            kv_pages_used: engine.pages_used as u64,
            kv_pages_cached: engine.pages_cached as u64,
            kv_pages_total: engine.pages_total as u64,
            preemptions: engine.preemptions,
            answers_begun: answers.begun,
            answers_finished: answers.finished,
            answers_failed: answers.failed,
            answers_cancelled: answers.cancelled,
            workers,
            answers_degraded: answers.degraded,
            assignments_left_out: total(|stats| stats.skipped_assignments),
            calls: total(|stats| stats.calls),
            retries: total(|stats| stats.retries),
            hedges: total(|stats| stats.hedges),
            local_assignments: total(|stats| stats.local_assignments),
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
            role: Some(Role::Gateway(gateway)),
        }))
    }

    async fn get_placement(
        &self,
        _: Request<v1::GetPlacementRequest>,
    ) -> Result<Response<v1::GetPlacementResponse>, Status> {
        Ok(Response::new(placement::status(self.workers()?.placement())))
    }

    async fn drain_worker(
        &self,
        request: Request<v1::DrainWorkerRequest>,
    ) -> Result<Response<v1::DrainWorkerResponse>, Status> {
        let drained = self.workers()?.drain_worker(&request.get_ref().worker).await;
        let report = drained.map_err(|error| placement::refusal(&error))?;
        Ok(Response::new(placement::drained(&report)))
    }

    async fn resume_worker(
        &self,
        request: Request<v1::ResumeWorkerRequest>,
    ) -> Result<Response<v1::ResumeWorkerResponse>, Status> {
        let resumed = self.workers()?.resume_worker(&request.get_ref().worker).await;
        let epoch = resumed.map_err(|error| placement::refusal(&error))?;
        Ok(Response::new(v1::ResumeWorkerResponse { epoch }))
    }

    async fn rebalance(
        &self,
        request: Request<v1::RebalanceRequest>,
    ) -> Result<Response<v1::RebalanceResponse>, Status> {
        let rebalanced = self.workers()?.rebalance(request.get_ref().dry_run).await;
        let report = rebalanced.map_err(|error| placement::refusal(&error))?;
        Ok(Response::new(placement::rebalanced(report)))
    }
}

fn worker_link(worker: WorkerStatus, stats: Option<&DispatchStats>) -> v1::WorkerLink {
    #[cfg(feature = "planted-violations")]
    let worker = super::planted::status(worker);
    let stats = stats.and_then(|stats| stats.workers.iter().find(|it| it.address == worker.address));
    let counted = |of: fn(&WorkerStats) -> u64| stats.map_or(0, of);
    #[cfg(feature = "planted-violations")]
    let counted = |of: fn(&WorkerStats) -> u64| super::planted::count(counted(of));
    v1::WorkerLink {
        address: worker.address,
        up: worker.down.is_none(),
        down_reason: worker.down.unwrap_or_default(),
        failed_calls: counted(|stats| stats.failures.iter().map(|&(_, count)| count).sum()),
        ejections: counted(|stats| stats.ejections),
        suspicions: counted(|stats| stats.suspicions),
        canary_failures: counted(|stats| stats.canary_failures),
        disconnections: counted(|stats| stats.disconnections),
        calls: counted(|stats| stats.calls),
        lost_to_hedge: counted(|stats| stats.failures_by(FailureReason::LostToHedge)),
    }
}

/// Serves [`AdminDoor`] on a port of its own until `shutdown` is cancelled.
pub async fn serve_admin(
    listener: TcpListener,
    gateway: Arc<Gateway>,
    shutdown: CancellationToken,
) -> Result<(), GatewayError> {
    let failed = |error: std::io::Error| GatewayError::Serve(format!("admin: {error}"));
    listener.set_nonblocking(true).map_err(failed)?;
    let listener = tokio::net::TcpListener::from_std(listener).map_err(failed)?;
    Server::builder()
        .add_service(AdminServiceServer::new(AdminDoor::new(gateway)))
        .serve_with_incoming_shutdown(TcpIncoming::from(listener), shutdown.cancelled_owned())
        .await
        .map_err(|error| GatewayError::Serve(format!("admin: {error:?}")))
}
