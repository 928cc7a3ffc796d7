//! A worker says that it is there, again and again: [`Registration`].

use std::{
    io,
    thread::{self, JoinHandle},
    time::Duration,
};

use moerun_process::{Address, Shutdown};
use moerun_proto::{
    PROTOCOL_VERSION,
    v1::{self, registry_service_client::RegistryServiceClient},
};
use moerun_transport::{ClientProtection, Dial};
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};
use tonic::{Status, transport::Channel};

use crate::{
    DiscoveryError, RegisterAt,
    known::check_address,
    source::{FIRST_PAUSE, LAST_PAUSE},
};

/// How long a gateway may take to accept a connection, and then to answer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
const CALL_TIMEOUT: Duration = Duration::from_secs(2);
/// Times that a worker registers in each lease.
const CALLS_PER_LEASE: u32 = 3;
/// Leases beyond these are none that a gateway of ours gives.
const LEAST_LEASE: Duration = Duration::from_millis(300);
const MOST_LEASE: Duration = Duration::from_secs(600);
/// How long a worker that leaves may take to say so, to all at once.
const FAREWELL: Duration = Duration::from_secs(1);

/// Where a worker is reached, and who is told.
#[derive(Debug, Clone)]
pub struct RegistrationConfig {
    /// Who is told.
    pub at: Vec<RegisterAt>,
    /// Where gateways reach the worker.
    pub address: String,
    /// How connections to them are protected.
    pub protection: ClientProtection,
}

/// A worker that says that it is there, from a thread of its own, until its shutdown begins; then it says that it leaves.
/// Whoever does not answer is asked on, and each change is a log line.
#[derive(Debug)]
pub struct Registration {
    thread: Option<JoinHandle<()>>,
}

impl Registration {
    /// Starts saying so. An error if the address is none that others can dial.
    pub fn start(config: RegistrationConfig, shutdown: Shutdown) -> Result<Self, DiscoveryError> {
        check_address(&config.address)?;
        let failed = |error: io::Error| DiscoveryError::Start {
            what: "registration".to_owned(),
            reason: error.to_string(),
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(failed)?;
        let thread = thread::Builder::new()
            .name("moerun-register".to_owned())
            .spawn(move || runtime.block_on(register_everywhere(config, shutdown)))
            .map_err(failed)?;
        Ok(Self { thread: Some(thread) })
    }

    /// Waits until all have been told that the worker leaves, or do not answer. Its shutdown must have begun.
    pub fn wait(mut self) {
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the registration panicked");
        }
    }
}

async fn register_everywhere(config: RegistrationConfig, shutdown: Shutdown) {
    let instance: u64 = rand::random();
    let mut telling = JoinSet::new();
    for at in config.at {
        let (address, protection, shutdown) = (config.address.clone(), config.protection.clone(), shutdown.clone());
        match at {
            RegisterAt::Gateway(gateway) => {
                let call = Call {
                    gateway,
                    protection,
                    address,
                    instance,
                };
                telling.spawn(call.repeat(shutdown));
            }
            #[cfg(feature = "etcd")]
            RegisterAt::Etcd(spec) => {
                let etcd = crate::etcd::Etcd::new(spec, protection);
                telling.spawn(crate::etcd::be_member(etcd, address, instance, shutdown));
            }
            #[cfg(not(feature = "etcd"))]
            RegisterAt::Etcd(_) => unreachable!("without the feature it is refused when it is parsed"),
        }
    }
    while let Some(told) = telling.join_next().await {
        if let Err(error) = told {
            tracing::error!("a registration ended: {error}");
        }
    }
}

/// What is told to one gateway.
struct Call {
    gateway: Address,
    protection: ClientProtection,
    address: String,
    instance: u64,
}

impl Call {
    async fn repeat(self, shutdown: Shutdown) {
        let mut client = None;
        let mut failing: Option<DiscoveryError> = None;
        let mut registered = false;
        let mut pause = FIRST_PAUSE;
        loop {
            let told = tokio::select! {
                told = self.register(&mut client) => told,
                () = shutdown.draining() => break,
            };
            let next = match told {
                Ok(lease) => {
                    if !registered || failing.is_some() {
                        tracing::info!(gateway = %self.gateway, address = self.address, "registered");
                    }
                    (registered, failing, pause) = (true, None, FIRST_PAUSE);
                    lease / CALLS_PER_LEASE
                }
                Err(error) => {
                    // A connection that was refused dials no more.
                    client = None;
                    if failing.as_ref() != Some(&error) {
                        tracing::warn!("not registered: {error}");
                    }
                    failing = Some(error);
                    let next = pause;
                    pause = (pause * 2).min(LAST_PAUSE);
                    next
                }
            };
            tokio::select! {
                () = sleep(next) => {}
                () = shutdown.draining() => break,
            }
        }
        if registered && timeout(FAREWELL, self.deregister(client)).await.is_err() {
            tracing::debug!(gateway = %self.gateway, "it was not told that this worker leaves");
        }
    }

    /// For how long the gateway knows this worker now.
    async fn register(&self, client: &mut Option<RegistryServiceClient<Channel>>) -> Result<Duration, DiscoveryError> {
        let dial = Dial::new(self.gateway.clone(), self.protection.clone());
        let refused = |reason: String| DiscoveryError::Peer {
            address: self.gateway.to_string(),
            // What runs above the connection passes on words at most; why it was refused is known below.
            reason: dial.refusal().map_or(reason, |refusal| refusal.to_string()),
        };
        let telling = async {
            let client = match client {
                Some(client) => client,
                none => none.insert(RegistryServiceClient::new(self.connect(&dial).await?)),
            };
            let request = v1::RegisterRequest {
                protocol_version: PROTOCOL_VERSION,
                address: self.address.clone(),
                instance: self.instance,
            };
            client.register(request).await.map_err(|status| in_words(&status))
        };
        match timeout(CALL_TIMEOUT, telling).await {
            Ok(Ok(response)) => {
                let lease = Duration::from_millis(response.into_inner().lease_millis.into());
                Ok(lease.clamp(LEAST_LEASE, MOST_LEASE))
            }
            Ok(Err(reason)) => Err(refused(reason)),
            Err(_) => Err(DiscoveryError::Timeout {
                what: self.gateway.to_string(),
                waited: CALL_TIMEOUT,
            }),
        }
    }

    async fn connect(&self, dial: &Dial) -> Result<Channel, String> {
        let endpoint = Dial::endpoint(&self.gateway, &self.protection)?.connect_timeout(CONNECT_TIMEOUT);
        let connecting = endpoint.connect_with_connector(dial.clone()).await;
        connecting.map_err(|error| with_sources(&error))
    }

    async fn deregister(&self, client: Option<RegistryServiceClient<Channel>>) {
        let Some(mut client) = client else { return };
        let request = v1::DeregisterRequest {
            address: self.address.clone(),
            instance: self.instance,
        };
        if let Err(status) = client.deregister(request).await {
            tracing::debug!(gateway = %self.gateway, "not deregistered: {}", in_words(&status));
        }
    }
}

fn in_words(status: &Status) -> String {
    match std::error::Error::source(status) {
        Some(source) => with_sources(source),
        None => format!("{:?}: {}", status.code(), status.message()),
    }
}

/// tonic's transport errors say little by themselves.
pub(crate) fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let said = cause.to_string();
        if !text.ends_with(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        source = cause.source();
    }
    text
}
