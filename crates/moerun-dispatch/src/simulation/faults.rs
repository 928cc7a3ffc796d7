//! What is done to the network and the workers, and when: drawn from the seed.

use std::{fmt, sync::Arc, time::Duration};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use turmoil::Sim;

use super::{
    gateway::Shared,
    network::{WORKERS, worker_address, worker_name},
    parts::MEMBERS,
};

/// After messages were lost: until pings have found the connections that lost them.
const PINGS: Duration = Duration::from_millis(2600);
/// Longest that a cluster may take to be whole again after a fault is over.
const HEALS_WITHIN: Duration = Duration::from_secs(20);
/// Undisturbed, before the first fault and after the last: latencies are known by then.
const QUIET: Duration = Duration::from_millis(1500);
/// What messages take when nothing is slow.
const USUAL_LATENCY: Duration = Duration::from_millis(1);

/// What does not change during a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Setup {
    pub(super) seed: u64,
    /// Of each expert among the first members. With one, the gateway computes what is lost.
    pub(super) holders: usize,
}

/// A fault, of a worker where it has a number.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    /// Row 1: killed, and started again after so long.
    Crash(usize, Duration),
    /// Row 3: as a stopped process: nothing is lost, all comes late.
    Hold(usize, Duration),
    /// Rows 4 and 9: every message takes so long, for so long.
    Slow(usize, Duration, Duration),
    /// Row 5: nothing goes through, both ways.
    Partition(usize, Duration),
    /// Row 6: requests go through, answers do not.
    OneWay(usize, Duration),
    /// Row 7: partitions one after another, so long each, so many times.
    Flap(usize, Duration, usize),
    /// Row 8: packets that TCP sends again come so much later, again and again.
    Lossy(usize, Duration, usize),
    /// Row 29: another worker joins, that one leaves, and comes back after so long.
    Swap(usize, Duration),
}

/// A step of the run.
#[derive(Debug, Clone, Copy)]
enum Step {
    Wait(Duration),
    /// Until the gateway is connected to all members.
    Whole,
    Do(Action),
}

#[derive(Debug, Clone, Copy)]
enum Action {
    Crash(usize),
    Bounce(usize),
    Hold(usize),
    Release(usize),
    Latency(usize, Duration),
    Partition(usize),
    Repair(usize),
    MuteAnswers(usize),
    RepairAnswers(usize),
    /// These are the members from now on, a bit each.
    Members(u8),
}

/// All that a seed decides.
#[derive(Debug, Clone)]
pub(super) struct Schedule {
    pub(super) setup: Setup,
    faults: Vec<Fault>,
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} holders, {:?}", self.setup.holders, self.faults)
    }
}

impl Schedule {
    pub(super) fn of(seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let setup = Setup {
            seed,
            holders: if random.random_range(0..4) == 0 { 1 } else { 2 },
        };
        let num_faults = random.random_range(1..=2);
        Self {
            setup,
            faults: (0..num_faults).map(|_| Fault::draw(&mut random)).collect(),
        }
    }

    /// Nothing is broken.
    pub(super) fn quiet(seed: u64) -> Self {
        Self {
            setup: Setup { seed, holders: 2 },
            faults: Vec::new(),
        }
    }

    fn steps(&self) -> Vec<Step> {
        let mut steps = vec![Step::Whole, Step::Wait(QUIET)];
        for fault in &self.faults {
            fault.push(&mut steps);
            steps.push(Step::Whole);
        }
        steps.push(Step::Wait(QUIET));
        steps
    }
}

impl Fault {
    fn draw(random: &mut StdRng) -> Self {
        let worker = random.random_range(0..MEMBERS);
        let mut millis = |from: u64, to: u64| Duration::from_millis(random.random_range(from..to));
        let (short, middle, long) = (millis(100, 800), millis(200, 2000), millis(300, 4000));
        match random.random_range(0..8) {
            0 => Fault::Crash(worker, middle),
            1 => Fault::Hold(worker, long),
            2 => Fault::Slow(worker, short / 10, middle),
            3 => Fault::Partition(worker, long),
            4 => Fault::OneWay(worker, long),
            5 => Fault::Flap(worker, short, 3),
            6 => Fault::Lossy(worker, Duration::from_millis(200) + short / 4, 4),
            _ => Fault::Swap(worker, middle),
        }
    }

    fn push(self, steps: &mut Vec<Step>) {
        use Action::{Bounce, Crash, Hold, Latency, Members, MuteAnswers, Partition, Release, Repair, RepairAnswers};
        match self {
            Fault::Crash(worker, lasts) => steps.extend(between(Crash(worker), lasts, Bounce(worker))),
            Fault::Hold(worker, lasts) => steps.extend(between(Hold(worker), lasts, Release(worker))),
            Fault::Slow(worker, by, lasts) => {
                steps.extend(between(Latency(worker, by), lasts, Latency(worker, USUAL_LATENCY)));
            }
            Fault::Partition(worker, lasts) => steps.extend(between(Partition(worker), lasts, Repair(worker))),
            Fault::OneWay(worker, lasts) => steps.extend(between(MuteAnswers(worker), lasts, RepairAnswers(worker))),
            Fault::Flap(worker, lasts, times) => {
                for _ in 0..times {
                    steps.extend(between(Partition(worker), lasts, Repair(worker)));
                    steps.push(Step::Wait(lasts));
                }
            }
            Fault::Lossy(worker, late, times) => {
                for _ in 0..times {
                    steps.extend(between(Hold(worker), late, Release(worker)));
                    steps.push(Step::Wait(late / 2));
                }
            }
            Fault::Swap(worker, lasts) => {
                let all: u8 = (1 << MEMBERS) - 1;
                let joined = all | 1 << MEMBERS;
                steps.extend([Step::Do(Members(joined)), Step::Whole]);
                steps.extend([Step::Do(Members(joined & !(1 << worker))), Step::Wait(lasts)]);
                steps.extend([Step::Do(Members(joined)), Step::Whole, Step::Do(Members(all))]);
            }
        }
        if !matches!(self, Fault::Slow(..) | Fault::Swap(..)) {
            steps.push(Step::Wait(PINGS));
        }
    }
}

fn between(before: Action, lasts: Duration, after: Action) -> [Step; 3] {
    [Step::Do(before), Step::Wait(lasts), Step::Do(after)]
}

/// Takes a schedule's steps as simulated time passes.
pub(super) struct Drive {
    steps: Vec<Step>,
    next: usize,
    /// When the step before was taken.
    since: Duration,
    shared: Arc<Shared>,
}

impl Drive {
    pub(super) fn new(schedule: Schedule, shared: Arc<Shared>) -> Self {
        Self {
            steps: schedule.steps(),
            next: 0,
            since: Duration::ZERO,
            shared,
        }
    }

    /// Takes all steps that are due; tells the gateway to end after the last.
    pub(super) fn step(&mut self, sim: &mut Sim<'static>) -> Result<(), String> {
        while let Some(&step) = self.steps.get(self.next) {
            let waited = sim.elapsed() - self.since;
            let due = match step {
                Step::Wait(time) => waited >= time,
                Step::Whole if waited > HEALS_WITHIN => {
                    return Err(format!("not whole again {waited:?} after step {}", self.next));
                }
                Step::Whole => self.shared.is_whole(),
                Step::Do(action) => {
                    self.act(action, sim);
                    true
                }
            };
            if !due {
                return Ok(());
            }
            self.next += 1;
            self.since = sim.elapsed();
        }
        self.shared.end();
        Ok(())
    }

    fn act(&self, action: Action, sim: &mut Sim<'static>) {
        let gateway = "gateway";
        match action {
            Action::Crash(worker) => sim.crash(worker_name(worker)),
            Action::Bounce(worker) => sim.bounce(worker_name(worker)),
            Action::Hold(worker) => sim.hold(gateway, worker_name(worker)),
            Action::Release(worker) => sim.release(gateway, worker_name(worker)),
            Action::Latency(worker, latency) => sim.set_link_latency(gateway, worker_name(worker), latency),
            Action::Partition(worker) => sim.partition(gateway, worker_name(worker)),
            Action::Repair(worker) => sim.repair(gateway, worker_name(worker)),
            Action::MuteAnswers(worker) => sim.partition_oneway(worker_name(worker), gateway),
            Action::RepairAnswers(worker) => sim.repair_oneway(worker_name(worker), gateway),
            Action::Members(members) => {
                let are = (0..WORKERS).filter(|worker| members & 1 << worker != 0);
                self.shared.set_members(are.map(worker_address).collect());
            }
        }
    }
}
