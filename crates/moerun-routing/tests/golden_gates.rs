//! The gates against an independent implementation: recorded router logits in, recorded experts and weights out.

use std::{fs, path::PathBuf};

use moerun_routing::select_experts;
use moerun_types::ModelConfig;
use ndarray::ArrayView2;
use safetensors::SafeTensors;

/// Every decoder family with experts, and where its layers keep the correction bias, if they have one.
const FAMILIES: [(&str, Option<&str>); 12] = [
    ("deepseek_v2", None),
    ("deepseek_v3", Some("mlp.gate.e_score_correction_bias")),
    ("ernie4_5_moe", Some("mlp.moe_statics.e_score_correction_bias")),
    ("glm4_moe", Some("mlp.gate.e_score_correction_bias")),
    ("gpt_oss", None),
    ("granitemoe", None),
    ("llama4_text", None),
    ("mixtral", None),
    ("olmoe", None),
    ("phimoe", None),
    ("qwen2_moe", None),
    ("qwen3_moe", None),
];

fn golden(family: &str, file: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "../../tests/golden", family, file]
        .iter()
        .collect()
}

fn read(family: &str, file: &str) -> Vec<u8> {
    fs::read(golden(family, file)).unwrap_or_else(|error| panic!("{family}/{file}: {error}"))
}

fn f32s(tensors: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let tensor = tensors.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!(tensor.dtype(), safetensors::Dtype::F32, "{name}");
    bytemuck::pod_collect_to_vec(tensor.data())
}

fn i64s(tensors: &SafeTensors<'_>, name: &str) -> Vec<i64> {
    let tensor = tensors.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!(tensor.dtype(), safetensors::Dtype::I64, "{name}");
    bytemuck::pod_collect_to_vec(tensor.data())
}

#[test]
fn recorded_logits_give_the_recorded_experts_and_weights() {
    for (family, correction_bias) in FAMILIES {
        let config = ModelConfig::from_json(&String::from_utf8(read(family, "config.json")).unwrap())
            .unwrap_or_else(|error| panic!("{family}: {error}"));
        let moe = config.moe.as_ref().unwrap_or_else(|| panic!("{family} has experts"));
        let (weights, recorded) = (read(family, "model.safetensors"), read(family, "golden.safetensors"));
        let (weights, recorded) = (
            SafeTensors::deserialize(&weights).unwrap(),
            SafeTensors::deserialize(&recorded).unwrap(),
        );
        let attention_mask = i64s(&recorded, "attention_mask");

        for (block, layer) in config.moe_layers().into_iter().enumerate() {
            let bias = correction_bias.map(|name| f32s(&weights, &format!("model.layers.{layer}.{name}")));
            let logits = f32s(&recorded, &format!("moe.{block}.router_logits"));
            let logits = ArrayView2::from_shape((attention_mask.len(), moe.num_experts), &logits).unwrap();
            let routing = select_experts(logits, &moe.gate, moe.top_k, bias.as_deref())
                .unwrap_or_else(|error| panic!("{family} block {block}: {error}"));

            let wanted_ids = i64s(&recorded, &format!("moe.{block}.topk_ids"));
            let wanted_weights = f32s(&recorded, &format!("moe.{block}.topk_weights"));
            for token in (0..attention_mask.len()).filter(|&token| attention_mask[token] == 1) {
                let places = token * moe.top_k..(token + 1) * moe.top_k;
                let mut found: Vec<(i64, f32)> = routing.expert_ids[places.clone()]
                    .iter()
                    .map(|id| i64::from(id.0))
                    .zip(routing.routing_weights[places.clone()].iter().copied())
                    .collect();
                found.sort_by_key(|&(id, _)| id);
                let ids: Vec<i64> = found.iter().map(|&(id, _)| id).collect();
                assert_eq!(ids, wanted_ids[places.clone()], "{family} block {block} token {token}");
                for (&(id, found), wanted) in found.iter().zip(&wanted_weights[places]) {
                    let close = (found - wanted).abs() <= 1e-5;
                    assert!(
                        close,
                        "{family} block {block} token {token} expert {id}: {found}, recorded {wanted}"
                    );
                }
            }
        }
    }
}
