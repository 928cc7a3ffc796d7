//! `moerun plan`: who should hold which experts.

mod report;
mod workers;

use std::{
    fs,
    io::{self, Write},
    path::Path,
};

use anyhow::Context;
use moerun_dispatch::{cost_model, expert_size};
use moerun_process::{LogFormat, init_telemetry};
use moerun_routing::planner::{ExpertLoads, PlanFile, PlanIdentity, PlanRequest, plan};
use moerun_types::{ModelConfig, Numerics, default_combine_block};
use moerun_weights::Checkpoint;

use self::report::Report;
use crate::{cli::PlanArgs, settings::SettingsError};

/// Runs the command.
pub(crate) fn run(args: &PlanArgs) -> anyhow::Result<()> {
    init_telemetry(LogFormat::Text, None, "warn")?;
    let checkpoint = super::inspect::open_any_part(&args.model)?;
    let config = checkpoint.config();
    let numerics = numerics(args, &checkpoint)?;
    checkpoint.check_format(numerics.format)?;
    let identity = PlanIdentity {
        config_hash: checkpoint.config_hash(),
        numerics: numerics.id(),
    };
    let present = args.present.as_deref().map(read_plan).transpose()?;
    let held = match (&present, &args.present) {
        (Some(present), Some(path)) => present
            .resolve(&identity, config, &numerics)
            .with_context(|| format!("{}", path.display()))?,
        _ => Vec::new(),
    };
    let request = PlanRequest {
        present: held,
        ..request(args, config, &numerics)?
    };
    let planned = plan(&request)?;
    let epoch = present.map_or(1, |present| present.epoch.saturating_add(1));
    let file = PlanFile::new(epoch, identity, &request, &planned);
    if let Some(out) = &args.out {
        write_whole(out, &file.to_json())?;
    }
    let report = Report {
        model: &args.model,
        config,
        numerics: &numerics,
        request: &request,
        plan: &planned,
        file: &file,
        out: args.out.as_deref(),
    };
    let mut stdout = io::stdout().lock();
    if args.json {
        writeln!(stdout, "{:#}", report.as_json())?;
    } else {
        write!(stdout, "{report}")?;
    }
    Ok(())
}

fn numerics(args: &PlanArgs, checkpoint: &Checkpoint) -> Result<Numerics, SettingsError> {
    let intermediate = checkpoint.config().moe.as_ref().map_or(0, |moe| moe.intermediate);
    Numerics::checked(
        args.weights.unwrap_or_else(|| checkpoint.default_format()),
        args.combine,
        args.combine_block
            .unwrap_or_else(|| default_combine_block(intermediate)),
    )
    .map_err(|error| SettingsError(error.to_string()))
}

fn request(args: &PlanArgs, config: &ModelConfig, numerics: &Numerics) -> anyhow::Result<PlanRequest> {
    let moe_layers = config.moe_layers();
    let num_experts = config.moe.as_ref().map_or(0, |moe| moe.num_experts);
    let loads = match &args.loads {
        Some(path) => {
            let text = fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
            ExpertLoads::from_json(&text).with_context(|| format!("{}", path.display()))?
        }
        None => ExpertLoads::new(&moe_layers, num_experts),
    };
    Ok(PlanRequest {
        top_k: config.moe.as_ref().map_or(0, |moe| moe.top_k),
        size: expert_size(config, numerics),
        workers: workers::workers(args)?,
        replicas: args.replicas,
        extra_holders: args.extra,
        layout: args.force,
        present: Vec::new(),
        stability: args.stability,
        seed: args.seed,
        cost: cost_model(config, numerics, args.batch, args.link.0 as f64),
        moe_layers,
        num_experts,
        loads,
    })
}

fn read_plan(path: &Path) -> anyhow::Result<PlanFile> {
    let text = fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
    PlanFile::from_json(&text).with_context(|| format!("{}", path.display()))
}

/// A file is there whole or not at all, so that nobody follows half a plan.
pub(super) fn write_whole(path: &Path, text: &str) -> anyhow::Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    fs::write(&partial, text).with_context(|| format!("{}", Path::new(&partial).display()))?;
    fs::rename(&partial, path).with_context(|| format!("{}", path.display()))
}
