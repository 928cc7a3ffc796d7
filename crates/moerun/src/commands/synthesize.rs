//! `moerun synthesize`: a random-weight checkpoint of a real shape.

use std::io::{self, Write};

use anyhow::{Context, bail};
use moerun_process::{LogFormat, WARNINGS_AND_PROGRESS, init_telemetry};
use moerun_weights::{DEFAULT_SHARD_BYTES, SHAPES, Shape, SynthesizeRequest, synthesize};

use super::writing::{WritingProgress, interrupted_by_signals};
use crate::{cli::SynthesizeArgs, size::ByteSize};

/// Runs the command.
pub(crate) fn run(args: &SynthesizeArgs) -> anyhow::Result<()> {
    init_telemetry(LogFormat::Text, None, WARNINGS_AND_PROGRESS)?;
    if args.list {
        for shape in SHAPES {
            writeln!(io::stdout(), "{}", shape.name)?;
        }
        return Ok(());
    }
    let config_json = match (&args.shape, &args.config) {
        (Some(name), _) => shape(name)?.config_json.to_owned(),
        (None, Some(path)) => std::fs::read_to_string(path).with_context(|| format!("{}", path.display()))?,
        (None, None) => bail!("wanted --shape NAME or --config FILE"),
    };
    let out = args.out.as_deref().context("wanted --out DIR")?;
    let interrupted = interrupted_by_signals()?;
    let writing = WritingProgress::new(out);
    let report = synthesize(&SynthesizeRequest {
        config_json: &config_json,
        layers: args.layers,
        seed: args.seed,
        dtype: args.weights,
        out,
        max_shard_bytes: DEFAULT_SHARD_BYTES,
        progress: Some(&|progress| writing.update(progress.written_bytes, progress.total_bytes)),
        interrupted: Some(&interrupted),
    })?;
    writing.finish();
    writeln!(
        io::stdout(),
        "{}: {} layers, {} tensors, {:.2} billion parameters, {} in {} file(s)",
        report.dir.display(),
        report.layers,
        report.tensors,
        report.parameters as f64 / 1e9,
        ByteSize(report.weight_bytes),
        report.shards,
    )?;
    Ok(())
}

fn shape(name: &str) -> anyhow::Result<&'static Shape> {
    Shape::by_name(name).with_context(|| format!("--shape: unknown shape {name:?}"))
}
