//! Shows how far a load has come: a bar on a terminal, a log line now and then otherwise.

use std::{
    io::{self, IsTerminal},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Between two log lines; what takes no longer than this is done before anyone asks, and is no news.
const LOG_INTERVAL: Duration = Duration::from_secs(2);

/// Filter that lets the log lines of slow loads through, for commands that otherwise log warnings only.
pub const WARNINGS_AND_PROGRESS: &str = "warn,moerun_process::progress=info";

/// Progress of one load.
#[derive(Debug)]
pub struct LoadProgress {
    what: String,
    begun: Instant,
    done: u64,
    display: Display,
}

const BYTES_STYLE: &str = "{msg} [{bar:40}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}";
const ITEMS_STYLE: &str = "{msg} [{bar:40}] {pos}/{len} {eta}";

#[derive(Debug)]
enum Display {
    Bar(ProgressBar),
    Log { last: Instant },
}

impl LoadProgress {
    /// Begins to show the load of `what`, in bytes, on standard error.
    pub fn new(what: impl Into<String>) -> Self {
        Self::with_style(what.into(), BYTES_STYLE)
    }

    /// Begins to show work on `what`, in items.
    pub fn counting(what: impl Into<String>) -> Self {
        Self::with_style(what.into(), ITEMS_STYLE)
    }

    fn with_style(what: String, style: &str) -> Self {
        let begun = Instant::now();
        let display = if io::stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            bar.set_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_message(what.clone());
            Display::Bar(bar)
        } else {
            Display::Log { last: begun }
        };
        Self {
            what,
            begun,
            done: 0,
            display,
        }
    }

    /// `done` of `total` bytes or items are behind us.
    pub fn update(&mut self, done: u64, total: u64) {
        self.done = done;
        match &mut self.display {
            Display::Bar(bar) => {
                bar.set_length(total);
                bar.set_position(done);
            }
            Display::Log { last } if last.elapsed() >= LOG_INTERVAL => {
                *last = Instant::now();
                let percent = if total == 0 {
                    100
                } else {
                    u128::from(done) * 100 / u128::from(total)
                };
                tracing::info!(done, total, "{}: {percent} %", self.what);
            }
            Display::Log { .. } => {}
        }
    }

    /// All is done.
    pub fn finish(self) {
        if let Display::Bar(bar) = &self.display {
            bar.finish_and_clear();
        }
        let (total, elapsed) = (self.done, self.begun.elapsed());
        if elapsed >= LOG_INTERVAL {
            tracing::info!(total, seconds = elapsed.as_secs_f64(), "{}: done", self.what);
        } else {
            tracing::debug!(total, seconds = elapsed.as_secs_f64(), "{}: done", self.what);
        }
    }
}
