//! I4: no panic, caught or not.

use super::Verdict;
use crate::History;

/// What the standard library writes before a panic's place.
const PANICKED: &str = "panicked at ";

pub(super) fn check(history: &History) -> Verdict {
    let mut verdict = Verdict::new("I4", "no panic, caught or not");
    for log in &history.logs {
        verdict.checked += 1;
        if log.line.contains(PANICKED) {
            verdict.violated(|| format!("{} at {} µs: {}", log.process, log.at, log.line));
        }
    }
    let mut told: Vec<(&str, u32)> = Vec::new();
    for sample in &history.samples {
        verdict.checked += 1;
        let panics = sample.figures.get("panics").copied().unwrap_or(0);
        if panics > 0 && !told.contains(&(&sample.process, sample.pid)) {
            told.push((&sample.process, sample.pid));
            verdict.violated(|| format!("{} counts {panics} panics at {} µs", sample.process, sample.at));
        }
    }
    verdict
}
