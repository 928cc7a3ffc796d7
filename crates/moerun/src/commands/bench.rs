//! `moerun bench`: what a model, its kernels and a hop reach, beside what the machine can do.

mod counted_experts;
mod experts;
mod hop;
mod machine;
mod model;
mod pin;
mod plan;
mod random;
mod spread;

use std::io::{self, Write};

use moerun_kernels::Isa;
use serde_json::{Value, json};

use crate::cli::{BenchArgs, BenchPart};

/// Runs the command.
pub(crate) fn run(args: &BenchArgs) -> anyhow::Result<()> {
    match &args.part {
        None => model::run(&args.model),
        Some(BenchPart::Kernels(args)) => experts::run(args),
        Some(BenchPart::Hop(args)) => hop::run(args),
        Some(BenchPart::Plan(args)) => plan::run(args),
    }
}

/// What every report begins with.
fn header(threads: usize) -> serde_json::Map<String, Value> {
    let header = json!({
        "moerun": env!("CARGO_PKG_VERSION"),
        "isa": Isa::current().to_string(),
        "threads": threads,
    });
    match header {
        Value::Object(header) => header,
        _ => unreachable!("an object was written above"),
    }
}

fn print_json(report: serde_json::Map<String, Value>) -> io::Result<()> {
    writeln!(io::stdout().lock(), "{:#}", Value::Object(report))
}
