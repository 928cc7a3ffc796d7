//! One file per command, and what they share: logging, exit codes, the ready line.

mod forward;
mod gateway;
mod generate;
mod inspect;
mod synthesize;
mod worker;

use std::{
    io::{self, Write},
    net::SocketAddr,
    process::ExitCode,
};

use moerun_kernels::Isa;
use moerun_process::{Exit, init_telemetry};

use crate::{
    cli::{Cli, Command},
    settings::{Settings, SettingsError},
};

/// Runs a command; what went wrong is the last line of standard error.
pub(crate) fn run(cli: Cli) -> ExitCode {
    let outcome = Isa::from_env()
        .map_err(anyhow::Error::from)
        .and_then(|_| match &cli.command {
            Command::Serve(args) => gateway::serve(args),
            Command::Gateway(args) => gateway::gateway(args),
            Command::Worker(args) => worker::run(args),
            Command::Generate(args) => generate::run(args),
            Command::Forward(args) => forward::run(args),
            Command::Inspect(args) => inspect::run(args),
            Command::Synthesize(args) => synthesize::run(args),
        });
    match outcome {
        Ok(()) => Exit::Success.into(),
        Err(error) if is_closed_pipe(&error) => Exit::Success.into(),
        Err(error) => {
            eprintln!("error: {error:#}");
            if error.is::<SettingsError>() {
                Exit::Usage.into()
            } else {
                Exit::Failure.into()
            }
        }
    }
}

/// Whoever read our output has seen enough (`moerun generate … | head`).
fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// Starts logging to standard error as the settings say, at `default_level` if they name none.
fn start_logging(settings: &mut Settings, default_level: &str) -> anyhow::Result<()> {
    let level = settings.log_level.get_or_insert_with(|| default_level.to_owned());
    Ok(init_telemetry(settings.log_format, level)?)
}

/// The one line on standard output that tells a parent or an operator where the door is.
fn print_ready(address: SocketAddr) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "ready grpc={address}")?;
    stdout.flush()
}
