//! What stands in a certificate, for people.

use std::{
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustls::pki_types::UnixTime;
use webpki::{EndEntityCert, KeyUsage};

use crate::{
    Identity, TransportError,
    material::{certificates, provider},
};

/// A moment after the end of every certificate.
const END_OF_TIME: u64 = 253_402_300_800; // the year 10000

/// What stands in a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateFacts {
    /// DNS names and URIs.
    pub names: Vec<Identity>,
    /// From when it is valid.
    pub not_before: SystemTime,
    /// Until when.
    pub not_after: SystemTime,
}

/// What stands in the first certificate of a PEM file.
pub fn certificate_facts(path: &Path, bytes: &[u8]) -> Result<CertificateFacts, TransportError> {
    let content = |reason: String| TransportError::Content {
        path: path.to_owned(),
        reason,
    };
    let certificate = &certificates(path, bytes)?[0];
    let parsed = EndEntityCert::try_from(certificate).map_err(|error| content(error.to_string()))?;
    let provider = provider();
    let algorithms = provider.signature_verification_algorithms.all;
    // The library tells the bounds only to whom it refuses.
    let refused_at = |seconds| {
        let at = UnixTime::since_unix_epoch(Duration::from_secs(seconds));
        let verified = parsed.verify_for_usage(algorithms, &[], &[], at, KeyUsage::server_auth(), None, None);
        verified.err()
    };
    let time = |at: UnixTime| UNIX_EPOCH + Duration::from_secs(at.as_secs());
    let not_before = match refused_at(0) {
        Some(webpki::Error::CertNotValidYet { not_before, .. }) => time(not_before),
        _ => UNIX_EPOCH,
    };
    match refused_at(END_OF_TIME) {
        Some(webpki::Error::CertExpired { not_after, .. }) => Ok(CertificateFacts {
            names: Identity::of(certificate),
            not_before,
            not_after: time(not_after),
        }),
        other => Err(content(format!("its validity cannot be read: {other:?}"))),
    }
}
