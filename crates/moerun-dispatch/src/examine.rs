//! One link, looked at closely: what `moerun doctor` does with each worker.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use moerun_proto::{
    MAX_HANDSHAKE_BYTES, MAX_MESSAGE_BYTES, PROTOCOL_VERSION, WorkerIdentity, decode_handshake,
    v1::{self, expert_service_client::ExpertServiceClient},
};
use moerun_transport::{ClientProtection, Dial};
use moerun_types::Numerics;
use moerun_weights::Checkpoint;
use tokio::{
    sync::mpsc,
    task::spawn_blocking,
    time::{Instant, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::{
    DispatchError,
    admission::Admission,
    session::{describe, endpoint},
};

/// How long a worker may take over each step.
const PATIENCE: Duration = Duration::from_secs(10);
/// Round trips of which the median is told.
const ROUND_TRIPS: usize = 21;
const SMALL_BYTES: usize = 64;
/// Messages that are sent back to see how fast that goes, until this much time has passed.
const LARGE_BYTES: usize = 1 << 20;
const MOST_LARGE: usize = 16;
const LARGE_TIME: Duration = Duration::from_secs(2);

/// What was found out about a worker.
#[derive(Debug, Clone)]
pub struct Examination {
    /// What it is and holds; what it holds only where there was a checkpoint to compare it with.
    pub identity: WorkerIdentity,
    /// What it runs on, if it says so.
    pub host: Option<v1::WorkerHost>,
    /// How far its clock is ahead of ours, in seconds, to within half a round trip.
    pub clock_ahead_secs: Option<f64>,
    /// Median time of a message of 64 bytes there and back, over the stream that experts are asked on.
    pub round_trip: Duration,
    /// Bytes a second each way, of messages of 1 MiB that are sent back.
    pub bytes_per_second: f64,
}

/// Connects to a worker, shakes hands, compares it with `checkpoint` if there is one (as at admission), and measures the
/// stream. Takes at most half a minute.
pub async fn examine(
    worker: &str,
    protection: &ClientProtection,
    compare_with: Option<(Arc<Checkpoint>, Numerics)>,
) -> Result<Examination, DispatchError> {
    let endpoint = endpoint(worker, protection)?;
    let dial = Dial::new(endpoint.address().clone(), protection.clone());
    let examined = examine_over(&dial, worker, endpoint.settings(), compare_with).await;
    // What runs above the connection passes on words at most; why it was refused is known below.
    examined.map_err(|error| match dial.refusal() {
        Some(refusal) => DispatchError::Untrusted {
            worker: worker.to_owned(),
            refusal,
        },
        None => error,
    })
}

async fn examine_over(
    dial: &Dial,
    worker: &str,
    settings: &tonic::transport::Endpoint,
    compare_with: Option<(Arc<Checkpoint>, Numerics)>,
) -> Result<Examination, DispatchError> {
    let gone = |reason: String| DispatchError::WorkerGone {
        worker: worker.to_owned(),
        reason,
    };
    let late = |_| gone(format!("no answer within {PATIENCE:?}"));
    let connecting = timeout(PATIENCE, settings.connect_with_connector(dial.clone())).await;
    let channel = connecting
        .map_err(late)?
        .map_err(|error| gone(crate::session::with_sources(&error)))?;
    let mut control = ExpertServiceClient::new(channel.clone()).max_decoding_message_size(MAX_HANDSHAKE_BYTES);
    let asked = v1::HandshakeRequest {
        protocol_version: PROTOCOL_VERSION,
    };
    let begun = (SystemTime::now(), Instant::now());
    let shaken = timeout(PATIENCE, control.handshake(asked)).await.map_err(late)?;
    let response = shaken.map_err(|status| gone(describe(&status)))?.into_inner();
    let half_way = begun.0 + begun.1.elapsed() / 2;
    let host = response.host.clone();
    let identity = compare(worker, response, compare_with).await?;
    let mut stream = Echoes::open(channel, worker).await?;
    let mut times = Vec::with_capacity(ROUND_TRIPS);
    for _ in 0..ROUND_TRIPS {
        times.push(stream.round_trip(SMALL_BYTES).await?);
    }
    times.sort();
    let (begun, mut large) = (Instant::now(), 0);
    while large < MOST_LARGE && begun.elapsed() < LARGE_TIME {
        stream.round_trip(LARGE_BYTES).await?;
        large += 1;
    }
    Ok(Examination {
        identity,
        clock_ahead_secs: host.as_ref().map(|host| {
            let theirs = Duration::from_millis(host.clock_unix_millis).as_secs_f64();
            theirs - half_way.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
        }),
        host,
        round_trip: times[ROUND_TRIPS / 2],
        // Each byte goes there and comes back.
        bytes_per_second: (2 * large * LARGE_BYTES) as f64 / begun.elapsed().as_secs_f64(),
    })
}

async fn compare(
    worker: &str,
    response: v1::HandshakeResponse,
    compare_with: Option<(Arc<Checkpoint>, Numerics)>,
) -> Result<WorkerIdentity, DispatchError> {
    let named = worker.to_owned();
    let Some((checkpoint, numerics)) = compare_with else {
        return decode_handshake(&response, None).map_err(|source| DispatchError::Malformed { worker: named, source });
    };
    // Hashes an expert, which reads the disk.
    let admitted = spawn_blocking(move || Admission::new(checkpoint, numerics).admit(&named, &response)).await;
    admitted.map_err(|error| DispatchError::Start {
        reason: error.to_string(),
    })?
}

/// The stream that experts are asked on, on which bytes are sent back.
struct Echoes {
    worker: String,
    requests: mpsc::Sender<v1::ExecuteRequest>,
    replies: Streaming<v1::ExecuteResponse>,
    last_id: u64,
}

impl Echoes {
    async fn open(channel: tonic::transport::Channel, worker: &str) -> Result<Self, DispatchError> {
        let (requests, receiver) = mpsc::channel(1);
        let mut data = ExpertServiceClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let opened = timeout(PATIENCE, data.execute(ReceiverStream::new(receiver))).await;
        let gone = |reason: String| DispatchError::WorkerGone {
            worker: worker.to_owned(),
            reason,
        };
        let opened = opened.map_err(|_| gone(format!("no stream within {PATIENCE:?}")))?;
        let replies = opened.map_err(|status| gone(describe(&status)))?.into_inner();
        Ok(Self {
            worker: worker.to_owned(),
            requests,
            replies,
            last_id: 0,
        })
    }

    async fn round_trip(&mut self, bytes: usize) -> Result<Duration, DispatchError> {
        self.last_id += 1;
        let request = v1::ExecuteRequest {
            request_id: self.last_id,
            echo: vec![1; bytes].into(),
            ..Default::default()
        };
        let begun = Instant::now();
        let asking = async {
            // When the stream has ended, the answer says why.
            let _ = self.requests.send(request).await;
            self.replies.message().await
        };
        let reason = match timeout(PATIENCE, asking).await {
            Ok(Ok(Some(answer))) if answer.request_id == self.last_id && answer.echo.len() == bytes => {
                return Ok(begun.elapsed());
            }
            Ok(Ok(Some(answer))) => format!("wanted {bytes} bytes back, found {}", answer.echo.len()),
            Ok(Ok(None)) => "the worker ended the stream".to_owned(),
            Ok(Err(status)) => describe(&status),
            Err(_) => format!("no echo within {PATIENCE:?}"),
        };
        Err(DispatchError::WorkerGone {
            worker: self.worker.clone(),
            reason,
        })
    }
}
