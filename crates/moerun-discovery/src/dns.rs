//! Workers as the records of a name: looked up again and again, since no name server tells of a change.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use hickory_resolver::{
    TokioResolver,
    config::{ConnectionConfig, NameServerConfig, ResolverConfig},
    net::runtime::TokioRuntimeProvider,
    proto::rr::{RData, RecordType},
};
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::{
    DiscoveryError, SourceSpec,
    source::{Reports, Said},
};

/// How long the resolver may take, all its attempts together.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);
/// How long it waits for one name server.
const SERVER_TIMEOUT: Duration = Duration::from_millis(1500);
/// … and how often it asks.
const ATTEMPTS: usize = 2;

/// Asks name servers.
#[derive(Debug, Clone)]
pub(crate) struct Resolver(Arc<TokioResolver>);

impl Resolver {
    /// Asks `server`, or else whom the system asks. Must be called inside a runtime.
    pub(crate) fn new(server: Option<SocketAddr>) -> Result<Self, DiscoveryError> {
        let failed = |error: &dyn std::error::Error| DiscoveryError::Start {
            what: "resolver".to_owned(),
            reason: error.to_string(),
        };
        let mut builder = match server {
            Some(server) => {
                let (mut udp, mut tcp) = (ConnectionConfig::udp(), ConnectionConfig::tcp());
                (udp.port, tcp.port) = (server.port(), server.port());
                let server = NameServerConfig::new(server.ip(), true, vec![udp, tcp]);
                let config = ResolverConfig::from_parts(None, Vec::new(), vec![server]);
                TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
            }
            None => TokioResolver::builder_tokio().map_err(|error| failed(&error))?,
        };
        let options = builder.options_mut();
        // What is asked is what is there now.
        options.cache_size = 0;
        options.timeout = SERVER_TIMEOUT;
        options.attempts = ATTEMPTS;
        let resolver = builder.build().map_err(|error| failed(&error))?;
        Ok(Self(Arc::new(resolver)))
    }

    /// Reports the workers of `spec` every `interval`, until nobody listens.
    pub(crate) async fn watch(self, spec: SourceSpec, every: Duration, to: Reports) {
        let mut ticks = interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let said = match timeout(LOOKUP_TIMEOUT, self.look_up(&spec)).await {
                Ok(said) => said,
                Err(_) => Err(DiscoveryError::Timeout {
                    what: spec.to_string(),
                    waited: LOOKUP_TIMEOUT,
                }),
            };
            if !to.say(said).await {
                return;
            }
        }
    }

    async fn look_up(&self, spec: &SourceSpec) -> Said {
        let failed = |name: &str, error: &dyn std::error::Error| DiscoveryError::Lookup {
            name: name.to_owned(),
            reason: error.to_string(),
        };
        match spec {
            SourceSpec::Dns { host, port } => {
                let found = self.0.lookup_ip(host.as_str()).await;
                let found = found.map_err(|error| failed(host, &error))?;
                Ok(found.iter().map(|ip| SocketAddr::new(ip, *port).to_string()).collect())
            }
            SourceSpec::Srv { name } => {
                let found = self.0.lookup(name.as_str(), RecordType::SRV).await;
                let found = found.map_err(|error| failed(name, &error))?;
                let worker = |data: &RData| match data {
                    RData::SRV(srv) => {
                        let host = srv.target.to_utf8();
                        Some(format!("{}:{}", host.trim_end_matches('.'), srv.port))
                    }
                    _ => None,
                };
                Ok(found
                    .answers()
                    .iter()
                    .filter_map(|record| worker(&record.data))
                    .collect())
            }
            SourceSpec::Etcd(_) => unreachable!("etcd has a source of its own"),
        }
    }
}
