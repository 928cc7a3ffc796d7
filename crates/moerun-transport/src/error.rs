//! Why a process cannot open a door or dial one.

use std::{io, path::PathBuf};

/// Why a process cannot open a door, or dial one, the way it was told to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// A file could not be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{}: {reason}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// Wanted, and found.
        reason: String,
    },
    /// Certificate and key are not of one pair.
    #[error("{} and {}: the key is not that of the certificate", cert.display(), key.display())]
    NotAPair {
        /// File of the certificate.
        cert: PathBuf,
        /// File of the key.
        key: PathBuf,
    },
    /// An entry of an allow-list makes no sense.
    #[error("allow_peer {text:?}: {reason}")]
    Pattern {
        /// As given.
        text: String,
        /// Wanted, and found.
        reason: String,
    },
    /// Others could read along.
    #[error(
        "{address}: {found} can be reached from other hosts, and nothing would be encrypted: wanted {remedy}, an address of \
         this host alone (127.0.0.1, [::1], unix:/PATH), or --insecure"
    )]
    Plaintext {
        /// As given.
        address: String,
        /// The address that it stands for.
        found: String,
        /// The flags that would encrypt.
        remedy: &'static str,
    },
    /// An address could not be taken.
    #[error("listen on {address}: {source}")]
    Listen {
        /// As given.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// A thread or signal handler could not be started.
    #[error("watch {what}: {source}")]
    Watch {
        /// What was to be watched.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

impl TransportError {
    /// Whether the settings themselves make no sense, whatever is in the files and on the network.
    pub fn is_usage(&self) -> bool {
        matches!(self, TransportError::Pattern { .. } | TransportError::Plaintext { .. })
    }
}
