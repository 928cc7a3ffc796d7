//! Certificates and keys as they stand in PEM files, checked before they are used.

use std::{path::Path, sync::Arc};

use rustls::{
    RootCertStore,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject},
    sign::CertifiedKey,
};
use webpki::{EndEntityCert, KeyUsage};

use crate::{TransportError, refusal::ago};

/// What the cryptography is done with; TLS 1.3 alone is compiled in.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn content(path: &Path, reason: impl Into<String>) -> TransportError {
    TransportError::Content {
        path: path.to_owned(),
        reason: reason.into(),
    }
}

pub(crate) fn certificates(path: &Path, bytes: &[u8]) -> Result<Vec<CertificateDer<'static>>, TransportError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(bytes).collect();
    let found = found.map_err(|error| content(path, format!("wanted certificates in PEM: {error}")))?;
    if found.is_empty() {
        return Err(content(path, "wanted a certificate in PEM, found none"));
    }
    Ok(found)
}

/// The first certificate in a PEM file, in DER.
pub fn first_certificate(path: &Path, bytes: &[u8]) -> Result<Vec<u8>, TransportError> {
    Ok(certificates(path, bytes)?[0].to_vec())
}

/// The authorities in a file.
pub(crate) fn roots(path: &Path, bytes: &[u8]) -> Result<Arc<RootCertStore>, TransportError> {
    let mut store = RootCertStore::empty();
    for certificate in certificates(path, bytes)? {
        store
            .add(certificate)
            .map_err(|error| content(path, format!("wanted a certificate of an authority: {error}")))?;
    }
    Ok(Arc::new(store))
}

/// A certificate with its chain, and the key to it: of one pair, and valid now.
pub(crate) fn certified_key(
    (cert, cert_bytes): (&Path, &[u8]),
    (key, key_bytes): (&Path, &[u8]),
    provider: &CryptoProvider,
) -> Result<Arc<CertifiedKey>, TransportError> {
    let chain = certificates(cert, cert_bytes)?;
    let private = PrivateKeyDer::from_pem_slice(key_bytes)
        .map_err(|error| content(key, format!("wanted a private key in PEM: {error}")))?;
    check_time(cert, &chain, provider)?;
    let signing = provider
        .key_provider
        .load_private_key(private)
        .map_err(|error| content(key, format!("wanted a private key for TLS: {error}")))?;
    let pair = CertifiedKey::new(chain, signing);
    match pair.keys_match() {
        Ok(()) => Ok(Arc::new(pair)),
        Err(rustls::Error::InconsistentKeys(rustls::InconsistentKeys::KeyMismatch)) => Err(TransportError::NotAPair {
            cert: cert.to_owned(),
            key: key.to_owned(),
        }),
        Err(error) => Err(content(cert, error.to_string())),
    }
}

/// Peers would refuse a certificate that is not valid now, and their words arrive late; so it is said where it can be
/// mended. By whom it is signed is theirs to judge: their authorities may be others than ours.
fn check_time(path: &Path, chain: &[CertificateDer<'static>], provider: &CryptoProvider) -> Result<(), TransportError> {
    let leaf = EndEntityCert::try_from(&chain[0]).map_err(|error| content(path, error.to_string()))?;
    let now = UnixTime::now();
    let verified = leaf.verify_for_usage(
        provider.signature_verification_algorithms.all,
        &[],
        &chain[1..],
        now,
        KeyUsage::server_auth(),
        None,
        None,
    );
    match verified {
        Err(webpki::Error::CertExpired { not_after, .. }) => {
            let reason = format!(
                "the certificate expired {} ago by this host's clock",
                ago(not_after, now)
            );
            Err(content(path, reason))
        }
        Err(webpki::Error::CertNotValidYet { not_before, .. }) => {
            let reason = format!(
                "the certificate becomes valid in {} by this host's clock",
                ago(now, not_before)
            );
            Err(content(path, reason))
        }
        _ => Ok(()),
    }
}
