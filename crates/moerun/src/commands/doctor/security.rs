//! Certificates, keys, and whether connections may be made at all.

use std::{
    fs,
    path::Path,
    time::{Duration, SystemTime},
};

use moerun_transport::{ClientProtection, certificate_facts};

use super::finding::Findings;
use crate::settings::Settings;

const DAY: Duration = Duration::from_secs(86_400);
/// Less is little for those who renew by hand.
const FEW_DAYS: u32 = 14;

/// How workers are to be dialled, unless that makes no sense.
pub(super) fn check(settings: &Settings, findings: &mut Findings) -> Option<ClientProtection> {
    let certificates = [
        ("tls_cert", &settings.tls_cert),
        ("tls_ca", &settings.tls_ca),
        ("grpc_tls_cert", &settings.grpc_tls_cert),
        ("grpc_tls_client_ca", &settings.grpc_tls_client_ca),
    ];
    for (name, path) in certificates {
        if let Some(path) = path {
            certificate(name, path, findings);
        }
    }
    let remedy = "files that belong together (moerun certs makes them)";
    if let Err(error) = settings.door_protection() {
        findings.fail("gRPC door", error, remedy);
    }
    if let Err(error) = settings.authenticator() {
        findings.fail("API keys", error, "lines as moerun key new prints them");
    }
    match settings.dial_protection() {
        Ok(protection) => {
            let found = match (&protection, settings.insecure) {
                (ClientProtection::Tls(_), _) => "TLS 1.3 with certificates on both sides",
                (_, true) => {
                    findings.warn(
                        "links",
                        "plaintext: whoever is on the way reads and changes everything",
                        "--tls-cert, --tls-key and --tls-ca instead of --insecure",
                    );
                    return Some(protection);
                }
                (_, false) => "plaintext, and so within this host only",
            };
            findings.ok("links", found);
            Some(protection)
        }
        Err(error) => {
            findings.fail("links", error, remedy);
            None
        }
    }
}

fn certificate(name: &str, path: &Path, findings: &mut Findings) {
    let check = format!("{name} {}", path.display());
    let facts = fs::read(path)
        .map_err(|error| error.to_string())
        .and_then(|bytes| certificate_facts(path, &bytes).map_err(|error| error.to_string()));
    let facts = match facts {
        Ok(facts) => facts,
        Err(error) => return findings.fail(check, error, "certificates in PEM"),
    };
    let names = match facts.names.as_slice() {
        [] => "no names".to_owned(),
        some => some.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
    };
    let now = SystemTime::now();
    let left = facts.not_after.duration_since(now);
    match (facts.not_before <= now, left) {
        (false, _) => findings.fail(
            check,
            format!("{names}: not valid yet by this host's clock"),
            "the right time",
        ),
        (true, Err(_)) => findings.fail(
            check,
            format!("{names}: expired"),
            "moerun certs --renew, or your authority",
        ),
        (true, Ok(left)) => {
            let days = left.as_secs() / DAY.as_secs();
            let found = format!("{names}: {days} days left");
            if left < DAY * FEW_DAYS {
                findings.warn(check, found, format!("renewal at least {FEW_DAYS} days before"));
            } else {
                findings.ok(check, found);
            }
        }
    }
}
