//! Why one side of a connection turned the other away, in words an operator can act on.

use std::io;

use rustls::{AlertDescription, CertificateError, Error, InvalidMessage, PeerIncompatible, pki_types::UnixTime};

use crate::verify::NotAllowed;

/// Why one side of a connection turned the other away. All are about files, names and flags: trying again will not help
/// until somebody changes one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Signed by no authority that we know.
    #[error("its certificate is signed by none of our authorities (--tls-ca): by itself, or by another authority")]
    UnknownAuthority,
    /// Of another host than the one that was dialled.
    #[error(
        "its certificate is not for {wanted}: it is for {presented} (--allow-peer would name whom to expect instead)"
    )]
    WrongName {
        /// What was dialled.
        wanted: String,
        /// The names in the certificate.
        presented: String,
    },
    /// Not on the list.
    #[error("its certificate is of {presented}, which --allow-peer does not name: wanted one of: {allowed}")]
    NotAllowed {
        /// The identities in the certificate.
        presented: String,
        /// The list.
        allowed: String,
    },
    /// No longer valid.
    #[error("its certificate has expired{0}")]
    Expired(String),
    /// Not valid yet.
    #[error("its certificate is not valid yet{0}")]
    NotValidYet(String),
    /// None was shown.
    #[error("it shows no certificate (wanted --tls-cert and --tls-key at the other end)")]
    NoCertificate,
    /// Something else about a certificate.
    #[error("its certificate is refused: {0}")]
    Certificate(String),
    /// The peer speaks plaintext to our TLS.
    #[error("it speaks plaintext, and TLS is wanted here")]
    PeerIsPlain,
    /// The peer wants TLS and we speak plaintext.
    #[error("it wants TLS, and this end speaks plaintext")]
    PeerWantsTls,
    /// The peer offers older versions only.
    #[error("it offers no TLS 1.3, and nothing older is taken")]
    TooOld,
    /// The peer turned our certificate away.
    #[error("it refuses this end's certificate: {0}")]
    ByPeer(&'static str),
    /// Plaintext would leave this host.
    #[error("{0}")]
    Plaintext(String),
    /// A broken handshake.
    #[error("TLS: {0}")]
    Handshake(String),
}

impl Refusal {
    /// Why, if `error` comes from TLS; `None` for what the network did.
    pub fn of(error: &io::Error) -> Option<Self> {
        let inner = error.get_ref()?;
        if let Some(refusal) = inner.downcast_ref::<Refusal>() {
            return Some(refusal.clone());
        }
        inner.downcast_ref::<Error>().map(Self::of_tls)
    }

    fn of_tls(error: &Error) -> Self {
        match error {
            Error::InvalidCertificate(error) => Self::of_certificate(error),
            Error::NoCertificatesPresented => Refusal::NoCertificate,
            Error::InvalidMessage(InvalidMessage::InvalidContentType | InvalidMessage::MessageTooLarge) => {
                Refusal::PeerIsPlain
            }
            Error::PeerIncompatible(
                PeerIncompatible::SupportedVersionsExtensionRequired
                | PeerIncompatible::Tls12NotOffered
                | PeerIncompatible::Tls12NotOfferedOrEnabled
                | PeerIncompatible::Tls13RequiredForQuic
                | PeerIncompatible::ServerDoesNotSupportTls12Or13
                | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig,
            ) => Refusal::TooOld,
            Error::AlertReceived(alert) => Self::of_alert(*alert),
            other => Refusal::Handshake(other.to_string()),
        }
    }

    fn of_certificate(error: &CertificateError) -> Self {
        match error {
            // A bad signature is that of another authority of the same name.
            CertificateError::UnknownIssuer | CertificateError::BadSignature => Refusal::UnknownAuthority,
            CertificateError::Expired => Refusal::Expired(String::new()),
            CertificateError::ExpiredContext { time, not_after } => {
                Refusal::Expired(format!(", {} ago by this host's clock", ago(*not_after, *time)))
            }
            CertificateError::NotValidYet => Refusal::NotValidYet(String::new()),
            CertificateError::NotValidYetContext { time, not_before } => {
                Refusal::NotValidYet(format!(": in {} by this host's clock", ago(*time, *not_before)))
            }
            CertificateError::NotValidForNameContext { expected, presented } => Refusal::WrongName {
                wanted: expected.to_str().into_owned(),
                presented: if presented.is_empty() {
                    "no host".to_owned()
                } else {
                    presented.join(", ")
                },
            },
            CertificateError::Other(other) => match other.0.downcast_ref::<NotAllowed>() {
                Some(NotAllowed { presented, allowed }) => Refusal::NotAllowed {
                    presented: presented.clone(),
                    allowed: allowed.clone(),
                },
                // An authority's own certificate, shown as a peer's, is how many make one that signs itself.
                None if matches!(other.0.downcast_ref(), Some(webpki::Error::CaUsedAsEndEntity)) => {
                    Refusal::UnknownAuthority
                }
                None => Refusal::Certificate(other.to_string()),
            },
            other => Refusal::Certificate(other.to_string()),
        }
    }

    fn of_alert(alert: AlertDescription) -> Self {
        match alert {
            AlertDescription::UnknownCA | AlertDescription::DecryptError => {
                Refusal::ByPeer("it is signed by none of the authorities known there (its --tls-ca)")
            }
            AlertDescription::CertificateUnknown | AlertDescription::AccessDenied => {
                Refusal::ByPeer("its identity is not on the list there (its --allow-peer)")
            }
            AlertDescription::BadCertificate => Refusal::ByPeer("it is malformed, or not for the name wanted there"),
            AlertDescription::CertificateExpired => {
                Refusal::ByPeer("it has expired or is not valid yet, by the clock there")
            }
            AlertDescription::CertificateRevoked => Refusal::ByPeer("it is revoked"),
            AlertDescription::UnsupportedCertificate => Refusal::ByPeer("it is not for this use"),
            AlertDescription::CertificateRequired | AlertDescription::HandshakeFailure => {
                Refusal::ByPeer("there is none, and one is wanted there (--tls-cert, --tls-key)")
            }
            AlertDescription::ProtocolVersion => Refusal::TooOld,
            other => Refusal::Handshake(format!("the other end broke off: {other:?}")),
        }
    }

    /// As an error of the socket, from which [`Refusal::of`] has it back.
    pub(crate) fn into_io(self) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidData, self)
    }

    /// The refusal behind an error, however deep.
    pub fn behind(error: &(dyn std::error::Error + 'static)) -> Option<Self> {
        let mut cause = Some(error);
        while let Some(error) = cause {
            if let Some(refusal) = error.downcast_ref::<Refusal>() {
                return Some(refusal.clone());
            }
            if let Some(refusal) = error.downcast_ref::<io::Error>().and_then(Refusal::of) {
                return Some(refusal);
            }
            cause = error.source();
        }
        None
    }
}

/// From one moment to a later one, in the largest unit that fits.
pub(crate) fn ago(earlier: UnixTime, later: UnixTime) -> String {
    let seconds = later.as_secs().saturating_sub(earlier.as_secs());
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}
