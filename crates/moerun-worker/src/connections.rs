//! Experts over connections that are given: how a simulation serves them, with all that a worker has but its own sockets.

use std::{
    io,
    sync::{Arc, OnceLock},
    time::Duration,
};

use moerun_kernels::CpuPool;
use moerun_model::ExpertBank;
use moerun_process::Shutdown;
use moerun_proto::{ModelLimits, WorkerIdentity, v1::admin_service_server::AdminServiceServer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

use crate::{
    WorkerError,
    admin::AdminDoor,
    compute::Compute,
    holdings::Holdings,
    server::{builder, expert_service, server_error},
    service::{Experts, Loaded},
};

/// Requests that may wait; none does, since each is run where it is read.
const MAX_QUEUE: usize = 64;

/// Serves experts that are loaded, and the admin service beside them, over the connections of `incoming`, on the runtime
/// that polls this and until they end. Every request is computed at once, where it is read, so that a runtime whose time is
/// simulated sees none pass; it must have one thread.
pub async fn serve_connections<C>(
    bank: Arc<ExpertBank>,
    identity: &WorkerIdentity,
    incoming: impl Stream<Item = io::Result<C>>,
) -> Result<(), WorkerError>
where
    C: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
{
    let limits = ModelLimits::new(bank.config(), bank.numerics());
    let pool = CpuPool::new(1);
    let run = Box::new(move |work: &moerun_proto::ExecuteWork| {
        bank.execute(&pool, work.layer, &work.activations, &work.assignments)
    });
    let start = |source| WorkerError::Start {
        what: "compute thread",
        source,
    };
    // The thread has nothing to do, and ends with this.
    let (compute, _) = Compute::start(run, MAX_QUEUE, usize::MAX).map_err(start)?;
    let loaded = Arc::new(OnceLock::from(Loaded {
        holdings: Arc::new(Holdings::new(identity.clone(), None, None)),
        limits,
        compute,
    }));
    let experts = Experts {
        loaded: Arc::clone(&loaded),
        shutdown: Shutdown::new(),
        closing: CancellationToken::new(),
        patience: Duration::ZERO,
        counts: Arc::default(),
    };
    let door = AdminDoor {
        loaded,
        shutdown: experts.shutdown.clone(),
        counts: Arc::clone(&experts.counts),
    };
    builder()
        .add_service(expert_service(experts))
        .add_service(AdminServiceServer::new(door))
        .serve_with_incoming(incoming)
        .await
        .map_err(server_error)
}
