//! Who may connect to a process of ours, and how: TLS 1.3 with certificates on both sides, an allow-list of identities,
//! plaintext only where no other host can listen, files that are read again when they change, and limits of connections.
//!
//! Knows nothing of models or of what is said over a connection.
#![forbid(unsafe_code)]

mod accept;
mod certificate;
mod client;
mod connection;
mod dial;
mod error;
mod identity;
mod material;
mod plaintext;
mod protection;
mod refusal;
mod server;
mod verify;
mod watch;

pub use accept::{ConnectionLimits, Incoming};
pub use certificate::{CertificateFacts, certificate_facts};
pub use client::{ClientFiles, ClientTls};
pub use connection::{Connection, PeerInfo};
pub use dial::{Dial, Dialed};
pub use error::TransportError;
pub use identity::{AllowList, Identity};
pub use material::first_certificate;
pub use plaintext::{bind, is_loopback};
pub use protection::{ClientProtection, Protection, ServerProtection};
pub use refusal::Refusal;
pub use server::{ServerFiles, ServerTls};
pub use watch::Watched;
