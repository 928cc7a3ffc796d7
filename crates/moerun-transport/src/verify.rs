//! Whether a peer's certificate is good: signed by our authority, valid now, and of somebody who may be there.

use std::sync::Arc;

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore, SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor, verify_server_name,
    },
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::{
        ParsedCertificate, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};

use crate::{AllowList, Identity, identity::in_words};

/// A certificate that is good, of somebody who is not on the list.
#[derive(Debug, thiserror::Error)]
#[error("its certificate is of {presented}, wanted one of: {allowed}")]
pub(crate) struct NotAllowed {
    pub(crate) presented: String,
    pub(crate) allowed: String,
}

fn check_allowed(certificate: &CertificateDer<'_>, allowed: &AllowList) -> Result<(), Error> {
    let presented = Identity::of(certificate);
    if allowed.is_empty() || allowed.allows(&presented) {
        return Ok(());
    }
    let refused = NotAllowed {
        presented: in_words(&presented),
        allowed: allowed.to_string(),
    };
    Err(CertificateError::Other(OtherError(Arc::new(refused))).into())
}

/// Judges those who connect to a door.
#[derive(Debug)]
pub(crate) struct ClientVerifier {
    chain: Arc<dyn ClientCertVerifier>,
    allowed: AllowList,
}

impl ClientVerifier {
    pub(crate) fn new(
        roots: Arc<RootCertStore>,
        allowed: AllowList,
        provider: Arc<CryptoProvider>,
    ) -> Result<Self, String> {
        let chain = WebPkiClientVerifier::builder_with_provider(roots, provider)
            .build()
            .map_err(|error| error.to_string())?;
        Ok(Self { chain, allowed })
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.chain.verify_client_cert(end_entity, intermediates, now)?;
        check_allowed(end_entity, &self.allowed)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// Judges those whom this process dials: by the list if there is one, as their address may be any; else by the name that
/// was dialled.
#[derive(Debug)]
pub(crate) struct ServerVerifier {
    roots: Arc<RootCertStore>,
    allowed: AllowList,
    provider: Arc<CryptoProvider>,
}

impl ServerVerifier {
    pub(crate) fn new(roots: Arc<RootCertStore>, allowed: AllowList, provider: Arc<CryptoProvider>) -> Self {
        Self {
            roots,
            allowed,
            provider,
        }
    }
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let certificate = ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&certificate, &self.roots, intermediates, now, algorithms)?;
        if self.allowed.is_empty() {
            verify_server_name(&certificate, server_name)?;
        } else {
            check_allowed(end_entity, &self.allowed)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
