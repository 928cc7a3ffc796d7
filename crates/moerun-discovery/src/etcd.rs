//! etcd, for clusters whose gateways share workers or follow one plan: who is there (leases), the plan and its epoch (a
//! watched key), and which one gateway plans (an election).
//!
//! Keys, under the cluster's prefix: `workers/ADDRESS`, `plan`, and below `planner` those of the election. Every connection
//! is made as those between gateway and workers are: plaintext stays on the host, certificates are shown and wanted.

mod coordination;
mod election;
mod members;
mod plan;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use etcd_client::Client;
use moerun_process::Address;
use moerun_transport::{ClientProtection, Dial};
use tokio::time::timeout;

pub(crate) use self::members::{MEMBER_LEASE, be_member, watch_members};
pub use self::{
    coordination::Coordination,
    election::{Leadership, resign, stand},
    plan::{PublishedPlan, publish_plan, watch_plan},
};
use crate::{DiscoveryError, registration::with_sources, spec::EtcdSpec};

/// How long etcd may take to accept a connection, and then over each call that waits for nothing.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
const CALL_TIMEOUT: Duration = Duration::from_secs(2);
/// A member that is gone without a word is found within the sum of these.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(2);

/// An etcd cluster. Clones share what they know of its members.
#[derive(Debug, Clone)]
pub struct Etcd {
    spec: EtcdSpec,
    protection: ClientProtection,
    /// Whom to ask first; the next one each time.
    next: Arc<AtomicUsize>,
}

/// Why etcd did not do what it was asked to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EtcdError {
    /// It gave no answer, or said no.
    #[error(transparent)]
    Unavailable(#[from] DiscoveryError),
    /// Another gateway plans now.
    #[error("this gateway does not lead any more: another one plans")]
    NotLeader,
    /// A plan must be newer than the one that is there.
    #[error("plan epoch: wanted above {present}, found {found}")]
    StaleEpoch {
        /// Of the plan that is there.
        present: u64,
        /// Of the one to be published.
        found: u64,
    },
    /// Another plan came between.
    #[error("another plan was published at the same time")]
    Conflict,
    /// A plan beyond what etcd takes.
    #[error("plan: wanted at most {most} bytes, found {found}")]
    TooLarge {
        /// The bound.
        most: usize,
        /// Its size.
        found: usize,
    },
    /// What is there is no plan of ours.
    #[error("{key}: wanted an epoch and a plan, found something else")]
    Malformed {
        /// Where.
        key: String,
    },
}

impl Etcd {
    /// The cluster of `spec`; nothing is asked yet.
    pub fn new(spec: EtcdSpec, protection: ClientProtection) -> Self {
        Self {
            spec,
            protection,
            next: Arc::default(),
        }
    }

    fn key(&self, name: &str) -> String {
        format!("{}/{name}", self.spec.prefix)
    }

    /// Connects to the first member that answers, beginning with another one each time.
    async fn connect(&self) -> Result<Client, DiscoveryError> {
        let endpoints = &self.spec.endpoints;
        let first = self.next.fetch_add(1, Relaxed);
        let mut refused = DiscoveryError::Nobody;
        for offset in 0..endpoints.len() {
            match self
                .connect_to(&endpoints[first.wrapping_add(offset) % endpoints.len()])
                .await
            {
                Ok(client) => return Ok(client),
                Err(error) => refused = error,
            }
        }
        Err(refused)
    }

    async fn connect_to(&self, endpoint: &str) -> Result<Client, DiscoveryError> {
        let failed = |reason: String| DiscoveryError::Peer {
            address: endpoint.to_owned(),
            reason,
        };
        let address = Address::parse(endpoint).map_err(failed)?;
        let dial = Dial::new(address.clone(), self.protection.clone());
        let settings = Dial::endpoint(&address, &self.protection)
            .map_err(failed)?
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true);
        let connecting = timeout(CONNECT_TIMEOUT, settings.connect_with_connector(dial.clone())).await;
        let refusal = |reason: String| failed(dial.refusal().map_or(reason, |refusal| refusal.to_string()));
        let channel = match connecting {
            Ok(Ok(channel)) => channel,
            Ok(Err(error)) => return Err(refusal(with_sources(&error))),
            Err(_) => return Err(refusal(format!("no connection within {CONNECT_TIMEOUT:?}"))),
        };
        let channel = etcd_client::Channel::Tonic(channel);
        let client = Client::from_channel(channel, None).await;
        client.map_err(|error| refusal(error.to_string()))
    }

    /// A call that waits for nothing.
    async fn within<T>(&self, call: impl Future<Output = Result<T, etcd_client::Error>>) -> Result<T, DiscoveryError> {
        match timeout(CALL_TIMEOUT, call).await {
            Ok(answer) => answer.map_err(|error| self.failed(&error)),
            Err(_) => Err(DiscoveryError::Timeout {
                what: self.spec.to_string(),
                waited: CALL_TIMEOUT,
            }),
        }
    }

    fn failed(&self, error: &etcd_client::Error) -> DiscoveryError {
        let reason = match error {
            etcd_client::Error::GRpcStatus(status) => format!("{:?}: {}", status.code(), status.message()),
            other => with_sources(other),
        };
        DiscoveryError::Peer {
            address: self.spec.to_string(),
            reason,
        }
    }

    /// A stream that was to go on has ended.
    fn ended(&self) -> DiscoveryError {
        DiscoveryError::Peer {
            address: self.spec.to_string(),
            reason: "it ended the stream".to_owned(),
        }
    }
}

/// A lease that is kept alive, and what is lost with it.
struct Lease {
    id: i64,
    ttl: Duration,
}

impl Lease {
    async fn grant(etcd: &Etcd, client: &mut Client, ttl: Duration) -> Result<Self, DiscoveryError> {
        let seconds = i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX);
        let granted = etcd.within(client.lease_grant(seconds, None)).await?;
        Ok(Self { id: granted.id(), ttl })
    }

    /// Keeps it; returns why it could not be kept any longer.
    async fn keep(&self, etcd: &Etcd, client: &mut Client) -> DiscoveryError {
        let keeping = async {
            let (mut keeper, mut kept) = etcd.within(client.lease_keep_alive(self.id)).await?;
            loop {
                etcd.within(keeper.keep_alive()).await?;
                match etcd.within(kept.message()).await? {
                    Some(answer) if answer.ttl() > 0 => {}
                    Some(_) => {
                        return Err(DiscoveryError::Peer {
                            address: etcd.spec.to_string(),
                            reason: "the lease is over".to_owned(),
                        });
                    }
                    None => return Err(etcd.ended()),
                }
                tokio::time::sleep(self.ttl / 3).await;
            }
        };
        let ended: Result<std::convert::Infallible, DiscoveryError> = keeping.await;
        match ended {
            Err(error) => error,
        }
    }
}
