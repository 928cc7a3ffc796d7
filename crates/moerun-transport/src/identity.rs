//! Who a certificate says its owner is, and who may connect.

use std::fmt;

use rustls::pki_types::{CertificateDer, DnsName};
use webpki::EndEntityCert;

use crate::TransportError;

/// A name in a certificate: a DNS name, or a URI such as `spiffe://cluster/ns/moerun/sa/gateway`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Identity {
    /// A DNS name, in lower case.
    Dns(String),
    /// A URI, as it is.
    Uri(String),
}

impl Identity {
    /// Reads `name.of.a.host` or `scheme://…`. No wildcards: an entry is one peer.
    pub fn parse(text: &str) -> Result<Self, TransportError> {
        let refused = |reason: &str| TransportError::Pattern {
            text: text.to_owned(),
            reason: reason.to_owned(),
        };
        if text.contains('*') {
            return Err(refused("wanted a whole name, found a wildcard"));
        }
        if let Some((scheme, rest)) = text.split_once("://") {
            let plain = |text: &str| !text.is_empty() && text.bytes().all(|it| it.is_ascii_graphic());
            return if plain(scheme) && plain(rest) {
                Ok(Identity::Uri(text.to_owned()))
            } else {
                Err(refused("wanted a URI as in spiffe://cluster/ns/name, in visible ASCII"))
            };
        }
        if text.parse::<std::net::IpAddr>().is_ok() || DnsName::try_from(text).is_err() {
            return Err(refused(
                "wanted a DNS name or a URI of a certificate's subject alternative names",
            ));
        }
        Ok(Identity::Dns(text.to_ascii_lowercase()))
    }

    /// The DNS names and URIs in a certificate, in its order, DNS names first.
    pub(crate) fn of(certificate: &CertificateDer<'_>) -> Vec<Identity> {
        let Ok(certificate) = EndEntityCert::try_from(certificate) else {
            return Vec::new();
        };
        let dns = certificate
            .valid_dns_names()
            .map(|it| Identity::Dns(it.to_ascii_lowercase()));
        let uris = certificate.valid_uri_names().map(|it| Identity::Uri(it.to_owned()));
        dns.chain(uris).collect()
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Identity::Dns(text) | Identity::Uri(text) => f.write_str(text),
        }
    }
}

/// Identities that may connect; empty = whoever has a certificate of the CA.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AllowList(Vec<Identity>);

impl AllowList {
    /// Reads each entry as [`Identity::parse`] does.
    pub fn parse<S: AsRef<str>>(entries: &[S]) -> Result<Self, TransportError> {
        entries
            .iter()
            .map(|it| Identity::parse(it.as_ref()))
            .collect::<Result<_, _>>()
            .map(AllowList)
    }

    /// Whether it names nobody.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether one of a peer's identities is in it.
    pub(crate) fn allows(&self, peer: &[Identity]) -> bool {
        peer.iter().any(|it| self.0.contains(it))
    }
}

/// Identities in one line, as they stand in a message.
pub(crate) fn in_words(identities: &[Identity]) -> String {
    match identities {
        [] => "no DNS name and no URI".to_owned(),
        some => some.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
    }
}

impl fmt::Display for AllowList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&in_words(&self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_whole_names_or_uris() {
        let list = AllowList::parse(&["Gateway.Moerun", "spiffe://cluster/ns/moerun/sa/gateway"]).unwrap();
        let allows = |text: &str| list.allows(&[Identity::parse(text).unwrap()]);
        assert!(allows("gateway.moerun") && allows("spiffe://cluster/ns/moerun/sa/gateway"));
        for other in [
            "gateway",
            "gateway.moerun.evil",
            "agateway.moerun",
            "spiffe://cluster/ns/moerun/sa/gateway2",
            "spiffe://cluster/ns/moerun/sa",
            "spiffe://Cluster/ns/moerun/sa/gateway",
        ] {
            assert!(!allows(other), "{other}");
        }
        assert!(!list.allows(&[]));
    }

    #[test]
    fn what_can_be_no_identity_is_refused_in_words() {
        for (bad, word) in [
            ("", "DNS name"),
            ("10.0.0.2", "DNS name"),
            ("a b", "DNS name"),
            ("*.moerun", "wildcard"),
            ("spiffe://cluster/*", "wildcard"),
            ("spiffe://", "URI"),
            ("://x", "URI"),
        ] {
            let error = AllowList::parse(&[bad]).unwrap_err().to_string();
            assert!(error.contains(&format!("{bad:?}")) && error.contains(word), "{error}");
        }
    }
}
