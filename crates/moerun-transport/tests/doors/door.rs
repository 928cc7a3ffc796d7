//! A gRPC server behind a door, and a client that dials it.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use moerun_process::{Address, Listener};
use moerun_testkit::Authority;
use moerun_transport::{
    AllowList, ClientFiles, ClientProtection, ClientTls, ConnectionLimits, Dial, Incoming, Refusal, ServerFiles,
    ServerProtection, ServerTls, bind,
};
use tempfile::TempDir;
use tokio::{task::JoinHandle, time::timeout};
use tonic::transport::{Channel, Server};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

/// Nothing here takes longer, unless it hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A server of the health service.
pub(crate) struct Door {
    pub(crate) address: SocketAddr,
    server: JoinHandle<()>,
}

impl Door {
    pub(crate) async fn open(protection: ServerProtection, limits: ConnectionLimits) -> Self {
        let listener = bind(&Address::parse("127.0.0.1:0").unwrap(), &protection, "TLS").unwrap();
        let Listener::Tcp(tcp) = &listener else {
            panic!("a port was asked for")
        };
        let address = tcp.local_addr().unwrap();
        let (incoming, _) = Incoming::open(listener, protection, limits).unwrap();
        let (_, health) = tonic_health::server::health_reporter();
        let server = tokio::spawn(async move {
            let _ = Server::builder()
                .add_service(health)
                .serve_with_incoming(incoming)
                .await;
        });
        Self { address, server }
    }

    pub(crate) async fn with_tls(tls: ServerTls) -> Self {
        Self::open(ServerProtection::Tls(Arc::new(tls)), ConnectionLimits::default()).await
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// Files of one end.
pub(crate) type Pair = (PathBuf, PathBuf);

pub(crate) struct Setting {
    pub(crate) _folder: TempDir,
    pub(crate) authority: Authority,
}

impl Setting {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::create(folder.path());
        Self {
            _folder: folder,
            authority,
        }
    }

    pub(crate) fn server(&self, (cert, key): Pair, allowed: &[&str]) -> ServerTls {
        let files = ServerFiles {
            cert,
            key,
            client_ca: Some(self.authority.ca()),
        };
        ServerTls::load(files, AllowList::parse(allowed).unwrap()).unwrap()
    }

    pub(crate) fn client(&self, own: Option<Pair>, allowed: &[&str]) -> ClientTls {
        let files = ClientFiles {
            ca: self.authority.ca(),
            own,
        };
        ClientTls::load(files, AllowList::parse(allowed).unwrap()).unwrap()
    }
}

/// What came of one call.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// `None` if it was answered.
    pub(crate) error: Option<String>,
    pub(crate) refusal: Option<Refusal>,
}

impl Outcome {
    #[track_caller]
    pub(crate) fn refusal(self) -> Refusal {
        assert!(self.error.is_some(), "the call was answered");
        self.refusal
            .unwrap_or_else(|| panic!("no refusal, but {:?}", self.error))
    }

    #[track_caller]
    pub(crate) fn ok(self) {
        assert_eq!(self.error, None, "{:?}", self.refusal);
    }
}

/// Dials `host:port` and asks for the server's health.
pub(crate) async fn knock(address: &str, protection: ClientProtection) -> Outcome {
    let (dial, channel) = dial(address, protection).await;
    let error = match channel {
        Ok(channel) => check(channel).await.err(),
        Err(error) => Some(error),
    };
    Outcome {
        error,
        refusal: dial.refusal(),
    }
}

pub(crate) async fn dial(address: &str, protection: ClientProtection) -> (Dial, Result<Channel, String>) {
    let address = Address::parse(address).unwrap();
    let endpoint = Dial::endpoint(&address, &protection).unwrap();
    let dial = Dial::new(address, protection);
    let connecting = timeout(PATIENCE, endpoint.connect_with_connector(dial.clone()));
    let channel = connecting.await.expect("no hang").map_err(|error| format!("{error:?}"));
    (dial, channel)
}

pub(crate) async fn check(channel: Channel) -> Result<(), String> {
    let asking = async { HealthClient::new(channel).check(HealthCheckRequest::default()).await };
    let answer = timeout(PATIENCE, asking).await.expect("no hang");
    answer.map(|_| ()).map_err(|status| format!("{status:?}"))
}
