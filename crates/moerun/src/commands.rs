//! One file per command, and what they share: logging, exit codes, the ready line.

mod admin;
mod bench;
mod certs;
mod chaos;
mod convert;
mod doctor;
mod forward;
mod gateway;
mod generate;
mod health;
mod inspect;
mod key;
mod plan;
mod synthesize;
mod table;
mod worker;
mod writing;

use std::{
    fmt::Display,
    io::{self, Write},
    net::SocketAddr,
    process::ExitCode,
};

use anyhow::Context;
use moerun_kernels::{Isa, IsaError, keep_freed_memory};
use moerun_metrics::MetricsDoor;
use moerun_process::{Exit, Shutdown, Supervision, TelemetryError, init_telemetry};
use moerun_transport::TransportError;
use moerun_worker::WorkerError;

use crate::{
    cli::{Cli, Command},
    settings::{Settings, SettingsError},
};

/// Runs a command; what went wrong is the last line of standard error.
pub(crate) fn run(cli: Cli) -> ExitCode {
    keep_freed_memory();
    let done = |outcome: anyhow::Result<()>| outcome.map(|()| Exit::Success);
    let outcome = Isa::from_env()
        .map_err(anyhow::Error::from)
        .and_then(|_| match &cli.command {
            Command::Serve(args) => gateway::serve(args),
            Command::Gateway(args) => gateway::gateway(args),
            Command::Worker(args) => worker::run(args),
            Command::Status(args) => done(admin::status(args)),
            Command::Drain(args) => done(admin::drain(args)),
            Command::Resume(args) => done(admin::resume(args)),
            Command::Rebalance(args) => done(admin::rebalance(args)),
            Command::Health(args) => done(health::run(args)),
            Command::Doctor(args) => doctor::run(args),
            Command::Generate(args) => done(generate::run(args)),
            Command::Forward(args) => done(forward::run(args)),
            Command::Inspect(args) => done(inspect::run(args)),
            Command::Plan(args) => done(plan::run(args)),
            Command::Convert(args) => done(convert::run(args)),
            Command::Synthesize(args) => done(synthesize::run(args)),
            Command::Bench(args) => done(bench::run(args)),
            Command::Certs(args) => done(certs::run(args)),
            Command::Key(args) => done(key::run(args)),
            Command::Chaos(args) => chaos::run(args),
        });
    let exit = match outcome {
        Ok(exit) => exit,
        Err(error) if is_closed_pipe(&error) => Exit::Success,
        Err(error) => {
            let _ = writeln!(io::stderr(), "error: {}", one_line(&error)); // nobody can be told: the code says it too
            if is_usage(&error) { Exit::Usage } else { Exit::Failure }
        }
    };
    exit.into()
}

/// Settings that make no sense, wherever they were found out.
fn is_usage(error: &anyhow::Error) -> bool {
    let worker = error.downcast_ref::<WorkerError>();
    error.is::<SettingsError>()
        || error.is::<TelemetryError>()
        || error.is::<IsaError>()
        || matches!(worker, Some(WorkerError::Numerics(_)))
        || matches!(worker, Some(WorkerError::Transport(error)) if error.is_usage())
        || error
            .downcast_ref::<TransportError>()
            .is_some_and(TransportError::is_usage)
}

/// An error and its causes. A cause that the message before it repeats at its end is not said twice.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !line.ends_with(&cause) {
            line.push_str(": ");
            line.push_str(&cause);
        }
    }
    line
}

/// Whoever read our output has seen enough (`moerun generate … | head`).
fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// Starts logging to standard error as the settings say, else as `default_filter` does; the settings say so afterwards.
fn start_logging(settings: &mut Settings, default_filter: &str) -> Result<(), TelemetryError> {
    let filter = init_telemetry(settings.log_format, settings.log_level.as_deref(), default_filter)?;
    settings.log_level = Some(filter);
    Ok(())
}

/// Says so where plaintext may leave this host.
fn warn_of_plaintext(between: &str, plaintext: bool) {
    if plaintext {
        tracing::warn!("--insecure: what {between} send and get is neither encrypted nor protected from change");
    }
}

/// The one line on standard output that tells a parent or an operator where the doors are.
fn print_ready(address: impl Display, health: Option<SocketAddr>) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    write!(stdout, "ready grpc={address}")?;
    if let Some(health) = health {
        write!(stdout, " health={health}")?;
    }
    writeln!(stdout)?;
    stdout.flush()
}

/// The door for Prometheus, if one is wanted.
fn metrics_door(settings: &Settings, role: &'static str) -> anyhow::Result<Option<MetricsDoor>> {
    let Some(address) = &settings.metrics_addr else {
        return Ok(None);
    };
    let door = MetricsDoor::open(address, role, env!("CARGO_PKG_VERSION"))
        .with_context(|| format!("metrics_addr: cannot listen on {address}"))?;
    tracing::info!(address = %door.address(), "metrics");
    Ok(Some(door))
}

/// What supervisors are told of this process, from now on.
fn supervise(settings: &Settings, shutdown: &Shutdown) -> anyhow::Result<Supervision> {
    let address = settings.health_addr.as_deref();
    Supervision::start(address, shutdown).with_context(|| match address {
        Some(address) => format!("health_addr: cannot listen on {address}"),
        None => "health thread".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_each_cause_once() {
        let missing = || io::Error::new(io::ErrorKind::NotFound, "no such file");
        let error = anyhow::Error::from(missing())
            .context("a.toml: no such file")
            .context("settings");
        assert_eq!(one_line(&error), "settings: a.toml: no such file");
        assert_eq!(
            one_line(&anyhow::Error::from(missing()).context("a.toml")),
            "a.toml: no such file"
        );
    }
}
