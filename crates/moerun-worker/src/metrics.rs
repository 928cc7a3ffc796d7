//! What a worker shows to Prometheus.

use std::{fmt, sync::atomic::Ordering::Relaxed};

use moerun_metrics::{Figures, Kind, Page};
use moerun_proto::v1::ExecuteStatus;

use crate::admin::AdminDoor;

/// What a worker is doing.
#[derive(Debug)]
pub struct WorkerFigures(pub(crate) AdminDoor);

impl Figures for WorkerFigures {
    fn write(&self, page: &mut Page<'_>) -> fmt::Result {
        let AdminDoor {
            loaded,
            shutdown,
            counts,
        } = &self.0;
        let loaded = loaded.get();
        let outstanding = loaded.map_or(0, |it| it.compute.outstanding());
        let held = loaded.map_or(0, |it| it.holdings.now().identity.held.len());
        for (name, help, value) in [
            ("ready", "Whether the experts are loaded", u64::from(loaded.is_some())),
            (
                "draining",
                "Whether new work is refused",
                u64::from(shutdown.is_draining()),
            ),
            ("held_slices", "Slices of experts held", held as u64),
            (
                "streams",
                "Streams of gateways that are open",
                counts.streams.load(Relaxed),
            ),
            (
                "outstanding_requests",
                "Requests queued or being computed",
                outstanding as u64,
            ),
        ] {
            page.figure(Kind::Gauge, name, help, value as f64)?;
        }
        for (name, help, value) in [
            (
                "streams_opened",
                "Streams that gateways opened",
                counts.streams_opened.load(Relaxed),
            ),
            (
                "requests_executed",
                "Requests answered with sums",
                counts.executed.load(Relaxed),
            ),
        ] {
            page.figure(Kind::Counter, name, help, value as f64)?;
        }
        for (name, help, micros) in [
            (
                "queue_seconds",
                "Time that they waited for the computation",
                &counts.queue_micros,
            ),
            (
                "compute_seconds",
                "Time that their computation took",
                &counts.compute_micros,
            ),
        ] {
            page.figure(Kind::Counter, name, help, micros.load(Relaxed) as f64 / 1e6)?;
        }
        let failed = counts.failed.iter().enumerate().filter_map(|(status, count)| {
            let status = ExecuteStatus::try_from(i32::try_from(status).ok()?).ok()?;
            let reason = status
                .as_str_name()
                .trim_start_matches("EXECUTE_STATUS_")
                .to_lowercase();
            (status != ExecuteStatus::Ok).then(|| ([("reason", reason)], count.load(Relaxed) as f64))
        });
        page.family(
            Kind::Counter,
            "requests_failed",
            "Requests answered with a failure",
            failed,
        )
    }
}
