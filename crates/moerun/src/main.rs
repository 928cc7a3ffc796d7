//! `moerun`: one binary for gateway, expert workers and the tools around them. Wiring only.
#![forbid(unsafe_code)]

mod cli;
mod commands;
mod formats;
mod settings;
mod size;
mod stack;

use std::process::ExitCode;

fn main() -> ExitCode {
    commands::run(cli::Cli::from_process())
}
