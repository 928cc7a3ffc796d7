//! `moerun worker`: holds experts and runs them for gateways.

use std::borrow::Cow;

use anyhow::Context;
use moerun_discovery::Registration;
use moerun_metrics::MetricsDoor;
use moerun_process::{Address, Exit, Shutdown, Supervision, available_threads, count_panics};
use moerun_routing::ShardSpec;
use moerun_transport::{ClientProtection, ServerProtection};
use moerun_worker::{Worker, WorkerConfig};
use rustix::system::uname;

use super::warn_of_plaintext;
use crate::{
    cli::WorkerArgs,
    settings::{RoleFlags, Settings, SettingsError},
};

/// Stands for a shard's index in `--shard`.
const ORDINAL: &str = "ordinal";

/// Runs the command.
pub(crate) fn run(args: &WorkerArgs) -> anyhow::Result<Exit> {
    let role = RoleFlags {
        listen: args.listen.clone(),
        health_addr: args.health_addr.clone(),
        metrics_addr: args.metrics_addr.clone(),
        admin_addr: args.admin_addr.clone(),
        shard: args.shard.clone(),
        replicas: args.replicas,
        experts: args.experts.clone(),
        expert_memory: args.expert_memory,
        register: args.register.clone(),
        advertise: args.advertise.clone(),
        cluster: args.cluster.clone(),
        ..RoleFlags::default()
    };
    let mut settings = Settings::load(&args.serving, &role)?;
    super::start_logging(&mut settings, "info")?;
    settings.registrations()?; // before anything is loaded
    let threads = settings.threads.unwrap_or_else(available_threads);
    let cores = available_threads();
    // A gateway on this host computes too.
    let gateway_here = usize::from(Address::parse(&settings.listen).is_ok_and(|it| it.is_on_this_host()));
    // A parent that starts us is on this host, and has no certificates for us.
    let protection = if args.exit_with_parent {
        ServerProtection::LoopbackOnly
    } else {
        settings.worker_protection()?
    };
    let fetch_protection = match args.exit_with_parent {
        true => ClientProtection::LoopbackOnly,
        false => settings.fetch_protection()?,
    };
    warn_of_plaintext("workers", settings.insecure && protection.tls().is_none());
    let config = WorkerConfig {
        protection,
        patience: settings.spin.patience(threads + gateway_here, cores),
        weights: settings.weights,
        combine: settings.combine,
        combine_block: settings.combine_block,
        load: settings.load,
        dial: fetch_protection,
        max_expert_bytes: settings.expert_memory.map(|size| size.0),
        threads,
        max_queue: settings.max_queue,
        admin_addr: settings.admin_addr.clone(),
        ..WorkerConfig::new(settings.model_dir()?, &settings.listen, shard(&settings)?)
    };
    count_panics();
    let shutdown = Shutdown::on_signals().context("signals")?;
    if args.exit_with_parent {
        // The parent made the folder; should it have been killed, the last worker takes it along.
        if let Ok(Address::Unix(path)) = Address::parse(&config.listen)
            && let Some(folder) = path.parent()
        {
            shutdown.remove_at_end(folder.to_owned());
        }
        shutdown.drain_with_parent().context("standard input")?;
    }
    let metrics = super::metrics_door(&settings, "worker")?;
    let supervision = super::supervise(&settings, &shutdown)?;
    let outcome = serve(&settings, &config, &shutdown, &supervision, metrics.as_ref());
    shutdown.remove_leftovers();
    outcome
}

fn serve(
    settings: &Settings,
    config: &WorkerConfig,
    shutdown: &Shutdown,
    supervision: &Supervision,
    metrics: Option<&MetricsDoor>,
) -> anyhow::Result<Exit> {
    let worker = Worker::start(config, shutdown.clone())?;
    if let Some(door) = metrics {
        door.show(worker.figures());
    }
    supervision.watch(worker.runtime());
    shutdown.begin();
    supervision.ready();
    super::print_ready(worker.address(), supervision.address())?;
    let registration = settings
        .registration(worker.address())?
        .map(|it| Registration::start(it, shutdown.clone()))
        .transpose()?;
    let ended = worker.wait();
    if let Some(registration) = registration {
        shutdown.drain(); // also where the worker ended by itself
        registration.wait();
    }
    ended?;
    Ok(shutdown.exit())
}

/// What the worker is told to hold; everything if it is told nothing.
fn shard(settings: &Settings) -> Result<ShardSpec, SettingsError> {
    let parsed = match (&settings.shard, &settings.experts) {
        (Some(shard), None) => {
            let shard = with_ordinal(shard, || uname().nodename().to_string_lossy().into_owned())?;
            ShardSpec::parse_shard(&shard).and_then(|it| it.replicated(settings.replicas))
        }
        (None, Some(experts)) => ShardSpec::parse_experts(experts),
        (None, None) => Ok(ShardSpec::All),
        (Some(shard), Some(experts)) => {
            let both = format!("wanted shard or experts, found both: shard {shard:?}, experts {experts:?}");
            return Err(SettingsError(both));
        }
    };
    parsed.map_err(|error| SettingsError(error.to_string()))
}

/// `shard` with the word ordinal replaced by the number that the host's name ends in: pods of one set differ in nothing
/// else.
fn with_ordinal(shard: &str, host: impl FnOnce() -> String) -> Result<Cow<'_, str>, SettingsError> {
    if !shard.contains(ORDINAL) {
        return Ok(Cow::Borrowed(shard));
    }
    let host = host();
    let digits = host.len() - host.trim_end_matches(|it: char| it.is_ascii_digit()).len();
    let ordinal = host[host.len() - digits..].parse::<usize>().map_err(|_| {
        SettingsError(format!(
            "shard {shard}: wanted a host whose name ends in its number, as in worker-3, found {host}"
        ))
    })?;
    Ok(Cow::Owned(shard.replace(ORDINAL, &ordinal.to_string())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ordinal_is_what_the_host_ends_in() {
        let on = |shard: &'static str, host: &str| with_ordinal(shard, || host.to_owned()).map(Cow::into_owned);
        assert_eq!(on("ordinal/4", "moerun-worker-3").unwrap(), "3/4");
        assert_eq!(on("slice:ordinal/16", "w012").unwrap(), "slice:12/16");
        assert_eq!(on("1/4", "box").unwrap(), "1/4");
        for host in ["box", "w-3a", "w99999999999999999999999"] {
            let error = on("ordinal/4", host).unwrap_err().to_string();
            assert!(error.contains(host), "{error}");
        }
    }
}
