//! Asks a connected worker what it holds, or to hold something else.

use std::time::Duration;

use moerun_proto::{
    HeldExpert, HeldNow, MAX_HANDSHAKE_BYTES, ModelLimits, encode_load, encode_unload,
    v1::{self, placement_service_client::PlacementServiceClient},
};
use moerun_types::ExpertSlice;
use tokio::time::timeout;
use tonic::{Code, Status, transport::Channel};

use crate::{DispatchError, member::Member, session::describe};

/// How long a worker may take to say what it holds, or to let go of something.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long it may take to load what one call names.
const LOAD_TIMEOUT: Duration = Duration::from_secs(600);

/// What `member` holds now.
pub(super) async fn held_now(member: &Member, limits: &ModelLimits) -> Result<HeldNow, DispatchError> {
    let mut client = client(member)?;
    let asking = async {
        let mut told = client.watch_held(v1::WatchHeldRequest {}).await?.into_inner();
        let first = told.message().await?;
        first.ok_or_else(|| Status::unavailable("it said nothing"))
    };
    answered(member, limits, timeout(ANSWER_TIMEOUT, asking).await, ANSWER_TIMEOUT)
}

/// Has `member` hold `slices` too.
pub(super) async fn load(
    member: &Member,
    limits: &ModelLimits,
    slices: &[HeldExpert],
    holder: &str,
) -> Result<HeldNow, DispatchError> {
    let mut client = client(member)?;
    let asking = async { Ok(client.load_experts(encode_load(slices, holder)).await?.into_inner()) };
    answered(member, limits, timeout(LOAD_TIMEOUT, asking).await, LOAD_TIMEOUT)
}

/// Has `member` let go of `slices`.
pub(super) async fn unload(
    member: &Member,
    limits: &ModelLimits,
    slices: &[ExpertSlice],
) -> Result<HeldNow, DispatchError> {
    let mut client = client(member)?;
    let asking = async { Ok(client.unload_experts(encode_unload(slices)).await?.into_inner()) };
    answered(member, limits, timeout(ANSWER_TIMEOUT, asking).await, ANSWER_TIMEOUT)
}

fn client(member: &Member) -> Result<PlacementServiceClient<Channel>, DispatchError> {
    let channel = member.channel().ok_or_else(|| DispatchError::WorkerGone {
        worker: member.address().to_owned(),
        reason: member
            .link
            .down_reason()
            .unwrap_or_else(|| "it is not connected".to_owned()),
    })?;
    Ok(PlacementServiceClient::new(channel).max_decoding_message_size(MAX_HANDSHAKE_BYTES))
}

fn answered(
    member: &Member,
    limits: &ModelLimits,
    answer: Result<Result<v1::HeldResponse, Status>, tokio::time::error::Elapsed>,
    allowed: Duration,
) -> Result<HeldNow, DispatchError> {
    let worker = member.address().to_owned();
    match answer {
        Ok(Ok(response)) => {
            HeldNow::decode(&response, limits).map_err(|source| DispatchError::Malformed { worker, source })
        }
        Ok(Err(status)) if status.code() == Code::ResourceExhausted => Err(DispatchError::NoRoom {
            worker,
            message: status.message().to_owned(),
        }),
        Ok(Err(status)) => Err(DispatchError::CannotHold {
            worker,
            message: describe(&status),
        }),
        Err(_) => Err(DispatchError::CannotHold {
            worker,
            message: format!("no answer within {allowed:?}"),
        }),
    }
}
