//! What a chaos run found, for programs (`report.json`) and people (`report.md`).

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::{BufWriter, Write as _},
    path::Path,
};

use serde_json::{Value, json};

use super::ChaosConfig;
use crate::{History, Limits, LoadError, RunFigures, Verdict, Window, clock::micros};

/// What a chaos run found.
#[derive(Debug, Clone)]
pub struct Report {
    /// How the run can be made again.
    pub replay: String,
    /// What became of each invariant.
    pub verdicts: Vec<Verdict>,
    /// Figures of the whole run.
    pub figures: RunFigures,
    /// Before the first fault.
    pub before: Window,
    /// From the first fault to the end of the last.
    pub during: Window,
    /// From when everything must have healed to the end of the sending.
    pub after: Window,
    /// Faults that met live traffic, and all.
    pub faults: (usize, usize),
}

impl Report {
    pub(super) fn new(config: &ChaosConfig, history: &History, verdicts: Vec<Verdict>) -> Self {
        let first = history
            .faults
            .iter()
            .map(|fault| fault.begin)
            .min()
            .unwrap_or(history.run.baseline.1);
        let last = history.faults.iter().map(|fault| fault.end).max().unwrap_or(first);
        let healed = last.saturating_add(micros(Limits::default().heals_within));
        Self {
            replay: replay(config),
            verdicts,
            figures: RunFigures::of(history),
            before: Window::of(history, history.run.baseline),
            during: Window::of(history, (first, last)),
            after: Window::of(history, (healed, history.run.end)),
            faults: (
                history.faults.iter().filter(|fault| fault.hit()).count(),
                history.faults.len(),
            ),
        }
    }

    /// Whether every invariant holds.
    pub fn holds(&self) -> bool {
        self.verdicts.iter().all(Verdict::holds)
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let verdict = |verdict: &Verdict| {
            json!({
                "invariant": verdict.invariant,
                "says": verdict.says,
                "holds": verdict.holds(),
                "checked": verdict.checked,
                "count": verdict.count,
                "violations": verdict.violations,
            })
        };
        json!({
            "holds": self.holds(),
            "replay": self.replay,
            "verdicts": self.verdicts.iter().map(verdict).collect::<Vec<_>>(),
            "figures": self.figures,
            "before": self.before,
            "during": self.during,
            "after": self.after,
            "faults": { "hit": self.faults.0, "all": self.faults.1 },
        })
    }

    /// Writes both forms, and the log of each process.
    pub(super) fn write(&self, folder: &Path, history: &History) -> Result<(), LoadError> {
        let write = |name: &str, text: String| {
            let path = folder.join(name);
            fs::write(&path, text).map_err(LoadError::file(path))
        };
        write("report.json", format!("{:#}\n", self.json()))?;
        write("report.md", self.markdown(history))?;
        let path = folder.join("logs.txt");
        let logs = || {
            let mut file = BufWriter::new(File::create(&path)?);
            for log in &history.logs {
                writeln!(file, "{:>11.6} {} {}", log.at as f64 / 1e6, log.process, log.line)?;
            }
            file.flush()
        };
        logs().map_err(LoadError::file(path.clone()))
    }

    fn markdown(&self, history: &History) -> String {
        let mut text = format!("# Chaos\n\n`{}`\n\n", self.replay);
        // Writing to a string does not fail.
        for verdict in &self.verdicts {
            let mark = if verdict.holds() { "holds" } else { "VIOLATED" };
            let _ = writeln!(
                text,
                "- **{} {mark}**: {}; {} checked",
                verdict.invariant, verdict.says, verdict.checked
            );
            for violation in &verdict.violations {
                let _ = writeln!(text, "  - {violation}");
            }
        }
        let _ = writeln!(
            text,
            "\n| stretch | s | requests | finished | tokens/s | share delivered |"
        );
        let _ = writeln!(text, "| --- | --- | --- | --- | --- | --- |");
        for (name, window) in [
            ("before", &self.before),
            ("during", &self.during),
            ("after", &self.after),
        ] {
            let _ = writeln!(
                text,
                "| {name} | {:.1} | {} | {} | {:.1} | {:.4} |",
                window.seconds,
                window.requests,
                window.finished,
                window.tokens_per_second,
                window.delivered_share()
            );
        }
        let figures = &self.figures;
        let _ = writeln!(
            text,
            "\nLongest gap between two tokens of one answer: {:.1} ms (request {}); p99 {:.1} ms, median {:.2} ms. Requests \
             with another token than the undisturbed run: {}. Send lag p99 {:.2} ms.\n",
            figures.gaps.longest_ms,
            figures.gaps.longest_in_request,
            figures.gaps.all.p99_ms,
            figures.gaps.all.p50_ms,
            figures.differing,
            figures.send_lag.p99_ms
        );
        for (how, count) in &figures.ended_otherwise {
            let _ = writeln!(text, "- {count} requests ended otherwise: {how}");
        }
        let _ = writeln!(
            text,
            "\n| fault | from s | to s | met live traffic: counter, before, after |"
        );
        let _ = writeln!(text, "| --- | --- | --- | --- |");
        for fault in &history.faults {
            let evidence: Vec<String> = fault
                .evidence
                .iter()
                .map(|it| format!("{} {} {}", it.counter, it.before, it.after))
                .collect();
            let _ = writeln!(
                text,
                "| {} {} | {:.3} | {:.3} | {}: {} |",
                fault.action,
                fault.target,
                fault.begin as f64 / 1e6,
                fault.end as f64 / 1e6,
                if fault.hit() { "yes" } else { "no" },
                evidence.join("; ")
            );
        }
        text.push_str(
            "\nBeside this file: `report.json`, `history.jsonl` with every token and its time, `logs.txt`.\n",
        );
        text
    }
}

fn replay(config: &ChaosConfig) -> String {
    let faults: Vec<String> = config.faults.iter().map(ToString::to_string).collect();
    format!(
        "moerun chaos --model {} --workers {} --holders {} --duration {} --rate {} --max-tokens {} --seed {} --faults {}",
        config.model.display(),
        config.workers,
        config.holders,
        config.duration.as_secs(),
        config.rate,
        config.max_tokens,
        config.seed,
        faults.join(",")
    )
}
