//! Taking a worker out that fails too often, for a while that grows each time.

use std::time::Duration;

use tokio::time::Instant;

/// This many failures one after another eject.
const CONSECUTIVE: u32 = 3;
/// And so does a share of successes below this …
const MIN_SUCCESS_PERCENT: u32 = 80;
/// … of at least this many calls …
const MIN_CALLS: u32 = 10;
/// … in this many seconds.
const WINDOW_SECS: u64 = 10;
/// The first ejection's length, doubled each time up to the last.
const FIRST: Duration = Duration::from_millis(100);
const LAST: Duration = Duration::from_secs(10);
/// A worker that stayed in for as long starts from the first length again.
const FORGIVEN_AFTER: Duration = Duration::from_secs(10);

/// Successes and failures of the latest seconds, and what follows from them.
#[derive(Debug)]
pub(crate) struct Ejection {
    begun: Instant,
    seconds: [Second; WINDOW_SECS as usize],
    consecutive: u32,
    /// When the present or last ejection ends.
    until: Option<Instant>,
    /// Ejections without a long stay between them.
    in_a_row: u32,
}

#[derive(Debug, Clone, Copy, Default)]
struct Second {
    number: u64,
    succeeded: u32,
    failed: u32,
}

impl Ejection {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            begun: now,
            seconds: [Second::default(); WINDOW_SECS as usize],
            consecutive: 0,
            until: None,
            in_a_row: 0,
        }
    }

    /// A call went well.
    pub(crate) fn succeeded(&mut self, now: Instant) {
        self.consecutive = 0;
        self.second(now).succeeded += 1;
    }

    /// A call that counted as failed was answered after all. It stays a failure, but the row of failures is broken: a busy
    /// host makes each of its workers lose a hedge now and then, and that must not look like one that has stopped answering.
    /// Who loses too many is ejected by its share of successes.
    pub(crate) fn answered_late(&mut self) {
        self.consecutive = 0;
    }

    /// A call failed. Returns for how long the worker is ejected, if this ejects it.
    pub(crate) fn failed(&mut self, now: Instant) -> Option<Duration> {
        self.consecutive += 1;
        self.second(now).failed += 1;
        if self.is_ejected(now) || !self.fails_too_often(now) {
            return None;
        }
        if self.until.is_some_and(|until| now >= until + FORGIVEN_AFTER) {
            self.in_a_row = 0;
        }
        let length = FIRST.saturating_mul(1 << self.in_a_row.min(16)).min(LAST);
        self.in_a_row += 1;
        self.until = Some(now + length);
        // It comes back on trial: what led here is told, and the first failure ejects again.
        self.seconds = Default::default();
        self.consecutive = CONSECUTIVE - 1;
        Some(length)
    }

    /// Whether it is out now.
    pub(crate) fn is_ejected(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| now < until)
    }

    fn fails_too_often(&self, now: Instant) -> bool {
        if self.consecutive >= CONSECUTIVE {
            return true;
        }
        let number = self.number(now);
        let lately = self.seconds.iter().filter(|it| it.number + WINDOW_SECS > number);
        let (succeeded, failed) = lately.fold((0, 0), |(succeeded, failed), it| {
            (succeeded + it.succeeded, failed + it.failed)
        });
        let calls = succeeded + failed;
        calls >= MIN_CALLS && succeeded * 100 < calls * MIN_SUCCESS_PERCENT
    }

    fn number(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.begun).as_secs()
    }

    fn second(&mut self, now: Instant) -> &mut Second {
        let number = self.number(now);
        let second = &mut self.seconds[(number % WINDOW_SECS) as usize];
        if second.number != number {
            *second = Second {
                number,
                ..Second::default()
            };
        }
        second
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn three_failures_one_after_another_eject_and_a_success_between_them_does_not() {
        let mut now = Instant::now();
        let mut ejection = Ejection::new(now);
        for _ in 0..10 {
            for _ in 0..10 {
                ejection.succeeded(now);
            }
            assert_eq!([ejection.failed(now), ejection.failed(now)], [None, None]);
            now += 100 * MS;
        }
        ejection.succeeded(now);
        assert_eq!([ejection.failed(now), ejection.failed(now)], [None, None]);
        assert_eq!(ejection.failed(now), Some(FIRST));
        assert!(ejection.is_ejected(now + FIRST - MS) && !ejection.is_ejected(now + FIRST));
        assert_eq!(ejection.failed(now), None, "it is out already");
    }

    #[test]
    fn a_worker_that_answers_late_is_ejected_by_its_share_alone() {
        let begun = Instant::now();
        let mut ejection = Ejection::new(begun);
        let mut calls = 0;
        while ejection.failed(begun).is_none() {
            ejection.answered_late();
            calls += 1;
            assert!(calls < 100, "never ejected");
        }
        assert_eq!(calls + 1, MIN_CALLS, "all of the first calls were lost");
        let mut ejection = Ejection::new(begun);
        for _ in 0..1000 {
            assert_eq!(ejection.failed(begun), None, "one in ten is lost");
            ejection.answered_late();
            (0..9).for_each(|_| ejection.succeeded(begun));
        }
    }

    #[test]
    fn too_small_a_share_of_successes_in_ten_seconds_ejects() {
        let begun = Instant::now();
        let mut ejection = Ejection::new(begun);
        for call in 0..9 {
            let at = begun + call * 100 * MS;
            if call % 3 == 0 {
                assert_eq!(ejection.failed(at), None, "too few calls to tell");
            } else {
                ejection.succeeded(at);
            }
        }
        assert_eq!(ejection.failed(begun + 1000 * MS), Some(FIRST), "6 of 10");

        let mut ejection = Ejection::new(begun);
        for _ in 0..3 {
            ejection.succeeded(begun);
            ejection.failed(begun);
        }
        let later = begun + Duration::from_secs(WINDOW_SECS);
        for _ in 0..9 {
            ejection.succeeded(later);
        }
        assert_eq!(ejection.failed(later), None, "the old failures have passed");
    }

    #[test]
    fn each_ejection_is_twice_as_long_until_the_worker_has_stayed_in_for_a_while() {
        let mut now = Instant::now();
        let mut ejection = Ejection::new(now);
        assert_eq!([ejection.failed(now), ejection.failed(now)], [None, None]);
        let mut lengths = Vec::new();
        for _ in 0..9 {
            // On trial: one failure is enough.
            let length = ejection.failed(now).unwrap();
            lengths.push(length.as_millis());
            now += length;
        }
        assert_eq!(lengths, [100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]);
        ejection.succeeded(now);
        now += FORGIVEN_AFTER;
        assert_eq!([ejection.failed(now), ejection.failed(now)], [None, None]);
        assert_eq!(ejection.failed(now), Some(FIRST));
    }
}
