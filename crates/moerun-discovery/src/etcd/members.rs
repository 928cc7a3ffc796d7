//! Who is there: a key for each worker, with a lease.

use std::time::Duration;

use etcd_client::{Client, GetOptions, PutOptions, WatchOptions};
use moerun_process::Shutdown;
use tokio::time::{sleep, timeout};

use super::{CALL_TIMEOUT, Etcd, Lease};
use crate::{
    DiscoveryError,
    known::check_address,
    source::{FIRST_PAUSE, LAST_PAUSE, Reports, Said},
};

/// How long a worker is known without a word of it.
pub(crate) const MEMBER_LEASE: Duration = Duration::from_secs(5);
/// The list is read this often even if nothing is told: a stream that hangs is found by it.
const READ_AGAIN: Duration = Duration::from_secs(5);

/// Reports who is there, at each change, until nobody listens.
pub(crate) async fn watch_members(etcd: Etcd, to: Reports) {
    let mut pause = FIRST_PAUSE;
    loop {
        let error = match etcd.connect().await {
            Ok(mut client) => {
                let watching = watch(&etcd, &mut client, &to, &mut pause).await;
                let Err(error) = watching else { return };
                error
            }
            Err(error) => error,
        };
        if !to.say(Err(error)).await {
            return;
        }
        sleep(pause).await;
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

/// Ends well when nobody listens.
async fn watch(etcd: &Etcd, client: &mut Client, to: &Reports, pause: &mut Duration) -> Result<(), DiscoveryError> {
    let prefix = etcd.key("workers/");
    loop {
        let (there, revision) = read(etcd, client, &prefix).await?;
        *pause = FIRST_PAUSE;
        if !to.say(there).await {
            return Ok(());
        }
        let options = WatchOptions::new().with_prefix().with_start_revision(revision + 1);
        let mut changes = etcd.within(client.watch(prefix.clone(), Some(options))).await?;
        loop {
            match timeout(READ_AGAIN, changes.message()).await {
                Ok(Ok(Some(change))) if change.canceled() => return Err(etcd.ended()),
                Ok(Ok(Some(change))) if change.created() => continue,
                Ok(Ok(Some(_))) | Err(_) => break, // what changed is read, whatever was told
                Ok(Ok(None)) => return Err(etcd.ended()),
                Ok(Err(error)) => return Err(etcd.failed(&error)),
            }
        }
    }
}

async fn read(etcd: &Etcd, client: &mut Client, prefix: &str) -> Result<(Said, i64), DiscoveryError> {
    let options = GetOptions::new().with_prefix().with_keys_only();
    let found = etcd.within(client.get(prefix, Some(options))).await?;
    let revision = found.header().map_or(0, etcd_client::ResponseHeader::revision);
    let mut workers = Vec::new();
    for entry in found.kvs() {
        let worker = entry
            .key_str()
            .ok()
            .and_then(|key| key.strip_prefix(prefix))
            .unwrap_or_default();
        match check_address(worker) {
            Ok(()) => workers.push(worker.to_owned()),
            // Somebody else's mistake takes nobody else away.
            Err(error) => tracing::warn!(source = %etcd.spec, "{error}"),
        }
    }
    Ok((Ok(workers), revision))
}

/// Keeps the worker at `address` known until `shutdown` begins, and takes it away then.
pub(crate) async fn be_member(etcd: Etcd, address: String, instance: u64, shutdown: Shutdown) {
    let key = etcd.key(&format!("workers/{address}"));
    let mut failing: Option<DiscoveryError> = None;
    let mut pause = FIRST_PAUSE;
    while !shutdown.is_draining() {
        let error = match join(&etcd, &key, instance).await {
            Ok((mut client, lease)) => {
                tracing::info!(etcd = %etcd.spec, address, "registered");
                (failing, pause) = (None, FIRST_PAUSE);
                tokio::select! {
                    error = lease.keep(&etcd, &mut client) => error,
                    () = shutdown.draining() => {
                        if let Err(error) = etcd.within(client.lease_revoke(lease.id)).await {
                            tracing::debug!("not deregistered: {error}");
                        }
                        return;
                    }
                }
            }
            Err(error) => error,
        };
        if failing.as_ref() != Some(&error) {
            tracing::warn!("not registered: {error}");
        }
        failing = Some(error);
        tokio::select! {
            () = sleep(pause) => {}
            () = shutdown.draining() => return,
        }
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

async fn join(etcd: &Etcd, key: &str, instance: u64) -> Result<(Client, Lease), DiscoveryError> {
    let mut client = etcd.connect().await?;
    let lease = Lease::grant(etcd, &mut client, MEMBER_LEASE).await?;
    let options = PutOptions::new().with_lease(lease.id);
    let putting = client.put(key, format!("{instance:016x}"), Some(options));
    match timeout(CALL_TIMEOUT, putting).await {
        Ok(Ok(_)) => Ok((client, lease)),
        Ok(Err(error)) => Err(etcd.failed(&error)),
        Err(_) => Err(DiscoveryError::Timeout {
            what: etcd.spec.to_string(),
            waited: CALL_TIMEOUT,
        }),
    }
}
