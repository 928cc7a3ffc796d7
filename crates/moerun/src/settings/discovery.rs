//! Where a gateway looks for workers, and where workers say that they are there, as the settings say it.

use std::{net::SocketAddr, time::Duration};

use anyhow::Context;
use clap::Args;
use moerun_discovery::{DiscoveryConfig, RegisterAt, RegistrationConfig, RegistryDoor, SourceSpec};
use moerun_process::Address;
use moerun_transport::bind;
use rustix::system::uname;
use serde::Serialize;

use super::{Settings, SettingsError};

/// What would encrypt the registry.
const TLS_FLAGS: &str = "--tls-cert, --tls-key and --tls-ca";

/// Flags about finding workers.
#[derive(Debug, Clone, Default, Args, Serialize)]
pub(crate) struct DiscoveryFlags {
    /// Look for workers: dns:HOST:PORT (every address of a name), srv:NAME (host and port of each record) or
    /// etcd:HOST:PORT[+HOST:PORT…][/PREFIX]; once for each. What a source fails to say takes no worker away. With any of them
    /// the gateway may start before its workers
    #[arg(long, value_name = "SOURCE", help_heading = "Discovery")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) discover: Vec<String>,

    /// How often names are looked up [default: 5]
    #[arg(long, value_name = "SECONDS", help_heading = "Discovery")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) discover_interval: Option<u64>,

    /// Name server to ask, IP:PORT [default: those of /etc/resolv.conf]
    #[arg(long, value_name = "ADDR", help_heading = "Discovery")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) dns_server: Option<String>,

    /// Address where workers may register (worker --register), HOST:PORT or unix:/PATH. Certificates as between gateway and
    /// workers [default: none]
    #[arg(long, value_name = "ADDR", help_heading = "Discovery")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) registry_addr: Option<String>,
}

impl Settings {
    /// Whether workers are found while the gateway runs.
    pub(crate) fn finds_workers(&self) -> bool {
        !self.discover.is_empty() || self.registry_addr.is_some()
    }

    /// Where the gateway looks for workers. Takes the address of the registry.
    pub(crate) fn discovery(&self) -> anyhow::Result<DiscoveryConfig> {
        let refused = |error: moerun_discovery::DiscoveryError| SettingsError(format!("discover: {error}"));
        let sources = self
            .discover
            .iter()
            .map(|text| text.parse::<SourceSpec>().map_err(refused));
        let dns_server = self.dns_server.as_ref().map(|text| {
            let wanted = |_| SettingsError(format!("dns_server: wanted IP:PORT, found {text:?}"));
            text.parse::<SocketAddr>().map_err(wanted)
        });
        Ok(DiscoveryConfig {
            fixed: self.worker.clone(),
            sources: sources.collect::<Result<_, _>>()?,
            interval: Duration::from_secs(self.discover_interval),
            dns_server: dns_server.transpose()?,
            protection: self.dial_protection()?,
            name: format!(
                "{} process {}",
                uname().nodename().to_string_lossy(),
                std::process::id()
            ),
            registry: self.registry()?,
        })
    }

    fn registry(&self) -> anyhow::Result<Option<RegistryDoor>> {
        let Some(text) = &self.registry_addr else {
            return Ok(None);
        };
        let address =
            Address::parse(text).map_err(|reason| SettingsError(format!("registry_addr: {reason}, found {text:?}")))?;
        let protection = self.worker_protection()?;
        let listener = bind(&address, &protection, TLS_FLAGS).context("registry_addr")?;
        tracing::info!(address = %listener.address().context("registry_addr")?, "workers may register");
        Ok(Some(RegistryDoor { listener, protection }))
    }

    /// Where a worker that listens on `bound` says that it is there; `None` if nowhere.
    pub(crate) fn registration(&self, bound: &Address) -> anyhow::Result<Option<RegistrationConfig>> {
        let at = self.registrations()?;
        if at.is_empty() {
            return Ok(None);
        }
        Ok(Some(RegistrationConfig {
            at,
            address: self.advertise.clone().unwrap_or_else(|| bound.to_string()),
            protection: self.dial_protection()?,
        }))
    }

    /// Checks what can be checked before anything is loaded.
    pub(crate) fn registrations(&self) -> Result<Vec<RegisterAt>, SettingsError> {
        let refused = |error: moerun_discovery::DiscoveryError| SettingsError(format!("register: {error}"));
        let at = self
            .register
            .iter()
            .map(|text| text.parse::<RegisterAt>().map_err(refused));
        let at: Vec<RegisterAt> = at.collect::<Result<_, _>>()?;
        let host = self.listen.rsplit_once(':').map_or("", |(host, _)| host);
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let is_any = host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_unspecified());
        if !at.is_empty() && self.advertise.is_none() && is_any {
            return Err(SettingsError(format!(
                "register: wanted advertise, the address where gateways reach this worker, since {} is every address of \
                 this host",
                self.listen
            )));
        }
        Ok(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listening(listen: &str, advertise: Option<&str>) -> Settings {
        Settings {
            listen: listen.to_owned(),
            advertise: advertise.map(str::to_owned),
            register: vec!["127.0.0.1:50071".to_owned()],
            ..Settings::default()
        }
    }

    #[test]
    fn a_worker_on_every_address_must_say_which_one_is_meant() {
        for listen in ["0.0.0.0:1", "[::]:1"] {
            let error = listening(listen, None).registrations().unwrap_err().to_string();
            assert!(error.contains("wanted advertise") && error.contains(listen), "{error}");
            assert_eq!(listening(listen, Some("w:1")).registrations().unwrap().len(), 1);
        }
        let bound = Address::parse("127.0.0.1:7").unwrap();
        let config = listening("127.0.0.1:0", None).registration(&bound).unwrap().unwrap();
        assert_eq!(config.address, "127.0.0.1:7");
        assert!(Settings::default().registration(&bound).unwrap().is_none());
    }

    #[test]
    fn sources_that_make_no_sense_are_named() {
        let settings = Settings {
            discover: vec!["dns:workers".to_owned()],
            ..Settings::default()
        };
        let error = settings.discovery().unwrap_err().to_string();
        assert!(error.contains("\"dns:workers\": wanted dns:HOST:PORT"), "{error}");
        let settings = Settings {
            dns_server: Some("localhost".to_owned()),
            ..Settings::default()
        };
        let error = settings.discovery().unwrap_err().to_string();
        assert!(error.contains("dns_server: wanted IP:PORT"), "{error}");
    }
}
