//! This host: processor, limits, clock, ports.

use std::{
    io,
    net::TcpListener,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use moerun_kernels::Isa;
use moerun_process::{Address, Listener, available_threads};
use rustix::process::{Resource, getrlimit};

use super::finding::Findings;
use crate::settings::Settings;

/// Fewer open files than this run out under load: a connection, a worker, a shard each take one.
const ENOUGH_FILES: u64 = 4096;
/// No process starts with fewer.
const LEAST_FILES: u64 = 256;
/// This code is younger; certificates are judged by the clock.
const EARLIEST_CLOCK: Duration = Duration::from_secs(1_767_225_600); // 2026-01-01

pub(super) fn check(settings: &Settings, findings: &mut Findings) {
    let cores = available_threads();
    match Isa::current() {
        Isa::Portable => findings.warn(
            "processor",
            format!("{cores} threads, no AVX2: kernels run in their portable variant, several times slower"),
            "a processor with AVX2 or AVX-512, and no MOERUN_ISA=portable",
        ),
        isa => findings.ok("processor", format!("{cores} threads, {isa}")),
    }
    files(findings);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    if now < EARLIEST_CLOCK {
        findings.fail(
            "clock",
            format!("{} seconds since 1970: before this program was written", now.as_secs()),
            "the time of day, since certificates are judged by it",
        );
    } else {
        findings.ok("clock", format!("{} seconds since 1970", now.as_secs()));
    }
    let doors = [
        ("grpc_addr", Some(&settings.grpc_addr)),
        ("health_addr", settings.health_addr.as_ref()),
        ("metrics_addr", settings.metrics_addr.as_ref()),
        ("admin_addr", settings.admin_addr.as_ref()),
        ("registry_addr", settings.registry_addr.as_ref()),
    ];
    for (name, address) in doors {
        if let Some(address) = address {
            port(name, address, findings);
        }
    }
}

fn files(findings: &mut Findings) {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let found = format!("at most {limit} at a time");
    let remedy = format!("ulimit -n {ENOUGH_FILES} or more (LimitNOFILE= in a unit)");
    if limit < LEAST_FILES {
        findings.fail("open files", found, remedy);
    } else if limit < ENOUGH_FILES {
        findings.warn("open files", found, remedy);
    } else {
        findings.ok("open files", found);
    }
}

/// Whether a door could be opened; it is closed again.
fn port(name: &str, address: &str, findings: &mut Findings) {
    let check = format!("{name} {address}");
    let taken = match Address::parse(address) {
        Ok(Address::Tcp(text)) => TcpListener::bind(text).map(|_| ()),
        Ok(unix) => Listener::bind(&unix).map(|_| ()),
        Err(reason) => Err(io::Error::new(io::ErrorKind::InvalidInput, reason)),
    };
    match taken {
        Ok(()) => findings.ok(check, "free"),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => findings.warn(
            check,
            "in use, which is as it should be if this gateway runs",
            "another address, if something else has it",
        ),
        Err(error) => findings.fail(check, error, "an address of this host that this user may take"),
    }
}
