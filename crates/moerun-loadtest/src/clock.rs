//! One monotonic clock for everything in a history.

use std::time::{Duration, Instant};

use crate::Micros;

/// Time since the run began.
#[derive(Debug, Clone, Copy)]
pub struct RunClock {
    began: Instant,
}

impl RunClock {
    /// The run begins now.
    pub fn start() -> Self {
        Self { began: Instant::now() }
    }

    /// Microseconds since the run began.
    pub fn now(&self) -> Micros {
        micros(self.began.elapsed())
    }

    /// When the run will have lasted `since_start`.
    pub fn instant(&self, since_start: Duration) -> Instant {
        self.began + since_start
    }
}

/// A duration in the unit of histories.
pub(crate) fn micros(duration: Duration) -> Micros {
    Micros::try_from(duration.as_micros()).unwrap_or(Micros::MAX)
}
