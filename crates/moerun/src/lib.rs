//! `moerun`: one binary for gateway, expert workers and the tools around them. Wiring only.
#![forbid(unsafe_code)]

mod cli;
mod commands;
mod settings;
mod size;
mod stack;

#[cfg(feature = "planted-violations")]
mod planted_experts;

use std::{path::Path, process::ExitCode};

/// Runs the command that this process was started with.
pub fn run() -> ExitCode {
    commands::run(cli::Cli::from_process())
}

/// Whether a file can be given as `--config`, with no setting beside it; an error says what is wrong with it.
pub fn check_config_file(file: &Path) -> Result<(), String> {
    settings::check_file(file).map_err(|error| error.to_string())
}
