//! TLS of connections that this process makes.

use std::{path::PathBuf, sync::Arc};

use rustls::{ClientConfig, client::Resumption};

use crate::{
    AllowList, TransportError, Watched,
    material::{certified_key, provider, roots},
    server::Always,
    verify::ServerVerifier,
};

/// Files of a client's TLS, all in PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientFiles {
    /// Authorities that sign those who are dialled.
    pub ca: PathBuf,
    /// Its own certificate and the key to it, where one is asked for.
    pub own: Option<(PathBuf, PathBuf)>,
}

/// TLS of connections that this process makes: certificates as they are in files now.
#[derive(Debug)]
pub struct ClientTls {
    config: Watched<ClientConfig>,
}

impl ClientTls {
    /// Reads the files, and again when they change. With `allowed`, a peer is known by its identity; without, by the name
    /// that is dialled.
    pub fn load(files: ClientFiles, allowed: AllowList) -> Result<Self, TransportError> {
        let mut paths = vec![files.ca.clone()];
        if let Some((cert, key)) = &files.own {
            paths.extend([cert.clone(), key.clone()]);
        }
        let build = move |contents: &[Vec<u8>]| config(&files, contents, &allowed);
        Ok(Self {
            config: Watched::start("TLS certificates", paths, build)?,
        })
    }

    /// What the next handshake uses.
    pub(crate) fn config(&self) -> Arc<ClientConfig> {
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

fn config(files: &ClientFiles, contents: &[Vec<u8>], allowed: &AllowList) -> Result<ClientConfig, TransportError> {
    let provider = provider();
    let authorities = roots(&files.ca, &contents[0])?;
    let own = match &files.own {
        Some((cert, key)) => Some(certified_key((cert, &contents[1]), (key, &contents[2]), &provider)?),
        None => None,
    };
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| TransportError::Content {
            path: files.ca.clone(),
            reason: error.to_string(),
        })?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ServerVerifier::new(authorities, allowed.clone(), provider)));
    let mut config = match own {
        Some(own) => builder.with_client_cert_resolver(Arc::new(Always(own))),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.resumption = Resumption::disabled();
    Ok(config)
}
