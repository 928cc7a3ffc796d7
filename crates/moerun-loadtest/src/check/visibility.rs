//! I5: whoever looks at figures or logs sees the fault soon.

use super::Verdict;
use crate::{FaultRecord, History, Micros};

pub(super) fn check(history: &History, within: Micros) -> Verdict {
    let mut verdict = Verdict::new("I5", "a fault shows in figures and in a log line soon");
    for fault in history.faults.iter().filter(|fault| fault.hit() && fault.must_show) {
        verdict.checked += 1;
        let FaultRecord { id, action, target, .. } = fault;
        let until = fault.begin.saturating_add(within);
        if !shows_in_figures(history, fault, until) {
            verdict.violated(|| format!("fault {id}, {action} {target}: no figure shows it within {within} µs"));
        }
        if !shows_in_logs(history, fault, until) {
            verdict.violated(|| format!("fault {id}, {action} {target}: no log line names it within {within} µs"));
        }
    }
    verdict
}

/// A gateway says that a link to it is down, or counts more troubles with it than before.
fn shows_in_figures(history: &History, fault: &FaultRecord, until: Micros) -> bool {
    let in_time = |at: Micros| (fault.begin..=until).contains(&at);
    fault.names.iter().any(|name| {
        let troubles = |wanted: &dyn Fn(Micros) -> bool| {
            let seen = history.samples.iter().filter(|sample| wanted(sample.at));
            seen.filter_map(|sample| sample.troubles.get(name)).copied().max()
        };
        let down = history
            .samples
            .iter()
            .any(|sample| in_time(sample.at) && sample.links.get(name) == Some(&false));
        let before = troubles(&|at| at < fault.begin).unwrap_or(0);
        down || troubles(&in_time).is_some_and(|count| count > before)
    })
}

/// Another process than the target itself names it.
fn shows_in_logs(history: &History, fault: &FaultRecord, until: Micros) -> bool {
    history.logs.iter().any(|log| {
        (fault.begin..=until).contains(&log.at)
            && log.process != fault.target
            && fault.names.iter().any(|name| log.line.contains(name))
    })
}
