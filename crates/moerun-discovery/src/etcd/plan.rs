//! The plan and its epoch, under one key that all gateways watch. What a gateway does with a plan is not decided here.

use std::time::Duration;

use etcd_client::{Client, Compare, CompareOp, Txn, TxnOp, WatchOptions};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use super::{Etcd, EtcdError, Leadership};
use crate::source::{FIRST_PAUSE, LAST_PAUSE};

/// Largest plan; etcd itself takes no request above 1.5 MiB.
const MAX_PLAN_BYTES: usize = 1 << 20;
/// The key is read this often even if nothing is told.
const READ_AGAIN: Duration = Duration::from_secs(5);

/// A plan as it was published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishedPlan {
    /// Of the plan; it only grows.
    pub epoch: u64,
    /// The plan file, as `moerun plan` writes it.
    pub plan: Vec<u8>,
}

impl PublishedPlan {
    /// The epoch in decimal, a line feed, the plan: so that people can read it too.
    fn encode(&self) -> Vec<u8> {
        let mut bytes = format!("{}\n", self.epoch).into_bytes();
        bytes.extend(&self.plan);
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let line = bytes.iter().take(21).position(|&byte| byte == b'\n')?;
        let epoch = std::str::from_utf8(&bytes[..line]).ok()?.parse().ok()?;
        Some(Self {
            epoch,
            plan: bytes[line + 1..].to_vec(),
        })
    }
}

/// Publishes a plan, if this gateway leads and the plan is newer than the one that is there. All of it is one transaction:
/// a gateway that has been deposed, and does not know it yet, changes nothing.
pub async fn publish_plan(etcd: &Etcd, leadership: &Leadership, plan: &PublishedPlan) -> Result<(), EtcdError> {
    let bytes = plan.encode();
    if bytes.len() > MAX_PLAN_BYTES {
        return Err(EtcdError::TooLarge {
            most: MAX_PLAN_BYTES,
            found: bytes.len(),
        });
    }
    let mut client = etcd.connect().await?;
    let key = etcd.key("plan");
    let (present, _) = read(etcd, &mut client, &key).await?;
    let (present, revision) = present.map_or((None, 0), |(present, came)| (Some(present.epoch), came));
    if let Some(present) = present.filter(|&present| present >= plan.epoch) {
        return Err(EtcdError::StaleEpoch {
            present,
            found: plan.epoch,
        });
    }
    let (leader, made) = leadership.key();
    let leads = Compare::create_revision(leader, CompareOp::Equal, made);
    let unchanged = Compare::mod_revision(key.as_str(), CompareOp::Equal, revision);
    let txn = Txn::new()
        .when([leads.clone(), unchanged])
        .and_then([TxnOp::put(key.as_str(), bytes, None)]);
    if etcd.within(client.txn(txn)).await?.succeeded() {
        return Ok(());
    }
    let still_leads = etcd.within(client.txn(Txn::new().when([leads]))).await?.succeeded();
    Err(if still_leads {
        EtcdError::Conflict
    } else {
        EtcdError::NotLeader
    })
}

/// Keeps `plans` at the newest plan that was published, until nobody looks. While etcd does not answer, the last one stays.
pub async fn watch_plan(etcd: Etcd, plans: watch::Sender<Option<PublishedPlan>>) {
    let mut failing: Option<EtcdError> = None;
    let mut pause = FIRST_PAUSE;
    loop {
        let watching = async {
            let mut client = etcd.connect().await?;
            watch_key(&etcd, &mut client, &plans, &mut pause).await
        };
        let error = tokio::select! {
            ended = watching => match ended {
                Err(error) => error,
                Ok(never) => match never {},
            },
            () = plans.closed() => return,
        };
        if failing.as_ref() != Some(&error) {
            tracing::warn!("the plan is the last known one: {error}");
        }
        failing = Some(error);
        sleep(pause).await;
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

async fn watch_key(
    etcd: &Etcd,
    client: &mut Client,
    plans: &watch::Sender<Option<PublishedPlan>>,
    pause: &mut Duration,
) -> Result<std::convert::Infallible, EtcdError> {
    let key = etcd.key("plan");
    loop {
        let (found, revision) = read(etcd, client, &key).await?;
        *pause = FIRST_PAUSE;
        if let Some((plan, _)) = found {
            plans.send_if_modified(|known| {
                let newer = known.as_ref().is_none_or(|known| known.epoch < plan.epoch);
                if newer {
                    *known = Some(plan);
                }
                newer
            });
        }
        // From what was read on, so that nothing is missed. A key that was not there may come at any time.
        let options = WatchOptions::new().with_start_revision(revision + 1);
        let mut changes = etcd.within(client.watch(key.clone(), Some(options))).await?;
        loop {
            match timeout(READ_AGAIN, changes.message()).await {
                Ok(Ok(Some(change))) if change.canceled() => return Err(etcd.ended().into()),
                Ok(Ok(Some(change))) if change.created() => continue,
                Ok(Ok(Some(_))) | Err(_) => break,
                Ok(Ok(None)) => return Err(etcd.ended().into()),
                Ok(Err(error)) => return Err(etcd.failed(&error).into()),
            }
        }
    }
}

/// The plan that is there and the revision in which it came; and the revision of now.
async fn read(etcd: &Etcd, client: &mut Client, key: &str) -> Result<(Option<(PublishedPlan, i64)>, i64), EtcdError> {
    let found = etcd.within(client.get(key, None)).await?;
    let revision = found.header().map_or(0, etcd_client::ResponseHeader::revision);
    let Some(entry) = found.kvs().first() else {
        return Ok((None, revision));
    };
    match PublishedPlan::decode(entry.value()) {
        Some(plan) => Ok((Some((plan, entry.mod_revision())), revision)),
        None => Err(EtcdError::Malformed { key: key.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_is_read_as_it_was_written_and_nothing_else_is() {
        let plan = PublishedPlan {
            epoch: u64::MAX,
            plan: b"{\n}".to_vec(),
        };
        assert_eq!(PublishedPlan::decode(&plan.encode()), Some(plan));
        for bad in [
            &b""[..],
            b"7",
            b"\n{}",
            b"x\n{}",
            b"-1\n",
            b"99999999999999999999999\n{}",
        ] {
            assert_eq!(PublishedPlan::decode(bad), None);
        }
    }
}
