//! `moerun`: one binary for gateway, expert workers and the tools around them. Wiring only.
#![forbid(unsafe_code)]

mod cli;
mod commands;
mod settings;
mod size;
mod stack;

#[cfg(feature = "planted-violations")]
mod planted_experts;

use std::process::ExitCode;

/// Runs the command that this process was started with.
pub fn run() -> ExitCode {
    commands::run(cli::Cli::from_process())
}
