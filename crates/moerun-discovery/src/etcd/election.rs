//! Which one gateway plans.

use std::time::Duration;

use etcd_client::{Client, LeaderKey, ResignOptions};
use tokio::{sync::watch, time::sleep};

use super::{Etcd, Lease};
use crate::{
    DiscoveryError,
    source::{FIRST_PAUSE, LAST_PAUSE},
};

/// So long after a leader was last heard of another may be elected.
const LEADER_LEASE: Duration = Duration::from_secs(3);

/// That a gateway leads. It says so in every plan that it publishes, and etcd takes none from who leads no more.
#[derive(Debug, Clone)]
pub struct Leadership {
    leader: LeaderKey,
}

impl Leadership {
    /// Its key in etcd, and the revision in which it was made.
    pub(super) fn key(&self) -> (&[u8], i64) {
        (self.leader.key(), self.leader.rev())
    }
}

/// Stands for election under `name`, again and again, until nobody looks at `leading`; that holds the leadership for as long
/// as it lasts. Whoever cannot reach etcd does not lead: it cannot know.
pub async fn stand(etcd: Etcd, name: String, leading: watch::Sender<Option<Leadership>>) {
    let mut failing: Option<DiscoveryError> = None;
    let mut pause = FIRST_PAUSE;
    loop {
        let error = tokio::select! {
            error = campaign(&etcd, &name, &leading, &mut pause) => error,
            () = leading.closed() => return,
        };
        if leading.send_replace(None).is_some() {
            tracing::warn!("this gateway leads no more: {error}");
        } else if failing.as_ref() != Some(&error) {
            tracing::warn!("no election: {error}");
        }
        failing = Some(error);
        sleep(pause).await;
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

async fn campaign(
    etcd: &Etcd,
    name: &str,
    leading: &watch::Sender<Option<Leadership>>,
    pause: &mut Duration,
) -> DiscoveryError {
    let opened = async {
        let mut client = etcd.connect().await?;
        let lease = Lease::grant(etcd, &mut client, LEADER_LEASE).await?;
        Ok((client, lease))
    };
    let (mut client, lease) = match opened.await {
        Ok(opened) => opened,
        Err(error) => return error,
    };
    *pause = FIRST_PAUSE;
    let mut keeping = client.clone();
    let elected = async {
        let election = etcd.key("planner");
        // Waits for as long as another leads.
        let mut response = client
            .campaign(election, name, lease.id)
            .await
            .map_err(|error| etcd.failed(&error))?;
        let leader = response.take_leader().ok_or_else(|| etcd.ended())?;
        tracing::info!("this gateway leads: it plans");
        leading.send_replace(Some(Leadership { leader }));
        std::future::pending().await
    };
    // Its end with either of them, or because nobody looks any more, takes the candidacy away with the lease.
    let _end = Revoke {
        client: keeping.clone(),
        lease: lease.id,
    };
    tokio::select! {
        error = lease.keep(etcd, &mut keeping) => error,
        ended = elected => match ended {
            Ok(never) => never,
            Err(error) => error,
        },
    }
}

/// Gives a lease back when dropped, if the runtime lives on; otherwise it ends by itself.
struct Revoke {
    client: Client,
    lease: i64,
}

impl Drop for Revoke {
    fn drop(&mut self) {
        let (mut client, lease) = (self.client.clone(), self.lease);
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                let _ = tokio::time::timeout(super::CALL_TIMEOUT, client.lease_revoke(lease)).await;
            });
        }
    }
}

/// Gives the leadership to the next one.
pub async fn resign(etcd: &Etcd, leadership: Leadership) -> Result<(), DiscoveryError> {
    let mut client = etcd.connect().await?;
    let options = ResignOptions::new().with_leader(leadership.leader);
    etcd.within(client.resign(Some(options))).await.map(|_| ())
}
