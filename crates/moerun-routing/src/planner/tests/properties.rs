//! What holds for every plan, whatever is asked.

use std::collections::BTreeMap;

use moerun_types::{ExpertSlice, LayerId};
use proptest::prelude::*;

use super::cases::{BLOCK_BYTES, request, zipf};
use crate::planner::{Layout, PlacementPlan, PlanRequest, PlannerError, apart::Domains, plan};

/// Holders of every block of every expert.
fn holders(held: &[Vec<ExpertSlice>]) -> BTreeMap<(LayerId, u16, u16), Vec<usize>> {
    let mut holders: BTreeMap<_, Vec<usize>> = BTreeMap::new();
    for (worker, held) in held.iter().enumerate() {
        for slice in held {
            for block in slice.blocks.first..slice.blocks.end {
                holders
                    .entry((slice.layer, slice.expert.0, block))
                    .or_default()
                    .push(worker);
            }
        }
    }
    holders
}

fn with_present(request: &PlanRequest, plan: &PlacementPlan) -> PlanRequest {
    let names = request.workers.iter().map(|worker| worker.name.clone());
    PlanRequest {
        present: names.zip(plan.held.iter().cloned()).collect(),
        ..request.clone()
    }
}

prop_compose! {
    fn layouts(num_experts: usize, num_blocks: u64)(
        kind in 0..4, slices in 1..=num_blocks, busiest in 1..=num_experts,
    ) -> Option<Layout> {
        match kind {
            0 => None,
            1 => Some(Layout::Whole),
            2 => Some(Layout::Slices(slices as u16)),
            _ => Some(Layout::Mix { busiest: busiest as u16, slices: slices as u16 }),
        }
    }
}

prop_compose! {
    /// Memory between what is just enough for an even placement and twice that, unequal by up to three.
    fn requests()(
        layers in 1..4usize, num_experts in 2..12usize, num_blocks in 1..6u64, num_workers in 1..8usize,
    )(
        layout in layouts(num_experts, num_blocks),
        replicas in 1..=num_workers.min(3),
        exponent in 0.0..1.5f64,
        seed in 0..1000u64,
        memory in prop::collection::vec(0.5..2.0f64, num_workers),
        bandwidth in prop::collection::vec(1e9..4e9f64, num_workers),
        domain in prop::collection::vec(0..4u8, num_workers),
        (layers, num_experts, num_blocks, num_workers) in Just((layers, num_experts, num_blocks, num_workers)),
    ) -> PlanRequest {
        let loads: Vec<Vec<f64>> = (0..layers).map(|layer| zipf(num_experts, exponent, seed + layer as u64)).collect();
        let mut request = request(&loads, num_workers, 1, num_blocks);
        let all = BLOCK_BYTES * num_blocks * (num_experts * layers * replicas) as u64;
        for (index, worker) in request.workers.iter_mut().enumerate() {
            worker.memory_bytes = (all as f64 / num_workers as f64 * memory[index]) as u64 + BLOCK_BYTES;
            worker.bandwidth = bandwidth[index];
            worker.domain = (domain[index] > 0).then(|| format!("rack{}", domain[index]));
        }
        request.layout = layout;
        request.replicas = replicas;
        request.seed = seed;
        request
    }
}

/// What no plan could do better: places in all, each piece once a worker and as often as allowed in a domain.
fn places_of_whole_experts(request: &PlanRequest) -> usize {
    let domains = Domains::new(&request.workers);
    let pieces = request.num_experts * request.moe_layers.len();
    let bytes = request.size.bytes(usize::from(request.size.num_blocks()));
    let mut in_domain = vec![0; domains.len()];
    for (index, worker) in request.workers.iter().enumerate() {
        in_domain[domains.of(index)] += ((worker.memory_bytes / bytes) as usize).min(pieces);
    }
    let most = domains.most_together(request.replicas) * pieces;
    in_domain.iter().map(|&places| places.min(most)).sum()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_block_has_its_holders_apart_and_within_memory(request in requests()) {
        let plan = match plan(&request) {
            Ok(plan) => plan,
            Err(PlannerError::DoesNotFit(shortage)) => {
                let wanted = shortage.pieces * shortage.replicas;
                prop_assert!(shortage.places < wanted, "{shortage}");
                if request.layout == Some(Layout::Whole) {
                    prop_assert_eq!(wanted, request.num_experts * request.moe_layers.len() * request.replicas);
                    prop_assert!(places_of_whole_experts(&request) < wanted, "{}", shortage);
                }
                return Ok(());
            }
            // Enough memory, but in workers that may not share: only domains can bring that about.
            Err(PlannerError::Apart { .. }) if request.workers.iter().any(|worker| worker.domain.is_some()) => return Ok(()),
            Err(error) => return Err(TestCaseError::fail(error.to_string())),
        };
        let domains = Domains::new(&request.workers);
        let most = domains.most_together(request.replicas);
        let holders = holders(&plan.held);
        let blocks = usize::from(request.size.num_blocks());
        prop_assert_eq!(holders.len(), request.moe_layers.len() * request.num_experts * blocks);
        for (block, holders) in &holders {
            prop_assert_eq!(holders.len(), request.replicas, "{:?}", block);
            for &holder in holders {
                let together = holders.iter().filter(|&&other| domains.of(other) == domains.of(holder)).count();
                prop_assert!(together <= most, "{:?}: {:?}", block, holders);
            }
        }
        for (worker, held) in request.workers.iter().zip(&plan.held) {
            let bytes: u64 = held.iter().map(|slice| slice.blocks.len() as u64 * BLOCK_BYTES).sum();
            prop_assert!(bytes <= worker.memory_bytes, "{} holds {bytes} of {}", worker.name, worker.memory_bytes);
        }
        for (found, held) in plan.prediction.workers.iter().zip(&plan.held) {
            let bytes: u64 = held.iter().map(|slice| slice.blocks.len() as u64 * BLOCK_BYTES).sum();
            prop_assert_eq!(found.memory_bytes, bytes);
            prop_assert_eq!(found.moved_bytes, bytes, "from nothing everything is fetched");
        }
    }

    #[test]
    fn shares_sum_to_one_over_the_holders(request in requests()) {
        let Ok(plan) = plan(&request) else { return Ok(()) };
        let holders = holders(&plan.held);
        let mut covered = 0;
        for piece in &plan.shares {
            let sum: f64 = piece.holders.iter().map(|&(_, share)| share).sum();
            prop_assert!((sum - 1.0).abs() < 1e-9 && piece.holders.iter().all(|&(_, share)| share >= 0.0));
            for block in piece.slice.blocks.first..piece.slice.blocks.end {
                let of: Vec<usize> = piece.holders.iter().map(|&(worker, _)| worker).collect();
                prop_assert_eq!(&of, &holders[&(piece.slice.layer, piece.slice.expert.0, block)]);
                covered += 1;
            }
        }
        prop_assert_eq!(covered, holders.len());
        // The loads that follow from the shares are those that are predicted.
        let worker_load: f64 = plan.prediction.workers.iter().map(|worker| worker.load).sum();
        prop_assert!((worker_load - 1.0).abs() < 1e-9);
        for balance in plan.prediction.layers.iter().map(|layer| layer.balance).chain([plan.prediction.balance]) {
            prop_assert!((0.0..=1.0 + 1e-9).contains(&balance), "{}", balance);
        }
    }

    #[test]
    fn the_same_request_gives_the_same_plan_and_nothing_moves_from_it(request in requests(), other_seed in 0..1000u64) {
        let Ok(first) = plan(&request) else { return Ok(()) };
        prop_assert_eq!(&plan(&request).expect("as before"), &first);
        let again = plan(&with_present(&request, &first)).expect("it fitted");
        prop_assert_eq!(again.prediction.moved_bytes, 0, "{:?}", (first.held, again.held));

        // Other loads: what moves is settled at once.
        let mut changed = with_present(&request, &first);
        changed.loads = super::cases::request(
            &vec![zipf(request.num_experts, 1.0, other_seed); request.moe_layers.len()], 1, 1, 1,
        ).loads;
        let Ok(second) = plan(&changed) else { return Ok(()) };
        let settled = plan(&with_present(&changed, &second)).expect("it fitted");
        prop_assert_eq!(settled.prediction.moved_bytes, 0);
    }

    #[test]
    fn with_room_everywhere_nothing_is_refused(request in requests()) {
        let mut request = request;
        for worker in &mut request.workers {
            worker.memory_bytes = u64::MAX / 64;
        }
        prop_assert!(plan(&request).is_ok());
    }
}

/// One more worker takes its part of the work, and little else moves.
#[test]
fn a_new_worker_gets_its_part_and_little_else_moves() {
    let layers: Vec<Vec<f64>> = (0..4).map(|seed| zipf(64, 0.8, seed)).collect();
    let mut request = request(&layers, 8, 20, 1);
    request.replicas = 2;
    let before = plan(&request).expect("it fits");
    let mut request = with_present(&request, &before);
    request
        .workers
        .push(super::cases::worker("new", request.workers[0].memory_bytes));
    let after = plan(&request).expect("it fits");
    let all = 4 * 64 * 2 * BLOCK_BYTES;
    let part = after.prediction.workers[8].moved_bytes;
    assert!(
        part >= all / 10 && part <= all / 8,
        "the new worker fetches {part} of {all}"
    );
    let others = after.prediction.moved_bytes - part;
    assert!(others * 20 <= all, "the others fetch {others} of {all}");
    assert!(after.prediction.balance > 0.99, "{:?}", after.prediction.balance);
    assert!(after.prediction.after_worst_death.expect("nine").balance > 0.94);
}

/// A worker is gone: the others fetch what it held and hardly more.
#[test]
fn after_a_death_only_what_was_lost_is_fetched() {
    let layers: Vec<Vec<f64>> = (0..4).map(|seed| zipf(64, 0.8, seed)).collect();
    let mut request = request(&layers, 8, 20, 1);
    request.replicas = 2;
    let before = plan(&request).expect("it fits");
    let mut request = with_present(&request, &before);
    let lost = request.workers.remove(3);
    let held: usize = before.held[3].len();
    let after = plan(&request).expect("it fits");
    let moved = after.prediction.moved_bytes;
    let needed = held as u64 * BLOCK_BYTES;
    assert!(
        moved >= needed && moved * 2 <= needed * 3,
        "{} held {needed}, moved {moved}",
        lost.name
    );
    assert!(after.prediction.after_worst_death.expect("seven").balance > 0.9);
}

/// Slices of one expert lie on different workers where there are enough, so that a single token is served by all.
#[test]
fn slices_of_an_expert_do_not_wait_for_each_other() {
    let layers: Vec<Vec<f64>> = (0..2).map(|seed| zipf(16, 0.8, seed)).collect();
    let mut request = request(&layers, 4, 4, 4);
    request.layout = Some(Layout::Slices(4));
    let plan = plan(&request).expect("it fits");
    for held in &plan.held {
        assert_eq!(held.len(), 32, "one slice of each expert");
        assert!(held.iter().all(|slice| slice.blocks.len() == 1), "{held:?}");
    }
    assert!(plan.prediction.balance > 0.999);
}

/// Large experts and few rows: slicing wins; tiny experts and long hops: it does not.
#[test]
fn the_cost_model_slices_where_reading_weights_takes_longest() {
    let layers = [zipf(8, 0.3, 1)];
    let mut request = request(&layers, 8, 2, 8);
    request.layout = None;
    request.cost.batch_tokens = 1;
    request.workers.iter_mut().for_each(|worker| worker.bandwidth = 1e6);
    let slow = plan(&request).expect("it fits");
    assert_eq!(slow.layout, Layout::Slices(8), "{:?}", slow.considered);
    assert!(slow.considered.iter().any(|(layout, _)| *layout == Layout::Whole));
    request.workers.iter_mut().for_each(|worker| worker.bandwidth = 1e12);
    request.cost.message_seconds = 1e-3;
    let fast = plan(&request).expect("it fits");
    assert_eq!(fast.layout, Layout::Whole, "{:?}", fast.considered);
    assert!(fast.prediction.cost.workers_per_token < slow.prediction.cost.workers_per_token);
}

#[test]
fn faster_workers_get_more_load() {
    let layers: Vec<Vec<f64>> = (0..2).map(|seed| zipf(32, 0.8, seed)).collect();
    let mut request = request(&layers, 4, 32, 1);
    request.replicas = 2;
    request.workers[0].bandwidth *= 2.0;
    let plan = plan(&request).expect("it fits");
    assert!(plan.prediction.balance > 0.99, "{:?}", plan.prediction);
    assert!(
        (plan.prediction.workers[0].load - 0.4).abs() < 0.01,
        "{:?}",
        plan.prediction.workers
    );
}

#[test]
fn requests_that_make_no_sense_are_refused_by_name() {
    let good = request(&[vec![1.0; 4]], 2, 4, 2);
    assert!(plan(&good).is_ok());
    let refused = |change: &dyn Fn(&mut PlanRequest)| {
        let mut request = good.clone();
        change(&mut request);
        plan(&request).expect_err("refused").to_string()
    };
    for (error, words) in [
        (refused(&|request| request.workers.clear()), "no workers"),
        (refused(&|request| request.moe_layers.clear()), "no experts"),
        (
            refused(&|request| request.replicas = 3),
            "3 holders of every expert: wanted 1 to the number of workers, 2",
        ),
        (refused(&|request| request.replicas = 0), "0 holders"),
        (
            refused(&|request| request.workers[1].name = "w0".to_owned()),
            "\"w0\" is named twice",
        ),
        (
            refused(&|request| request.workers[1].bandwidth = f64::NAN),
            "w1: bandwidth: wanted a number above 0, found NaN",
        ),
        (
            refused(&|request| request.workers[0].round_trip_seconds = -1.0),
            "w0: round trip: wanted 0 or more, found -1",
        ),
        (
            refused(&|request| request.cost.ops_per_second = 0.0),
            "operations per second",
        ),
        (
            refused(&|request| request.layout = Some(Layout::Slices(3))),
            "layout slices:3: the model has 4 experts",
        ),
        (refused(&|request| request.extra_holders = 5), "5 more holders"),
    ] {
        assert!(error.contains(words), "{error}");
    }
}
