//! I3: what a process took for the load it has given back.

use super::{Limits, Verdict};
use crate::{History, Phase, Sample};

/// Figures that count what is under way.
pub(crate) const UNDER_WAY: [&str; 5] = [
    "answers_under_way",
    "running_requests",
    "waiting_requests",
    "kv_pages_used",
    "outstanding_requests",
];

/// Figures that must be what they were, but for a few.
const MUST_RETURN: [&str; 2] = ["open_files", "async_tasks"];

pub(super) fn check(history: &History, limits: &Limits) -> Verdict {
    let mut verdict = Verdict::new("I3", "what was taken for the load has been given back");
    let of = |phase: Phase| history.samples.iter().filter(move |sample| sample.phase == phase);
    for sample in of(Phase::Final) {
        verdict.checked += 1;
        let Sample { process, figures, .. } = sample;
        for name in UNDER_WAY {
            if let Some(&left) = figures.get(name).filter(|&&left| left > 0) {
                verdict.violated(|| format!("{process}: {name}: wanted 0 after the load, found {left}"));
            }
        }
        // A process that was started anew has no past to compare with.
        let Some(before) = of(Phase::Baseline).find(|it| it.process == *process && it.pid == sample.pid) else {
            continue;
        };
        for name in MUST_RETURN {
            if let (Some(&was), Some(&is)) = (before.figures.get(name), figures.get(name))
                && is > was + limits.left_over
            {
                verdict.violated(|| format!("{process}: {name}: {was} before the load, {is} after it"));
            }
        }
        // Memory is compared with the most of the undisturbed load: the first requests fill buffers that stay.
        let undisturbed = history
            .samples
            .iter()
            .filter(|it| it.process == *process && it.pid == sample.pid && it.at <= history.run.baseline.1);
        let bytes = |sample: &Sample| sample.figures.get("resident_bytes").copied();
        if let (Some(was), Some(is)) = (undisturbed.filter_map(bytes).max(), bytes(sample)) {
            let growth = ((was as f64 * limits.memory_growth_share) as u64).max(limits.memory_growth_bytes);
            if is > was.saturating_add(growth) {
                verdict.violated(|| format!("{process}: resident bytes: {was} before the faults, {is} after the load"));
            }
        }
    }
    let expected = of(Phase::Baseline).map(|sample| &sample.process);
    for process in expected {
        if !of(Phase::Final).any(|sample| sample.process == *process) {
            verdict.violated(|| format!("{process}: no figures after the load"));
        }
    }
    verdict
}
