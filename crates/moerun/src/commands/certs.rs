//! `moerun certs`: an authority of one's own, and certificates for gateways and workers.

use std::{
    fs::{self, OpenOptions},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail, ensure};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData, SanType,
};
use time::{Duration, OffsetDateTime};

use moerun_transport::first_certificate;

use crate::{cli::CertsArgs, settings::SettingsError};

/// Name of the authority in its certificates.
const AUTHORITY: &str = "Moerun cluster authority";
/// Names under which a gateway is dialled from its own host.
const LOCAL_NAMES: [&str; 3] = ["localhost", "127.0.0.1", "::1"];
/// Clocks of a cluster differ.
const CLOCK_SKEW: Duration = Duration::HOUR;

/// A process that gets a certificate.
struct Holder {
    name: String,
    role: &'static str,
    names: Vec<String>,
}

/// Runs the command.
pub(crate) fn run(args: &CertsArgs) -> anyhow::Result<()> {
    let mut holders = Vec::new();
    for text in &args.gateway {
        let mut gateway = holder(text, "gateway")?;
        gateway.names.extend(LOCAL_NAMES.map(str::to_owned));
        holders.push(gateway);
    }
    for text in &args.worker {
        holders.push(holder(text, "worker")?);
    }
    fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    let issuer = authority(&args.out, args.days)?;
    for holder in &holders {
        issue(&args.out, holder, &issuer, args)?;
    }
    Ok(())
}

fn holder(text: &str, role: &'static str) -> Result<Holder, SettingsError> {
    let (name, names) = text.split_once('=').unwrap_or((text, text));
    let plain = |it: &str| !it.is_empty() && it.bytes().all(|it| it.is_ascii_alphanumeric() || b"-_.".contains(&it));
    if !plain(name) || name.starts_with('.') || name == "ca" {
        return Err(SettingsError(format!(
            "--{role} {text:?}: wanted a name in letters, digits and -_. that is not ca, found {name:?}"
        )));
    }
    Ok(Holder {
        name: name.to_owned(),
        role,
        names: names.split(',').map(|it| it.trim().to_owned()).collect(),
    })
}

/// The authority in `folder`, made if there is none.
fn authority(folder: &Path, days: u16) -> anyhow::Result<Issuer<'static, KeyPair>> {
    let (cert_path, key_path) = (folder.join("ca.pem"), folder.join("ca.key"));
    let mut params = CertificateParams::default();
    params.distinguished_name = named(AUTHORITY);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    valid_for(&mut params, Duration::days(i64::from(days) * 10));
    if !cert_path.exists() && !key_path.exists() {
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?;
        write_new(&key_path, &key.serialize_pem(), 0o600)?;
        write_new(&cert_path, &certificate.pem(), 0o644)?;
        println!("{}", cert_path.display());
        return Ok(Issuer::new(params, key));
    }
    let read = |path: &Path| fs::read_to_string(path).with_context(|| path.display().to_string());
    let key = KeyPair::from_pem(&read(&key_path)?).with_context(|| key_path.display().to_string())?;
    let found = first_certificate(&cert_path, read(&cert_path)?.as_bytes())?;
    // Both stand in a certificate as they are.
    let holds = |part: &[u8]| found.windows(part.len()).any(|window| window == part);
    ensure!(
        holds(&key.subject_public_key_info()) && holds(AUTHORITY.as_bytes()),
        "{}: wanted the authority that moerun certs made with {}, found another",
        cert_path.display(),
        key_path.display(),
    );
    Ok(Issuer::new(params, key))
}

fn issue(folder: &Path, holder: &Holder, issuer: &Issuer<'_, KeyPair>, args: &CertsArgs) -> anyhow::Result<()> {
    let path = |ending: &str| folder.join(format!("{}.{ending}", holder.name));
    let (cert_path, key_path) = (path("pem"), path("key"));
    if cert_path.exists() && !args.renew {
        if holder.role == "gateway" && !args.worker.is_empty() {
            return Ok(()); // workers are added to a cluster whose gateway has its own
        }
        bail!("{}: is there already; --renew replaces it", cert_path.display());
    }
    let mut params = CertificateParams::new(holder.names.clone())
        .map_err(|error| SettingsError(format!("--{} {}: {error}", holder.role, holder.name)))?;
    let uri = format!("spiffe://moerun/{}/{}", holder.role, holder.name);
    params.subject_alt_names.push(SanType::URI(uri.as_str().try_into()?));
    params.distinguished_name = named(&holder.name);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    // Gateways have a door for clients, and workers may dial workers.
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    valid_for(&mut params, Duration::days(i64::from(args.days)));
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, issuer)?;
    replace(&key_path, &key.serialize_pem(), 0o600)?;
    replace(&cert_path, &certificate.pem(), 0o644)?;
    println!("{} {uri} {}", cert_path.display(), holder.names.join(","));
    Ok(())
}

fn named(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn valid_for(params: &mut CertificateParams, time: Duration) {
    let now = OffsetDateTime::now_utc();
    (params.not_before, params.not_after) = (now - CLOCK_SKEW, now + time);
}

fn write_new(path: &Path, text: &str, mode: u32) -> anyhow::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .with_context(|| path.display().to_string())?;
    file.write_all(text.as_bytes())
        .with_context(|| path.display().to_string())
}

/// Nobody sees half a file.
fn replace(path: &Path, text: &str, mode: u32) -> anyhow::Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let _ = fs::remove_file(&partial);
    write_new(&partial, text, mode)?;
    fs::rename(&partial, path).with_context(|| path.display().to_string())
}
