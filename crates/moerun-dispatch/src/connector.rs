//! The seam under a connection: how a transport to a worker is opened.

use std::{fmt, pin::Pin, sync::Arc, time::Duration};

use hyper_util::client::legacy::connect::HttpConnector;
use tonic::transport::{Channel, Endpoint, Error};

/// Sent bytes that stay unacknowledged for as long end the connection: a peer that is cut off is found even by messages.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(2);

type Connecting = Pin<Box<dyn Future<Output = Result<Channel, Error>> + Send>>;
type Connect = dyn Fn(&str, Endpoint) -> Connecting + Send + Sync;

/// Opens transports to workers: over sockets, or however a simulation does.
#[derive(Clone)]
pub struct Connector(Arc<Connect>);

impl Connector {
    /// Over TCP or Unix sockets.
    pub fn sockets() -> Self {
        Self::new(|worker, endpoint| {
            let is_unix = worker.starts_with("unix:");
            Box::pin(async move {
                if is_unix {
                    return endpoint.connect().await;
                }
                let mut tcp = HttpConnector::new();
                tcp.enforce_http(false);
                tcp.set_nodelay(true);
                tcp.set_tcp_user_timeout(Some(TCP_USER_TIMEOUT));
                endpoint.connect_with_connector(tcp).await
            })
        })
    }

    /// By `connect`, which is given the worker's address and the endpoint with all its settings.
    pub fn new(connect: impl Fn(&str, Endpoint) -> Connecting + Send + Sync + 'static) -> Self {
        Self(Arc::new(connect))
    }

    pub(crate) async fn connect(&self, worker: &str, endpoint: &Endpoint) -> Result<Channel, Error> {
        (self.0)(worker, endpoint.clone()).await
    }
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Connector")
    }
}
