//! What this process takes of the machine, as the system tells it, and how often it panicked.

use std::{
    fs, panic,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crate::telemetry::dropped_log_lines;

static STARTED: OnceLock<Instant> = OnceLock::new();
static PANICS: AtomicU64 = AtomicU64::new(0);

/// What this process takes of the machine; 0 where the system does not tell (it does on Linux).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OwnFigures {
    /// Process id.
    pub pid: u32,
    /// Time since [`count_panics`] was called.
    pub uptime: Duration,
    /// Resident memory.
    pub resident_bytes: u64,
    /// Open file descriptors.
    pub open_files: u64,
    /// Threads of the operating system.
    pub threads: u64,
    /// Panics since [`count_panics`] was called, caught or not.
    pub panics: u64,
    /// Log lines that could not be written, since the start.
    pub dropped_log_lines: u64,
}

impl OwnFigures {
    /// As of now.
    pub fn now() -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        Self {
            pid: std::process::id(),
            uptime: STARTED.get().map_or(Duration::ZERO, Instant::elapsed),
            resident_bytes: field(&status, "VmRSS:").saturating_mul(1024),
            // One of them reads the folder.
            open_files: fs::read_dir("/proc/self/fd").map_or(0, |files| (files.count() as u64).saturating_sub(1)),
            threads: field(&status, "Threads:"),
            panics: PANICS.load(Ordering::Relaxed),
            dropped_log_lines: dropped_log_lines(),
        }
    }
}

/// Number after a name in `/proc/self/status`.
fn field(status: &str, name: &str) -> u64 {
    status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

/// Counts panics from now on; they are printed as before. Called once, when a process starts to serve.
pub fn count_panics() {
    STARTED.get_or_init(Instant::now);
    let print = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        PANICS.fetch_add(1, Ordering::Relaxed);
        print(info);
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_knows_what_it_takes() {
        let before = OwnFigures::now();
        assert!(before.resident_bytes > 1 << 20 && before.threads >= 1, "{before:?}");
        let files: Vec<fs::File> = (0..50).map(|_| fs::File::open("/dev/null").unwrap()).collect();
        // Other tests of this binary open and close a few of their own meanwhile.
        let during = OwnFigures::now();
        assert!(during.open_files >= before.open_files + 30, "{before:?} {during:?}");
        drop(files);
        assert_eq!(field("VmRSS:\t  12 kB\nThreads:\t3\n", "Threads:"), 3);
        assert_eq!(field("", "Threads:"), 0);
    }
}
