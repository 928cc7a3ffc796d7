//! Workers that register with a gateway, at the gateway: a door, and leases in memory. What is lost with the process comes
//! back by itself, since workers register again before their lease ends.

mod door;
mod leases;

use std::{sync::Arc, time::Duration};

use moerun_process::SocketFile;
use moerun_proto::v1::registry_service_server::RegistryServiceServer;
use moerun_transport::{ConnectionLimits, Incoming};
use parking_lot::Mutex;
use tokio::{
    sync::Notify,
    time::{Instant, interval},
};
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use self::{door::Door, leases::Leases};
use crate::{DiscoveryError, RegistryDoor, source::Reports};

/// Registrations are short.
const MAX_MESSAGE_BYTES: usize = 4 << 10;
/// Names and values of a call's headers.
const MAX_HEADER_BYTES: u32 = 8 << 10;
/// Workers, one connection each, and some to spare.
const MAX_CONNECTIONS: usize = 2048;
/// How long a call may take; they wait for nothing.
const CALL_TIMEOUT: Duration = Duration::from_secs(2);
/// A worker that is gone without a word frees its connection after the sum of these.
const KEEPALIVE: Duration = Duration::from_secs(5);
/// How often leases are looked at, in a lease.
const LOOKS_PER_LEASE: u32 = 12;

/// Who has registered, and the door at which they do.
#[derive(Debug)]
pub(crate) struct Registry {
    incoming: Incoming,
    _socket: Option<SocketFile>,
    lease: Duration,
}

impl Registry {
    /// Opens the door; must be called inside the runtime that serves it.
    pub(crate) fn open(door: RegistryDoor, lease: Duration) -> Result<Self, DiscoveryError> {
        let limits = ConnectionLimits {
            max_connections: MAX_CONNECTIONS,
            ..ConnectionLimits::default()
        };
        let opened = Incoming::open(door.listener, door.protection, limits);
        let (incoming, socket) = opened.map_err(|error| DiscoveryError::Start {
            what: "registry".to_owned(),
            reason: error.to_string(),
        })?;
        Ok(Self {
            incoming,
            _socket: socket,
            lease,
        })
    }

    /// Takes registrations and reports who is there, until nobody listens.
    pub(crate) async fn serve(self, to: Reports) {
        let Self {
            incoming,
            _socket,
            lease,
        } = self;
        let leases = Arc::new(Mutex::new(Leases::new(lease, Instant::now())));
        let changed = Arc::new(Notify::new());
        let door = Door {
            leases: Arc::clone(&leases),
            changed: Arc::clone(&changed),
            lease,
        };
        // However this ends: connections would outlive the server otherwise, and workers would go on telling nobody.
        let end = CancellationToken::new();
        let _end_with_this = end.clone().drop_guard();
        let server = Server::builder()
            .timeout(CALL_TIMEOUT)
            .http2_keepalive_interval(Some(KEEPALIVE))
            .http2_keepalive_timeout(Some(KEEPALIVE))
            .http2_max_header_list_size(MAX_HEADER_BYTES)
            .max_concurrent_streams(16)
            .add_service(
                RegistryServiceServer::new(door)
                    .max_decoding_message_size(MAX_MESSAGE_BYTES)
                    .max_encoding_message_size(MAX_MESSAGE_BYTES),
            )
            .serve_with_incoming_shutdown(incoming, end.clone().cancelled_owned());
        let reporting = async {
            let mut looks = interval(lease / LOOKS_PER_LEASE);
            loop {
                tokio::select! {
                    () = changed.notified() => {}
                    now = looks.tick() => {
                        let gone = leases.lock().expire(now);
                        if gone.is_empty() {
                            continue;
                        }
                        for worker in gone {
                            tracing::warn!(worker, "nothing was heard of a registered worker for {lease:?}");
                        }
                    }
                }
                let there = leases.lock().addresses();
                if !to.say(Ok(there)).await {
                    return;
                }
            }
        };
        tokio::select! {
            ended = server => {
                if let Err(error) = ended {
                    tracing::error!("the registry ended: {error:?}");
                }
            }
            () = reporting => {}
            () = to.unheard() => {}
        }
    }
}
