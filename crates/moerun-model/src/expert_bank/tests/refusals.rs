//! Slices and batches that do not fit, each refused by its own error.

use moerun_kernels::Activations;
use moerun_routing::{Assignment, ShardSpec};
use moerun_types::{ActivationFormat, BlockRange, ExpertId, ExpertSlice, LayerId};
use moerun_weights::{Checkpoint, Needs};
use ndarray::Array2;
use safetensors::SafeTensors;

use super::{EXACT, Golden, pool};
use crate::{ExpertBank, ExpertError, ModelError};

#[test]
fn slices_outside_the_model_are_refused() {
    let golden = Golden::open("llama4_text", 0);
    let inside = ExpertSlice {
        layer: LayerId(1),
        expert: ExpertId(0),
        blocks: BlockRange { first: 0, end: 3 },
    };
    for lie in [
        ExpertSlice {
            layer: LayerId(0),
            ..inside
        },
        ExpertSlice {
            layer: LayerId(4),
            ..inside
        },
        ExpertSlice {
            expert: ExpertId(4),
            ..inside
        },
        ExpertSlice {
            blocks: BlockRange { first: 2, end: 4 },
            ..inside
        },
    ] {
        let refused = ExpertBank::load(&golden.checkpoint, &[inside, lie], EXACT, &mut |_, _| {});
        match refused {
            Err(ModelError::Expert(ExpertError::NotInModel { slice })) if slice.layer == lie.layer => {}
            other => panic!("{lie}: {other:?}"),
        }
    }
}

#[test]
fn batches_that_do_not_fit_are_refused() {
    let golden = Golden::open("qwen3_moe", 0);
    let bank = golden.shard(&ShardSpec::parse_experts("0:0-3:0,0:0-3:2").unwrap(), EXACT);
    let x = golden.activations(EXACT);
    let work = |row, expert, first, end| Assignment {
        row,
        expert: ExpertId(expert),
        blocks: BlockRange { first, end },
        weight: 0.5,
    };
    let refused = |assignments: &[Assignment]| bank.execute(&pool(), LayerId(0), &x, assignments).unwrap_err();
    let good = work(0, 1, 0, 1);
    assert!(bank.execute(&pool(), LayerId(0), &x, &[good, work(0, 1, 2, 3)]).is_ok());

    for (expert, first, end) in [
        (4, 0, 1),
        (8, 0, 1),
        (u16::MAX, 0, 1),
        (1, 1, 2),
        (1, 0, 3),
        (1, 3, 4),
        (1, 0, 2),
    ] {
        let not_held = ExpertError::NotHeld {
            layer: LayerId(0),
            expert: ExpertId(expert),
            blocks: BlockRange { first, end },
        };
        assert_eq!(refused(&[good, work(1, expert, first, end)]), not_held);
    }
    for layer in [1, 2, u32::MAX].map(LayerId) {
        let refused = bank.execute(&pool(), layer, &x, &[good]).unwrap_err();
        assert_eq!(
            refused,
            ExpertError::NotHeld {
                layer,
                expert: good.expert,
                blocks: good.blocks
            }
        );
    }
    for row in [x.rows() as u32, u32::MAX] {
        assert_eq!(
            refused(&[good, work(row, 1, 0, 1)]),
            ExpertError::Row { row, rows: x.rows() }
        );
    }
    for (first, end) in [(0, 0), (2, 1)] {
        let blocks = BlockRange { first, end };
        assert_eq!(
            refused(&[work(2, 1, first, end)]),
            ExpertError::NoBlocks {
                row: 2,
                expert: ExpertId(1),
                blocks
            }
        );
    }
    let twice = ExpertError::Duplicate {
        row: 0,
        expert: ExpertId(1),
        block: 0,
    };
    assert_eq!(refused(&[good, work(1, 1, 0, 1), good]), twice);
    let top_k = golden.routing.top_k;
    let crowd: Vec<Assignment> = (0..=top_k as u16).map(|expert| work(3, expert, 0, 1)).collect();
    assert_eq!(
        refused(&crowd),
        ExpertError::TooManyExperts {
            row: 3,
            top_k,
            found: top_k + 1
        }
    );
    for weight in [f32::NAN, f32::INFINITY] {
        let unweighable = refused(&[Assignment { weight, ..good }]);
        assert!(
            matches!(
                unweighable,
                ExpertError::Weight {
                    row: 0,
                    expert: ExpertId(1),
                    ..
                }
            ),
            "{unweighable:?}"
        );
    }

    let narrow = Activations::round(ActivationFormat::F32, Array2::zeros((2, 31)).view());
    let refused = bank.execute(&pool(), LayerId(0), &narrow, &[good]).unwrap_err();
    assert_eq!(
        refused,
        ExpertError::Shape {
            what: "length of a row",
            wanted: 32,
            found: 31
        }
    );
    let rounded = Activations::round(ActivationFormat::Bf16, golden.input.view());
    let refused = bank.execute(&pool(), LayerId(0), &rounded, &[good]).unwrap_err();
    assert_eq!(
        refused,
        ExpertError::Format {
            wanted: ActivationFormat::F32,
            found: ActivationFormat::Bf16
        }
    );
}

#[test]
fn blocks_assigned_twice_within_a_longer_run_are_refused() {
    let golden = Golden::open("qwen3_moe", 0);
    let bank = golden.shard(&ShardSpec::All, EXACT);
    let x = golden.activations(EXACT);
    let work = |first, end| Assignment {
        row: 1,
        expert: ExpertId(5),
        blocks: BlockRange { first, end },
        weight: 0.5,
    };
    assert!(
        bank.execute(&pool(), golden.layer, &x, &[work(2, 3), work(0, 2)])
            .is_ok()
    );
    for (overlapping, block) in [
        ([work(0, 2), work(1, 3)], 1),
        ([work(0, 3), work(2, 3)], 2),
        ([work(0, 1), work(0, 3)], 0),
    ] {
        let refused = bank.execute(&pool(), golden.layer, &x, &overlapping).unwrap_err();
        assert_eq!(
            refused,
            ExpertError::Duplicate {
                row: 1,
                expert: ExpertId(5),
                block
            }
        );
    }
}

#[test]
fn a_term_out_of_range_names_the_block_of_the_whole_expert() {
    let golden = Golden::open("qwen3_moe", 0);
    let bank = golden.shard(&ShardSpec::parse_experts("0:2-5:1-2").unwrap(), EXACT);
    let x = golden.activations(EXACT);
    let work = |row, expert, weight| Assignment {
        row,
        expert: ExpertId(expert),
        blocks: BlockRange { first: 2, end: 3 },
        weight,
    };
    let failed = bank
        .execute(&pool(), LayerId(0), &x, &[work(0, 3, 0.5), work(1, 4, 1e30)])
        .unwrap_err();
    match failed {
        ExpertError::Term {
            layer: LayerId(0),
            expert: ExpertId(4),
            block: Some(2),
            limit,
            ..
        } => {
            assert_eq!(limit, 2f32.powi(20), "2 experts of 3 blocks make 6 terms");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn loading_ends_with_an_error_where_an_expert_is_absent() {
    let golden = Golden::open("qwen3_moe", 0);
    let from = golden.checkpoint.dir();
    let to = tempfile::tempdir().unwrap();
    std::fs::copy(from.join("config.json"), to.path().join("config.json")).unwrap();
    let bytes = std::fs::read(from.join("model.safetensors")).unwrap();
    // Enough slices before and after the absent one that every loader meets the end of the work.
    let kept = SafeTensors::deserialize(&bytes).unwrap();
    let kept = kept
        .tensors()
        .into_iter()
        .filter(|(name, _)| !name.contains("layers.1.mlp.experts.3."));
    safetensors::serialize_to_file(kept, None, &to.path().join("model.safetensors")).unwrap();

    let checkpoint = Checkpoint::open(to.path(), Needs::GatewayOnly).unwrap();
    let slices = ShardSpec::All.resolve(checkpoint.config(), &EXACT).unwrap();
    let mut last = (0, 0);
    let refused = ExpertBank::load(&checkpoint, &slices, EXACT, &mut |done, total| last = (done, total));
    let Err(ModelError::Weights(error)) = refused else {
        panic!("{refused:?}")
    };
    assert!(error.to_string().contains("layer 1 expert 3"), "{error}");
    assert!(last.0 < last.1, "{last:?}");
}
