//! I6: some seconds after a fault is over, what is asked is answered as before.

use super::{Limits, Verdict};
use crate::{History, Micros, RequestRecord, Window, clock::micros};

/// Least requests in a stretch from which a share can be told.
const LEAST_REQUESTS: usize = 10;

pub(super) fn check(history: &History, limits: &Limits) -> Verdict {
    let mut verdict = Verdict::new("I6", "soon after a fault, what is asked is answered as before");
    if history.faults.is_empty() {
        return verdict;
    }
    let before = Window::of(history, history.run.baseline);
    if before.requests < LEAST_REQUESTS {
        verdict.violated(|| format!("only {} requests before the first fault", before.requests));
        return verdict;
    }
    let quiet = quiet_stretches(history, micros(limits.heals_within));
    for &(from, to) in &quiet {
        // What the next fault met on its way says nothing of the one before.
        let ended = |request: &RequestRecord| to == history.run.end || request.closed < to;
        let after = Window::of_those(history, (from, to), ended);
        if after.requests < LEAST_REQUESTS {
            continue;
        }
        verdict.checked += 1;
        let (was, is) = (before.delivered_share(), after.delivered_share());
        if is < was * limits.healed_share {
            verdict.violated(|| {
                format!(
                    "between {from} and {to} µs {:.1} % of the tokens asked for came, {:.1} % before the faults",
                    is * 100.0,
                    was * 100.0
                )
            });
        }
    }
    if verdict.checked == 0 {
        verdict.violated(|| format!("fewer than {LEAST_REQUESTS} requests in every stretch without faults: {quiet:?}"));
    }
    verdict
}

/// From `heals_within` after faults have ended to the next one or the end of the sending.
fn quiet_stretches(history: &History, heals_within: Micros) -> Vec<(Micros, Micros)> {
    let mut faults: Vec<(Micros, Micros)> = history.faults.iter().map(|fault| (fault.begin, fault.end)).collect();
    faults.sort_unstable();
    let mut quiet = Vec::new();
    let mut broken_until = 0;
    for (index, &(_, end)) in faults.iter().enumerate() {
        broken_until = broken_until.max(end);
        let from = broken_until.saturating_add(heals_within);
        let to = faults.get(index + 1).map_or(history.run.end, |next| next.0);
        if from < to {
            quiet.push((from, to));
        }
    }
    quiet
}
