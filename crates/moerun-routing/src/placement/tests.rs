use moerun_types::{BlockRange, ExpertId, ExpertSlice, LayerId};

use super::{Placement, PlanError};
use crate::testing::{Seeded, model};

fn slice(layer: u32, expert: u16, first: u16, end: u16) -> ExpertSlice {
    ExpertSlice {
        layer: LayerId(layer),
        expert: ExpertId(expert),
        blocks: BlockRange { first, end },
    }
}

/// Whole experts of layers 0 and 1 for which `held` says yes.
fn whole(num_experts: u16, held: impl Fn(u16) -> bool) -> Vec<ExpertSlice> {
    (0..2)
        .flat_map(|layer| (0..num_experts).map(move |expert| (layer, expert)))
        .filter(|&(_, expert)| held(expert))
        .map(|(layer, expert)| slice(layer, expert, 0, 3))
        .collect()
}

#[test]
fn every_block_has_exactly_one_runner_and_it_holds_the_block() {
    for seed in 0..300 {
        let mut random = Seeded::new(seed);
        let moe_layers: Vec<bool> = (0..random.between(1, 4)).map(|_| random.chance(70)).collect();
        let (num_experts, num_blocks) = (random.between(1, 7), random.between(1, 9));
        let config = model(&moe_layers, num_experts, num_blocks * 8);
        let mut held: Vec<Vec<ExpertSlice>> = vec![Vec::new(); random.between(1, 5)];
        for layer in config.moe_layers() {
            for expert in (0..num_experts).map(|expert| ExpertId(expert as u16)) {
                for block in 0..num_blocks as u16 {
                    for _ in 0..random.between(1, 3) {
                        let holder = random.below(held.len());
                        let first = block.saturating_sub(random.below(3) as u16);
                        held[holder].push(ExpertSlice {
                            layer,
                            expert,
                            blocks: BlockRange { first, end: block + 1 },
                        });
                    }
                }
            }
        }
        held.iter_mut().for_each(|slices| random.shuffle(slices));

        let placement = Placement::new(&config, num_blocks, &held).unwrap();
        assert_eq!(placement.num_workers(), held.len());
        let mut runners = std::collections::HashMap::new();
        for (worker, slices) in held.iter().enumerate() {
            for run in placement.slices_of(worker) {
                for block in run.blocks.first..run.blocks.end {
                    let one = BlockRange {
                        first: block,
                        end: block + 1,
                    };
                    let holds = slices
                        .iter()
                        .any(|held| (held.layer, held.expert) == (run.layer, run.expert) && held.blocks.contains(one));
                    assert!(
                        holds,
                        "seed {seed}: worker {worker} runs {run} and does not hold block {block}"
                    );
                    let before = runners.insert((run.layer, run.expert, block), worker);
                    assert_eq!(before, None, "seed {seed}: {run} block {block} has two runners");
                }
            }
        }
        assert_eq!(
            runners.len(),
            config.moe_layers().len() * num_experts * num_blocks,
            "seed {seed}"
        );
    }
}

#[test]
fn replicas_share_every_layer() {
    let config = model(&[true, true], 8, 24);
    // Two pairs of replicas: even experts on 0 and 2, odd ones on 1 and 3.
    let held: Vec<_> = (0..4)
        .map(|worker| whole(8, |expert| expert % 2 == worker % 2))
        .collect();
    let placement = Placement::new(&config, 3, &held).unwrap();
    for worker in 0..4 {
        let runs = placement.slices_of(worker);
        for layer in 0..2 {
            let of_layer = runs.iter().filter(|run| run.layer.0 == layer).count();
            assert_eq!(of_layer, 2, "worker {worker}, layer {layer}: {runs:?}");
        }
    }
}

#[test]
fn an_odd_expert_of_each_layer_does_not_always_go_to_the_same_replica() {
    let config = model(&[true, true], 1, 24);
    let held = [whole(1, |_| true), whole(1, |_| true)];
    let placement = Placement::new(&config, 3, &held).unwrap();
    assert_eq!(placement.slices_of(0), [slice(0, 0, 0, 3)]);
    assert_eq!(placement.slices_of(1), [slice(1, 0, 0, 3)]);
}

#[test]
fn what_nobody_holds_is_named_and_counted() {
    let config = model(&[true, true], 3, 24);
    let held = [
        whole(3, |expert| expert != 1),
        vec![slice(0, 1, 0, 1), slice(0, 1, 2, 3), slice(1, 1, 0, 2)],
    ];
    let refused = Placement::new(&config, 3, &held).unwrap_err();
    assert_eq!(
        refused,
        PlanError::Uncovered {
            missing: slice(0, 1, 1, 2),
            others: 1
        }
    );
    assert_eq!(
        refused.to_string(),
        "no worker holds layer 0 expert 1 blocks 1..2 (and 1 more slices)"
    );
    assert_eq!(
        Placement::new(&config, 3, &[]).unwrap_err(),
        PlanError::Uncovered {
            missing: slice(0, 0, 0, 3),
            others: 5
        }
    );
}

#[test]
fn holdings_outside_the_model_are_refused() {
    let config = model(&[true, false], 3, 24);
    for lie in [
        slice(1, 0, 0, 3),
        slice(7, 0, 0, 3),
        slice(0, 3, 0, 3),
        slice(0, 0, 0, 4),
    ] {
        let refused = Placement::new(&config, 3, &[vec![], vec![slice(0, 0, 0, 3), lie]]);
        assert_eq!(refused, Err(PlanError::Unknown { worker: 1, slice: lie }));
    }
    let refused = Placement::new(&config, 70_000, &[]);
    assert_eq!(refused, Err(PlanError::TooManyBlocks { num_blocks: 70_000 }));
}

#[test]
fn a_dense_model_needs_nobody() {
    let placement = Placement::new(&model(&[false], 0, 0), 0, &[]).unwrap();
    assert_eq!(placement.num_workers(), 0);
}
