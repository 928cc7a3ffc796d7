//! The dispatch over a simulated network with simulated time: real workers' code, real HTTP/2, no sockets. A seed decides the
//! faults, their times and every delay; one that fails is printed with the command that runs it again.
//!
//! Rows 1, 3, 5–9, 11 and 29 of the fault matrix. `MOERUN_SIM_SEEDS` says how many seeds (200), `MOERUN_SIM_SEED` runs one.

mod faults;
mod gateway;
mod network;
mod parts;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use faults::{Drive, Schedule};
use gateway::{Ended, Shared};
use network::{WORKERS, sim, worker_name};

/// Seeds of the normal test run.
const SEEDS: u64 = 200;
/// Threads that run them side by side.
const THREADS: u64 = 2;

/// Runs one seed to its end; an error says what was violated.
fn simulate(seed: u64) -> Result<Ended, String> {
    let schedule = Schedule::of(seed);
    let shared = Arc::new(Shared::default());
    let mut sim = sim(seed);
    for index in 0..WORKERS {
        let holder = parts::holder(&schedule, index);
        sim.host(worker_name(index), move || network::serve(holder));
    }
    sim.client("gateway", gateway::run(schedule.setup, Arc::clone(&shared)));
    let mut drive = Drive::new(schedule, Arc::clone(&shared));
    while !sim.step().map_err(|error| error.to_string())? {
        drive.step(&mut sim)?;
    }
    let ended = shared.ended().ok_or("the gateway said nothing")?;
    match &ended.violations[..] {
        [] => Ok(ended),
        violations => Err(violations.join("\n  ")),
    }
}

fn describe(seed: u64, violated: &str) -> String {
    format!(
        "seed {seed}: {}\n  {violated}\n  again: MOERUN_SIM_SEED={seed} cargo test --release -p moerun-dispatch simulation",
        Schedule::of(seed)
    )
}

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn whatever_the_network_does_the_bits_are_those_of_an_undisturbed_run() {
    let seeds = match variable("MOERUN_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..variable("MOERUN_SIM_SEEDS").unwrap_or(SEEDS),
    };
    let begun = Instant::now();
    let (next, end) = (AtomicU64::new(seeds.start), seeds.end);
    let results: Vec<Result<Ended, String>> = thread::scope(|scope| {
        let run = || {
            let mut results = Vec::new();
            loop {
                let seed = next.fetch_add(1, Relaxed);
                if seed >= end {
                    return results;
                }
                results.push(simulate(seed).map_err(|violated| describe(seed, &violated)));
            }
        };
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(run)).collect();
        let joined = threads
            .into_iter()
            .map(|thread| thread.join().expect("seeds do not panic"));
        joined.flatten().collect()
    });
    let failed: Vec<&str> = results
        .iter()
        .filter_map(|it| it.as_ref().err())
        .map(String::as_str)
        .collect();
    assert!(
        failed.is_empty(),
        "{} seeds failed:\n{}",
        failed.len(),
        failed.join("\n")
    );

    let all: Vec<&Ended> = results.iter().flatten().collect();
    let sum = |of: fn(&Ended) -> u64| all.iter().map(|ended| of(ended)).sum::<u64>();
    let longest = all.iter().map(|ended| ended.longest).max().unwrap_or_default();
    eprintln!(
        "simulation: {} seeds in {:.1} s, {:.0} s simulated; {} dispatches, 0 with other bits, 0 failed, longest {longest:?}; {} \
         calls, {} retries, {} hedges, {} connections lost, {} late answers dropped, {} experts computed at the gateway",
        all.len(),
        begun.elapsed().as_secs_f64(),
        all.iter().map(|ended| ended.simulated.as_secs_f64()).sum::<f64>(),
        sum(|it| it.dispatches),
        sum(|it| it.calls),
        sum(|it| it.retries),
        sum(|it| it.hedges),
        sum(|it| it.connections_lost),
        sum(|it| it.late_answers),
        sum(|it| it.local_assignments),
    );
    if all.len() >= 50 {
        // Faults that met nothing prove nothing.
        for (what, count) in [
            ("retries", sum(|it| it.retries)),
            ("hedges", sum(|it| it.hedges)),
            ("connections lost", sum(|it| it.connections_lost)),
            ("late answers", sum(|it| it.late_answers)),
            ("experts computed at the gateway", sum(|it| it.local_assignments)),
        ] {
            assert!(count > 0, "no {what} in {} seeds", all.len());
        }
    }
}

#[test]
fn a_gateway_that_dies_leaves_nothing_in_its_workers_and_is_served_again() {
    for seed in 0..20 {
        let schedule = Schedule::quiet(seed);
        let (one, other) = (Arc::new(Shared::default()), Arc::new(Shared::default()));
        let mut sim = sim(seed);
        for index in 0..WORKERS {
            let holder = parts::holder(&schedule, index);
            sim.host(worker_name(index), move || network::serve(holder));
        }
        sim.client("gateway", gateway::run(schedule.setup, Arc::clone(&one)));
        let (setup, theirs) = (schedule.setup, Arc::clone(&other));
        sim.host("other", move || gateway::run(setup, Arc::clone(&theirs)));
        let dies = Duration::from_millis(1000 + 37 * seed);
        sim.client("observer", gateway::nothing_is_left(dies + Duration::from_secs(5)));
        let (mut died, mut back) = (false, false);
        let mut step = || {
            if !died && sim.elapsed() >= dies {
                assert!(other.is_whole(), "seed {seed}: it was not there");
                sim.crash("other");
                other.forget();
                died = true;
            }
            if !back && sim.elapsed() >= dies + Duration::from_secs(6) {
                sim.bounce("other");
                back = true;
            }
            if back && other.is_whole() {
                assert!(
                    sim.elapsed() < dies + Duration::from_secs(8),
                    "seed {seed}: it is back late"
                );
                one.end();
            }
            sim.step().unwrap_or_else(|error| panic!("seed {seed}: {error}"))
        };
        while !step() {}
        let ended = one.ended().expect("the gateway ended");
        assert!(ended.violations.is_empty(), "seed {seed}: {:?}", ended.violations);
    }
}

#[test]
fn a_seed_gives_the_same_run_again() {
    for seed in 0..variable("MOERUN_SIM_REPEATS").unwrap_or(6) {
        let [one, other] = [simulate(seed), simulate(seed)].map(|ended| ended.unwrap_or_else(|it| panic!("{it}")));
        let differs = one.trace.iter().zip(&other.trace).position(|(one, other)| one != other);
        assert!(differs.is_none(), "{}: dispatch {differs:?}", Schedule::of(seed));
        assert_eq!(one.trace.len(), other.trace.len(), "seed {seed}");
        assert!(one.trace.len() > 50 && one.longest < Duration::from_secs(10));
    }
}
