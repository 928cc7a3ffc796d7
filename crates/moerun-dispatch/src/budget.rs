//! How many calls may be made twice: so that a fault does not become a storm of its own repetitions.

use tokio::time::Instant;

/// A share of all calls, and a few a second besides.
#[derive(Debug)]
pub(crate) struct Budget {
    /// What each call adds.
    per_call: f64,
    per_second: f64,
    most: f64,
    left: f64,
    filled: Instant,
}

impl Budget {
    /// For repeating failed calls: 20 % of the calls and 10 a second, saved up for 10 seconds of each.
    pub(crate) fn for_retries(now: Instant) -> Self {
        Self {
            per_call: 0.2,
            per_second: 10.0,
            most: 100.0,
            left: 100.0,
            filled: now,
        }
    }

    /// For asking a second holder of a call that takes long: 5 % of the calls.
    pub(crate) fn for_hedges(now: Instant) -> Self {
        Self {
            per_call: 0.05,
            per_second: 0.0,
            most: 20.0,
            left: 4.0,
            filled: now,
        }
    }

    /// A call was made for the first time.
    pub(crate) fn earn(&mut self, calls: usize) {
        self.left = (self.left + self.per_call * calls as f64).min(self.most);
    }

    /// Whether one more repetition would be allowed.
    pub(crate) fn allows_one(&mut self, now: Instant) -> bool {
        self.spend(0, now);
        self.left + 1e-9 >= 1.0
    }

    /// Takes what `calls` repetitions cost, if there is as much.
    pub(crate) fn spend(&mut self, calls: usize, now: Instant) -> bool {
        let idle = now.saturating_duration_since(self.filled);
        self.filled = now;
        self.left = (self.left + self.per_second * idle.as_secs_f64()).min(self.most);
        // A hundred additions of 0.01 are a little less than 1.
        let enough = self.left + 1e-9 >= calls as f64;
        if enough {
            self.left -= calls as f64;
        }
        enough
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn spend_all(budget: &mut Budget, now: Instant) -> usize {
        (0..10_000).take_while(|_| budget.spend(1, now)).count()
    }

    #[test]
    fn retries_are_a_fifth_of_the_calls_and_ten_a_second() {
        let mut now = Instant::now();
        let mut budget = Budget::for_retries(now);
        assert_eq!(spend_all(&mut budget, now), 100, "saved up");
        assert!(!budget.spend(1, now) && !budget.allows_one(now));
        now += Duration::from_millis(100);
        assert!(budget.allows_one(now));
        assert_eq!(spend_all(&mut budget, now), 1);
        now += Duration::from_secs(1);
        assert_eq!(spend_all(&mut budget, now), 10);
        budget.earn(50);
        assert_eq!(spend_all(&mut budget, now), 10);
        now += Duration::from_secs(3600);
        assert_eq!(spend_all(&mut budget, now), 100, "no more is saved up");
    }

    #[test]
    fn hedges_are_a_twentieth_of_the_calls() {
        let mut now = Instant::now();
        let mut budget = Budget::for_hedges(now);
        let at_first = spend_all(&mut budget, now);
        assert_eq!(at_first, 4);
        now += Duration::from_secs(3600);
        assert!(!budget.spend(1, now), "time adds none");
        let mut hedged = 0;
        for _ in 0..1000 {
            budget.earn(1);
            hedged += usize::from(budget.spend(1, now));
        }
        assert_eq!(hedged, 50);
        budget.earn(39);
        assert!(!budget.spend(2, now) && budget.spend(1, now), "all or nothing");
    }
}
