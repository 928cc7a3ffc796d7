//! What one source said last, and what is made of what it says now: [`Known`].

use std::time::Duration;

use moerun_process::Address;
use tokio::time::Instant;

use crate::DiscoveryError;

/// Most workers of one source.
const MAX_WORKERS: usize = 1024;

/// The workers that a source named last. An error changes nothing, and neither does a list without any worker: whoever
/// serves from these workers dials those that are gone on, which costs little, and an empty list would cost all.
///
/// After an error a source may have forgotten some of them (a registry that was started anew), so that for a while only
/// newcomers are believed.
#[derive(Debug)]
pub(crate) struct Known {
    /// Sorted.
    workers: Vec<String>,
    /// What was said last without an error, while some of `workers` that are not in it are kept.
    held_back: Option<Vec<String>>,
    settle: Duration,
    settled_at: Option<Instant>,
    pub(crate) counts: Counts,
}

/// What has come of a source.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Why it is not believed now, if it is not.
    pub(crate) failing: Option<DiscoveryError>,
    /// Lists that it named.
    pub(crate) answers: u64,
    /// Times it failed to.
    pub(crate) errors: u64,
    /// Times that the list changed.
    pub(crate) changes: u64,
}

/// What a report changed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// Nothing that anybody wants to know.
    None,
    /// It began to fail, or fails for another reason.
    Fails,
    /// It answers again; the list is the same.
    Answers,
    /// The list is another.
    Workers,
}

impl Known {
    /// Nobody yet. After an error, nobody is taken off the list for `settle`.
    pub(crate) fn new(settle: Duration) -> Self {
        Self {
            workers: Vec::new(),
            held_back: None,
            settle,
            settled_at: None,
            counts: Counts::default(),
        }
    }

    /// The workers, sorted.
    pub(crate) fn workers(&self) -> &[String] {
        &self.workers
    }

    /// When [`Known::settle`] is to be called, if it is.
    pub(crate) fn settles_at(&self) -> Option<Instant> {
        self.held_back.as_ref().and(self.settled_at)
    }

    /// Takes what the source says.
    pub(crate) fn hear(&mut self, now: Instant, said: Result<Vec<String>, DiscoveryError>) -> Change {
        match said.and_then(checked) {
            Err(error) => {
                self.counts.errors += 1;
                self.settled_at = Some(now + self.settle);
                let is_news = self.counts.failing.as_ref() != Some(&error);
                self.counts.failing = Some(error);
                if is_news { Change::Fails } else { Change::None }
            }
            Ok(workers) => {
                self.counts.answers += 1;
                let recovered = self.counts.failing.take().is_some();
                if recovered {
                    self.settled_at = Some(now + self.settle);
                }
                match self.take(now, workers) {
                    true => Change::Workers,
                    false if recovered => Change::Answers,
                    false => Change::None,
                }
            }
        }
    }

    /// Takes those off the list who were kept for a while; whether that changed it.
    pub(crate) fn settle(&mut self, now: Instant) -> bool {
        match self.held_back.take() {
            Some(workers) => self.take(now, workers),
            None => false,
        }
    }

    fn take(&mut self, now: Instant, said: Vec<String>) -> bool {
        let mut workers = said.clone();
        self.held_back = None;
        if self.settled_at.is_some_and(|at| now < at) {
            workers.extend(self.workers.iter().filter(|it| !said.contains(it)).cloned());
            workers.sort();
            if workers != said {
                self.held_back = Some(said);
            }
        }
        if workers == self.workers {
            return false;
        }
        self.workers = workers;
        self.counts.changes += 1;
        true
    }
}

/// A list that can be worked with: sorted, each once, each an address that can be dialled.
fn checked(mut workers: Vec<String>) -> Result<Vec<String>, DiscoveryError> {
    workers.sort();
    workers.dedup();
    for worker in &workers {
        check_address(worker)?;
    }
    match workers.len() {
        0 => Err(DiscoveryError::Nobody),
        found if found > MAX_WORKERS => Err(DiscoveryError::TooMany {
            found,
            most: MAX_WORKERS,
        }),
        _ => Ok(workers),
    }
}

/// That a worker can be dialled at `address`.
pub(crate) fn check_address(address: &str) -> Result<(), DiscoveryError> {
    let refused = |reason: String| DiscoveryError::Address {
        address: address.chars().take(256).collect(),
        reason,
    };
    if address.len() > 256 {
        return Err(refused("wanted at most 256 bytes".to_owned()));
    }
    if !address.bytes().all(|it| it.is_ascii_graphic()) {
        return Err(refused("wanted visible ASCII".to_owned()));
    }
    match Address::parse(address).map_err(refused)? {
        Address::Tcp(text) if text.ends_with(":0") => Err(refused("wanted a port above 0".to_owned())),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTLE: Duration = Duration::from_secs(5);

    fn list(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    fn lookup(reason: &str) -> DiscoveryError {
        DiscoveryError::Lookup {
            name: "workers".to_owned(),
            reason: reason.to_owned(),
        }
    }

    #[test]
    fn an_error_or_an_empty_answer_changes_nothing_and_is_news_once() {
        let (mut known, now) = (Known::new(SETTLE), Instant::now());
        assert_eq!(known.hear(now, Ok(list("b:1 a:1 b:1"))), Change::Workers);
        assert_eq!(known.workers(), ["a:1", "b:1"]);
        assert_eq!(known.hear(now, Ok(list("a:1 b:1"))), Change::None);
        assert_eq!(known.hear(now, Err(lookup("no such name"))), Change::Fails);
        assert_eq!(known.hear(now, Err(lookup("no such name"))), Change::None);
        assert_eq!(known.hear(now, Err(lookup("timed out"))), Change::Fails);
        assert_eq!(known.hear(now, Ok(Vec::new())), Change::Fails);
        assert_eq!(known.hear(now, Ok(list("nonsense"))), Change::Fails);
        assert_eq!(known.workers(), ["a:1", "b:1"]);
        assert_eq!(
            (known.counts.answers, known.counts.errors, known.counts.changes),
            (2, 5, 1)
        );
        assert_eq!(known.hear(now, Ok(list("a:1 b:1"))), Change::Answers);
        assert_eq!(known.counts.failing, None);
    }

    #[test]
    fn a_source_that_comes_back_may_add_at_once_and_take_away_when_it_has_settled() {
        let (mut known, begun) = (Known::new(SETTLE), Instant::now());
        known.hear(begun, Ok(list("a:1 b:1")));
        known.hear(begun, Err(lookup("gone")));
        let back = begun + Duration::from_secs(60);
        assert_eq!(known.hear(back, Ok(list("b:1 c:1"))), Change::Workers);
        assert_eq!(known.workers(), ["a:1", "b:1", "c:1"]);
        assert_eq!(known.settles_at(), Some(back + SETTLE));
        // The first of them is there again meanwhile, or it is not.
        let mut without = Known::new(SETTLE);
        std::mem::swap(&mut without, &mut known);
        assert!(without.settle(back + SETTLE));
        assert_eq!(without.workers(), ["b:1", "c:1"]);
        assert_eq!(without.settles_at(), None);
    }

    #[test]
    fn a_list_changes_at_once_while_nothing_fails() {
        let (mut known, now) = (Known::new(SETTLE), Instant::now());
        known.hear(now, Ok(list("a:1 b:1")));
        assert_eq!(known.hear(now, Ok(list("c:1"))), Change::Workers);
        assert_eq!((known.workers(), known.settles_at()), (&list("c:1")[..], None));
    }

    #[test]
    fn lists_beyond_all_bounds_are_not_believed() {
        let mut known = Known::new(SETTLE);
        let many = (0..=MAX_WORKERS).map(|index| format!("w{index}:1")).collect();
        assert_eq!(known.hear(Instant::now(), Ok(many)), Change::Fails);
        assert!(known.workers().is_empty());
        for bad in ["a:0", "a", "a b:1", &"a".repeat(300)] {
            assert!(check_address(bad).is_err(), "{bad}");
        }
    }
}
