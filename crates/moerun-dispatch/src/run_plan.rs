//! Which workers a dispatch may ask: one immutable value with an epoch, and the choice among the holders of an expert.

use std::sync::Arc;

use moerun_routing::{Candidates, Placement, PlanError};
use moerun_types::{ExpertSlice, ModelConfig};
use rand::{RngExt, rngs::StdRng};
use tokio::time::Instant;

use crate::{
    health::{SizeClass, Standing},
    member::Member,
};

/// A worker that gets rows of this dispatch anyway is taken if it costs at most this many times the best other: a message
/// less is worth a little.
const NEAR_TIE: f64 = 1.25;

/// Members, and which of them hold what. A dispatch finishes on the plan it began with.
#[derive(Debug)]
pub(crate) struct RunPlan {
    /// Greater than that of the plan before it.
    pub(crate) epoch: u64,
    /// By position in `members`.
    pub(crate) placement: Placement,
    /// In the order given.
    pub(crate) members: Vec<Arc<Member>>,
}

impl RunPlan {
    /// Over what each of `members` may be asked for so far.
    pub(crate) fn new(
        epoch: u64,
        config: &ModelConfig,
        num_blocks: usize,
        members: Vec<Arc<Member>>,
    ) -> Result<Self, PlanError> {
        let held: Vec<Vec<ExpertSlice>> = members.iter().map(|member| member.usable()).collect();
        Ok(Self {
            epoch,
            placement: Placement::new(config, num_blocks, &held)?,
            members,
        })
    }
}

/// Chooses holders for one dispatch, or for what is to be sent again of it.
pub(crate) struct Chooser<'a> {
    plan: &'a RunPlan,
    tried: &'a [usize],
    only_good: bool,
    class: SizeClass,
    now: Instant,
    random: &'a mut StdRng,
    /// What is known of each member, once it was asked for.
    known: Vec<Option<Known>>,
}

#[derive(Debug, Clone, Copy)]
struct Known {
    standing: Option<Standing>,
    /// Seconds that a call takes with nothing before it.
    cost: f64,
    /// Assignments of a usual call.
    usual_call: f64,
    /// Assignments before it, those given by this choice included.
    before: u64,
    /// Whether this choice gave it any.
    used: bool,
}

impl<'a> Chooser<'a> {
    /// For calls of about `class`, on members that are not in `tried`.
    pub(crate) fn new(
        plan: &'a RunPlan,
        tried: &'a [usize],
        class: SizeClass,
        now: Instant,
        random: &'a mut StdRng,
    ) -> Self {
        Self {
            plan,
            tried,
            only_good: false,
            class,
            now,
            random,
            known: vec![None; plan.members.len()],
        }
    }

    /// The same, but suspect and ejected members are not taken even as the last.
    pub(crate) fn only_good(self) -> Self {
        Self {
            only_good: true,
            ..self
        }
    }

    /// A live holder: of those that are neither suspect nor ejected the better of two chosen at random, by expected latency
    /// times one more than the usual calls that are in flight; if there is none, of the others. `None` if no holder lives or all have been tried.
    pub(crate) fn choose(&mut self, run: Candidates<'_>) -> Option<usize> {
        let mut good = Vec::with_capacity(run.holders.len());
        let mut others = Vec::new();
        for worker in run.holders.iter().map(|&worker| worker as usize) {
            if self.tried.contains(&worker) {
                continue;
            }
            match self.known(worker).standing {
                Some(Standing::Good) => good.push(worker),
                Some(Standing::Suspect | Standing::Ejected) if !self.only_good => others.push(worker),
                _ => {}
            }
        }
        let candidates = if good.is_empty() { others } else { good };
        let chosen = self.best(&candidates)?;
        let rows = run.rows as u64;
        if let Some(known) = &mut self.known[chosen] {
            known.before += rows;
            known.used = true;
        }
        Some(chosen)
    }

    fn best(&mut self, candidates: &[usize]) -> Option<usize> {
        let best = match candidates {
            [] => return None,
            &[only] => return Some(only),
            several => {
                let first = self.random.random_range(0..several.len());
                let second = self.random.random_range(0..several.len() - 1);
                let second = second + usize::from(second >= first);
                let (one, other) = (several[first], several[second]);
                if self.expected(one) <= self.expected(other) {
                    one
                } else {
                    other
                }
            }
        };
        let limit = self.expected(best) * NEAR_TIE;
        let used = candidates.iter().copied().filter(|&worker| self.is_used(worker));
        let cheapest = used.min_by(|&one, &other| self.expected(one).total_cmp(&self.expected(other)));
        Some(
            cheapest
                .filter(|&worker| self.expected(worker) <= limit)
                .unwrap_or(best),
        )
    }

    fn known(&mut self, worker: usize) -> Known {
        let (plan, now, class) = (self.plan, self.now, self.class);
        *self.known[worker].get_or_insert_with(|| {
            let member = &plan.members[worker];
            let standing = member.standing(now);
            let (cost, usual_call, before) = member.load(now, class);
            Known {
                standing,
                cost,
                usual_call,
                before,
                used: false,
            }
        })
    }

    fn expected(&self, worker: usize) -> f64 {
        self.known[worker].map_or(f64::INFINITY, |known| {
            known.cost * (1.0 + known.before as f64 / known.usual_call)
        })
    }

    fn is_used(&self, worker: usize) -> bool {
        self.known[worker].is_some_and(|known| known.used)
    }
}

#[cfg(test)]
mod tests {
    use std::{path::Path, time::Duration};

    use moerun_proto::HeldExpert;
    use moerun_routing::{Assignment, ShardSpec, whole_assignments};
    use moerun_types::{CombineMode, NumberFormat, Numerics};
    use moerun_weights::{Checkpoint, Needs};
    use rand::SeedableRng;
    use tokio::sync::mpsc;

    use super::*;
    use crate::stats::FailureReason;

    const MS: Duration = Duration::from_millis(1);

    /// Members that are up and hold everything.
    struct Case {
        plan: RunPlan,
        random: StdRng,
    }

    impl Case {
        fn new(members: usize) -> Self {
            let dir = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/qwen3_moe"));
            let checkpoint = Checkpoint::open(dir, Needs::All).unwrap();
            let (config, numerics) = (
                checkpoint.config(),
                Numerics {
                    format: NumberFormat::F32,
                    combine: CombineMode::Exact,
                    combine_block: 8,
                },
            );
            let held: Vec<HeldExpert> = ShardSpec::All
                .resolve(config, &numerics)
                .unwrap()
                .into_iter()
                .map(|slice| HeldExpert {
                    slice,
                    block_hashes: Vec::new(),
                })
                .collect();
            let members = (0..members).map(|index| {
                let member = Member::new(format!("worker-{index}"));
                member.announce(held.clone());
                member.link.up(mpsc::channel(1).0, 1002);
                Arc::new(member)
            });
            let blocks = numerics.num_blocks(config.moe.as_ref().unwrap().intermediate);
            Self {
                plan: RunPlan::new(1, config, blocks, members.collect()).unwrap(),
                random: StdRng::seed_from_u64(7),
            }
        }

        fn chooser<'a>(&'a mut self, tried: &'a [usize]) -> Chooser<'a> {
            Chooser::new(&self.plan, tried, SizeClass::Small, Instant::now(), &mut self.random)
        }

        fn took(&self, member: usize, latency: Duration) {
            let member = &self.plan.members[member];
            for _ in 0..16 {
                member.sent(SizeClass::Small, 1, Duration::from_secs(1));
                member.succeeded(Instant::now(), SizeClass::Small, latency, 1);
            }
        }

        fn suspect(&self, member: usize) {
            let member = &self.plan.members[member];
            member.sent(SizeClass::Small, 1, Duration::from_secs(1));
            member.overdue(Instant::now(), FailureReason::Overdue, SizeClass::Small, MS, 1);
        }
    }

    /// How often each of the holders is chosen for one row, of `times`.
    fn shares(chooser: &mut Chooser<'_>, holders: &[u32], times: usize) -> Vec<usize> {
        let mut shares = vec![0; holders.len()];
        for _ in 0..times {
            let chosen = chooser.choose(Candidates { holders, rows: 1 });
            shares[chosen.expect("somebody lives")] += 1;
        }
        shares
    }

    #[test]
    fn equals_share_the_work_of_one_dispatch() {
        let mut case = Case::new(3);
        let shares = shares(&mut case.chooser(&[]), &[0, 1, 2], 300);
        assert!(shares.iter().all(|share| (80..=120).contains(share)), "{shares:?}");
    }

    #[test]
    fn a_worker_ten_times_as_slow_gets_about_a_tenth() {
        let mut case = Case::new(2);
        case.took(0, 10 * MS);
        case.took(1, MS);
        let shares = shares(&mut case.chooser(&[]), &[0, 1], 220);
        assert!((10..=33).contains(&shares[0]), "{shares:?}");
    }

    #[test]
    fn suspects_are_asked_only_as_the_last() {
        let mut case = Case::new(3);
        case.suspect(0);
        assert_eq!(shares(&mut case.chooser(&[]), &[0, 1], 50), [0, 50]);
        let run = Candidates {
            holders: &[0, 1],
            rows: 1,
        };
        assert_eq!(case.chooser(&[1]).choose(run), Some(0), "the last holder");
        assert_eq!(case.chooser(&[1]).only_good().choose(run), None);
        assert_eq!(case.chooser(&[0, 1]).choose(run), None, "all have been tried");
        case.plan.members[1].link.down("it left");
        assert_eq!(case.chooser(&[]).choose(run), Some(0), "the other does not live");
        case.plan.members[0].link.down("it left too");
        assert_eq!(case.chooser(&[]).choose(run), None);
    }

    #[test]
    fn an_ejected_worker_is_asked_again_when_its_time_has_passed() {
        let mut case = Case::new(2);
        let now = Instant::now();
        for _ in 0..3 {
            case.plan.members[0].sent(SizeClass::Small, 1, Duration::from_secs(1));
            case.plan.members[0].failed(now, FailureReason::Internal, 1);
        }
        let run = Candidates {
            holders: &[0, 1],
            rows: 1,
        };
        let mut at = |now| {
            let mut chooser = Chooser::new(&case.plan, &[], SizeClass::Small, now, &mut case.random);
            (0..20).any(|_| chooser.choose(run) == Some(0))
        };
        assert!(!at(now));
        assert!(at(now + Duration::from_secs(1)));
    }

    #[test]
    fn the_same_seed_gives_the_same_choice() {
        let work: Vec<Assignment> = whole_assignments(
            &moerun_routing::Routing {
                top_k: 2,
                expert_ids: [0, 1, 2, 3, 4, 5].map(moerun_types::ExpertId).to_vec(),
                routing_weights: vec![0.5; 6],
            },
            Case::new(1).plan.placement.num_blocks().into(),
        )
        .collect();
        let plan = || {
            let mut case = Case::new(4);
            let (plan, random) = (&case.plan, &mut case.random);
            let mut chooser = Chooser::new(plan, &[], SizeClass::Small, Instant::now(), random);
            plan.placement
                .plan_layer(moerun_types::LayerId(0), &work, &mut |run| chooser.choose(run))
        };
        assert_eq!(plan(), plan());
    }
}
