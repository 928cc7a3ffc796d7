//! [`v1::expert_service_server::ExpertService`]: handshake and the stream of executions.

use std::{
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use moerun_kernels::Isa;
use moerun_process::{Shutdown, spin_then_wait};
use moerun_proto::{
    ExecuteFailure, ModelLimits, PROTOCOL_VERSION, decode_request, encode_echo, encode_failure, encode_handshake,
    request_is_intact, speaks_same_major,
    v1::{self, expert_service_server::ExpertService},
};
use moerun_weights::available_memory_bytes;
use tokio::sync::mpsc;
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    admin::{Counts, OpenStream},
    compute::{Compute, Job, ReplySlot},
    holdings::Holdings,
};

/// Requests of one stream that may be queued, computed or waiting to be written, if the queue has room for as many. The
/// next is not read before, so that HTTP/2 flow control holds the gateway back: a gateway alone never overfills the queue.
const MAX_IN_FLIGHT_PER_STREAM: usize = 64;

/// What a loaded worker answers with.
#[derive(Debug)]
pub(crate) struct Loaded {
    /// What it is and holds.
    pub(crate) holdings: Arc<Holdings>,
    /// What a request may say.
    pub(crate) limits: ModelLimits,
    /// Runs requests.
    pub(crate) compute: Compute,
}

/// The service; it is there before the experts are.
#[derive(Debug, Clone)]
pub(crate) struct Experts {
    /// Filled when the experts are loaded.
    pub(crate) loaded: Arc<OnceLock<Loaded>>,
    /// When draining, new work is refused.
    pub(crate) shutdown: Shutdown,
    /// When cancelled, streams end.
    pub(crate) closing: CancellationToken,
    /// How long to look for a stream's next request before sleeping.
    pub(crate) patience: Duration,
    /// Of all streams.
    pub(crate) counts: Arc<Counts>,
}

impl Experts {
    fn loaded(&self) -> Result<&Loaded, Status> {
        if self.shutdown.is_draining() {
            return Err(Status::unavailable("the worker is stopping"));
        }
        self.loaded
            .get()
            .ok_or_else(|| Status::unavailable("the worker is still loading its experts"))
    }
}

#[tonic::async_trait]
impl ExpertService for Experts {
    type ExecuteStream = Replies;

    async fn handshake(
        &self,
        request: Request<v1::HandshakeRequest>,
    ) -> Result<Response<v1::HandshakeResponse>, Status> {
        let asked = request.get_ref().protocol_version;
        if !speaks_same_major(asked) {
            let message = format!("protocol version: wanted major of {PROTOCOL_VERSION}, found {asked}");
            return Err(Status::failed_precondition(message));
        }
        let mut handshake = encode_handshake(&self.loaded()?.holdings.now().identity);
        handshake.host = Some(host());
        Ok(Response::new(handshake))
    }

    async fn execute(
        &self,
        request: Request<Streaming<v1::ExecuteRequest>>,
    ) -> Result<Response<Self::ExecuteStream>, Status> {
        let in_flight = MAX_IN_FLIGHT_PER_STREAM.min(self.loaded()?.compute.max_queue());
        let (replies, receiver) = mpsc::channel(in_flight);
        let abandoned = CancellationToken::new();
        // The reader ends with the stream or with `closing`; the runtime's end awaits it.
        tokio::spawn(
            self.clone()
                .read_requests(request.into_inner(), replies, abandoned.clone()),
        );
        let replies = Replies {
            receiver: ReceiverStream::new(receiver),
            open: OpenStream::new(Arc::clone(&self.counts)),
            _abandoned: abandoned.drop_guard(),
        };
        Ok(Response::new(replies))
    }
}

/// What this process runs on.
fn host() -> v1::WorkerHost {
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    v1::WorkerHost {
        clock_unix_millis: u64::try_from(clock.as_millis()).unwrap_or(u64::MAX),
        available_memory_bytes: available_memory_bytes().unwrap_or(0),
        isa: Isa::current().to_string(),
    }
}

impl Experts {
    async fn read_requests(
        self,
        mut requests: Streaming<v1::ExecuteRequest>,
        replies: mpsc::Sender<Result<v1::ExecuteResponse, Status>>,
        abandoned: CancellationToken,
    ) {
        let mut patience = Duration::ZERO;
        loop {
            let next = async {
                let reply = replies.clone().reserve_owned().await.ok()?;
                Some((spin_then_wait(patience, requests.message()).await, reply))
            };
            let (message, reply) = tokio::select! {
                () = self.closing.cancelled() => return,
                () = abandoned.cancelled() => return,
                next = next => match next {
                    Some(next) => next,
                    None => return,
                },
            };
            match message {
                Ok(Some(request)) => {
                    self.take(&request, ReplySlot::new(reply, &request), &abandoned);
                    patience = self.patience; // where one layer asks, the next soon will
                }
                // The gateway has said all it wanted to; answers still go out.
                Ok(None) => return,
                // Either the gateway is gone, or it sent what is no message, and is told so.
                Err(status) => {
                    tracing::debug!(%status, "a gateway's stream broke");
                    abandoned.cancel();
                    reply.send(Err(status));
                    return;
                }
            }
        }
    }

    fn take(&self, request: &v1::ExecuteRequest, reply: ReplySlot, abandoned: &CancellationToken) {
        let arrived = Instant::now();
        let refuse = |reply: ReplySlot, failure| {
            reply.send(encode_failure(request.request_id, failure));
        };
        if !request_is_intact(request) {
            return refuse(reply, ExecuteFailure::Corrupted);
        }
        if self.shutdown.is_draining() {
            return refuse(reply, ExecuteFailure::Draining);
        }
        let Some(loaded) = self.loaded.get() else {
            return refuse(
                reply,
                ExecuteFailure::Internal {
                    message: "no experts are loaded".to_owned(),
                },
            );
        };
        if !request.echo.is_empty() {
            reply.send(encode_echo(request));
            return;
        }
        match decode_request(request, &loaded.limits) {
            Ok(work) => loaded.compute.submit(Job {
                work,
                arrived,
                abandoned: abandoned.clone(),
                reply,
            }),
            Err(error) => refuse(
                reply,
                ExecuteFailure::Invalid {
                    message: error.to_string(),
                },
            ),
        }
    }
}

/// Answers of one stream. Dropping it, as the server does when the gateway is gone, cancels what is still queued.
#[derive(Debug)]
pub(crate) struct Replies {
    receiver: ReceiverStream<Result<v1::ExecuteResponse, Status>>,
    open: OpenStream,
    _abandoned: DropGuard,
}

impl Stream for Replies {
    type Item = Result<v1::ExecuteResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let polled = Pin::new(&mut self.receiver).poll_next(context);
        if let Poll::Ready(Some(Ok(response))) = &polled {
            self.open.counts().answered(response);
        }
        polled
    }
}
