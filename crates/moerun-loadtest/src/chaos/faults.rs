//! What is broken, when, for how long: drawn from a seed before the run.

use std::{fmt, str::FromStr, time::Duration};

use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};

use super::ChaosConfig;

/// A way to break a worker or the way to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultKind {
    /// SIGKILL; started again after a while.
    Kill,
    /// SIGSTOP; SIGCONT after a while.
    Stop,
    /// All its answers come much later.
    Slow,
    /// Nothing goes through, in neither direction, and nobody is told.
    Partition,
    /// Requests go through, answers do not.
    OneWay,
    /// Its connections are reset.
    Reset,
    /// Bits of its answers are flipped.
    Corrupt,
}

impl FaultKind {
    /// All there are, with their names.
    pub const ALL: [(FaultKind, &str); 7] = [
        (FaultKind::Kill, "kill"),
        (FaultKind::Stop, "stop"),
        (FaultKind::Slow, "slow"),
        (FaultKind::Partition, "partition"),
        (FaultKind::OneWay, "one-way"),
        (FaultKind::Reset, "reset"),
        (FaultKind::Corrupt, "corrupt"),
    ];

    /// Longest that it may last, restart included.
    pub(super) fn longest(self) -> Duration {
        Duration::from_millis(match self {
            // Started again, the worker has to load.
            FaultKind::Kill => 3000,
            other => *other.millis().end(),
        })
    }

    /// How long it lasts; of a killed worker, how long it is not started again.
    fn millis(self) -> std::ops::RangeInclusive<u64> {
        match self {
            FaultKind::Kill => 300..=1500,
            // Long enough that a ping goes unanswered.
            FaultKind::Stop | FaultKind::Partition | FaultKind::OneWay => 3600..=5000,
            FaultKind::Slow | FaultKind::Corrupt => 1000..=3000,
            FaultKind::Reset => 100..=300,
        }
    }

    /// Whether it is done by a proxy before the worker.
    pub(super) fn needs_proxy(self) -> bool {
        !matches!(self, FaultKind::Kill | FaultKind::Stop)
    }
}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = Self::ALL.iter().find(|(kind, _)| kind == self);
        f.write_str(known.map_or("", |(_, name)| name))
    }
}

impl FromStr for FaultKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::ALL.iter().find(|(_, name)| *name == text);
        known.map(|&(kind, _)| kind).ok_or_else(|| {
            let names: Vec<&str> = Self::ALL.iter().map(|&(_, name)| name).collect();
            format!("wanted {}, found {text:?}", names.join(", "))
        })
    }
}

/// One fault of the schedule.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Planned {
    pub(super) kind: FaultKind,
    /// Which worker.
    pub(super) worker: usize,
    /// How long it lasts; of a killed worker, how long it is not started again.
    pub(super) lasts: Duration,
    /// How long nothing is broken after it.
    pub(super) then: Duration,
    /// For what it decides itself.
    pub(super) seed: u64,
}

impl Planned {
    /// The faults of a run, without end: each kind comes once before any comes twice, on workers as they are drawn. The
    /// same seed, kinds and number of workers give the same faults.
    pub(super) fn schedule(config: &ChaosConfig) -> impl Iterator<Item = Planned> + use<> {
        let (kinds, workers) = (config.faults.clone(), config.workers);
        let mut rng = ChaCha8Rng::seed_from_u64(config.seed);
        let mut left: Vec<FaultKind> = Vec::new();
        std::iter::from_fn(move || {
            if left.is_empty() {
                left.clone_from(&kinds);
            }
            if left.is_empty() {
                return None;
            }
            let kind = left.swap_remove(rng.random_range(0..left.len()));
            Some(Planned {
                kind,
                worker: rng.random_range(0..workers),
                lasts: Duration::from_millis(rng.random_range(kind.millis())),
                // Five seconds to heal, and some to be judged.
                then: Duration::from_millis(rng.random_range(6500..8000)),
                seed: rng.random(),
            })
        })
    }

    /// Whether figures and logs must tell of it: a slow worker that answers is none that they know of.
    pub(super) fn must_show(&self) -> bool {
        self.kind != FaultKind::Slow
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(seed: u64) -> ChaosConfig {
        ChaosConfig {
            seed,
            workers: 3,
            faults: FaultKind::ALL.map(|(kind, _)| kind).to_vec(),
            ..ChaosConfig::new("moerun", "model", "report")
        }
    }

    #[test]
    fn a_seed_gives_its_faults_again_and_another_gives_others() {
        let draw = |seed| Planned::schedule(&config(seed)).take(30).collect::<Vec<_>>();
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
        for seed in 0..50 {
            let drawn = draw(seed);
            for round in drawn.chunks(FaultKind::ALL.len()).take(4) {
                for (kind, _) in FaultKind::ALL {
                    assert_eq!(round.iter().filter(|it| it.kind == kind).count(), 1, "seed {seed}");
                }
            }
            assert!(
                drawn
                    .iter()
                    .all(|fault| fault.worker < 3 && fault.lasts <= fault.kind.longest())
            );
        }
    }

    #[test]
    fn faults_have_names() {
        for (kind, name) in FaultKind::ALL {
            assert_eq!(name.parse::<FaultKind>().unwrap(), kind);
            assert_eq!(kind.to_string(), name);
        }
        let error = "melt".parse::<FaultKind>().unwrap_err();
        assert!(error.contains("kill, stop") && error.contains("melt"), "{error}");
    }
}
