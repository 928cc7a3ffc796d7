//! Each worker: whether it can be reached and is admitted, how fast the link is, and whether all of them hold all experts.

use std::{collections::HashMap, sync::Arc, time::Duration};

use moerun_discovery::Discovery;
use moerun_dispatch::{Examination, examine};
use moerun_proto::{HeldExpert, PROTOCOL_VERSION};
use moerun_transport::ClientProtection;
use moerun_types::{LayerId, Numerics};
use moerun_weights::Checkpoint;
use tokio::{runtime::Handle, time::timeout};

use super::finding::Findings;
use crate::{settings::Settings, size::ByteSize};

/// How long sources may take to name workers.
const FIND_TIMEOUT: Duration = Duration::from_secs(6);
/// A layer waits for a round trip, and a token for every layer.
const LONG_ROUND_TRIP: Duration = Duration::from_millis(2);
/// A gigabit a second, less what headers take.
const LITTLE_BANDWIDTH: f64 = 100e6;
/// Clocks that differ by more confuse those who read logs side by side; certificates are judged by each its own.
const CLOCK_SKEW_SECS: f64 = 2.0;

/// The workers that are named, and those that sources name.
pub(super) async fn workers(settings: &Settings, findings: &mut Findings) -> Vec<String> {
    if settings.discover.is_empty() {
        if settings.worker.is_empty() {
            findings.warn("workers", "none given", "--worker or --discover");
        }
        return settings.worker.clone();
    }
    // Not the registry: a gateway that runs has its address.
    let without_registry = Settings {
        registry_addr: None,
        ..settings.clone()
    };
    let remedy = "a source that names workers";
    let config = match without_registry.discovery() {
        Ok(config) => config,
        Err(error) => {
            findings.fail("discovery", error, remedy);
            return settings.worker.clone();
        }
    };
    let discovery = match Discovery::start(config, &Handle::current()) {
        Ok(discovery) => discovery,
        Err(error) => {
            findings.fail("discovery", error, remedy);
            return settings.worker.clone();
        }
    };
    let all_have_said = async {
        while discovery.stats().iter().any(|it| it.answers == 0) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    // Who has not answered by then is told so below.
    let _ = timeout(FIND_TIMEOUT, all_have_said).await;
    for source in discovery.stats() {
        let check = format!("discovery {}", source.source);
        match source.failing {
            _ if source.answers > 0 => findings.ok(check, format!("{} workers", source.workers)),
            Some(error) => findings.fail(check, error, remedy),
            None => findings.fail(check, format!("no answer within {FIND_TIMEOUT:?}"), remedy),
        }
    }
    discovery.workers().borrow().clone()
}

/// Looks at each of them, and at what they hold together.
pub(super) async fn check(
    settings: &Settings,
    workers: &[String],
    protection: &ClientProtection,
    checkpoint: Option<Arc<Checkpoint>>,
    findings: &mut Findings,
) {
    let numerics = checkpoint
        .as_ref()
        .and_then(|it| crate::stack::numerics(settings, it).ok());
    let compare_with = checkpoint.clone().zip(numerics);
    let mut held = Vec::new();
    for worker in workers {
        match examine(worker, protection, compare_with.clone()).await {
            Ok(examination) => {
                of_one(worker, &examination, findings);
                held.push((worker.as_str(), examination.identity.held));
            }
            Err(error) => findings.fail(
                format!("worker {worker}"),
                error,
                "a worker of the same model and numerics that listens there, and may be dialled from here",
            ),
        }
    }
    if let Some((checkpoint, numerics)) = compare_with
        && !workers.is_empty()
    {
        coverage(&checkpoint, numerics, &held, findings);
    }
}

fn of_one(worker: &str, found: &Examination, findings: &mut Findings) {
    let check = format!("worker {worker}");
    let version = found.identity.protocol_version;
    if version == PROTOCOL_VERSION {
        findings.ok(&check, format!("protocol {version}, build {}", found.identity.build));
    } else {
        findings.warn(
            &check,
            format!(
                "protocol {version}, build {}; this is {PROTOCOL_VERSION}",
                found.identity.build
            ),
            "the same version everywhere, once an upgrade is done",
        );
    }
    let trip = format!("round trip {:.3} ms", found.round_trip.as_secs_f64() * 1e3);
    if found.round_trip > LONG_ROUND_TRIP {
        findings.warn(
            &check,
            trip,
            format!("at most {LONG_ROUND_TRIP:?}: every layer of every token waits for one"),
        );
    } else {
        findings.ok(&check, trip);
    }
    let bandwidth = format!("{:.0} MB/s each way", found.bytes_per_second / 1e6);
    if found.bytes_per_second < LITTLE_BANDWIDTH {
        findings.warn(&check, bandwidth, "a gigabit a second or more: prompts are long");
    } else {
        findings.ok(&check, bandwidth);
    }
    let (Some(host), Some(ahead)) = (&found.host, found.clock_ahead_secs) else {
        return findings.warn(&check, "it does not say what it runs on", "a worker of this version");
    };
    let free = ByteSize(host.available_memory_bytes);
    if host.isa == "portable" {
        findings.warn(
            &check,
            format!("{free} free, no AVX2: its kernels are several times slower"),
            "a processor with AVX2 or AVX-512, and no MOERUN_ISA=portable",
        );
    } else {
        findings.ok(&check, format!("{free} free, {}", host.isa));
    }
    if ahead.abs() > CLOCK_SKEW_SECS {
        findings.warn(
            &check,
            format!("its clock is {ahead:+.1} s from this one"),
            "clocks that are set (NTP), since certificates are judged by them",
        );
    } else {
        findings.ok(&check, format!("its clock is {:+.0} ms from this one", ahead * 1e3));
    }
}

/// Whether every block of every expert is held, and by whom alone.
fn coverage(checkpoint: &Checkpoint, numerics: Numerics, workers: &[(&str, Vec<HeldExpert>)], findings: &mut Findings) {
    let Some(moe) = &checkpoint.config().moe else { return };
    let mut holders: HashMap<(LayerId, u16, u16), Vec<&str>> = HashMap::new();
    for (worker, held) in workers {
        for slice in held.iter().map(|it| it.slice) {
            for block in slice.blocks.first..slice.blocks.end {
                holders
                    .entry((slice.layer, slice.expert.0, block))
                    .or_default()
                    .push(worker);
            }
        }
    }
    let num_blocks = numerics.num_blocks(moe.intermediate) as u16;
    let (mut missing, mut alone) = (Vec::new(), Vec::new());
    for layer in checkpoint.config().moe_layers() {
        for expert in 0..moe.num_experts as u16 {
            for block in 0..num_blocks {
                match holders.get(&(layer, expert, block)).map_or(&[][..], Vec::as_slice) {
                    [] => missing.push((layer, expert, block)),
                    [only] => alone.push(*only),
                    _ => {}
                }
            }
        }
    }
    if let Some((layer, expert, block)) = missing.first() {
        findings.fail(
            "experts",
            format!(
                "layer {layer} expert {expert} block {block} and {} more are held by no worker that can be used",
                missing.len() - 1
            ),
            "workers that hold every expert between them (moerun plan)",
        );
    } else if alone.is_empty() {
        findings.ok("experts", "all are held by two workers or more");
    } else {
        alone.sort_unstable();
        alone.dedup();
        findings.warn(
            "experts",
            format!("all are held, some by one worker alone: {}", alone.join(", ")),
            "replicas (worker --replicas, moerun plan --replicas), so that any worker may be lost",
        );
    }
}
