//! How the connections of a door, or to one, are protected.

use std::sync::Arc;

use crate::{ClientTls, ServerTls};

/// How connections are protected. Unix sockets are always plain: the permissions of their files decide who connects.
#[derive(Debug, Clone, Default)]
pub enum Protection<T> {
    /// Not at all, and so only where no other host can listen: loopback.
    #[default]
    LoopbackOnly,
    /// Not at all, anywhere: the operator said so.
    Insecure,
    /// TLS, on loopback too.
    Tls(T),
}

/// Of a door.
pub type ServerProtection = Protection<Arc<ServerTls>>;

/// Of connections that this process makes.
pub type ClientProtection = Protection<Arc<ClientTls>>;

impl<T> Protection<T> {
    /// TLS if there is `tls`; else plaintext, on loopback alone unless `insecure`.
    pub fn new(tls: Option<T>, insecure: bool) -> Self {
        match (tls, insecure) {
            (Some(tls), _) => Protection::Tls(tls),
            (None, true) => Protection::Insecure,
            (None, false) => Protection::LoopbackOnly,
        }
    }

    /// The TLS, if it is that.
    pub fn tls(&self) -> Option<&T> {
        match self {
            Protection::Tls(tls) => Some(tls),
            Protection::LoopbackOnly | Protection::Insecure => None,
        }
    }
}
