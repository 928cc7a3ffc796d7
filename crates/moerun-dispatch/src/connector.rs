//! The seam under a connection: how a transport to a worker is opened.

use std::{fmt, pin::Pin, sync::Arc};

use moerun_transport::Dial;
use tokio::task::{JoinError, spawn_blocking};
use tonic::transport::{Channel, Endpoint, Error};

type Connecting = Pin<Box<dyn Future<Output = Result<Channel, Error>> + Send>>;
type Connect = dyn Fn(&str, Endpoint) -> Connecting + Send + Sync;

/// Opens transports to workers: over sockets, or however a simulation does.
#[derive(Clone)]
pub struct Connector(How);

#[derive(Clone)]
enum How {
    Sockets,
    Given(Arc<Connect>),
}

impl Connector {
    /// Over TCP or Unix sockets, protected as the worker's address asks for.
    pub fn sockets() -> Self {
        Self(How::Sockets)
    }

    /// By `connect`, which is given the worker's address and the endpoint with all its settings.
    pub fn new(connect: impl Fn(&str, Endpoint) -> Connecting + Send + Sync + 'static) -> Self {
        Self(How::Given(Arc::new(connect)))
    }

    /// Runs work that takes a while, on a thread for that; at once where the network is not the system's, since simulated
    /// time waits for nobody's thread and a run must be the same again.
    pub(crate) async fn aside<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, JoinError> {
        match &self.0 {
            How::Sockets => spawn_blocking(work).await,
            How::Given(_) => Ok(work()),
        }
    }

    /// One transport; `dial` is that of this attempt, which remembers why it was turned away.
    pub(crate) async fn connect(&self, worker: &str, endpoint: &Endpoint, dial: &Dial) -> Result<Channel, Error> {
        match &self.0 {
            How::Sockets => endpoint.connect_with_connector(dial.clone()).await,
            How::Given(connect) => connect(worker, endpoint.clone()).await,
        }
    }
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Connector")
    }
}
