//! What has happened so far, as plain numbers: [`DispatchStats`].

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

/// Why a call to a worker failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FailureReason {
    /// The connection ended before the answer.
    ConnectionLost,
    /// It was given up as overdue.
    Overdue,
    /// Another holder, asked later, answered earlier.
    LostToHedge,
    /// The worker's queue was full, or that of its connection.
    Overloaded,
    /// The worker is stopping.
    Draining,
    /// Something that should not happen, in the worker.
    Internal,
    /// The worker does not hold what it said it holds.
    NotHeld,
    /// A term was not finite or too large for the exact combine.
    TermOutOfRange,
    /// The request arrived corrupted.
    CorruptedRequest,
    /// The answer's checksum does not fit.
    CorruptedAnswer,
    /// The answer cannot be what it says it is.
    Malformed,
    /// The worker says that the request does not fit its model.
    Invalid,
}

impl FailureReason {
    /// All of them.
    pub const ALL: [FailureReason; 12] = [
        FailureReason::ConnectionLost,
        FailureReason::Overdue,
        FailureReason::LostToHedge,
        FailureReason::Overloaded,
        FailureReason::Draining,
        FailureReason::Internal,
        FailureReason::NotHeld,
        FailureReason::TermOutOfRange,
        FailureReason::CorruptedRequest,
        FailureReason::CorruptedAnswer,
        FailureReason::Malformed,
        FailureReason::Invalid,
    ];

    /// Whether it tells something about the worker; else it may be the rows' own fault, and they must not get a worker
    /// ejected.
    pub(crate) fn is_the_workers(self) -> bool {
        !matches!(self, FailureReason::TermOutOfRange | FailureReason::Invalid)
    }

    /// Whether it never happens while all is well, load and slowness included: whoever reads logs is to know at once.
    pub(crate) fn is_alarming(self) -> bool {
        matches!(
            self,
            FailureReason::Internal
                | FailureReason::NotHeld
                | FailureReason::CorruptedRequest
                | FailureReason::CorruptedAnswer
                | FailureReason::Malformed
                | FailureReason::Invalid
        )
    }

    /// In snake case, as metrics and logs name it.
    pub fn name(self) -> &'static str {
        match self {
            FailureReason::ConnectionLost => "connection_lost",
            FailureReason::Overdue => "overdue",
            FailureReason::LostToHedge => "lost_to_hedge",
            FailureReason::Overloaded => "overloaded",
            FailureReason::Draining => "draining",
            FailureReason::Internal => "internal",
            FailureReason::NotHeld => "not_held",
            FailureReason::TermOutOfRange => "term_out_of_range",
            FailureReason::CorruptedRequest => "corrupted_request",
            FailureReason::CorruptedAnswer => "corrupted_answer",
            FailureReason::Malformed => "malformed",
            FailureReason::Invalid => "invalid",
        }
    }
}

/// Counters of everything since the start, and gauges of now.
#[derive(Debug, Clone, PartialEq)]
pub struct DispatchStats {
    /// Of the plan that new dispatches take; it grows with each change of the members.
    pub plan_epoch: u64,
    /// Each worker, in the order given.
    pub workers: Vec<WorkerStats>,
    /// Layers dispatched.
    pub dispatches: u64,
    /// Messages sent for the first time.
    pub calls: u64,
    /// Messages sent again because a call failed.
    pub retries: u64,
    /// Rows in them.
    pub retried_rows: u64,
    /// Messages sent to a second holder because the first took long.
    pub hedges: u64,
    /// Hedges whose answer came first.
    pub hedges_won: u64,
    /// Times that a retry was not allowed by its budget.
    pub retry_budget_exhausted: u64,
    /// Experts on rows that this process computed for want of a holder.
    pub local_assignments: u64,
    /// Experts on rows that were left out for want of a holder.
    pub skipped_assignments: u64,
    /// Known inputs whose answers were compared.
    pub canaries: u64,
    /// Those whose answers were wrong.
    pub canary_failures: u64,
}

/// One worker.
#[derive(Debug, Clone, PartialEq)]
pub struct WorkerStats {
    /// Its address.
    pub address: String,
    /// Why it is down, if it is.
    pub down: Option<String>,
    /// Whether it owes an overdue answer.
    pub suspect: bool,
    /// Whether it is ejected for now.
    pub ejected: bool,
    /// Messages sent to it, hedges and retries included.
    pub calls: u64,
    /// Experts on rows in them.
    pub assignments: u64,
    /// How long calls took that were answered well.
    pub latency: LatencyHistogram,
    /// Calls that failed, by reason; those without any are left out.
    pub failures: Vec<(FailureReason, u64)>,
    /// Answers that nobody waited for any more.
    pub late_answers: u64,
    /// Times it was ejected.
    pub ejections: u64,
    /// Times it became suspect.
    pub suspicions: u64,
    /// Times its connection ended.
    pub disconnections: u64,
    /// Known inputs that it answered wrongly.
    pub canary_failures: u64,
    /// Experts on rows that it was asked for and has not answered.
    pub assignments_in_flight: u64,
    /// Average latency of small calls (up to 16 assignments), rising at once and falling slowly.
    pub ewma: Option<Duration>,
    /// Median of the latest small calls.
    pub p50: Option<Duration>,
    /// 95th percentile of the latest small calls.
    pub p95: Option<Duration>,
}

impl WorkerStats {
    /// Calls that failed for `reason`.
    pub fn failures_by(&self, reason: FailureReason) -> u64 {
        self.failures
            .iter()
            .find(|(other, _)| *other == reason)
            .map_or(0, |&(_, count)| count)
    }
}

/// Upper bounds of a histogram's buckets, in seconds; what takes longer is in a last one.
const LATENCY_BOUNDS: [f64; 12] = [
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.0,
];

/// How long calls took.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LatencyHistogram {
    /// Of all together.
    pub sum: Duration,
    /// Upper bounds in seconds, the last one infinite, and how many took at most so long and longer than the bound before.
    pub buckets: Vec<(f64, u64)>,
}

/// How long calls took, as it is counted.
#[derive(Debug, Default)]
pub(crate) struct LatencyCounts {
    nanos: AtomicU64,
    buckets: [Counter; LATENCY_BOUNDS.len() + 1],
}

impl LatencyCounts {
    pub(crate) fn add(&self, took: Duration) {
        self.nanos
            .fetch_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX), Relaxed);
        let seconds = took.as_secs_f64();
        self.buckets[LATENCY_BOUNDS.partition_point(|&bound| bound < seconds)].add(1);
    }

    pub(crate) fn get(&self) -> LatencyHistogram {
        let bounds = LATENCY_BOUNDS.into_iter().chain([f64::INFINITY]);
        LatencyHistogram {
            sum: Duration::from_nanos(self.nanos.load(Relaxed)),
            buckets: bounds.zip(self.buckets.iter().map(Counter::get)).collect(),
        }
    }
}

/// A number that only grows.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, count: usize) {
        self.0.fetch_add(count as u64, Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// Counters of all dispatches together.
#[derive(Debug, Default)]
pub(crate) struct Totals {
    pub(crate) dispatches: Counter,
    pub(crate) calls: Counter,
    pub(crate) retries: Counter,
    pub(crate) retried_rows: Counter,
    pub(crate) hedges: Counter,
    pub(crate) hedges_won: Counter,
    pub(crate) retry_budget_exhausted: Counter,
    pub(crate) local_assignments: Counter,
    pub(crate) skipped_assignments: Counter,
    pub(crate) canaries: Counter,
    pub(crate) canary_failures: Counter,
}

/// Counters of one worker.
#[derive(Debug, Default)]
pub(crate) struct WorkerCounters {
    pub(crate) calls: Counter,
    pub(crate) assignments: Counter,
    pub(crate) latency: LatencyCounts,
    pub(crate) failures: [Counter; FailureReason::ALL.len()],
    pub(crate) late_answers: Counter,
    pub(crate) ejections: Counter,
    pub(crate) suspicions: Counter,
    pub(crate) disconnections: Counter,
    pub(crate) canary_failures: Counter,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_in_the_first_bucket_whose_bound_it_does_not_exceed() {
        let counts = LatencyCounts::default();
        for micros in [1, 100, 101, 2_000_000, 2_000_001] {
            counts.add(Duration::from_micros(micros));
        }
        let histogram = counts.get();
        let filled: Vec<(f64, u64)> = histogram.buckets.iter().copied().filter(|it| it.1 > 0).collect();
        assert_eq!(filled, [(0.0001, 2), (0.00025, 1), (2.0, 1), (f64::INFINITY, 1)]);
        assert_eq!(histogram.sum, Duration::from_micros(4_000_203));
    }
}
