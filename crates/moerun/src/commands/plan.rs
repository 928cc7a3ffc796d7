//! `moerun plan`: who should hold which experts.

mod report;
mod workers;

use std::{
    fs,
    io::{self, Write},
    path::Path,
};

use anyhow::Context;
use moerun_process::{LogFormat, init_telemetry};
use moerun_routing::planner::{CostModel, ExpertLoads, ExpertSize, PlanFile, PlanIdentity, PlanRequest, plan};
use moerun_types::{BlockRange, CombineMode, ModelConfig, Numerics, default_combine_block};
use moerun_weights::{Checkpoint, MemoryNeed, ParameterCounts};

use self::report::Report;
use crate::{cli::PlanArgs, settings::SettingsError};

/// Operations per second of a worker that reads as fast as the mean: what a few cores reach on a small batch.
const OPS_PER_SECOND: f64 = 4e11;
/// Time of one message and its answer on the gateway's thread.
const MESSAGE_SECONDS: f64 = 20e-6;
/// Bytes of an element of a reply, packed: exact mode's fixed point, and f32.
const EXACT_REPLY_BYTES: f64 = 5.5;
const FAST_REPLY_BYTES: f64 = 4.0;

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
        cost: cost_model(args, config, numerics),
        moe_layers,
        num_experts,
        loads,
    })
}

fn expert_size(config: &ModelConfig, numerics: &Numerics) -> ExpertSize {
    let num_blocks = config
        .moe
        .as_ref()
        .map_or(0, |moe| numerics.num_blocks(moe.intermediate));
    let blocks = (1..=num_blocks).map_while(|end| u16::try_from(end).ok());
    let bytes = |end: u16| MemoryNeed::of_slice(config, numerics, BlockRange { first: 0, end });
    ExpertSize::new(blocks.map(bytes).collect())
}

fn cost_model(args: &PlanArgs, config: &ModelConfig, numerics: &Numerics) -> CostModel {
    let hidden = config.hidden;
    let reply = match numerics.combine {
        CombineMode::Exact => EXACT_REPLY_BYTES,
        CombineMode::Fast => FAST_REPLY_BYTES,
    };
    CostModel {
        batch_tokens: args.batch,
        expert_ops: 2.0 * ParameterCounts::of(config).per_expert as f64,
        ops_per_second: OPS_PER_SECOND,
        row_bytes: numerics.format.activations().row_bytes(hidden) as f64 + hidden as f64 * reply,
        link_bytes_per_second: args.link.0 as f64,
        message_seconds: MESSAGE_SECONDS,
    }
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
