//! A worker that says the right things of itself and then does what a test wants.

use std::{net::SocketAddr, path::Path, pin::Pin, sync::Arc};

use moerun_process::DataPlane;
use moerun_proto::{
    WorkerIdentity, encode_handshake,
    v1::{self, expert_service_server::ExpertService, expert_service_server::ExpertServiceServer},
};
use moerun_routing::ShardSpec;
use moerun_types::Numerics;
use moerun_weights::{Checkpoint, Needs};
use moerun_worker::identify;
use tokio::sync::mpsc;
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Server, server::TcpIncoming},
};

/// What the puppet does with a request: answers, stays silent, or ends the stream.
#[derive(Debug)]
pub(crate) enum Act {
    /// Send this.
    Answer(v1::ExecuteResponse),
    /// Send nothing.
    Silence,
    /// End the stream.
    Leave,
}

type Script = Arc<dyn Fn(v1::ExecuteRequest) -> Act + Send + Sync>;

/// The puppet; it ends when dropped.
pub(crate) struct Puppet {
    pub(crate) address: SocketAddr,
    _data_plane: DataPlane,
}

struct Service {
    identity: WorkerIdentity,
    script: Script,
}

impl Puppet {
    /// A holder of every expert of the checkpoint in `dir`.
    pub(crate) fn start(
        dir: &Path,
        numerics: Numerics,
        script: impl Fn(v1::ExecuteRequest) -> Act + Send + Sync + 'static,
    ) -> Self {
        let checkpoint = Checkpoint::open(dir, Needs::All).unwrap();
        let slices = ShardSpec::All.resolve(checkpoint.config(), &numerics).unwrap();
        let identity = identify(&checkpoint, &slices, numerics, &mut |_, _| {}).unwrap();
        let data_plane = DataPlane::start("puppet").unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let service = Service {
            identity,
            script: Arc::new(script),
        };
        data_plane.handle().spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
            Server::builder()
                .add_service(ExpertServiceServer::new(service))
                .serve_with_incoming(incoming)
                .await
                .unwrap();
        });
        Self {
            address,
            _data_plane: data_plane,
        }
    }
}

#[tonic::async_trait]
impl ExpertService for Service {
    type ExecuteStream = Pin<Box<dyn Stream<Item = Result<v1::ExecuteResponse, Status>> + Send>>;

    async fn handshake(
        &self,
        _request: Request<v1::HandshakeRequest>,
    ) -> Result<Response<v1::HandshakeResponse>, Status> {
        Ok(Response::new(encode_handshake(&self.identity)))
    }

    async fn execute(
        &self,
        request: Request<Streaming<v1::ExecuteRequest>>,
    ) -> Result<Response<Self::ExecuteStream>, Status> {
        let (replies, receiver) = mpsc::channel(8);
        let (mut requests, script) = (request.into_inner(), Arc::clone(&self.script));
        tokio::spawn(async move {
            while let Ok(Some(request)) = requests.message().await {
                match script(request) {
                    Act::Answer(response) => replies.send(Ok(response)).await.unwrap(),
                    Act::Silence => {}
                    Act::Leave => return,
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}
