//! I5: whoever looks at figures or logs sees the fault soon.

use super::Verdict;
use crate::{FaultRecord, History, Micros, Sample};

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

/// A gateway says that a link to it is down, or a process counts more troubles with it than when it was last asked before:
/// a process that was started anew counts from the beginning.
fn shows_in_figures(history: &History, fault: &FaultRecord, until: Micros) -> bool {
    let in_time = |at: Micros| (fault.begin..=until).contains(&at);
    fault.names.iter().any(|name| {
        let troubles = |sample: &Sample| Some((sample.at, *sample.troubles.get(name)?));
        let counted = || history.samples.iter().filter_map(troubles);
        let before = counted()
            .filter(|&(at, _)| at < fault.begin)
            .max()
            .map_or(0, |(_, count)| count);
        let more = counted().any(|(at, count)| in_time(at) && count > before);
        let down = |sample: &Sample| in_time(sample.at) && sample.links.get(name) == Some(&false);
        more || history.samples.iter().any(down)
    })
}

/// Another process than the target itself names it in a warning or an error: that it is connected, say, tells nobody of a
/// fault.
fn shows_in_logs(history: &History, fault: &FaultRecord, until: Micros) -> bool {
    history.logs.iter().any(|log| {
        (fault.begin..=until).contains(&log.at)
            && log.process != fault.target
            && (log.line.contains("WARN") || log.line.contains("ERROR"))
            && fault.names.iter().any(|name| log.line.contains(name))
    })
}
