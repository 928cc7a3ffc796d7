//! Bytes of a connection to a worker: HTTP/2, gRPC's framing, and the messages in it, recorded from a real client.

use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use futures::{StreamExt, stream};
use hyper_util::rt::TokioIo;
use moerun_model::ExpertBank;
use moerun_proto::{PROTOCOL_VERSION, WorkerIdentity, v1, v1::expert_service_client::ExpertServiceClient};
use moerun_routing::ShardSpec;
use moerun_tests::golden_dir;
use moerun_types::{CombineMode, NumberFormat, Numerics};
use moerun_weights::{Checkpoint, Needs};
use moerun_worker::{identify, serve_connections};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf, duplex},
    runtime::Runtime,
    time::timeout,
};
use tonic::{
    codegen::{Service, http::Uri},
    transport::{Endpoint, server::Connected},
};

use crate::{Form, Target};

/// Room between both ends of a connection.
const BUFFER_BYTES: usize = 1 << 20;
/// How long a worker's answer is waited for: it may rightly wait for more.
const PATIENCE: Duration = Duration::from_millis(2);

pub(crate) fn targets() -> Vec<Target> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let worker = Worker::load();
    let input = runtime.block_on(worker.recorded());
    assert!(input.len() > 200, "what a client says: {input:?}");
    vec![Target::new("connection", Form::Bytes, vec![input], move |bytes| {
        worker.hear(&runtime, bytes)
    })]
}

struct Worker {
    bank: Arc<ExpertBank>,
    identity: Arc<WorkerIdentity>,
}

impl Worker {
    fn load() -> Self {
        let checkpoint = Checkpoint::open(&golden_dir("qwen3_moe"), Needs::All).expect("a golden checkpoint");
        let numerics = Numerics {
            format: NumberFormat::F32,
            combine: CombineMode::Exact,
            combine_block: 8,
        };
        let slices = ShardSpec::All
            .resolve(checkpoint.config(), &numerics)
            .expect("the whole model");
        Self {
            identity: Arc::new(identify(&checkpoint, &slices, numerics, &mut |_, _| {}).expect("it has contents")),
            bank: Arc::new(ExpertBank::load(&checkpoint, &slices, numerics, &mut |_, _| {}).expect("it loads")),
        }
    }

    /// Serves one connection for as long as this is polled.
    async fn serve(&self, connection: DuplexStream) {
        let incoming = stream::iter([Ok(Accepted(connection))]).chain(stream::pending());
        let _ = serve_connections(Arc::clone(&self.bank), &self.identity, incoming).await;
    }

    /// What a client says that shakes hands and asks for an echo.
    async fn recorded(&self) -> Vec<u8> {
        let (ours, theirs) = duplex(BUFFER_BYTES);
        let said = Arc::new(Mutex::new(Vec::new()));
        let dial = Dial(Arc::new(Mutex::new(Some(Recorded {
            stream: ours,
            said: Arc::clone(&said),
        }))));
        let asking = async {
            let channel = Endpoint::from_static("http://worker")
                .connect_with_connector(dial)
                .await
                .expect("connected");
            let mut client = ExpertServiceClient::new(channel);
            let greeting = v1::HandshakeRequest {
                protocol_version: PROTOCOL_VERSION,
            };
            client.handshake(greeting).await.expect("a handshake");
            let echo = v1::ExecuteRequest {
                request_id: 1,
                echo: vec![5; 40].into(),
                ..v1::ExecuteRequest::default()
            };
            let mut replies = client
                .execute(stream::iter([echo]))
                .await
                .expect("a stream")
                .into_inner();
            replies.message().await.expect("no failure").expect("an echo");
        };
        tokio::select! {
            () = asking => {}
            () = self.serve(theirs) => panic!("the connection ended before the client"),
        }
        said.lock().expect("nobody panics with it").clone()
    }

    /// Gives bytes to the worker as a client's, and reads what it says to them.
    fn hear(&self, runtime: &Runtime, bytes: &[u8]) {
        let (mut ours, theirs) = duplex(BUFFER_BYTES);
        let saying = async {
            let _ = ours.write_all(bytes).await;
            let _ = ours.shutdown().await;
            let mut heard = Vec::new();
            let _ = timeout(PATIENCE, ours.read_to_end(&mut heard)).await;
        };
        runtime.block_on(async {
            tokio::select! {
                () = saying => {}
                () = self.serve(theirs) => {}
            }
        });
    }
}

/// An end of a connection, as tonic wants it.
struct Accepted(DuplexStream);

impl Connected for Accepted {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

/// An end whose written bytes are kept.
struct Recorded {
    stream: DuplexStream,
    said: Arc<Mutex<Vec<u8>>>,
}

/// Gives its one connection away.
#[derive(Clone)]
struct Dial(Arc<Mutex<Option<Recorded>>>);

impl Service<Uri> for Dial {
    type Response = TokioIo<Recorded>;
    type Error = io::Error;
    type Future = std::future::Ready<io::Result<TokioIo<Recorded>>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let connection = self.0.lock().expect("nobody panics with it").take();
        std::future::ready(
            connection
                .map(TokioIo::new)
                .ok_or_else(|| io::Error::other("it was given away")),
        )
    }
}

impl AsyncRead for Accepted {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, into)
    }
}

impl AsyncWrite for Accepted {
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

impl AsyncRead for Recorded {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, into)
    }
}

impl AsyncWrite for Recorded {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        if let Poll::Ready(Ok(length)) = written {
            self.said
                .lock()
                .expect("nobody panics with it")
                .extend_from_slice(&bytes[..length]);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
