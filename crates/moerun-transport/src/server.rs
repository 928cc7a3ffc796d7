//! TLS at a door.

use std::{path::PathBuf, sync::Arc};

use rustls::{
    ServerConfig,
    server::{NoServerSessionStorage, ResolvesServerCert},
    sign::CertifiedKey,
};

use crate::{
    AllowList, TransportError, Watched,
    material::{certified_key, provider, roots},
    verify::ClientVerifier,
};

/// Files of a door's TLS, all in PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerFiles {
    /// Its certificate, and those between it and the authority.
    pub cert: PathBuf,
    /// The key to it.
    pub key: PathBuf,
    /// Authorities that sign those who may connect; `None` = nobody is asked for a certificate.
    pub client_ca: Option<PathBuf>,
}

/// TLS at a door: certificates as they are in files now.
#[derive(Debug)]
pub struct ServerTls {
    config: Watched<ServerConfig>,
}

impl ServerTls {
    /// Reads the files, and again when they change. `allowed` narrows whom the authorities vouch for.
    pub fn load(files: ServerFiles, allowed: AllowList) -> Result<Self, TransportError> {
        let mut paths = vec![files.cert.clone(), files.key.clone()];
        paths.extend(files.client_ca.clone());
        let build = move |contents: &[Vec<u8>]| config(&files, contents, &allowed);
        Ok(Self {
            config: Watched::start("TLS certificates", paths, build)?,
        })
    }

    /// What the next handshake uses.
    pub(crate) fn config(&self) -> Arc<ServerConfig> {
        self.config.current()
    }

    /// How often the files have been read again.
    pub fn reloads(&self) -> u64 {
        self.config.reloads()
    }

    /// Looks at the files now.
    pub fn look(&self) {
        self.config.look();
    }
}

fn config(files: &ServerFiles, contents: &[Vec<u8>], allowed: &AllowList) -> Result<ServerConfig, TransportError> {
    let provider = provider();
    let own = certified_key((&files.cert, &contents[0]), (&files.key, &contents[1]), &provider)?;
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| TransportError::Content {
            path: files.cert.clone(),
            reason: error.to_string(),
        })?;
    let builder = match &files.client_ca {
        Some(path) => {
            let verifier = ClientVerifier::new(roots(path, &contents[2])?, allowed.clone(), provider);
            let verifier = verifier.map_err(|reason| TransportError::Content {
                path: path.clone(),
                reason,
            })?;
            builder.with_client_cert_verifier(Arc::new(verifier))
        }
        None => builder.with_no_client_auth(),
    };
    let mut config = builder.with_cert_resolver(Arc::new(Always(own)));
    config.alpn_protocols = vec![b"h2".to_vec()];
    // A resumed session would not show its certificate again, so a peer that was struck off the list could come back.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// One certificate, whatever name is asked for.
#[derive(Debug)]
pub(crate) struct Always(pub(crate) Arc<CertifiedKey>);

impl ResolvesServerCert for Always {
    fn resolve(&self, _hello: rustls::server::ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }
}

impl rustls::client::ResolvesClientCert for Always {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }

    fn has_certs(&self) -> bool {
        true
    }
}
