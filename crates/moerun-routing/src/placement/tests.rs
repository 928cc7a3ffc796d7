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
fn every_block_has_exactly_the_workers_that_hold_it() {
    for seed in 0..300 {
        let mut random = Seeded::new(seed);
        let moe_layers: Vec<bool> = (0..random.between(1, 4)).map(|_| random.chance(70)).collect();
        let (num_experts, num_blocks) = (random.between(1, 7), random.between(1, 9));
        let config = model(&moe_layers, num_experts, num_blocks * 8);
        let mut held: Vec<Vec<ExpertSlice>> = vec![Vec::new(); random.between(1, 5)];
        for layer in config.moe_layers() {
            for expert in (0..num_experts).map(|expert| ExpertId(expert as u16)) {
                for block in 0..num_blocks as u16 {
                    for _ in 0..random.below(4) {
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
        let missing = placement.uncovered(|_| true);
        assert_eq!(
            placement.check_covered(|_| true).is_ok(),
            missing.is_empty(),
            "seed {seed}"
        );
        for layer in config.moe_layers() {
            for expert in (0..num_experts).map(|expert| ExpertId(expert as u16)) {
                for first in 0..num_blocks as u16 {
                    let blocks = BlockRange { first, end: first + 1 };
                    let holds = |slices: &&Vec<ExpertSlice>| {
                        let same = |held: &&ExpertSlice| (held.layer, held.expert) == (layer, expert);
                        slices.iter().filter(same).any(|held| held.blocks.contains(blocks))
                    };
                    let wanted: Vec<usize> = (0..held.len()).filter(|&worker| holds(&&held[worker])).collect();
                    let one = ExpertSlice { layer, expert, blocks };
                    assert_eq!(placement.holders_of(one), wanted, "seed {seed}: {one}");
                    let is_missing = missing
                        .iter()
                        .any(|slice| (slice.layer, slice.expert) == (layer, expert) && slice.blocks.contains(blocks));
                    assert_eq!(is_missing, wanted.is_empty(), "seed {seed}: {one}");
                }
            }
        }
    }
}

#[test]
fn blocks_are_covered_only_by_workers_that_may_run() {
    let config = model(&[true, true], 4, 24);
    let held = [whole(4, |expert| expert < 3), whole(4, |expert| expert > 0)];
    let placement = Placement::new(&config, 3, &held).unwrap();
    placement.check_covered(|_| true).unwrap();
    let missing = |worker| placement.uncovered(|it| it == worker);
    assert_eq!(missing(0), [slice(0, 3, 0, 3), slice(1, 3, 0, 3)]);
    assert_eq!(missing(1), [slice(0, 0, 0, 3), slice(1, 0, 0, 3)]);
    assert_eq!(placement.holders_of(slice(0, 1, 1, 2)), [0, 1]);
    assert_eq!(placement.holders_of(slice(2, 1, 1, 2)), [0usize; 0], "no such layer");
}

#[test]
fn what_nobody_holds_is_named_and_counted() {
    let config = model(&[true, true], 3, 24);
    let held = [
        whole(3, |expert| expert != 1),
        vec![slice(0, 1, 0, 1), slice(0, 1, 2, 3), slice(1, 1, 0, 2)],
    ];
    let refused = Placement::new(&config, 3, &held)
        .unwrap()
        .check_covered(|_| true)
        .unwrap_err();
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
        Placement::new(&config, 3, &[])
            .unwrap()
            .check_covered(|_| true)
            .unwrap_err(),
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
