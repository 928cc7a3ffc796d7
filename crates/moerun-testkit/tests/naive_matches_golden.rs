//! The naive reference against what an independent implementation computed.
#![allow(clippy::unwrap_used)] // clippy's exception for tests does not reach the helpers of an integration test

use std::path::Path;

use moerun_testkit::{ALL_FAMILIES, Element, Family, NaiveForward, NaiveModel, RawFile, decode, golden_dir};
use serde_json::Value;

/// A tensor of golden.safetensors, `[batch, sequence, …]`.
struct Golden {
    shape: Vec<usize>,
    values: Vec<f64>,
}

impl Golden {
    /// The values of one token.
    fn token(&self, sequence: usize, position: usize) -> &[f64] {
        let width = self.shape[2];
        &self.values[(sequence * self.shape[1] + position) * width..][..width]
    }
}

fn golden(file: &RawFile, name: &str) -> Golden {
    let tensor = file
        .tensors
        .iter()
        .find(|tensor| tensor.name == name)
        .unwrap_or_else(|| panic!("no {name}"));
    let values = match tensor.dtype.as_str() {
        "I64" => tensor
            .data
            .as_chunks::<8>()
            .0
            .iter()
            .map(|&bytes| i64::from_le_bytes(bytes) as f64)
            .collect(),
        dtype => decode(Element::from_name(dtype).expect("a known type"), &tensor.data),
    };
    Golden {
        shape: tensor.shape.clone(),
        values,
    }
}

fn assert_close(found: &[f64], wanted: &[f64], what: &str) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    for (i, (found, wanted)) in found.iter().zip(wanted).enumerate() {
        assert!(
            (found - wanted).abs() <= 1e-4 + 1e-4 * wanted.abs(),
            "{what}[{i}]: {found} instead of {wanted}"
        );
    }
}

fn ids(value: &Value) -> Vec<u32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|id| id.as_u64().expect("an id") as u32)
        .collect()
}

fn check_forward(forward: &NaiveForward, file: &RawFile, sequence: usize, what: &str) {
    for position in 0..forward.logits.len() {
        let check = |name: &str, found: &[f64]| {
            let wanted = golden(file, name);
            assert_close(
                found,
                wanted.token(sequence, position),
                &format!("{what} {name} position {position}"),
            );
        };
        check("logits", &forward.logits[position]);
        check("hidden_final", &forward.hidden_final[position]);
        for (layer, output) in forward.layer_outputs.iter().enumerate() {
            check(&format!("layer.{layer}.output"), &output[position]);
        }
        for (j, block) in forward.moe.iter().enumerate() {
            check(&format!("moe.{j}.input"), &block.input[position]);
            check(&format!("moe.{j}.output"), &block.output[position]);
            check(&format!("moe.{j}.router_logits"), &block.router_logits[position]);
            check(&format!("moe.{j}.topk_weights"), &block.topk_weights[position]);
            let chosen: Vec<f64> = block.topk_ids[position].iter().map(|&id| id as f64).collect();
            assert_eq!(
                chosen,
                golden(file, &format!("moe.{j}.topk_ids")).token(sequence, position),
                "{what} moe {j}"
            );
        }
    }
}

fn check_folder(dir: &Path, config_file: &str) {
    let text = std::fs::read_to_string(dir.join("golden.json")).expect("golden.json");
    let recorded: Value = serde_json::from_str(&text).expect("JSON");
    let file = RawFile::read(&dir.join("golden.safetensors")).expect("golden.safetensors");
    let model = NaiveModel::open_with_config(dir, config_file).expect("a checkpoint");
    let moe_layers = ids(&recorded["moe_layers"]);
    for (sequence, prompt) in recorded["prompts"].as_array().expect("a list").iter().enumerate() {
        let what = format!("{} sequence {sequence}", dir.display());
        let forward = model.forward(&ids(prompt)).expect("a forward pass");
        assert_eq!(
            forward.moe.iter().map(|block| block.layer as u32).collect::<Vec<_>>(),
            moe_layers,
            "{what}"
        );
        check_forward(&forward, &file, sequence, &what);
    }
}

#[test]
fn every_golden_forward_pass_is_reproduced_from_either_spelling_of_the_config() {
    for family in ALL_FAMILIES {
        check_folder(&golden_dir(family), "config.json");
        check_folder(&golden_dir(family), "config.hub.json");
    }
}

#[test]
fn every_golden_greedy_continuation_is_reproduced() {
    for family in ALL_FAMILIES {
        let dir = golden_dir(family);
        let recorded: Value = serde_json::from_str(&std::fs::read_to_string(dir.join("golden.json")).unwrap()).unwrap();
        let model = NaiveModel::open(&dir).unwrap();
        let prompts = recorded["prompts"].as_array().unwrap();
        for (prompt, wanted) in prompts.iter().zip(recorded["greedy"].as_array().unwrap()) {
            let wanted = ids(wanted);
            assert_eq!(
                model.greedy(&ids(prompt), wanted.len()).unwrap(),
                wanted,
                "{family:?} {prompt}"
            );
        }
    }
}

#[test]
fn the_trained_model_is_continued_as_recorded() {
    let dir = golden_dir(Family::Qwen3Moe).join("../../models/tiny-bible-moe");
    let recorded: Value = serde_json::from_str(&std::fs::read_to_string(dir.join("golden.json")).unwrap()).unwrap();
    let model = NaiveModel::open(&dir).unwrap();
    let case = &recorded["prompts"][0];
    let wanted = ids(&case["greedy"]);
    let wanted = &wanted[..wanted.len().min(8)];
    assert_eq!(model.greedy(&ids(&case["ids"]), wanted.len()).unwrap(), wanted);
}
