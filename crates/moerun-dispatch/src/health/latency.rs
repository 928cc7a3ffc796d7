//! How fast a worker answers: a decaying average that rises at once, and quantiles of the latest answers.

use std::time::Duration;

use tokio::time::Instant;

/// Time in which the average forgets: a worker that was slow and gets no calls for it is tried again after a while.
const DECAY: Duration = Duration::from_secs(2);
/// Answers that the quantiles are taken from.
const WINDOW: usize = 128;
/// Answers between two looks at the quantiles.
const REFRESH: usize = 16;

/// Sizes of calls that are timed apart: a prefill's message takes longer than a decode step's without being slow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SizeClass {
    /// A decode step's.
    Small,
    /// A batch's.
    Medium,
    /// A prefill's.
    Large,
}

impl SizeClass {
    pub(crate) const COUNT: usize = 3;

    /// Of a call with this many assignments.
    pub(crate) fn of(assignments: usize) -> Self {
        match assignments {
            0..=16 => SizeClass::Small,
            17..=256 => SizeClass::Medium,
            _ => SizeClass::Large,
        }
    }
}

/// Times of one worker's answers to calls of one size class.
#[derive(Debug, Default)]
pub(crate) struct Latency {
    /// Seconds.
    average: f64,
    updated: Option<Instant>,
    window: Vec<Duration>,
    next: usize,
    since_refresh: usize,
    median: Duration,
    p95: Option<Duration>,
}

impl Latency {
    /// Takes in one answer. The average rises to a slower one at once and falls slowly (peak EWMA).
    pub(crate) fn record(&mut self, now: Instant, took: Duration) {
        let seconds = took.as_secs_f64();
        self.average = match self.updated {
            Some(before) if seconds < self.average => {
                let keep = decay(now.saturating_duration_since(before));
                self.average * keep + seconds * (1.0 - keep)
            }
            _ => seconds,
        };
        self.updated = Some(now);
        if self.window.len() < WINDOW {
            self.window.push(took);
        } else {
            self.window[self.next] = took;
        }
        self.next = (self.next + 1) % WINDOW;
        self.since_refresh += 1;
        if self.since_refresh >= REFRESH {
            self.refresh();
        }
    }

    /// An answer for which nobody waited to the end took so long: the average rises to that.
    pub(crate) fn took_at_least(&mut self, now: Instant, took: Duration) {
        if self
            .average_secs(now)
            .is_none_or(|average| average < took.as_secs_f64())
        {
            self.average = took.as_secs_f64();
            self.updated = Some(now);
        }
    }

    /// What made it slow is over: the average is that of its usual answers again, where those are known.
    pub(crate) fn forgive(&mut self) {
        match self.p95 {
            Some(_) => self.average = self.average.min(self.median.as_secs_f64()),
            None => self.updated = None,
        }
    }

    fn refresh(&mut self) {
        self.since_refresh = 0;
        let mut sorted = self.window.clone();
        sorted.sort_unstable();
        self.median = sorted[sorted.len() / 2];
        self.p95 = Some(sorted[(sorted.len() * 95).div_ceil(100) - 1]);
    }

    /// The average as of now, in seconds; `None` before the first answer.
    pub(crate) fn average_secs(&self, now: Instant) -> Option<f64> {
        let updated = self.updated?;
        Some(self.average * decay(now.saturating_duration_since(updated)))
    }

    /// Half of the latest answers took at most this; `None` while there are too few.
    pub(crate) fn median(&self) -> Option<Duration> {
        self.p95.map(|_| self.median)
    }

    /// 95 of 100 of the latest answers took at most this; `None` while there are too few.
    pub(crate) fn p95(&self) -> Option<Duration> {
        self.p95
    }
}

fn decay(age: Duration) -> f64 {
    (-age.as_secs_f64() / DECAY.as_secs_f64()).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_average_rises_at_once_and_falls_in_time() {
        let begun = Instant::now();
        let mut latency = Latency::default();
        assert_eq!(latency.average_secs(begun), None);
        latency.record(begun, MS);
        latency.record(begun, 10 * MS);
        assert_eq!(latency.average_secs(begun), Some(0.010));
        latency.record(begun, MS);
        assert_eq!(latency.average_secs(begun), Some(0.010), "no time has passed");
        latency.record(begun + DECAY, MS);
        let fallen = latency.average_secs(begun + DECAY).unwrap();
        assert!(
            (fallen - (0.001 + 0.009 / std::f64::consts::E)).abs() < 1e-6,
            "{fallen}"
        );
        let idle = latency.average_secs(begun + 3 * DECAY).unwrap();
        assert!(idle < fallen / 7.0, "{idle}: without calls it is forgotten");
    }

    #[test]
    fn quantiles_are_those_of_the_latest_answers() {
        let now = Instant::now();
        let mut latency = Latency::default();
        for count in 1..REFRESH as u32 {
            latency.record(now, count * MS);
            assert_eq!((latency.median(), latency.p95()), (None, None));
        }
        latency.record(now, REFRESH as u32 * MS);
        assert_eq!((latency.median(), latency.p95()), (Some(9 * MS), Some(16 * MS)));
        for _ in 0..WINDOW {
            latency.record(now, 5 * MS);
        }
        assert_eq!((latency.median(), latency.p95()), (Some(5 * MS), Some(5 * MS)));
        for _ in 0..REFRESH {
            latency.record(now, 50 * MS);
        }
        assert_eq!((latency.median(), latency.p95()), (Some(5 * MS), Some(50 * MS)));
    }

    #[test]
    fn what_is_forgiven_leaves_the_usual_latency() {
        let now = Instant::now();
        let mut latency = Latency::default();
        latency.record(now, 900 * MS);
        latency.forgive();
        assert_eq!(latency.average_secs(now), None, "nothing is known yet");
        for _ in 0..REFRESH {
            latency.record(now, 3 * MS);
        }
        latency.record(now, 900 * MS);
        assert_eq!(latency.average_secs(now), Some(0.9));
        latency.forgive();
        assert_eq!(latency.average_secs(now), Some(0.003));
    }

    #[test]
    fn calls_are_classed_by_their_assignments() {
        let classes = [1, 16, 17, 256, 257].map(SizeClass::of);
        use SizeClass::{Large, Medium, Small};
        assert_eq!(classes, [Small, Small, Medium, Medium, Large]);
    }
}
