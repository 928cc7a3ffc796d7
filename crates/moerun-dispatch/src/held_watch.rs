//! Follows what a connected worker says it holds, which may change while it runs: other gateways ask for changes too.

use std::{convert::Infallible, future::pending, sync::Arc};

use moerun_proto::{
    HeldNow, MAX_HANDSHAKE_BYTES,
    v1::{self, placement_service_client::PlacementServiceClient},
};
use tonic::{Code, Status, transport::Channel};

use crate::{member::Member, membership::Shared, session::describe};

/// Never ends; with the connection it is dropped.
pub(crate) async fn follow(shared: &Shared, member: &Arc<Member>) -> Infallible {
    if let Some(channel) = member.channel()
        && let Err(status) = listen(shared, member, channel).await
        && status.code() != Code::Unimplemented
    {
        tracing::debug!(
            worker = member.address(),
            "it tells no more what it holds: {}",
            describe(&status)
        );
    }
    pending().await
}

async fn listen(shared: &Shared, member: &Arc<Member>, channel: Channel) -> Result<(), Status> {
    let mut client = PlacementServiceClient::new(channel).max_decoding_message_size(MAX_HANDSHAKE_BYTES);
    let mut told = client.watch_held(v1::WatchHeldRequest {}).await?.into_inner();
    while let Some(response) = told.message().await? {
        match HeldNow::decode(&response, shared.core.admission.limits()) {
            Ok(now) => {
                member.tells(now);
                if !member.is_changing() {
                    take_what_was_told(shared, member);
                }
            }
            Err(error) => member.cut(format!("what it says it holds is malformed: {error}")),
        }
    }
    Ok(())
}

/// Plans with what `member` said last; who holds other contents than it should is disconnected.
pub(crate) fn take_what_was_told(shared: &Shared, member: &Arc<Member>) {
    let Some(told) = member.told() else { return };
    if let Err(error) = shared.take(member, &told.held) {
        member.cut(error.to_string());
    }
}
