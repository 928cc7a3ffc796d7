//! `moerun chaos`: breaks workers of its own beside a load, and judges what came of it.

use std::{
    io::{self, Write},
    time::Duration,
};

use anyhow::Context;
use moerun_loadtest::chaos::{self, ChaosConfig};
use moerun_process::{Exit, LogFormat, init_telemetry};

use crate::{cli::ChaosArgs, settings::SettingsError};

/// Runs the command; an invariant that does not hold makes it fail.
pub(crate) fn run(args: &ChaosArgs) -> anyhow::Result<Exit> {
    init_telemetry(LogFormat::Text, None, "warn")?;
    let program = std::env::current_exe().context("the path of this binary")?;
    let config = ChaosConfig {
        workers: args.workers,
        holders: args.holders,
        duration: Duration::from_secs(args.duration),
        rate: args.rate,
        max_tokens: args.max_tokens,
        seed: args.seed,
        faults: chaos::parse_faults(&args.faults).map_err(|error| SettingsError(format!("faults: {error}")))?,
        ..ChaosConfig::new(program, &args.model, &args.report)
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("async runtime")?;
    let report = runtime.block_on(chaos::run(config))?;
    let mut stdout = io::stdout().lock();
    for verdict in &report.verdicts {
        writeln!(stdout, "{verdict}")?;
    }
    let (hit, all) = report.faults;
    writeln!(
        stdout,
        "{} requests, {} finished, {} with another token; {hit} of {all} faults met traffic; longest gap {:.0} ms; \
         tokens/s {:.1} before, {:.1} during, {:.1} after",
        report.figures.requests,
        report.figures.finished,
        report.figures.differing,
        report.figures.gaps.longest_ms,
        report.before.tokens_per_second,
        report.during.tokens_per_second,
        report.after.tokens_per_second,
    )?;
    writeln!(stdout, "again: {}", report.replay)?;
    Ok(if report.holds() { Exit::Success } else { Exit::Failure })
}
