//! Tiny checkpoints are read back by the naive reference, and are what they say.
#![allow(clippy::unwrap_used)] // clippy's exception for tests does not reach the helpers of an integration test

use moerun_testkit::{
    ALL_FAMILIES, Element, Family, NaiveForward, NaiveModel, RawFile, Storage, TinyCheckpoint, copy_only_experts,
    copy_without_experts, edit_tensor, is_expert_tensor, perturb_tensor,
};

const PROMPT: [u32; 12] = [1, 40, 301, 7, 99, 7, 250, 319, 12, 40, 5, 66];

fn forward(tiny: &TinyCheckpoint) -> NaiveForward {
    let dir = tempfile::tempdir().unwrap();
    tiny.write(dir.path()).unwrap();
    NaiveModel::open(dir.path())
        .and_then(|model| model.forward(&PROMPT))
        .unwrap_or_else(|e| panic!("{tiny:?}: {e}"))
}

fn deviation(forward: &NaiveForward) -> f64 {
    let values: Vec<f64> = forward.logits.iter().flatten().copied().collect();
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    (values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / values.len() as f64).sqrt()
}

#[test]
fn every_family_of_every_drawn_size_runs_and_has_logits_of_order_one() {
    for family in ALL_FAMILIES {
        for seed in 0..25 {
            let tiny = TinyCheckpoint::from_seed(family, seed);
            let forward = forward(&tiny);
            let moe_layers: Vec<usize> = (0..tiny.layers).filter(|&layer| tiny.is_moe_layer(layer)).collect();
            assert_eq!(
                forward.moe.iter().map(|block| block.layer).collect::<Vec<_>>(),
                moe_layers,
                "{tiny:?}"
            );
            assert_eq!(family.has_experts(), !moe_layers.is_empty(), "{tiny:?}");
            assert!(
                forward
                    .moe
                    .iter()
                    .flat_map(|block| &block.topk_ids)
                    .all(|ids| ids.len() == tiny.top_k)
            );
            let deviation = deviation(&forward);
            assert!(
                (0.3..6.0).contains(&deviation),
                "seed {seed} {family:?}: logits deviate by {deviation}"
            );
        }
    }
}

#[test]
fn drawn_sizes_are_varied() {
    let drawn: Vec<TinyCheckpoint> = (0..60)
        .map(|seed| TinyCheckpoint::from_seed(Family::Qwen3Moe, seed))
        .collect();
    assert!(drawn.iter().any(|tiny| tiny.top_k == 1));
    assert!(drawn.iter().any(|tiny| tiny.top_k == tiny.experts));
    assert!(drawn.iter().any(|tiny| tiny.hidden % 2 == 1));
    assert!(drawn.iter().any(|tiny| !tiny.experts.is_power_of_two()));
    assert!(drawn.iter().any(|tiny| tiny.dense_first > 0));
    assert!(drawn.iter().any(|tiny| tiny.sparse_step > 1));
    assert!(drawn.iter().any(|tiny| tiny.window.is_some()));
    assert!(drawn.iter().any(|tiny| tiny.tied));
    assert!(drawn.iter().any(|tiny| tiny.shards > 1));
}

#[test]
fn one_seed_gives_one_checkpoint_and_another_seed_another() {
    let first = forward(&TinyCheckpoint::new(Family::Mixtral, 3));
    assert_eq!(first, forward(&TinyCheckpoint::new(Family::Mixtral, 3)));
    assert_ne!(first, forward(&TinyCheckpoint::new(Family::Mixtral, 4)));
}

#[test]
fn shards_and_spelling_change_nothing() {
    for family in ALL_FAMILIES {
        let one = TinyCheckpoint::new(family, 5);
        let other = TinyCheckpoint {
            shards: 4,
            spelling: moerun_testkit::Spelling::Hub,
            ..one.clone()
        };
        assert_eq!(forward(&one), forward(&other), "{family:?}");
    }
}

/// Largest change of a logit between plain and quantised storage of the same values.
fn storage_error(plain: &TinyCheckpoint, storage: Storage) -> f64 {
    let exact = forward(plain);
    let rounded = forward(&TinyCheckpoint {
        storage,
        ..plain.clone()
    });
    let pairs = exact.logits.iter().flatten().zip(rounded.logits.iter().flatten());
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[test]
fn fp8_blocks_are_close_to_the_values_they_store() {
    // Wider than a block, so that several scales meet; all experts are chosen, so that rounding cannot move a choice.
    let plain = TinyCheckpoint {
        hidden: 150,
        expert_intermediate: 140,
        top_k: 6,
        top_groups: 3,
        layers: 2,
        ..TinyCheckpoint::new(Family::DeepseekV3, 1)
    };
    let error = storage_error(&plain, Storage::Fp8Block);
    assert!(error > 1e-4 && error < 1.0, "{error}");
}

#[test]
fn mxfp4_blocks_are_close_to_the_values_they_store() {
    let plain = TinyCheckpoint {
        hidden: 64,
        expert_intermediate: 32,
        top_k: 6,
        layers: 2,
        ..TinyCheckpoint::new(Family::GptOss, 1)
    };
    let error = storage_error(&plain, Storage::Mxfp4);
    assert!(error > 1e-3 && error < 3.0, "{error}");
}

#[test]
fn a_safe_checkpoint_keeps_its_margin() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = vec![PROMPT.to_vec()];
    let tiny = TinyCheckpoint {
        element: Element::Bf16,
        ..TinyCheckpoint::new(Family::Olmoe, 10)
    };
    let seed = tiny.write_safe(dir.path(), &prompts, 4, 1e-3).unwrap();
    let model = NaiveModel::open(dir.path()).unwrap();
    assert!(model.forward(&PROMPT).unwrap().routing_margin() >= 1e-3, "seed {seed}");
}

#[test]
fn copies_part_the_experts_from_the_rest() {
    for family in ALL_FAMILIES {
        let dir = tempfile::tempdir().unwrap();
        let [whole, dense, experts] = ["whole", "dense", "experts"].map(|name| dir.path().join(name));
        TinyCheckpoint::new(family, 2).write(&whole).unwrap();
        copy_without_experts(&whole, &dense).unwrap();
        copy_only_experts(&whole, &experts).unwrap();
        let count = |dir: &std::path::Path| RawFile::read(&dir.join("model.safetensors")).unwrap().tensors.len();
        assert_eq!(count(&whole), count(&dense) + count(&experts), "{family:?}");
        assert_eq!(count(&experts) > 0, family.has_experts());
        let left = RawFile::read(&dense.join("model.safetensors")).unwrap();
        assert!(
            left.tensors.iter().all(|tensor| !is_expert_tensor(&tensor.name)),
            "{family:?}"
        );
    }
}

#[test]
fn edits_reach_tensors_in_any_shard() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = TinyCheckpoint {
        shards: 3,
        ..TinyCheckpoint::new(Family::Mixtral, 2)
    };
    tiny.write(dir.path()).unwrap();
    let before = NaiveModel::open(dir.path()).unwrap().forward(&PROMPT).unwrap();
    perturb_tensor(dir.path(), "model.layers.2.block_sparse_moe.gate.weight", 0.5).unwrap();
    assert_ne!(before, NaiveModel::open(dir.path()).unwrap().forward(&PROMPT).unwrap());

    edit_tensor(dir.path(), "lm_head.weight", |tensor| tensor.name = "gone".to_owned()).unwrap();
    let error = NaiveModel::open(dir.path()).unwrap().forward(&PROMPT).unwrap_err();
    assert!(error.to_string().contains("lm_head.weight"), "{error}");
    assert!(edit_tensor(dir.path(), "lm_head.weight", |_| {}).is_err());
}
