//! Checkpoints of other sizes than the golden ones, against the naive f64 reference: odd widths, expert counts that are
//! no powers of two, other K, other layer patterns, other storage.

use std::{collections::HashMap, fs, path::Path};

use moerun_testkit::{ALL_FAMILIES, Element, Family, NaiveModel, Storage, TinyCheckpoint};
use moerun_tests::{assert_close, read_tensors, run};
use safetensors::{Dtype, tensor::TensorView};
use tempfile::TempDir;

/// Prompts of different lengths, longer than the windows and chunks that are drawn.
fn prompts(seed: u64) -> Vec<Vec<u32>> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    [23, 1, 9]
        .iter()
        .map(|&length| {
            (0..length)
                .map(|_| {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    (state % 319) as u32 + 1
                })
                .collect()
        })
        .collect()
}

/// Right-padded `input_ids` and `attention_mask`; returns which positions hold tokens.
fn write_inputs(path: &Path, prompts: &[Vec<u32>]) -> Vec<bool> {
    let length = prompts.iter().map(Vec::len).max().expect("prompts");
    let cell = |row: usize, column: usize| prompts[row].get(column).copied();
    let cells: Vec<Option<u32>> = (0..prompts.len())
        .flat_map(|row| (0..length).map(move |column| cell(row, column)))
        .collect();
    let bytes = |value: fn(&Option<u32>) -> i64| cells.iter().flat_map(|c| value(c).to_le_bytes()).collect::<Vec<u8>>();
    let (ids, mask) = (bytes(|c| c.unwrap_or(0).into()), bytes(|c| c.is_some().into()));
    let view = |bytes| TensorView::new(Dtype::I64, vec![prompts.len(), length], bytes).expect("shape and bytes agree");
    let file = safetensors::serialize([("input_ids", view(&ids)), ("attention_mask", view(&mask))], None);
    fs::write(path, file.expect("serialises")).expect("writable");
    cells.iter().map(Option::is_some).collect()
}

fn path(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

fn forward(model: &Path, inputs: &Path, out: &Path, extra: &[&str]) -> Vec<u8> {
    let args = [
        "forward",
        "--model",
        path(model),
        "--inputs",
        path(inputs),
        "--out",
        path(out),
        "--weights",
        "f32",
    ];
    run(&[&args[..], extra].concat()).ok();
    fs::read(out).expect("forward writes its output")
}

/// `forward` and `generate` against the reference, and bits over workers.
fn check(tiny: &TinyCheckpoint) {
    let folder = TempDir::new().expect("a temporary folder");
    let model = folder.path().join("model");
    let prompts = prompts(tiny.seed);
    let margin = if tiny.family.has_experts() { 2e-4 } else { 0.0 };
    let seed = tiny
        .write_safe(&model, &prompts, 6, margin)
        .expect("a checkpoint with safe decisions");
    let what = format!("{:?} seed {seed} {:?} {:?}", tiny.family, tiny.element, tiny.storage);
    let naive = NaiveModel::open(&model).expect("the reference reads it");

    let (inputs, out) = (
        folder.path().join("in.safetensors"),
        folder.path().join("out.safetensors"),
    );
    let valid = write_inputs(&inputs, &prompts);
    let local = forward(&model, &inputs, &out, &["--combine-block", "8"]);
    let found: HashMap<_, _> = read_tensors(&out).into_iter().collect();
    let (shape, logits) = &found["logits"];
    let row = shape[1] * shape[2];
    for (index, prompt) in prompts.iter().enumerate() {
        let wanted = naive.forward(prompt).expect("the reference runs");
        let wanted: Vec<f32> = wanted.logits.iter().flatten().map(|&value| value as f32).collect();
        let found = &logits[index * row..index * row + wanted.len()];
        assert_close(
            &format!("{what}: logits of prompt {index}"),
            found,
            &wanted,
            &vec![true; prompt.len()],
            1e-4,
        );
    }
    assert!(
        valid.iter().filter(|&&valid| valid).count() == 33,
        "the reference saw every token"
    );
    if tiny.family.has_experts() {
        for workers in ["2", "3"] {
            let remote = forward(&model, &inputs, &out, &["--combine-block", "8", "--workers", workers]);
            assert!(local == remote, "{what}: {workers} workers differ from local experts");
        }
    }

    let prompt = &prompts[0];
    let ids = prompt.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    let args = [
        "generate",
        "--model",
        path(&model),
        "--weights",
        "f32",
        "--prompt-ids",
        &ids,
        "--json",
    ];
    let extra = ["--temperature", "0", "--max-tokens", "6", "--ignore-eos"];
    let answer: serde_json::Value =
        serde_json::from_str(&run(&[&args[..], &extra].concat()).ok()).expect("--json prints JSON");
    let found: Vec<u32> = serde_json::from_value(answer["token_ids"].clone()).expect("ids");
    assert_eq!(found, naive.greedy(prompt, 6).expect("the reference runs"), "{what}");
}

#[test]
fn every_family_matches_the_naive_reference_at_drawn_sizes() {
    for family in ALL_FAMILIES {
        for seed in [3, 11] {
            check(&TinyCheckpoint::from_seed(family, seed));
        }
    }
}

#[test]
fn quantised_and_half_precision_checkpoints_match_their_dequantised_values() {
    let fp8 = TinyCheckpoint {
        storage: Storage::Fp8Block,
        hidden: 132,
        expert_intermediate: 136,
        ..TinyCheckpoint::new(Family::DeepseekV3, 5)
    };
    let mxfp4 = TinyCheckpoint {
        storage: Storage::Mxfp4,
        hidden: 64,
        expert_intermediate: 96,
        ..TinyCheckpoint::new(Family::GptOss, 6)
    };
    let half = TinyCheckpoint {
        element: Element::F16,
        shards: 3,
        ..TinyCheckpoint::new(Family::Qwen2Moe, 7)
    };
    let brain = TinyCheckpoint {
        element: Element::Bf16,
        shards: 2,
        ..TinyCheckpoint::new(Family::GraniteMoe, 8)
    };
    for tiny in [fp8, mxfp4, half, brain] {
        check(&tiny);
    }
}
