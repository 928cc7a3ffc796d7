//! The doors on a socket: settings of the connection, health, reflection, and how it all ends.

use std::{sync::Arc, time::Duration};

use moerun_process::{Listener, SocketFile};
use moerun_proto::{
    FILE_DESCRIPTOR_SET,
    v1::{
        admin_service_server::AdminServiceServer, inference_service_server::InferenceServiceServer,
        moe_layer_service_server::MoeLayerServiceServer,
    },
};
use moerun_transport::{ConnectionLimits, Incoming, ServerProtection};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::{
    server::NamedService,
    service::interceptor::InterceptedService,
    transport::server::{Router, Server},
};
use tonic_health::{ServingStatus, server::HealthReporter};

use super::{AdminDoor, InferenceDoor, KeyCheck, LogPrompts, MoeLayerDoor};
use crate::{Gateway, GatewayError, auth::Authenticator};

/// Bytes of one stream that a client may send before it must wait: one large message goes out at a stretch.
const STREAM_WINDOW_BYTES: u32 = 8 << 20;

/// The same for all streams of a connection together.
const CONNECTION_WINDOW_BYTES: u32 = 32 << 20;

/// Rows of activations and logits are tens of kilobytes; the default of 16 KiB would cut each into several frames.
const MAX_FRAME_BYTES: u32 = 256 << 10;

/// Calls of one connection at a time. More wait at the client; how many run is decided by the engine's queue.
const MAX_STREAMS_PER_CONNECTION: u32 = 1024;

/// Clients that cancel many calls at once are not attacking: the default of 20 would close their connection.
const MAX_PENDING_RESETS: usize = 1024;

/// A client that is gone without a word is noticed after interval + timeout, and its requests end. Clients may be far
/// away or busy, so both are longer than between gateway and workers.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long connections may take to end once the engine has nothing left to say: last messages are on their way, and
/// watchers of the health service would stay for ever.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Names and values of a request's headers; an API key is the longest that is wanted.
const MAX_HEADER_BYTES: u32 = 16 << 10;

/// Who may use the gRPC server, and its bounds.
#[derive(Debug, Clone)]
pub struct ServeSettings {
    /// Whether connections are encrypted.
    pub protection: ServerProtection,
    /// Who may ask; health is told to everybody.
    pub auth: Arc<Authenticator>,
    /// Bounds of its connections.
    pub connections: ConnectionLimits,
    /// Whether what people say is logged.
    pub log_prompts: LogPrompts,
    /// Largest message in either direction.
    pub max_message_bytes: usize,
    /// How long running requests may take to end after the server was told to stop.
    pub drain_timeout: Duration,
    /// Whether [`AdminDoor`] is served here too. It asks nobody who they are: only where the listener is reached from this
    /// host alone.
    pub with_admin: bool,
}

impl Default for ServeSettings {
    fn default() -> Self {
        ServeSettings {
            protection: ServerProtection::default(),
            auth: Arc::new(Authenticator::open()),
            connections: ConnectionLimits::default(),
            log_prompts: LogPrompts::Never,
            max_message_bytes: 32 << 20,
            drain_timeout: Duration::from_secs(30),
            with_admin: false,
        }
    }
}

/// Serves until `shutdown` is cancelled, then drains: health says `NOT_SERVING`, new requests are refused, running ones
/// end or reach `drain_timeout`, connections close. An error if the server cannot start or fails.
///
/// Dropping the future stops at once.
pub async fn serve(
    listener: Listener,
    gateway: Arc<Gateway>,
    settings: ServeSettings,
    shutdown: CancellationToken,
) -> Result<(), GatewayError> {
    let (health, health_service) = tonic_health::server::health_reporter();
    set_health(&health, ServingStatus::Serving).await;
    let close = CancellationToken::new();
    let router = router(&gateway, &settings)?.add_service(health_service);
    let opened = Incoming::open(listener, settings.protection.clone(), settings.connections);
    let (incoming, _socket): (Incoming, Option<SocketFile>) =
        opened.map_err(|error| GatewayError::Serve(format!("listener: {error}")))?;
    let server = router.serve_with_incoming_shutdown(incoming, close.clone().cancelled_owned());
    tokio::pin!(server);

    let failed = |error: tonic::transport::Error| GatewayError::Serve(with_sources(&error));
    tokio::select! {
        ended = &mut server => return ended.map_err(failed),
        () = shutdown.cancelled() => {}
    }
    set_health(&health, ServingStatus::NotServing).await;
    tokio::select! {
        ended = &mut server => return ended.map_err(failed),
        drained = timeout(settings.drain_timeout, gateway.drain()) => {
            if drained.is_err() {
                let running = gateway.stats().running;
                tracing::warn!(running, timeout = ?settings.drain_timeout, "requests still run; they are cut off");
            }
        }
    }
    close.cancel();
    match timeout(CLOSE_TIMEOUT, server).await {
        Ok(ended) => ended.map_err(failed),
        Err(_) => {
            tracing::debug!("connections still open; they are cut off");
            Ok(())
        }
    }
}

fn router(gateway: &Arc<Gateway>, settings: &ServeSettings) -> Result<Router, GatewayError> {
    let limit = settings.max_message_bytes;
    let check = KeyCheck::new(Arc::clone(&settings.auth));
    let inference = InferenceServiceServer::new(InferenceDoor::new(gateway.clone()).logging(settings.log_prompts))
        .max_decoding_message_size(limit)
        .max_encoding_message_size(limit);
    let moe_layer = MoeLayerServiceServer::new(MoeLayerDoor::new(gateway.clone()))
        .max_decoding_message_size(limit)
        .max_encoding_message_size(limit);
    let admin = settings
        .with_admin
        .then(|| AdminServiceServer::new(AdminDoor::new(gateway.clone())));
    let reflected = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            // Only what is served here: the file also describes what workers serve.
            .with_service_name(<InferenceServiceServer<InferenceDoor> as NamedService>::NAME)
            .with_service_name(<MoeLayerServiceServer<MoeLayerDoor> as NamedService>::NAME)
            .with_service_name("grpc.health.v1.Health")
    };
    let reflection_failed = |error: tonic_reflection::server::Error| GatewayError::Serve(error.to_string());
    Ok(Server::builder()
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(MAX_FRAME_BYTES)
        .max_concurrent_streams(MAX_STREAMS_PER_CONNECTION)
        .http2_max_pending_accept_reset_streams(Some(MAX_PENDING_RESETS))
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .http2_max_header_list_size(MAX_HEADER_BYTES)
        // Before a message is read: who is not known costs no memory.
        .add_service(InterceptedService::new(inference, check.clone()))
        .add_service(InterceptedService::new(moe_layer, check.clone()))
        .add_optional_service(admin.map(|admin| InterceptedService::new(admin, check.clone())))
        .add_service(InterceptedService::new(
            reflected().build_v1().map_err(reflection_failed)?,
            check.clone(),
        ))
        .add_service(InterceptedService::new(
            reflected().build_v1alpha().map_err(reflection_failed)?,
            check,
        )))
}

/// Of the whole server (the empty name) and of each service.
async fn set_health(health: &HealthReporter, status: ServingStatus) {
    let services = [
        "",
        <InferenceServiceServer<InferenceDoor> as NamedService>::NAME,
        <MoeLayerServiceServer<MoeLayerDoor> as NamedService>::NAME,
    ];
    for service in services {
        health.set_service_status(service, status).await;
    }
}

/// tonic's own message is "transport error"; what happened is in its sources.
fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}
