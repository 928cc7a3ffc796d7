//! How a worker does, as seen from here: how fast it answers, how often it fails, whether it is to be asked.

mod ejection;
mod latency;

use std::time::Duration;

use tokio::time::Instant;

use ejection::Ejection;
use latency::Latency;
pub(crate) use latency::SizeClass;

/// Assumed of a worker that has not answered yet.
const UNKNOWN_LATENCY_SECS: f64 = 0.001;
/// A second worker is asked no sooner than this after the first: a stall of less is not worth a call.
const HEDGE_FLOOR: Duration = Duration::from_millis(2);
/// … and after this where nothing is known of the worker yet.
const FIRST_HEDGE: Duration = Duration::from_millis(250);
/// A call is overdue after this many times the time that 95 of 100 take …
const OVERDUE_FACTOR: u32 = 8;
/// … but not sooner than this.
const OVERDUE_FLOOR: Duration = Duration::from_millis(300);

/// Calls over which their size is averaged.
const USUAL_CALLS: f64 = 16.0;
/// A stall is forgiven, but not another one within this time.
const FORGIVEN_AGAIN_AFTER: Duration = Duration::from_secs(10);

/// Whether a worker is to be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It is.
    Good,
    /// It owes an answer: not while there is another holder.
    Suspect,
    /// It failed too often: not for a while, while there is another holder.
    Ejected,
}

/// What is known of one worker.
#[derive(Debug)]
pub(crate) struct Health {
    latencies: [Latency; SizeClass::COUNT],
    ejection: Ejection,
    /// Since when it owes an answer for which nobody waits any more.
    suspect_since: Option<Instant>,
    /// Whether the last ejection's end has been told.
    told_ejected: bool,
    assignments_in_flight: u64,
    /// Assignments of a call, a moving average.
    usual_call: f64,
    last_answer: Option<Instant>,
    /// When slowness was last forgiven.
    forgiven: Option<Instant>,
}

impl Health {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            latencies: Default::default(),
            ejection: Ejection::new(now),
            suspect_since: None,
            told_ejected: false,
            assignments_in_flight: 0,
            usual_call: 1.0,
            last_answer: None,
            forgiven: None,
        }
    }

    pub(crate) fn standing(&self, now: Instant) -> Standing {
        if self.suspect_since.is_some() {
            Standing::Suspect
        } else if self.ejection.is_ejected(now) {
            Standing::Ejected
        } else {
            Standing::Good
        }
    }

    /// Whether an ejection has ended since this was last asked.
    pub(crate) fn came_back(&mut self, now: Instant) -> bool {
        let back = self.told_ejected && !self.ejection.is_ejected(now);
        self.told_ejected &= !back;
        back
    }

    /// A call was sent.
    pub(crate) fn sent(&mut self, assignments: usize) {
        self.assignments_in_flight += assignments as u64;
        self.usual_call += (assignments as f64 - self.usual_call) / USUAL_CALLS;
    }

    /// A call is not waited for any more, however it ended.
    pub(crate) fn closed(&mut self, assignments: usize) {
        self.assignments_in_flight = self.assignments_in_flight.saturating_sub(assignments as u64);
    }

    /// Something came from the worker, so it is not suspect any more. Returns when something last had, and whether it was.
    pub(crate) fn answered(&mut self, now: Instant) -> (Option<Instant>, bool) {
        let Some(since) = self.suspect_since.take() else {
            return (self.last_answer.replace(now), false);
        };
        if self.forgiven.is_none_or(|at| now >= at + FORGIVEN_AGAIN_AFTER) {
            // Else it would get no calls, and so could not show that it is well again, until the average has decayed.
            self.latencies.iter_mut().for_each(Latency::forgive);
            self.forgiven = Some(now);
        } else {
            // Who stalls again and again is slow, and is to be asked less: by how long it stalled, not by how long somebody
            // had the patience to wait for it.
            let stalled = now.saturating_duration_since(since);
            self.latencies
                .iter_mut()
                .for_each(|latency| latency.took_at_least(now, stalled));
        }
        (self.last_answer.replace(now), true)
    }

    /// A call that was given up was answered well after all: the worker is slow, not silent.
    pub(crate) fn answered_late(&mut self) {
        self.ejection.answered_late();
    }

    /// A call was answered well, `took` after it was sent or the worker answered the one before.
    pub(crate) fn succeeded(&mut self, now: Instant, class: SizeClass, took: Duration) {
        self.ejection.succeeded(now);
        self.latencies[class as usize].record(now, took);
    }

    /// A call failed. Returns for how long the worker is ejected, if this ejects it.
    pub(crate) fn failed(&mut self, now: Instant) -> Option<Duration> {
        let ejected = self.ejection.failed(now);
        self.told_ejected |= ejected.is_some();
        ejected
    }

    /// A call was given up unanswered after `waited`. Returns whether the worker is suspect from now on.
    pub(crate) fn overdue(&mut self, now: Instant, class: SizeClass, waited: Duration) -> bool {
        // It would have taken at least as long: left out, the quantiles would creep downwards.
        self.latencies[class as usize].record(now, waited);
        let is_news = self.suspect_since.is_none();
        self.suspect_since.get_or_insert(now.checked_sub(waited).unwrap_or(now));
        is_news
    }

    /// A new connection owes nothing.
    pub(crate) fn reconnected(&mut self, now: Instant) {
        self.suspect_since = None;
        self.last_answer = Some(now);
    }

    /// What a call of `class` is expected to take, in seconds, if nothing is before it.
    pub(crate) fn cost(&self, now: Instant, class: SizeClass) -> f64 {
        self.latencies[class as usize]
            .average_secs(now)
            .unwrap_or(UNKNOWN_LATENCY_SECS)
    }

    /// Assignments of a usual call: as many before another one make that take as long again.
    pub(crate) fn usual_call(&self) -> f64 {
        self.usual_call.max(1.0)
    }

    pub(crate) fn in_flight(&self) -> u64 {
        self.assignments_in_flight
    }

    pub(crate) fn is_suspect(&self) -> bool {
        self.suspect_since.is_some()
    }

    /// Times of calls of a class.
    pub(crate) fn latency(&self, class: SizeClass) -> &Latency {
        &self.latencies[class as usize]
    }

    /// From when a call that was sent at `sent` is timed: a worker that answers others before it is not late.
    pub(crate) fn timed_from(&self, sent: Instant) -> Instant {
        self.last_answer.map_or(sent, |answered| answered.max(sent))
    }

    /// How long to wait before another holder is asked too.
    pub(crate) fn hedge_after(&self, class: SizeClass) -> Duration {
        self.latencies[class as usize]
            .p95()
            .map_or(FIRST_HEDGE, |p95| p95.max(HEDGE_FLOOR))
    }

    /// How long to wait before a call is given up for another holder; `ceiling` where nothing is known of the worker yet.
    pub(crate) fn overdue_after(&self, class: SizeClass, ceiling: Duration) -> Duration {
        self.latencies[class as usize]
            .p95()
            .map_or(ceiling, |p95| (p95 * OVERDUE_FACTOR).max(OVERDUE_FLOOR).min(ceiling))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn an_overdue_worker_is_suspect_until_it_says_something() {
        let now = Instant::now();
        let mut health = Health::new(now);
        assert_eq!(health.standing(now), Standing::Good);
        assert!(health.overdue(now, SizeClass::Small, 30 * MS));
        assert!(!health.overdue(now, SizeClass::Small, 30 * MS), "it was already");
        assert_eq!(health.standing(now + 1000 * MS), Standing::Suspect);
        assert_eq!(health.answered(now + 1000 * MS), (None, true));
        assert_eq!(health.standing(now + 1000 * MS), Standing::Good);
        assert_eq!(health.answered(now + 1001 * MS), (Some(now + 1000 * MS), false));
    }

    #[test]
    fn one_stall_is_forgiven_and_the_next_soon_after_it_is_not() {
        let begun = Instant::now();
        let mut health = Health::new(begun);
        for _ in 0..128 {
            health.succeeded(begun, SizeClass::Small, MS);
        }
        let mut stall = |at: Instant| {
            health.overdue(at, SizeClass::Small, 300 * MS);
            health.answered(at);
            health.cost(at, SizeClass::Small)
        };
        assert_eq!(stall(begun), 0.001);
        assert_eq!(stall(begun + 1000 * MS), 0.3);
        assert_eq!(stall(begun + FORGIVEN_AGAIN_AFTER), 0.001);
    }

    #[test]
    fn a_stall_counts_as_long_as_it_lasted_and_not_as_long_as_somebody_waited() {
        let begun = Instant::now();
        let mut health = Health::new(begun);
        for _ in 0..128 {
            health.succeeded(begun, SizeClass::Small, MS);
        }
        // A worker that has a tenth of a processor: it answers at once for a while, and then for a while not at all.
        for period in 0..3 {
            let lost = begun + period * 100 * MS + 12 * MS;
            health.overdue(lost, SizeClass::Small, 2 * MS);
            health.answered(lost + 88 * MS);
        }
        let now = begun + 300 * MS;
        assert_eq!(health.cost(now, SizeClass::Small), 0.09);
        assert!(health.cost(now + 5000 * MS, SizeClass::Small) > 0.005);
    }

    #[test]
    fn deadlines_follow_what_was_seen_between_floor_and_ceiling() {
        let now = Instant::now();
        let mut health = Health::new(now);
        let ceiling = Duration::from_secs(2);
        assert_eq!(health.hedge_after(SizeClass::Small), FIRST_HEDGE);
        assert_eq!(health.overdue_after(SizeClass::Small, ceiling), ceiling);
        let mut settle = |took: Duration, class| {
            for _ in 0..128 {
                health.succeeded(now, class, took);
            }
            (health.hedge_after(class), health.overdue_after(class, ceiling))
        };
        assert_eq!(settle(MS / 10, SizeClass::Small), (HEDGE_FLOOR, OVERDUE_FLOOR));
        assert_eq!(settle(100 * MS, SizeClass::Small), (100 * MS, 800 * MS));
        assert_eq!(settle(900 * MS, SizeClass::Large), (900 * MS, ceiling));
        assert_eq!(health.hedge_after(SizeClass::Small), 100 * MS, "classes are apart");
    }

    #[test]
    fn an_ejection_ends_by_itself_and_that_is_told_once() {
        let now = Instant::now();
        let mut health = Health::new(now);
        health.failed(now);
        health.failed(now);
        let length = health.failed(now).unwrap();
        assert_eq!(health.standing(now), Standing::Ejected);
        assert!(!health.came_back(now));
        assert_eq!(health.standing(now + length), Standing::Good);
        assert!(health.came_back(now + length) && !health.came_back(now + length));
    }

    #[test]
    fn a_call_is_timed_from_the_answer_before_it() {
        let now = Instant::now();
        let mut health = Health::new(now);
        assert_eq!(health.timed_from(now), now);
        health.answered(now + 5 * MS);
        assert_eq!(health.timed_from(now), now + 5 * MS);
        assert_eq!(health.timed_from(now + 7 * MS), now + 7 * MS);
    }

    #[test]
    fn what_is_in_flight_adds_up() {
        let mut health = Health::new(Instant::now());
        health.sent(3);
        health.sent(4);
        health.closed(3);
        assert_eq!(health.in_flight(), 4);
    }
}
