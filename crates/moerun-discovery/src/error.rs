//! Why a source does not say who is there.

use std::time::Duration;

/// Why a source does not say who is there, or a worker cannot say that it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DiscoveryError {
    /// What was given as a source is none.
    #[error("{text:?}: {wanted}")]
    Spec {
        /// As given.
        text: String,
        /// What was wanted instead.
        wanted: String,
    },
    /// This binary was built without something.
    #[error("{text:?}: this binary was built without the feature {feature}")]
    NotBuilt {
        /// As given.
        text: String,
        /// The cargo feature.
        feature: &'static str,
    },
    /// A name server said that there is nothing, or did not say anything.
    #[error("{name}: {reason}")]
    Lookup {
        /// What was looked up.
        name: String,
        /// What the resolver said.
        reason: String,
    },
    /// No answer in time.
    #[error("{what}: no answer within {waited:?}")]
    Timeout {
        /// What was asked.
        what: String,
        /// How long.
        waited: Duration,
    },
    /// A source that named workers before names none.
    #[error("it names no worker")]
    Nobody,
    /// More workers than one gateway takes.
    #[error("it names {found} workers, wanted at most {most}")]
    TooMany {
        /// How many.
        found: usize,
        /// The bound.
        most: usize,
    },
    /// A worker that is no address.
    #[error("worker address {address:?}: {reason}")]
    Address {
        /// As it was named.
        address: String,
        /// What was wanted.
        reason: String,
    },
    /// The resolver's or the door's own settings.
    #[error("{what}: {reason}")]
    Start {
        /// What was started.
        what: String,
        /// What the system said.
        reason: String,
    },
    /// The other end of a connection, in its own words or tonic's.
    #[error("{address}: {reason}")]
    Peer {
        /// Who was asked.
        address: String,
        /// What came of it.
        reason: String,
    },
}
