//! The simulated network: hosts, streams, and how each end gets them.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use futures::stream;
use hyper_util::rt::TokioIo;
use moerun_worker::serve_connections;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::{
    codegen::{Service, http::Uri},
    transport::{
        Channel, Endpoint,
        server::{Connected, TcpConnectInfo},
    },
};
use turmoil::{
    Builder, Sim,
    net::{TcpListener, TcpStream},
};

use super::parts::Holder;
use crate::Connector;

/// Hosts with experts.
pub(super) const WORKERS: usize = 4;
/// Longest simulated run: far beyond any schedule, so that what hangs is found.
const LONGEST: Duration = Duration::from_secs(300);
const PORT: u16 = 50061;

pub(super) fn worker_name(index: usize) -> String {
    format!("worker-{index}")
}

pub(super) fn worker_address(index: usize) -> String {
    format!("worker-{index}:{PORT}")
}

/// A network whose every delay follows from `seed`.
pub(super) fn sim(seed: u64) -> Sim<'static> {
    Builder::new()
        .rng_seed(seed)
        .simulation_duration(LONGEST)
        .tick_duration(Duration::from_millis(1))
        .min_message_latency(Duration::ZERO)
        .max_message_latency(Duration::from_millis(3))
        .tcp_capacity(1 << 12)
        .build()
}

/// A worker's life, from its start to its crash.
pub(super) async fn serve(holder: &'static Holder) -> turmoil::Result {
    let listener = TcpListener::bind(("0.0.0.0", PORT)).await?;
    let incoming = stream::unfold(listener, |listener| async move {
        let accepted = listener.accept().await.map(|(stream, _)| Connection(stream));
        Some((accepted, listener))
    });
    serve_connections(holder.bank.clone(), &holder.identity, incoming).await?;
    Ok(())
}

/// Opens transports over the simulated network.
pub(super) fn connector() -> Connector {
    Connector::new(|_, endpoint| Box::pin(async move { endpoint.connect_with_connector(Dial).await }))
}

/// A transport to a worker, for whoever is no gateway.
pub(super) async fn channel(index: usize) -> Result<Channel, tonic::transport::Error> {
    let endpoint = Endpoint::from_shared(format!("http://{}", worker_address(index)))?;
    endpoint.connect_with_connector(Dial).await
}

#[derive(Debug, Clone, Copy)]
struct Dial;

impl Service<Uri> for Dial {
    type Response = TokioIo<TcpStream>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<TokioIo<TcpStream>>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        Box::pin(async move {
            let host = uri.host().unwrap_or_default().to_owned();
            Ok(TokioIo::new(TcpStream::connect((host, PORT)).await?))
        })
    }
}

/// An accepted stream, as tonic wants it.
struct Connection(TcpStream);

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        TcpConnectInfo {
            local_addr: self.0.local_addr().ok(),
            remote_addr: self.0.peer_addr().ok(),
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, into)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}
