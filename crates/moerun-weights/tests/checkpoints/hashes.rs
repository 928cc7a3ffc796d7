//! What makes two checkpoints equal, and what does not.

use std::path::Path;

use moerun_types::{BlockRange, ExpertId, Family, LayerId};
use moerun_weights::{Checkpoint, WeightsError};

use crate::{
    directories::{change_config, copy_of, golden, open},
    files::{self, RawTensor},
};

const COMBINE_BLOCK: usize = 8;

fn block_hashes(checkpoint: &Checkpoint, layer: LayerId, expert: u16) -> Vec<[u8; 16]> {
    let width = checkpoint.config().moe.as_ref().unwrap().intermediate;
    let blocks = BlockRange {
        first: 0,
        end: width.div_ceil(COMBINE_BLOCK) as u16,
    };
    checkpoint
        .expert_block_hashes(layer, ExpertId(expert), blocks, COMBINE_BLOCK)
        .unwrap()
}

type Hashes = (String, Option<String>, Option<String>, Option<String>);

fn hashes(checkpoint: &Checkpoint) -> Hashes {
    (
        checkpoint.config_hash(),
        checkpoint.expert_header_hash(),
        checkpoint.dense_header_hash(),
        checkpoint.router_hash(),
    )
}

#[test]
fn hashes_do_not_depend_on_sharding() {
    for family in Family::ALL {
        let whole = open(&golden(family)).unwrap();
        let dir = copy_of(family);
        files::shard(dir.path(), |name| name.len() % 3);
        let sharded = open(dir.path()).unwrap();
        assert_eq!(hashes(&whole), hashes(&sharded), "{family:?}");
        for layer in whole.config().moe_layers() {
            assert_eq!(
                block_hashes(&whole, layer, 0),
                block_hashes(&sharded, layer, 0),
                "{family:?} {layer}"
            );
        }
        assert_eq!(whole.router_hash().is_some(), whole.config().moe.is_some());
    }
}

/// Changes one element of one tensor, given by its index.
fn change(dir: &Path, name: &str, element: usize) {
    let path = dir.join("model.safetensors");
    let mut tensors = files::read(&path);
    let tensor: &mut RawTensor = tensors.get_mut(name).unwrap_or_else(|| panic!("{name}"));
    tensor.data[element * 4 + 1] ^= 1;
    files::write(&path, &tensors);
}

/// Blocks of expert 1 whose hash changes with one element of a tensor; no other expert's may.
fn changed_blocks(family: Family, name: &str, element: usize) -> Vec<usize> {
    let layer = open(&golden(family)).unwrap().config().moe_layers()[0];
    let before = open(&golden(family)).unwrap();
    let dir = copy_of(family);
    change(dir.path(), &name.replace("LAYER", &layer.to_string()), element);
    let after = open(dir.path()).unwrap();
    assert_eq!(
        block_hashes(&before, layer, 0),
        block_hashes(&after, layer, 0),
        "{family:?}: expert 0 is untouched"
    );
    let (before, after) = (block_hashes(&before, layer, 1), block_hashes(&after, layer, 1));
    (0..before.len())
        .filter(|&block| before[block] != after[block])
        .collect()
}

#[test]
fn one_element_changes_the_hash_of_its_block_alone() {
    let experts = "model.layers.LAYER.mlp.experts";
    // olmoe: width 32, hidden 32; qwen3_moe: width 24.
    assert_eq!(
        changed_blocks(Family::Olmoe, &format!("{experts}.1.gate_proj.weight"), 9 * 32),
        [1]
    );
    assert_eq!(
        changed_blocks(Family::Olmoe, &format!("{experts}.1.up_proj.weight"), 31 * 32 + 31),
        [3]
    );
    assert_eq!(
        changed_blocks(Family::Qwen3Moe, &format!("{experts}.1.down_proj.weight"), 5 * 24 + 17),
        [2]
    );
    // granite: [8, 64, 32], up rows after the gate rows; [8, 32, 32].
    let granite = "model.layers.LAYER.block_sparse_moe";
    let up_row = (64 + 32 + 20) * 32;
    assert_eq!(
        changed_blocks(Family::GraniteMoe, &format!("{granite}.input_linear.weight"), up_row),
        [2]
    );
    // llama4: [4, 32, 48] and [4, 24, 32]: columns are output features.
    let llama4 = "model.layers.LAYER.feed_forward.experts";
    assert_eq!(
        changed_blocks(Family::Llama4Text, &format!("{llama4}.gate_up_proj"), 32 * 48 + 24 + 9),
        [1]
    );
    assert_eq!(
        changed_blocks(Family::Llama4Text, &format!("{llama4}.down_proj"), 24 * 32 + 23 * 32),
        [2]
    );
    // gpt_oss: [8, 32, 64] with gate and up alternating, biases [8, 64] and [8, 32].
    assert_eq!(
        changed_blocks(Family::GptOss, &format!("{experts}.gate_up_proj"), 32 * 64 + 2 * 8 + 1),
        [1]
    );
    assert_eq!(
        changed_blocks(Family::GptOss, &format!("{experts}.gate_up_proj_bias"), 64 + 2 * 31),
        [3]
    );
    assert_eq!(
        changed_blocks(Family::GptOss, &format!("{experts}.down_proj_bias"), 32 + 31),
        [0]
    );
}

#[test]
fn a_slice_of_blocks_has_the_hashes_of_the_whole() {
    let checkpoint = open(&golden(Family::Mixtral)).unwrap();
    let all = block_hashes(&checkpoint, LayerId(1), 3);
    let blocks = BlockRange { first: 2, end: 5 };
    let some = checkpoint
        .expert_block_hashes(LayerId(1), ExpertId(3), blocks, COMBINE_BLOCK)
        .unwrap();
    assert_eq!(some, all[2..5]);
    assert_eq!(
        all.iter().collect::<std::collections::HashSet<_>>().len(),
        6,
        "no two blocks are alike"
    );
}

#[test]
fn blocks_that_an_expert_does_not_have_are_refused() {
    let checkpoint = open(&golden(Family::Mixtral)).unwrap();
    for (end, combine_block) in [(7, 8), (2, 48), (1, 0)] {
        let blocks = BlockRange { first: 0, end };
        let error = checkpoint
            .expert_block_hashes(LayerId(0), ExpertId(0), blocks, combine_block)
            .unwrap_err();
        assert!(matches!(error, WeightsError::Blocks { .. }), "{error}");
    }
    let backwards = BlockRange { first: 3, end: 1 };
    assert!(
        checkpoint
            .expert_block_hashes(LayerId(0), ExpertId(0), backwards, 8)
            .unwrap()
            .is_empty()
    );
}

#[test]
fn another_config_or_another_training_has_other_hashes() {
    let before = hashes(&open(&golden(Family::Qwen3Moe)).unwrap());
    let dir = copy_of(Family::Qwen3Moe);
    change_config(dir.path(), serde_json::json!({ "norm_topk_prob": false }));
    let after = hashes(&open(dir.path()).unwrap());
    assert_ne!(before.0, after.0);
    assert_eq!((&before.1, &before.2, &before.3), (&after.1, &after.2, &after.3));

    let dir = copy_of(Family::Qwen3Moe);
    change(dir.path(), "model.layers.1.mlp.gate.weight", 7);
    let after = hashes(&open(dir.path()).unwrap());
    assert_eq!((&before.0, &before.1, &before.2), (&after.0, &after.1, &after.2));
    assert_ne!(before.3, after.3);
}
