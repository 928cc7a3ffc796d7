//! `moerun convert`: a checkpoint packed once, for every start after.

use std::io::{self, Write};

use moerun_gateway::gguf_text_files;
use moerun_process::{LogFormat, WARNINGS_AND_PROGRESS, init_telemetry};
use moerun_weights::{Checkpoint, ConvertRequest, Needs, convert};

use super::writing::{WritingProgress, interrupted_by_signals};
use crate::{cli::ConvertArgs, size::ByteSize};

/// Runs the command.
pub(crate) fn run(args: &ConvertArgs) -> anyhow::Result<()> {
    init_telemetry(LogFormat::Text, None, WARNINGS_AND_PROGRESS)?;
    let source = Checkpoint::open(&args.model, Needs::All)?;
    let files = if args.model.is_file() {
        gguf_text_files(&args.model)?
    } else {
        Vec::new()
    };
    let interrupted = interrupted_by_signals()?;
    let writing = WritingProgress::new(&args.out);
    let report = convert(&ConvertRequest {
        files: &files,
        progress: Some(&|written_bytes, total_bytes| writing.update(written_bytes, total_bytes)),
        interrupted: Some(&interrupted),
        ..ConvertRequest::new(
            &source,
            args.weights.unwrap_or_else(|| source.default_format()),
            &args.out,
        )
    })?;
    writing.finish();
    writeln!(
        io::stdout(),
        "{}: {} tensors packed in {}, {} in {} file(s)",
        report.dir.display(),
        report.tensors,
        report.format,
        ByteSize(report.weight_bytes),
        report.shards,
    )?;
    Ok(())
}
