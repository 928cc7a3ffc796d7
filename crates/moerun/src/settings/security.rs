//! Who may connect, and how, as the settings say it.

use std::{path::PathBuf, sync::Arc};

use clap::Args;
use moerun_gateway::auth::{Authenticator, KeyList};
use moerun_transport::{
    AllowList, ClientFiles, ClientProtection, ClientTls, ServerFiles, ServerProtection, ServerTls, TransportError,
};
use serde::Serialize;

use super::{Settings, SettingsError};

/// Flags about the other processes of a cluster.
#[derive(Debug, Clone, Default, Args, Serialize)]
pub(crate) struct ClusterFlags {
    /// Certificate of this process, and those between it and the authority, in PEM; read again when it changes
    #[arg(long, value_name = "FILE", help_heading = "Security")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tls_cert: Option<PathBuf>,

    /// The private key to it, in PEM
    #[arg(long, value_name = "FILE", help_heading = "Security")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tls_key: Option<PathBuf>,

    /// Authorities that sign the certificates of the other end, in PEM. With these three files TLS 1.3 is spoken on all
    /// connections over TCP between gateway and workers; Unix sockets stay as they are
    #[arg(long, value_name = "FILE", help_heading = "Security")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tls_ca: Option<PathBuf>,

    /// Whom to expect at the other end: a DNS name or URI (spiffe://cluster/ns/name) in its certificate, whole; once for each
    /// [default: a worker takes whom the authorities vouch for, a gateway wants the host that it dials]
    #[arg(long, value_name = "NAME", help_heading = "Security")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) allow_peer: Vec<String>,
}

/// Flags about the gateway's clients.
#[derive(Debug, Clone, Default, Args, Serialize)]
pub(crate) struct DoorFlags {
    /// Certificate of the gRPC door, in PEM: clients must speak TLS 1.3; read again when it changes
    #[arg(long, value_name = "FILE", help_heading = "Security")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) grpc_tls_cert: Option<PathBuf>,

    /// The private key to it, in PEM
    #[arg(long, value_name = "FILE", help_heading = "Security")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) grpc_tls_key: Option<PathBuf>,

    /// Authorities that sign the certificates of clients, which must then show one
    #[arg(long, value_name = "FILE", help_heading = "Security")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) grpc_tls_client_ca: Option<PathBuf>,

    /// File of API keys, a name and a hash a line, as moerun key new prints them: clients must send one of the keys with
    /// "authorization: Bearer"; read again when it changes. MOERUN_API_KEY_LIST holds such lines itself
    #[arg(long, value_name = "FILE", help_heading = "Security")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) api_keys: Option<PathBuf>,

    /// Most connections of the gRPC door; one more is turned away [default: 1024]
    #[arg(long, value_name = "N", help_heading = "Limits")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) max_connections: Option<usize>,

    /// Most tokens of an answer that a request may ask for [default: what the context leaves]
    #[arg(long, value_name = "TOKENS", help_heading = "Limits")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) max_answer_tokens: Option<usize>,

    /// Log prompts and answers in full; without it no text of theirs is logged at any level
    #[arg(long, help_heading = "Settings and logs")]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) log_prompts: bool,
}

/// Settings that belong together were not all given.
fn incomplete(names: &[(&str, bool)]) -> SettingsError {
    let with = |given: bool| {
        let names: Vec<&str> = names.iter().filter(|it| it.1 == given).map(|it| it.0).collect();
        names.join(", ")
    };
    SettingsError(format!(
        "found {} without {}: wanted all of them or none",
        with(true),
        with(false)
    ))
}

impl Settings {
    /// Of a worker's door: with a certificate of its own, it wants one of whoever connects.
    pub(crate) fn worker_protection(&self) -> anyhow::Result<ServerProtection> {
        let tls = match self.cluster_files()? {
            None => None,
            Some((cert, key, ca)) => {
                let files = ServerFiles {
                    cert,
                    key,
                    client_ca: Some(ca),
                };
                Some(Arc::new(ServerTls::load(files, self.allowed()?)?))
            }
        };
        Ok(ServerProtection::new(tls, self.insecure))
    }

    /// Of a gateway's connections to its workers.
    pub(crate) fn dial_protection(&self) -> anyhow::Result<ClientProtection> {
        let tls = match self.cluster_files()? {
            None => None,
            Some((cert, key, ca)) => {
                let files = ClientFiles {
                    ca,
                    own: Some((cert, key)),
                };
                Some(Arc::new(ClientTls::load(files, self.allowed()?)?))
            }
        };
        Ok(ClientProtection::new(tls, self.insecure))
    }

    /// Of a worker's connections to others, which hand over experts: they are known by the hosts that a gateway names, since
    /// the list of identities says who may connect to this worker.
    pub(crate) fn fetch_protection(&self) -> anyhow::Result<ClientProtection> {
        let anybody = Settings {
            allow_peer: Vec::new(),
            ..self.clone()
        };
        anybody.dial_protection()
    }

    /// Of a client's connection to a gateway: TLS with authorities alone, and a certificate where one is asked for.
    pub(crate) fn client_protection(&self) -> anyhow::Result<ClientProtection> {
        let tls = match (&self.tls_ca, &self.tls_cert, &self.tls_key) {
            (None, None, None) => None,
            (Some(ca), cert, key) if cert.is_some() == key.is_some() => {
                let files = ClientFiles {
                    ca: ca.clone(),
                    own: cert.clone().zip(key.clone()),
                };
                Some(Arc::new(ClientTls::load(files, self.allowed()?)?))
            }
            (ca, cert, key) => {
                let names = [
                    ("tls_ca", ca.is_some()),
                    ("tls_cert", cert.is_some()),
                    ("tls_key", key.is_some()),
                ];
                return Err(incomplete(&names).into());
            }
        };
        Ok(ClientProtection::new(tls, self.insecure))
    }

    /// Of a gateway's gRPC door.
    pub(crate) fn door_protection(&self) -> anyhow::Result<ServerProtection> {
        let tls = match (&self.grpc_tls_cert, &self.grpc_tls_key) {
            (None, None) if self.grpc_tls_client_ca.is_some() => {
                let names = [
                    ("grpc_tls_client_ca", true),
                    ("grpc_tls_cert", false),
                    ("grpc_tls_key", false),
                ];
                return Err(incomplete(&names).into());
            }
            (None, None) => None,
            (Some(cert), Some(key)) => {
                let files = ServerFiles {
                    cert: cert.clone(),
                    key: key.clone(),
                    client_ca: self.grpc_tls_client_ca.clone(),
                };
                Some(Arc::new(ServerTls::load(files, AllowList::default())?))
            }
            (cert, key) => {
                let names = [("grpc_tls_cert", cert.is_some()), ("grpc_tls_key", key.is_some())];
                return Err(incomplete(&names).into());
            }
        };
        Ok(ServerProtection::new(tls, self.insecure))
    }

    /// Who may ask the gateway.
    pub(crate) fn authenticator(&self) -> anyhow::Result<Authenticator> {
        if self.api_keys.is_none() && self.api_key_list.is_none() {
            return Ok(Authenticator::open());
        }
        let lines = self.api_key_list.as_deref().unwrap_or_default().replace(',', "\n");
        let fixed = KeyList::parse(&lines).map_err(|reason| SettingsError(format!("api_key_list: {reason}")))?;
        if fixed.is_empty() && self.api_keys.is_none() {
            return Err(SettingsError("api_key_list: wanted at least one key, found none".to_owned()).into());
        }
        Ok(Authenticator::with_keys(fixed, self.api_keys.as_deref())?)
    }

    fn allowed(&self) -> Result<AllowList, TransportError> {
        AllowList::parse(&self.allow_peer)
    }

    fn cluster_files(&self) -> Result<Option<(PathBuf, PathBuf, PathBuf)>, SettingsError> {
        match (&self.tls_cert, &self.tls_key, &self.tls_ca) {
            (Some(cert), Some(key), Some(ca)) => Ok(Some((cert.clone(), key.clone(), ca.clone()))),
            (None, None, None) if self.allow_peer.is_empty() => Ok(None),
            (cert, key, ca) => {
                let mut names = vec![
                    ("tls_cert", cert.is_some()),
                    ("tls_key", key.is_some()),
                    ("tls_ca", ca.is_some()),
                ];
                // It needs the files; they do not need it.
                if !self.allow_peer.is_empty() {
                    names.push(("allow_peer", true));
                }
                Err(incomplete(&names))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_belong_together_are_wanted_together() {
        let error = |settings: &Settings| settings.worker_protection().unwrap_err().to_string();
        let mut settings = Settings {
            tls_cert: Some("a.pem".into()),
            ..Settings::default()
        };
        assert!(
            error(&settings).contains("found tls_cert without tls_key, tls_ca"),
            "{}",
            error(&settings)
        );
        settings.tls_cert = None;
        settings.allow_peer = vec!["gateway".to_owned()];
        assert!(
            error(&settings).contains("found allow_peer without tls_cert"),
            "{}",
            error(&settings)
        );
        settings.grpc_tls_client_ca = Some("ca.pem".into());
        let error = settings.door_protection().unwrap_err().to_string();
        assert!(error.contains("grpc_tls_client_ca without grpc_tls_cert"), "{error}");
    }

    #[test]
    fn keys_given_in_the_environment_are_separated_by_lines_or_commas() {
        let key = moerun_gateway::auth::ApiKey::generate();
        let other = moerun_gateway::auth::ApiKey::generate();
        let mut settings = Settings::default();
        assert!(settings.authenticator().unwrap().is_open());
        settings.api_key_list = Some(format!("a {}, b {}\n", key.hash(), other.hash()));
        let auth = settings.authenticator().unwrap();
        let shown = format!("Bearer {}", other.reveal());
        assert_eq!(auth.authenticate(Some(shown.as_bytes())).unwrap().name(), "b");
        settings.api_key_list = Some(" , ".to_owned());
        assert!(settings.authenticator().is_err());
    }
}
