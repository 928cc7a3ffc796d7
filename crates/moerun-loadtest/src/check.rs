//! Judges a history by the six invariants. Nothing here knows how the history came about.

mod exactness;
mod healing;
mod leaks;
mod outcomes;
mod panics;
mod visibility;

use std::{fmt, time::Duration};

pub(crate) use leaks::UNDER_WAY;

use crate::{History, clock::micros};

/// Violations that are told one by one; more are counted.
const MAX_TOLD: usize = 20;

/// What a history may and may not have.
#[derive(Debug, Clone)]
pub struct Limits {
    /// How much later than its deadline a request may end.
    pub end_grace: Duration,
    /// How soon a fault must show in figures and logs.
    pub shows_within: Duration,
    /// How soon after a fault everything must be as before.
    pub heals_within: Duration,
    /// Share of the throughput before the fault that must be there again.
    pub healed_share: f64,
    /// Share by which resident memory may have grown.
    pub memory_growth_share: f64,
    /// Bytes by which it may have grown in any case: a small process grows by more than a share of itself when buffers
    /// are used for the first time.
    pub memory_growth_bytes: u64,
    /// Open files and tasks that may be left: connections that come and go on their own, as those of whoever takes the
    /// samples.
    pub left_over: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            end_grace: Duration::from_secs(1),
            shows_within: Duration::from_secs(5),
            heals_within: Duration::from_secs(5),
            healed_share: 0.98,
            memory_growth_share: 0.05,
            // Workers that no fault had touched were seen to take 15 to 19 MB once, during one run; what takes it is not known.
            memory_growth_bytes: 24 << 20,
            left_over: 2,
        }
    }
}

/// What became of one invariant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// I1 to I6, or `hit`.
    pub invariant: &'static str,
    /// What it says.
    pub says: &'static str,
    /// Requests, samples, lines or faults that were looked at.
    pub checked: usize,
    /// What contradicts it: the first ones, in words.
    pub violations: Vec<String>,
    /// How many contradict it.
    pub count: usize,
}

impl Verdict {
    fn new(invariant: &'static str, says: &'static str) -> Self {
        Self {
            invariant,
            says,
            checked: 0,
            violations: Vec::new(),
            count: 0,
        }
    }

    /// Whether nothing contradicts it.
    pub fn holds(&self) -> bool {
        self.count == 0
    }

    fn violated(&mut self, how: impl FnOnce() -> String) {
        self.count += 1;
        if self.violations.len() < MAX_TOLD {
            self.violations.push(how());
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Verdict {
            invariant,
            says,
            checked,
            violations,
            count,
        } = self;
        if self.holds() {
            return write!(f, "{invariant} holds ({says}; {checked} checked)");
        }
        write!(f, "{invariant} is violated {count} times ({says}; {checked} checked)")?;
        violations.iter().try_for_each(|violation| write!(f, "\n  {violation}"))
    }
}

/// One verdict for each of I1 to I6, in this order, and last `hit`: whether any of the faults met live traffic, without
/// which the others say nothing about faults.
pub fn check(history: &History, limits: &Limits) -> Vec<Verdict> {
    let mut hit = Verdict::new("hit", "a counter proves that faults met live traffic");
    hit.checked = history.faults.len();
    if !history.faults.is_empty() && !history.faults.iter().any(|fault| fault.hit()) {
        hit.violated(|| format!("none of {} faults met live traffic", history.faults.len()));
    }
    vec![
        exactness::check(history),
        outcomes::check(history, micros(limits.end_grace)),
        leaks::check(history, limits),
        panics::check(history),
        visibility::check(history, micros(limits.shows_within)),
        healing::check(history, limits),
        hit,
    ]
}

#[cfg(test)]
pub(crate) mod tests;
