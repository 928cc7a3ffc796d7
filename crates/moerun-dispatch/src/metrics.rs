//! What the dispatch shows to Prometheus: totals, and each worker as this gateway sees it.

use std::{fmt, sync::Arc};

use moerun_metrics::{Figures, Kind, MAX_LABELLED, Page};

use crate::{RemoteExperts, WorkerStats};

/// The workers of a gateway.
#[derive(Debug)]
pub struct DispatchFigures(Arc<RemoteExperts>);

impl DispatchFigures {
    /// Of these experts.
    pub fn new(experts: Arc<RemoteExperts>) -> Self {
        Self(experts)
    }
}

impl Figures for DispatchFigures {
    fn write(&self, page: &mut Page<'_>) -> fmt::Result {
        let stats = self.0.stats();
        let workers = &stats.workers;
        let shown = &workers[..workers.len().min(MAX_LABELLED)];
        for (name, help, value) in [
            ("plan_epoch", "Grows with each change of the workers", stats.plan_epoch),
            ("workers", "Workers that this gateway knows", workers.len() as u64),
            (
                "workers_not_shown",
                "Workers without figures of their own here",
                (workers.len() - shown.len()) as u64,
            ),
        ] {
            page.figure(Kind::Gauge, name, help, value as f64)?;
        }
        for (name, help, value) in [
            ("dispatches", "Layers dispatched", stats.dispatches),
            ("calls", "Messages to workers sent for the first time", stats.calls),
            ("retries", "Messages sent again because a call failed", stats.retries),
            ("retried_rows", "Rows in them", stats.retried_rows),
            (
                "hedges",
                "Messages sent to a second holder because the first took long",
                stats.hedges,
            ),
            ("hedges_won", "Hedges whose answer came first", stats.hedges_won),
            (
                "retry_budget_exhausted",
                "Times that a retry was not allowed by its budget",
                stats.retry_budget_exhausted,
            ),
            (
                "local_assignments",
                "Experts on rows that the gateway computed for want of a holder",
                stats.local_assignments,
            ),
            (
                "skipped_assignments",
                "Experts on rows that were left out for want of a holder",
                stats.skipped_assignments,
            ),
            ("canaries", "Known inputs whose answers were compared", stats.canaries),
            (
                "canary_failures",
                "Known inputs that were answered wrongly",
                stats.canary_failures,
            ),
        ] {
            page.figure(Kind::Counter, name, help, value as f64)?;
        }
        of_each_worker(page, shown)
    }
}

fn of_each_worker(page: &mut Page<'_>, workers: &[WorkerStats]) -> fmt::Result {
    type Value = fn(&WorkerStats) -> f64;
    let figures: [(Kind, &str, &str, Value); 10] = [
        (
            Kind::Gauge,
            "worker_up",
            "Whether there is a connection on which it was admitted",
            |it| f64::from(u8::from(it.down.is_none())),
        ),
        (
            Kind::Gauge,
            "worker_suspect",
            "Whether it owes an overdue answer",
            |it| f64::from(u8::from(it.suspect)),
        ),
        (Kind::Gauge, "worker_ejected", "Whether it is ejected for now", |it| {
            f64::from(u8::from(it.ejected))
        }),
        (
            Kind::Gauge,
            "worker_assignments_in_flight",
            "Experts on rows that it owes",
            |it| it.assignments_in_flight as f64,
        ),
        (
            Kind::Counter,
            "worker_calls",
            "Messages sent to it, hedges and retries included",
            |it| it.calls as f64,
        ),
        (
            Kind::Counter,
            "worker_assignments",
            "Experts on rows that it was asked for",
            |it| it.assignments as f64,
        ),
        (
            Kind::Counter,
            "worker_late_answers",
            "Answers that nobody waited for any more",
            |it| it.late_answers as f64,
        ),
        (Kind::Counter, "worker_ejections", "Times that it was ejected", |it| {
            it.ejections as f64
        }),
        (
            Kind::Counter,
            "worker_suspicions",
            "Times that it became suspect",
            |it| it.suspicions as f64,
        ),
        (
            Kind::Counter,
            "worker_canary_failures",
            "Known inputs that it answered wrongly",
            |it| it.canary_failures as f64,
        ),
    ];
    for (kind, name, help, value) in figures {
        let values = workers.iter().map(|it| ([("worker", it.address.as_str())], value(it)));
        page.family(kind, name, help, values)?;
    }
    let failures = workers.iter().flat_map(|it| {
        let labels = |reason: &'static str| [("worker", it.address.as_str()), ("reason", reason)];
        it.failures
            .iter()
            .map(move |(reason, count)| (labels(reason.name()), *count as f64))
    });
    page.family(
        Kind::Counter,
        "worker_call_failures",
        "Calls that failed, by reason",
        failures,
    )?;
    let latencies = workers.iter().map(|it| {
        let labels = [("worker", it.address.as_str())];
        (labels, it.latency.sum.as_secs_f64(), it.latency.buckets.clone())
    });
    let help = "From when a call was sent, or the worker last answered, to its answer";
    page.histograms("worker_call_seconds", help, latencies)
}
