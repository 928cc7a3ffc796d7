//! Who has registered, and until when: [`Leases`].

use std::{collections::BTreeMap, time::Duration};

use tokio::time::Instant;

/// Most workers that may be registered.
pub(crate) const MAX_REGISTERED: usize = 1024;

/// Workers with leases. A pure table: the caller brings the time.
#[derive(Debug)]
pub(crate) struct Leases {
    lease: Duration,
    held: BTreeMap<String, Lease>,
    /// When leases were last looked at.
    looked: Instant,
}

#[derive(Debug)]
struct Lease {
    instance: u64,
    until: Instant,
}

/// What a registration is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Registered {
    /// Of a worker that was not known, or of another process at its address.
    New,
    /// Of one that was.
    Again,
    /// There is no room.
    Full,
}

impl Leases {
    pub(crate) fn new(lease: Duration, now: Instant) -> Self {
        Self {
            lease,
            held: BTreeMap::new(),
            looked: now,
        }
    }

    /// A worker is there. A process that takes another's address takes its place: it has the port.
    pub(crate) fn register(&mut self, now: Instant, address: &str, instance: u64) -> Registered {
        let until = now + self.lease;
        let is_full = self.held.len() >= MAX_REGISTERED;
        match self.held.get_mut(address) {
            Some(held) => {
                let before = std::mem::replace(held, Lease { instance, until });
                if before.instance == instance {
                    Registered::Again
                } else {
                    Registered::New
                }
            }
            None if is_full => Registered::Full,
            None => {
                self.held.insert(address.to_owned(), Lease { instance, until });
                Registered::New
            }
        }
    }

    /// A worker is leaving; whether it was there.
    pub(crate) fn deregister(&mut self, address: &str, instance: u64) -> bool {
        let is_held = self.held.get(address).is_some_and(|held| held.instance == instance);
        if is_held {
            self.held.remove(address);
        }
        is_held
    }

    /// Takes those away whose lease is over, and names them. Time in which this process stood still counts for nobody:
    /// what they said meanwhile has not been read yet.
    pub(crate) fn expire(&mut self, now: Instant) -> Vec<String> {
        let since = now.saturating_duration_since(self.looked);
        self.looked = now;
        if since > self.lease / 2 {
            for held in self.held.values_mut() {
                held.until += since;
            }
        }
        let gone: Vec<String> = (self.held.iter())
            .filter(|(_, held)| held.until <= now)
            .map(|(address, _)| address.clone())
            .collect();
        for address in &gone {
            self.held.remove(address);
        }
        gone
    }

    /// Who is there, sorted.
    pub(crate) fn addresses(&self) -> Vec<String> {
        self.held.keys().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_secs(3);

    #[test]
    fn a_worker_is_there_for_as_long_as_it_says_so() {
        let begun = Instant::now();
        let at = |seconds: f64| begun + Duration::from_secs_f64(seconds);
        let mut leases = Leases::new(LEASE, begun);
        assert_eq!(leases.register(at(0.0), "a:1", 1), Registered::New);
        assert_eq!(leases.register(at(0.0), "b:1", 2), Registered::New);
        for step in 1..=20 {
            let now = at(f64::from(step) * 0.25);
            if step < 10 {
                leases.register(now, "a:1", 1);
            }
            assert_eq!(leases.register(now, "b:1", 2), Registered::Again);
            let gone = leases.expire(now);
            // Last heard of at 2.25 s.
            assert_eq!(gone.is_empty(), step != 21 && now < at(5.25), "{step}: {gone:?}");
        }
        assert_eq!(leases.expire(at(5.25)), ["a:1"]);
        assert_eq!(leases.addresses(), ["b:1"]);
    }

    #[test]
    fn another_process_at_an_address_takes_it_and_the_first_cannot_take_it_away() {
        let now = Instant::now();
        let mut leases = Leases::new(LEASE, now);
        leases.register(now, "a:1", 1);
        assert_eq!(leases.register(now, "a:1", 2), Registered::New);
        assert!(!leases.deregister("a:1", 1));
        assert!(leases.deregister("a:1", 2));
        assert!(!leases.deregister("a:1", 2) && leases.addresses().is_empty());
    }

    #[test]
    fn a_gateway_that_stood_still_blames_nobody() {
        let begun = Instant::now();
        let mut leases = Leases::new(LEASE, begun);
        leases.register(begun, "a:1", 1);
        let woken = begun + Duration::from_secs(60);
        assert!(leases.expire(woken).is_empty());
        for step in 1..12 {
            assert!(leases.expire(woken + LEASE / 12 * step).is_empty());
        }
        assert_eq!(leases.expire(woken + LEASE), ["a:1"]);
    }

    #[test]
    fn there_is_room_for_so_many() {
        let now = Instant::now();
        let mut leases = Leases::new(LEASE, now);
        for index in 0..MAX_REGISTERED {
            leases.register(now, &format!("w{index}:1"), 1);
        }
        assert_eq!(leases.register(now, "more:1", 1), Registered::Full);
        assert_eq!(leases.register(now, "w0:1", 1), Registered::Again);
    }
}
