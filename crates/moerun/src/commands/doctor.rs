//! `moerun doctor`: looks at this host, at the settings and at each link to a worker, and says what is wrong and what would
//! help.

mod finding;
mod host;
mod links;
mod security;

use std::{
    io::{self, Write},
    sync::Arc,
};

use anyhow::Context;
use moerun_process::{Exit, LogFormat, init_telemetry};
use moerun_weights::{Checkpoint, MemoryNeed, available_memory_bytes};
use serde_json::json;

use self::finding::{Findings, Level};
use super::inspect::open_any_part;
use crate::{
    cli::DoctorArgs,
    settings::{RoleFlags, Settings},
    size::ByteSize,
};

/// Runs the command; exit code 1 if anything is wrong.
pub(crate) fn run(args: &DoctorArgs) -> anyhow::Result<Exit> {
    init_telemetry(LogFormat::Text, None, "error")?;
    let role = RoleFlags {
        worker: args.worker.clone(),
        grpc_addr: args.grpc_addr.clone(),
        health_addr: args.health_addr.clone(),
        metrics_addr: args.metrics_addr.clone(),
        discovery: args.discovery.clone(),
        cluster: args.cluster.clone(),
        door: args.door.clone(),
        ..RoleFlags::default()
    };
    let settings = Settings::load(&args.serving, &role)?;
    let mut findings = Findings::default();
    host::check(&settings, &mut findings);
    let protection = security::check(&settings, &mut findings);
    let checkpoint = model(&settings, &mut findings);
    let runtime = tokio::runtime::Runtime::new().context("async runtime")?;
    if let Some(protection) = protection {
        let workers = runtime.block_on(links::workers(&settings, &mut findings));
        runtime.block_on(links::check(
            &settings,
            &workers,
            &protection,
            checkpoint,
            &mut findings,
        ));
    }
    print(&findings, args.json)?;
    Ok(match findings.worst() {
        Level::Fail => Exit::Failure,
        Level::Ok | Level::Warn => Exit::Success,
    })
}

/// Whether the checkpoint can be opened, and would fit.
fn model(settings: &Settings, findings: &mut Findings) -> Option<Arc<Checkpoint>> {
    let Some(path) = &settings.model else {
        findings.warn(
            "model",
            "none given: hashes of workers are not compared with anything",
            "--model DIR, as the gateway has it",
        );
        return None;
    };
    let checkpoint = match open_any_part(path) {
        Ok(checkpoint) => checkpoint,
        Err(error) => {
            findings.fail("model", error, "a checkpoint that moerun inspect can read");
            return None;
        }
    };
    findings.ok(
        "model",
        format!("{}, config hash {}", path.display(), checkpoint.config_hash()),
    );
    let numerics = match crate::stack::numerics(settings, &checkpoint) {
        Ok(numerics) => numerics,
        Err(error) => {
            findings.fail(
                "numerics",
                error,
                "--weights, --combine and --combine-block that fit the model",
            );
            return None;
        }
    };
    let need = MemoryNeed::of(checkpoint.config(), numerics.format).gateway_bytes;
    match available_memory_bytes() {
        Some(free) if free < need && !checkpoint.is_mapped() => findings.fail(
            "memory",
            format!(
                "{} are free, the gateway's tensors take {}",
                ByteSize(free),
                ByteSize(need)
            ),
            "more memory, narrower --weights, or a checkpoint packed by moerun convert",
        ),
        Some(free) => findings.ok(
            "memory",
            format!(
                "{} are free, the gateway's tensors take {}",
                ByteSize(free),
                ByteSize(need)
            ),
        ),
        None => findings.warn("memory", "the system does not tell what is free", "Linux with /proc"),
    }
    Some(Arc::new(checkpoint))
}

fn print(findings: &Findings, as_json: bool) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    if as_json {
        let report = json!({ "worst": findings.worst(), "findings": findings.all() });
        return writeln!(stdout, "{report:#}");
    }
    for finding in findings.all() {
        writeln!(stdout, "{finding}")?;
    }
    let count = |level| findings.all().iter().filter(|it| it.level == level).count();
    let [ok, warn, fail] = [Level::Ok, Level::Warn, Level::Fail].map(count);
    writeln!(stdout, "{ok} ok, {warn} to look at, {fail} wrong")
}
