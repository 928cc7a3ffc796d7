//! A certificate authority that makes good certificates and bad ones.

use std::{
    fs,
    path::{Path, PathBuf},
};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, IsCa, KeyPair, SanType};
use time::{Duration, OffsetDateTime};

/// When a certificate is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Validity {
    /// From an hour ago for a day.
    Now,
    /// Until an hour ago.
    Past,
    /// From an hour from now.
    Future,
}

impl Validity {
    fn set(self, params: &mut CertificateParams) {
        let now = OffsetDateTime::now_utc();
        let (first, last) = match self {
            Validity::Now => (now - Duration::HOUR, now + Duration::DAY),
            Validity::Past => (now - Duration::DAY, now - Duration::HOUR),
            Validity::Future => (now + Duration::HOUR, now + Duration::DAY),
        };
        (params.not_before, params.not_after) = (first, last);
    }
}

/// An authority and the folder of its files: `ca.pem`, and `NAME.pem` and `NAME.key` of what it signed.
#[derive(Debug)]
pub struct Authority {
    folder: PathBuf,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    /// A new one, which writes into `folder`.
    pub fn create(folder: &Path) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name = named("authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Validity::Now.set(&mut params);
        let key = KeyPair::generate().expect("the system has random numbers");
        let issuer = CertifiedIssuer::self_signed(params, key).expect("these parameters are good");
        write(&folder.join("ca.pem"), &issuer.pem());
        Self {
            folder: folder.to_owned(),
            issuer,
        }
    }

    /// Its own certificate.
    pub fn ca(&self) -> PathBuf {
        self.folder.join("ca.pem")
    }

    /// Signs a certificate with these alternative names (DNS names, IP addresses, URIs), as `NAME.pem` and `NAME.key`,
    /// which are replaced if they are there. Returns the two paths.
    pub fn issue(&self, name: &str, alternative_names: &[&str], validity: Validity) -> (PathBuf, PathBuf) {
        let key = KeyPair::generate().expect("the system has random numbers");
        let params = leaf(name, alternative_names, validity);
        let certificate = params.signed_by(&key, &self.issuer).expect("these parameters are good");
        self.keep(name, &certificate.pem(), &key)
    }

    /// As [`Authority::issue`], but the certificate signs itself.
    pub fn issue_self_signed(&self, name: &str, alternative_names: &[&str]) -> (PathBuf, PathBuf) {
        let key = KeyPair::generate().expect("the system has random numbers");
        let params = leaf(name, alternative_names, Validity::Now);
        let certificate = params.self_signed(&key).expect("these parameters are good");
        self.keep(name, &certificate.pem(), &key)
    }

    fn keep(&self, name: &str, certificate: &str, key: &KeyPair) -> (PathBuf, PathBuf) {
        let (cert_path, key_path) = (
            self.folder.join(format!("{name}.pem")),
            self.folder.join(format!("{name}.key")),
        );
        write(&cert_path, certificate);
        write(&key_path, &key.serialize_pem());
        (cert_path, key_path)
    }
}

fn leaf(name: &str, alternative_names: &[&str], validity: Validity) -> CertificateParams {
    let (uris, others): (Vec<&str>, Vec<&str>) = alternative_names.iter().partition(|it| it.contains("://"));
    let others: Vec<String> = others.into_iter().map(str::to_owned).collect();
    let mut params = CertificateParams::new(others).expect("a test names names");
    for uri in uris {
        params
            .subject_alt_names
            .push(SanType::URI(uri.try_into().expect("a test names URIs")));
    }
    params.distinguished_name = named(name);
    validity.set(&mut params);
    params
}

fn named(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn write(path: &Path, text: &str) {
    fs::write(path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}
