//! Experts from one worker to another, as their owner's checkpoint stores them: named by layer and number, hashed by whoever
//! gets them before they are used.

use std::time::Duration;

use moerun_process::Address;
use moerun_proto::{
    CONNECTION_WINDOW_BYTES, MAX_FRAME_BYTES, MAX_MESSAGE_BYTES, STREAM_WINDOW_BYTES,
    v1::{self, placement_service_client::PlacementServiceClient},
};
use moerun_transport::{ClientProtection, Dial};
use moerun_types::{ExpertId, LayerId, ModelConfig};
use moerun_weights::{Checkpoint, Dtype, ExpertTensorName, MatrixForm, ReceivedExpert, WeightsError};
use tokio::{sync::mpsc, time::timeout};
use tonic::{Status, transport::Channel};

use crate::HoldingError;

/// Bytes of one message.
const CHUNK_BYTES: usize = 1 << 20;
/// How long a holder may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long it may then take to say something more.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(10);

/// Sends one expert of `checkpoint` in messages, until it is sent or nobody listens. Blocks, and reads the disk.
pub(crate) fn send(
    checkpoint: &Checkpoint,
    (layer, expert): (LayerId, ExpertId),
    to: &mpsc::Sender<Result<v1::ExpertChunk, Status>>,
) -> Result<(), WeightsError> {
    let export = checkpoint.export_expert(layer, expert)?;
    let head = v1::ExpertChunk {
        parts: export.forms().map(|(name, form)| encode_part(name, &form)).collect(),
        data: Vec::new().into(),
    };
    if to.blocking_send(Ok(head)).is_err() {
        return Ok(());
    }
    for tensor in export.tensors() {
        for data in tensor.chunks(CHUNK_BYTES) {
            let chunk = v1::ExpertChunk {
                parts: Vec::new(),
                data: data.to_vec().into(),
            };
            if to.blocking_send(Ok(chunk)).is_err() {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// A holder that experts are fetched from.
#[derive(Debug, Clone)]
pub(crate) struct Holder {
    address: String,
    client: PlacementServiceClient<Channel>,
    dial: Dial,
}

impl Holder {
    /// Connects to a worker, over a connection as protected as a gateway's.
    pub(crate) async fn connect(address: &str, protection: &ClientProtection) -> Result<Self, HoldingError> {
        let failed = |reason: String| HoldingError::Fetch {
            holder: address.to_owned(),
            reason,
        };
        let parsed = Address::parse(address).map_err(failed)?;
        let endpoint = Dial::endpoint(&parsed, protection)
            .map_err(failed)?
            .connect_timeout(CONNECT_TIMEOUT)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(MAX_FRAME_BYTES);
        let dial = Dial::new(parsed, protection.clone());
        let connecting = timeout(CONNECT_TIMEOUT, endpoint.connect_with_connector(dial.clone())).await;
        let channel = match (connecting, dial.refusal()) {
            (Ok(Ok(channel)), _) => channel,
            (_, Some(refusal)) => return Err(failed(refusal.to_string())),
            (Ok(Err(error)), None) => return Err(failed(format!("no connection: {error}"))),
            (Err(_), None) => return Err(failed(format!("no connection within {CONNECT_TIMEOUT:?}"))),
        };
        Ok(Self {
            address: address.to_owned(),
            client: PlacementServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES),
            dial,
        })
    }

    /// Fetches one expert. What it is made of is checked before it is taken in, its content is not: that is the caller's.
    pub(crate) async fn fetch(
        &mut self,
        config: &ModelConfig,
        (layer, expert): (LayerId, ExpertId),
    ) -> Result<ReceivedExpert, HoldingError> {
        let request = v1::FetchExpertRequest {
            layer: layer.0,
            expert: expert.0.into(),
        };
        let asked = timeout(SILENCE_TIMEOUT, self.client.fetch_expert(request)).await;
        let mut chunks = self.heard(asked)?.into_inner();
        let head = self.heard(timeout(SILENCE_TIMEOUT, chunks.message()).await)?;
        let forms: Vec<(ExpertTensorName, MatrixForm)> = match &head {
            Some(head) => head.parts.iter().map(decode_part).collect::<Result<_, _>>(),
            None => Err("it sent nothing".to_owned()),
        }
        .map_err(|reason| self.failed(reason))?;
        let mut received = ReceivedExpert::new(config, &forms)?;
        let mut next = head;
        while let Some(chunk) = next {
            received.push(&chunk.data)?;
            next = self.heard(timeout(SILENCE_TIMEOUT, chunks.message()).await)?;
        }
        received.check_complete()?;
        Ok(received)
    }

    fn heard<T>(&self, answer: Result<Result<T, Status>, tokio::time::error::Elapsed>) -> Result<T, HoldingError> {
        match (answer, self.dial.refusal()) {
            (Ok(Ok(heard)), _) => Ok(heard),
            (_, Some(refusal)) => Err(self.failed(refusal.to_string())),
            (Ok(Err(status)), None) => Err(self.failed(format!("{:?}: {}", status.code(), status.message()))),
            (Err(_), None) => Err(self.failed(format!("it said nothing for {SILENCE_TIMEOUT:?}"))),
        }
    }

    fn failed(&self, reason: String) -> HoldingError {
        HoldingError::Fetch {
            holder: self.address.clone(),
            reason,
        }
    }
}

fn encode_part(name: ExpertTensorName, form: &MatrixForm) -> v1::StoredPart {
    let (bytes, scale_bytes) = form.bytes().unwrap_or_default();
    let ([scale_rows, scale_cols], scale_dtype) = match form.scales {
        Some((block, dtype)) => (block.map(|it| it as u32), dtype.name().to_owned()),
        None => ([0, 0], String::new()),
    };
    v1::StoredPart {
        name: name.name().to_owned(),
        dtype: form.dtype.name().to_owned(),
        rows: form.rows as u32,
        cols: form.cols as u32,
        by_columns: form.by_columns,
        scale_rows,
        scale_cols,
        scale_dtype,
        bytes: bytes as u64,
        scale_bytes: scale_bytes as u64,
    }
}

fn decode_part(part: &v1::StoredPart) -> Result<(ExpertTensorName, MatrixForm), String> {
    let name = ExpertTensorName::ALL.into_iter().find(|name| name.name() == part.name);
    let name = name.ok_or_else(|| format!("parts.name: wanted a tensor of an expert, found {:?}", part.name))?;
    let dtype = |field: &str, text: &str| {
        Dtype::from_name(text).ok_or_else(|| format!("parts.{field}: wanted a type of elements, found {text:?}"))
    };
    let scales = match part.scale_dtype.as_str() {
        "" => None,
        text => Some((
            [part.scale_rows as usize, part.scale_cols as usize],
            dtype("scale_dtype", text)?,
        )),
    };
    let form = MatrixForm {
        rows: part.rows as usize,
        cols: part.cols as usize,
        dtype: dtype("dtype", &part.dtype)?,
        by_columns: part.by_columns,
        scales,
    };
    let said = (part.bytes, part.scale_bytes);
    let are = form
        .bytes()
        .map(|(bytes, scale_bytes)| (bytes as u64, scale_bytes as u64));
    if are != Some(said) {
        return Err(format!("parts.bytes of {}: wanted {are:?}, found {said:?}", part.name));
    }
    Ok((name, form))
}
