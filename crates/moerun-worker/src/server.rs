//! The gRPC server of a worker: experts, health, reflection; and how it ends.

use std::{
    pin::Pin,
    sync::{Arc, OnceLock},
    time::Duration,
};

use moerun_process::{Listener, Shutdown, SocketFile};
use moerun_proto::{
    CONNECTION_WINDOW_BYTES, FILE_DESCRIPTOR_SET, MAX_FRAME_BYTES, MAX_HANDSHAKE_BYTES, MAX_MESSAGE_BYTES,
    STREAM_WINDOW_BYTES,
    v1::{
        admin_service_server::AdminServiceServer, expert_service_server::ExpertServiceServer,
        placement_service_server::PlacementServiceServer,
    },
};
use moerun_transport::{ConnectionLimits, Incoming};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tonic::{server::NamedService, transport::Server};
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    ServeOptions, WorkerError,
    admin::{self, AdminDoor},
    placement_door::{MAX_HANDED_OVER, PlacementDoor},
    service::{Experts, Loaded},
};

/// A gateway that is gone without a word is found within the sum of these.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long connections may take to close once their streams have ended; hyper can wait for ever.
const CLOSE_GRACE: Duration = Duration::from_secs(2);
/// hyper's default of 20 ends a connection whose peer cancels a few streams at once.
const MAX_PENDING_RESETS: usize = 1024;
/// Gateways, probes and people that look; one more is turned away.
const MAX_CONNECTIONS: usize = 256;
/// Names and values of a call's headers, of which we use few.
const MAX_HEADER_BYTES: u32 = 16 << 10;

type ExpertServer = ExpertServiceServer<Experts>;

/// Says whether the worker can be used, under the service's own name and for the process.
#[derive(Debug, Clone)]
pub(crate) struct Health {
    reporter: HealthReporter,
}

impl Health {
    /// Changes what is said.
    pub(crate) async fn set(&self, status: ServingStatus) {
        self.reporter.set_service_status("", status).await;
        self.reporter
            .set_service_status(<ExpertServer as NamedService>::NAME, status)
            .await;
    }
}

/// A server that accepts connections but holds no experts yet.
pub(crate) struct ExpertsServer {
    /// Filled when they are loaded.
    pub(crate) loaded: Arc<OnceLock<Loaded>>,
    /// Changed when they are.
    pub(crate) health: Health,
    /// Its figures.
    pub(crate) figures: AdminDoor,
    /// Runs until shutdown.
    pub(crate) run: Serving,
}

type Serving = Pin<Box<dyn Future<Output = Result<(), WorkerError>> + Send>>;

/// Where the admin service is.
pub(crate) enum AdminDoors {
    /// Nowhere.
    None,
    /// Beside the experts.
    Beside,
    /// On a port of its own.
    Own(std::net::TcpListener),
}

/// Prepares the server; it accepts as soon as `run` is polled. Call it inside the data plane's runtime. A Unix socket's file
/// is the caller's to keep.
pub(crate) async fn prepare(
    listener: Listener,
    admin: AdminDoors,
    shutdown: Shutdown,
    options: &ServeOptions,
) -> Result<(ExpertsServer, Option<SocketFile>), WorkerError> {
    let (reporter, health_service) = tonic_health::server::health_reporter();
    let health = Health { reporter };
    health.set(ServingStatus::NotServing).await;

    let start = |source| WorkerError::Start {
        what: "listener",
        source,
    };
    let closing = CancellationToken::new();
    let loaded = Arc::new(OnceLock::new());
    let experts = Experts {
        loaded: loaded.clone(),
        shutdown: shutdown.clone(),
        closing: closing.clone(),
        patience: options.patience,
        counts: Arc::default(),
    };
    let door = AdminDoor {
        loaded: loaded.clone(),
        shutdown: shutdown.clone(),
        counts: experts.counts.clone(),
    };
    let figures = door.clone();
    let beside = matches!(admin, AdminDoors::Beside).then(|| AdminServiceServer::new(door.clone()));
    if let AdminDoors::Own(listener) = admin {
        // Ends with `closing`; the runtime's end awaits it.
        tokio::spawn(admin::serve(listener, door, closing.clone()));
    }
    let placement = PlacementDoor {
        loaded: loaded.clone(),
        shutdown: shutdown.clone(),
        closing: closing.clone(),
        handing_over: Arc::new(Semaphore::new(MAX_HANDED_OVER)),
    };
    let placement_service = PlacementServiceServer::new(placement)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_HANDSHAKE_BYTES);
    let router = builder()
        .add_service(expert_service(experts))
        .add_service(placement_service)
        .add_service(health_service)
        .add_optional_service(beside)
        .add_service(reflection().build_v1().map_err(reflection_error)?)
        .add_service(reflection().build_v1alpha().map_err(reflection_error)?);
    let closed = closing.clone().cancelled_owned();
    let end = End {
        shutdown,
        health: health.clone(),
        loaded: loaded.clone(),
        closing,
        drain_timeout: options.drain_timeout,
    };
    let limits = ConnectionLimits {
        max_connections: MAX_CONNECTIONS,
        ..ConnectionLimits::default()
    };
    let (incoming, socket) = Incoming::open(listener, options.protection.clone(), limits).map_err(start)?;
    let server = router.serve_with_incoming_shutdown(incoming, closed);
    let run: Serving = Box::pin(end.serve_until_shutdown(server));
    let server = ExpertsServer {
        loaded,
        health,
        figures,
        run,
    };
    Ok((server, socket))
}

/// What every connection of a gateway has.
pub(crate) fn builder() -> Server {
    Server::builder()
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(MAX_FRAME_BYTES)
        .max_concurrent_streams(256)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .http2_max_pending_accept_reset_streams(Some(MAX_PENDING_RESETS))
        .http2_max_header_list_size(MAX_HEADER_BYTES)
}

/// The service with its limits.
pub(crate) fn expert_service(experts: Experts) -> ExpertServer {
    ExpertServiceServer::new(experts)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_HANDSHAKE_BYTES)
}

fn reflection() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .with_service_name(<ExpertServer as NamedService>::NAME)
        .with_service_name(<PlacementServiceServer<PlacementDoor> as NamedService>::NAME)
        .with_service_name("grpc.health.v1.Health")
}

fn reflection_error(error: tonic_reflection::server::Error) -> WorkerError {
    WorkerError::Server {
        reason: format!("reflection: {error}"),
    }
}

/// The way down.
struct End {
    shutdown: Shutdown,
    health: Health,
    loaded: Arc<OnceLock<Loaded>>,
    closing: CancellationToken,
    drain_timeout: Duration,
}

impl End {
    /// Serves; on drain refuses new work, finishes what is queued, ends the streams, and closes the connections.
    async fn serve_until_shutdown(
        self,
        server: impl Future<Output = Result<(), tonic::transport::Error>>,
    ) -> Result<(), WorkerError> {
        tokio::pin!(server);
        let outcome = tokio::select! {
            ended = &mut server => return Err(ended_by_itself(ended)),
            outcome = self.drain() => outcome,
        };
        self.closing.cancel();
        tokio::select! {
            ended = &mut server => ended.map_err(server_error)?,
            () = self.shutdown.stopping() => {}
            () = tokio::time::sleep(CLOSE_GRACE) => tracing::warn!("connections did not close in {CLOSE_GRACE:?}"),
        }
        outcome
    }

    async fn drain(&self) -> Result<(), WorkerError> {
        self.shutdown.draining().await;
        self.health.set(ServingStatus::NotServing).await;
        let Some(loaded) = self.loaded.get() else { return Ok(()) };
        tokio::select! {
            () = loaded.compute.idle() => Ok(()),
            () = self.shutdown.stopping() => Ok(()),
            () = tokio::time::sleep(self.drain_timeout) => Err(WorkerError::DrainTimeout {
                seconds: self.drain_timeout.as_secs(),
                outstanding: loaded.compute.outstanding(),
            }),
        }
    }
}

fn ended_by_itself(ended: Result<(), tonic::transport::Error>) -> WorkerError {
    match ended {
        Ok(()) => WorkerError::Server {
            reason: "ended without being asked to".to_owned(),
        },
        Err(error) => server_error(error),
    }
}

pub(crate) fn server_error(error: tonic::transport::Error) -> WorkerError {
    WorkerError::Server {
        reason: format!("{error:?}"),
    }
}
