//! A worker that says the right things of itself, answers the known input of its admission rightly, and then does what a
//! test wants.

use std::{
    net::SocketAddr,
    path::Path,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use moerun_kernels::CpuPool;
use moerun_model::ExpertBank;
use moerun_process::DataPlane;
use moerun_proto::{
    ModelLimits, WorkerIdentity, decode_request, encode_echo, encode_handshake, encode_response, seal_answer,
    v1::{self, expert_service_server::ExpertService, expert_service_server::ExpertServiceServer},
};
use moerun_routing::ShardSpec;
use moerun_types::Numerics;
use moerun_weights::{Checkpoint, Needs};
use moerun_worker::identify;
use tokio::sync::{Notify, mpsc};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Server, server::TcpIncoming},
};

/// What the puppet does with a request.
#[derive(Debug)]
pub(crate) enum Act {
    /// Sends this, with a checksum if the request has one.
    Answer(v1::ExecuteResponse),
    /// Answers rightly.
    Right,
    /// Answers rightly, when it is told to.
    RightLater(Arc<Notify>),
    /// Answers rightly but for this change, made before the checksum.
    Wrong(fn(&mut v1::ExecuteResponse)),
    /// Answers rightly, and this is changed on the way.
    Corrupted(fn(&mut v1::ExecuteResponse)),
    /// Sends nothing.
    Silence,
    /// Ends the stream.
    Leave,
}

type Script = Arc<dyn Fn(v1::ExecuteRequest) -> Act + Send + Sync>;

/// The puppet; it ends when dropped.
pub(crate) struct Puppet {
    pub(crate) address: SocketAddr,
    requests: Arc<AtomicUsize>,
    _data_plane: DataPlane,
}

struct Service {
    identity: WorkerIdentity,
    script: Script,
    holder: Arc<Holder>,
    requests: Arc<AtomicUsize>,
}

struct Holder {
    bank: ExpertBank,
    pool: CpuPool,
    limits: ModelLimits,
}

impl Puppet {
    /// A holder of every expert of the checkpoint in `dir`.
    pub(crate) fn start(
        dir: &Path,
        numerics: Numerics,
        script: impl Fn(v1::ExecuteRequest) -> Act + Send + Sync + 'static,
    ) -> Self {
        Self::start_as(dir, numerics, &ShardSpec::All, |_| (), script)
    }

    /// A holder of `shard` that says of itself what `change` makes of the truth.
    pub(crate) fn start_as(
        dir: &Path,
        numerics: Numerics,
        shard: &ShardSpec,
        change: impl FnOnce(&mut WorkerIdentity),
        script: impl Fn(v1::ExecuteRequest) -> Act + Send + Sync + 'static,
    ) -> Self {
        let checkpoint = Checkpoint::open(dir, Needs::All).unwrap();
        let slices = shard.resolve(checkpoint.config(), &numerics).unwrap();
        let mut identity = identify(&checkpoint, &slices, numerics, &mut |_, _| {}).unwrap();
        change(&mut identity);
        let holder = Holder {
            bank: ExpertBank::load(&checkpoint, &slices, numerics, &mut |_, _| {}).unwrap(),
            pool: CpuPool::new(1),
            limits: ModelLimits::new(checkpoint.config(), numerics),
        };
        let data_plane = DataPlane::start("puppet").unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(AtomicUsize::new(0));
        let service = Service {
            identity,
            script: Arc::new(script),
            holder: Arc::new(holder),
            requests: Arc::clone(&requests),
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
            requests,
            _data_plane: data_plane,
        }
    }

    /// Requests for experts so far, without those of admissions.
    pub(crate) fn requests(&self) -> usize {
        self.requests.load(SeqCst)
    }
}

impl Holder {
    fn right(&self, request: &v1::ExecuteRequest) -> v1::ExecuteResponse {
        let work = decode_request(request, &self.limits).unwrap();
        let sums = self
            .bank
            .execute(&self.pool, work.layer, &work.activations, &work.assignments);
        encode_response(request.request_id, &sums.unwrap(), Duration::ZERO, Duration::ZERO)
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
        let (mut requests, script, holder) = (request.into_inner(), Arc::clone(&self.script), Arc::clone(&self.holder));
        let count = Arc::clone(&self.requests);
        tokio::spawn(async move {
            let mut is_admission = true;
            while let Ok(Some(request)) = requests.message().await {
                let sealed = request.checksum.is_some();
                let seal = |mut response: v1::ExecuteResponse| {
                    if sealed {
                        seal_answer(&mut response);
                    }
                    response
                };
                let act = if std::mem::take(&mut is_admission) {
                    Act::Right
                } else {
                    count.fetch_add(usize::from(request.echo.is_empty()), SeqCst);
                    script(request.clone())
                };
                let right = || match request.echo.is_empty() {
                    true => holder.right(&request),
                    false => encode_echo(&request),
                };
                let response = match act {
                    Act::Answer(response) => seal(response),
                    Act::Right => seal(right()),
                    Act::RightLater(told) => {
                        let (response, replies) = (seal(right()), replies.clone());
                        tokio::spawn(async move {
                            told.notified().await;
                            let _ = replies.send(Ok(response)).await;
                        });
                        continue;
                    }
                    Act::Wrong(change) => {
                        let mut response = right();
                        change(&mut response);
                        seal(response)
                    }
                    Act::Corrupted(change) => {
                        let mut response = seal(right());
                        change(&mut response);
                        response
                    }
                    Act::Silence => continue,
                    Act::Leave => return,
                };
                if replies.send(Ok(response)).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}
