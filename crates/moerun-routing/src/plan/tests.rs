use std::collections::HashMap;

use moerun_types::{BlockRange, ExpertId, ExpertSlice, LayerId};

use super::{Assignment, Candidates, WorkerBatch, whole_assignments};
use crate::testing::{Seeded, model};
use crate::{Placement, Routing};

const LAYER: LayerId = LayerId(1);

/// A random placement of one MoE layer's experts, and routing for it.
struct PlanCase {
    placement: Placement,
    routing: Routing,
    num_blocks: usize,
}

impl PlanCase {
    fn from_seed(seed: u64) -> Self {
        let mut random = Seeded::new(seed);
        let (num_experts, num_blocks) = (random.between(1, 9), random.between(1, 6));
        let mut held: Vec<Vec<ExpertSlice>> = vec![Vec::new(); random.between(1, 5)];
        for expert in (0..num_experts).map(|expert| ExpertId(expert as u16)) {
            let sliced = random.chance(50);
            for first in 0..num_blocks as u16 {
                let blocks = if sliced { first..first + 1 } else { 0..num_blocks as u16 };
                let blocks = BlockRange {
                    first: blocks.start,
                    end: blocks.end,
                };
                for _ in 0..random.between(1, 3) {
                    let holder = random.below(held.len());
                    held[holder].push(ExpertSlice {
                        layer: LAYER,
                        expert,
                        blocks,
                    });
                }
            }
        }
        let placement = Placement::new(&model(&[false, true], num_experts, num_blocks * 8), num_blocks, &held).unwrap();
        let (tokens, top_k) = (random.between(1, 12), random.between(1, num_experts));
        let mut routing = Routing {
            top_k,
            expert_ids: Vec::new(),
            routing_weights: Vec::new(),
        };
        for _ in 0..tokens {
            let mut experts: Vec<ExpertId> = (0..num_experts).map(|expert| ExpertId(expert as u16)).collect();
            random.shuffle(&mut experts);
            routing.expert_ids.extend_from_slice(&experts[..top_k]);
            routing.routing_weights.extend((0..top_k).map(|_| random.signed()));
        }
        Self {
            placement,
            routing,
            num_blocks,
        }
    }
}

/// Some holder of each run, by the seed.
fn any_holder(seed: u64) -> impl FnMut(Candidates<'_>) -> Option<usize> {
    let mut random = Seeded::new(seed);
    move |run| Some(run.holders[random.below(run.holders.len())] as usize)
}

/// How often each (row, expert, block) is run, and with which weight.
fn work(batches: &[WorkerBatch]) -> HashMap<(u32, ExpertId, u16), Vec<f32>> {
    let mut work: HashMap<_, Vec<f32>> = HashMap::new();
    for batch in batches {
        for assignment in &batch.assignments {
            let row = batch.rows[assignment.row as usize];
            for block in assignment.blocks.first..assignment.blocks.end {
                work.entry((row, assignment.expert, block))
                    .or_default()
                    .push(assignment.weight);
            }
        }
    }
    work
}

fn assert_well_formed(batch: &WorkerBatch, seed: u64) {
    assert!(batch.rows.is_sorted_by(|a, b| a < b), "seed {seed}: rows ascend");
    assert!(
        batch.assignments.is_sorted_by_key(|assignment| assignment.row),
        "seed {seed}: assignments ascend by row"
    );
    let mut used: Vec<u32> = batch.assignments.iter().map(|assignment| assignment.row).collect();
    used.dedup();
    assert_eq!(
        used,
        (0..batch.rows.len() as u32).collect::<Vec<_>>(),
        "seed {seed}: every row sent has work"
    );
}

#[test]
fn every_block_of_every_choice_is_run_once_by_a_holder() {
    for seed in 0..300 {
        let PlanCase {
            placement,
            routing,
            num_blocks,
        } = PlanCase::from_seed(seed);
        let all: Vec<_> = whole_assignments(&routing, num_blocks).collect();
        let plan = placement.plan_layer(LAYER, &all, &mut any_holder(seed));
        assert_eq!(plan.unheld, [], "seed {seed}");
        let batches = plan.batches;
        assert!(
            batches.is_sorted_by(|a, b| a.worker < b.worker),
            "seed {seed}: one batch per worker, ascending"
        );
        batches.iter().for_each(|batch| assert_well_formed(batch, seed));
        for batch in &batches {
            for assignment in &batch.assignments {
                let slice = ExpertSlice {
                    layer: LAYER,
                    expert: assignment.expert,
                    blocks: assignment.blocks,
                };
                assert!(
                    placement.holders_of(slice).contains(&batch.worker),
                    "seed {seed}: {slice} sent to worker {}",
                    batch.worker
                );
            }
        }
        let whole = WorkerBatch {
            worker: 0,
            rows: (0..routing.tokens() as u32).collect(),
            assignments: all,
        };
        let wanted = work(&[whole]);
        assert!(wanted.values().all(|weights| weights.len() == 1), "seed {seed}");
        assert_eq!(wanted.len(), routing.expert_ids.len() * num_blocks, "seed {seed}");
        assert_eq!(work(&batches), wanted, "seed {seed}");
    }
}

#[test]
fn the_work_of_one_batch_can_be_given_to_others_and_what_nobody_takes_is_told() {
    for seed in 0..300 {
        let PlanCase {
            placement,
            routing,
            num_blocks,
        } = PlanCase::from_seed(seed);
        let all: Vec<_> = whole_assignments(&routing, num_blocks).collect();
        for failed in placement.plan_layer(LAYER, &all, &mut any_holder(seed)).batches {
            let others = |run: Candidates<'_>| {
                let mut holders = run.holders.iter().map(|&worker| worker as usize);
                holders.find(|&worker| worker != failed.worker)
            };
            let again = placement.plan_layer(LAYER, &failed.work(), &mut { others });
            assert!(again.batches.iter().all(|batch| batch.worker != failed.worker));
            let left = WorkerBatch {
                worker: failed.worker,
                rows: (0..routing.tokens() as u32).collect(),
                assignments: again.unheld,
            };
            for lost in &left.assignments {
                let slice = ExpertSlice {
                    layer: LAYER,
                    expert: lost.expert,
                    blocks: BlockRange {
                        first: lost.blocks.first,
                        end: lost.blocks.first + 1,
                    },
                };
                assert_eq!(placement.holders_of(slice), [failed.worker], "seed {seed}: {slice}");
            }
            let found: Vec<WorkerBatch> = again.batches.into_iter().chain([left]).collect();
            assert_eq!(work(&found), work(&[failed]), "seed {seed}");
        }
    }
}

#[test]
fn runs_are_chosen_once_each_those_with_most_rows_first() {
    for seed in 0..100 {
        let PlanCase {
            placement,
            routing,
            num_blocks,
        } = PlanCase::from_seed(seed);
        let mut asked = Vec::new();
        placement.plan_layer(
            LAYER,
            &whole_assignments(&routing, num_blocks).collect::<Vec<_>>(),
            &mut |run| {
                asked.push(run.rows);
                Some(run.holders[0] as usize)
            },
        );
        assert!(asked.is_sorted_by(|a, b| a >= b), "seed {seed}: {asked:?}");
        let runs = placement.runs_of_layer(LAYER).len();
        assert!(!asked.is_empty() && asked.len() <= runs, "seed {seed}: {asked:?}");
    }
}

#[test]
fn a_split_batch_is_the_same_work_in_bounded_parts() {
    for seed in 0..300 {
        let PlanCase {
            placement,
            routing,
            num_blocks,
        } = PlanCase::from_seed(seed);
        let all: Vec<_> = whole_assignments(&routing, num_blocks).collect();
        for batch in placement.plan_layer(LAYER, &all, &mut any_holder(seed)).batches {
            for max_rows in [0, 1, 2, 3, batch.rows.len(), usize::MAX] {
                let parts = batch.clone().split(max_rows);
                for part in &parts {
                    assert_well_formed(part, seed);
                    assert_eq!(part.worker, batch.worker);
                    assert!(part.rows.len() <= max_rows.max(1), "seed {seed}");
                }
                assert_eq!(parts.len(), batch.rows.len().div_ceil(max_rows.max(1)), "seed {seed}");
                let rows: Vec<u32> = parts.iter().flat_map(|part| part.rows.clone()).collect();
                assert_eq!(rows, batch.rows, "seed {seed}");
                assert_eq!(work(&parts), work(std::slice::from_ref(&batch)), "seed {seed}");
            }
        }
    }
}

#[test]
fn whole_assignments_keep_the_order_of_the_routing() {
    let routing = Routing {
        top_k: 2,
        expert_ids: [3, 1, 0, 3].map(ExpertId).to_vec(),
        routing_weights: vec![0.7, 0.3, 0.6, 0.4],
    };
    let blocks = BlockRange { first: 0, end: 5 };
    let wanted = [(0, 3, 0.7), (0, 1, 0.3), (1, 0, 0.6), (1, 3, 0.4)].map(|(row, expert, weight)| Assignment {
        row,
        expert: ExpertId(expert),
        blocks,
        weight,
    });
    assert!(whole_assignments(&routing, 5).eq(wanted));
}
