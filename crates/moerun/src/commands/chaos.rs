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
    if let Some(streams) = args.figures {
        return figures(&runtime, config, streams);
    }
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

/// Prints what single faults cost; what was promised and is not kept makes the command fail only where requests failed or
/// tokens differ, since times are the machine's too.
fn figures(runtime: &tokio::runtime::Runtime, config: ChaosConfig, streams: usize) -> anyhow::Result<Exit> {
    let folder = config.report.clone();
    let figures = runtime.block_on(chaos::figures(config, streams))?;
    let text: String = figures.iter().map(|figure| format!("{figure}\n")).collect();
    std::fs::write(folder.join("figures.txt"), &text).context("figures.txt")?;
    write!(io::stdout(), "{text}")?;
    let sound = figures.iter().all(|figure| figure.failed == 0 && figure.differing == 0);
    Ok(if sound { Exit::Success } else { Exit::Failure })
}
