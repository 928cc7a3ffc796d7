//! `moerun worker`: holds experts and runs them for gateways.

use anyhow::Context;
use moerun_process::{Address, Exit, Shutdown, available_threads, count_panics};
use moerun_routing::ShardSpec;
use moerun_worker::{Worker, WorkerConfig};

use crate::{
    cli::WorkerArgs,
    settings::{RoleFlags, Settings, SettingsError},
};

/// Runs the command.
pub(crate) fn run(args: &WorkerArgs) -> anyhow::Result<Exit> {
    let role = RoleFlags {
        listen: args.listen.clone(),
        admin_addr: args.admin_addr.clone(),
        shard: args.shard.clone(),
        experts: args.experts.clone(),
        ..RoleFlags::default()
    };
    let mut settings = Settings::load(&args.serving, &role)?;
    super::start_logging(&mut settings, "info")?;
    let threads = settings.threads.unwrap_or_else(available_threads);
    let cores = available_threads();
    // A gateway on this host computes too.
    let gateway_here = usize::from(Address::parse(&settings.listen).is_ok_and(|it| it.is_on_this_host()));
    let config = WorkerConfig {
        patience: settings.spin.patience(threads + gateway_here, cores),
        weights: settings.weights,
        combine: settings.combine,
        combine_block: settings.combine_block,
        load: settings.load,
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
    let outcome = serve(&config, &shutdown);
    shutdown.remove_leftovers();
    outcome
}

fn serve(config: &WorkerConfig, shutdown: &Shutdown) -> anyhow::Result<Exit> {
    let worker = Worker::start(config, shutdown.clone())?;
    shutdown.begin();
    super::print_ready(worker.address())?;
    worker.wait()?;
    Ok(shutdown.exit())
}

/// What the worker is told to hold; everything if it is told nothing.
fn shard(settings: &Settings) -> Result<ShardSpec, SettingsError> {
    let parsed = match (&settings.shard, &settings.experts) {
        (Some(shard), None) => ShardSpec::parse_shard(shard),
        (None, Some(experts)) => ShardSpec::parse_experts(experts),
        (None, None) => Ok(ShardSpec::All),
        (Some(shard), Some(experts)) => {
            let both = format!("wanted shard or experts, found both: shard {shard:?}, experts {experts:?}");
            return Err(SettingsError(both));
        }
    };
    parsed.map_err(|error| SettingsError(error.to_string()))
}
