//! What every process tells.

use std::fmt;

use moerun_process::OwnFigures;

use crate::{Figures, Kind, Page};

/// This process.
#[derive(Debug)]
pub(crate) struct ThisProcess {
    /// `gateway` or `worker`.
    pub(crate) role: &'static str,
    /// Version of the binary.
    pub(crate) version: &'static str,
}

impl Figures for ThisProcess {
    fn write(&self, page: &mut Page<'_>) -> fmt::Result {
        let own = OwnFigures::now();
        let labels = [("role", self.role), ("version", self.version)];
        page.family(Kind::Gauge, "build", "What runs: always 1", [(labels, 1.0)])?;
        for (name, help, value) in [
            ("process_resident_bytes", "Resident memory", own.resident_bytes),
            ("process_open_files", "Open file descriptors", own.open_files),
            ("process_threads", "Threads of the operating system", own.threads),
        ] {
            page.figure(Kind::Gauge, name, help, value as f64)?;
        }
        let uptime = own.uptime.as_secs_f64();
        page.figure(
            Kind::Gauge,
            "process_uptime_seconds",
            "Since the process started",
            uptime,
        )?;
        let panics = own.panics as f64;
        page.figure(Kind::Counter, "process_panics", "Panics, caught or not", panics)?;
        let dropped = own.dropped_log_lines as f64;
        page.figure(
            Kind::Counter,
            "process_dropped_log_lines",
            "Log lines that could not be written",
            dropped,
        )
    }
}
