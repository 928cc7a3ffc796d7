//! The golden checkpoints against what the safetensors crate reads from the same files.

use std::fs;

use moerun_types::{ExpertId, Family, ModelConfig, NumberFormat};
use moerun_weights::{
    Checkpoint, Dtype, ExpertSource, LayerTensor, MatrixSource, MemoryNeed, ModelPart, Needs, ParameterCounts,
    TensorRole, expected_tensors,
};
use serde_json::json;

use crate::{
    directories::{change_config, copy_of, golden, open},
    files::{self, RawTensor, RawTensors},
};

fn values(source: &MatrixSource<'_>) -> Vec<f32> {
    let mut values = vec![0.0; source.rows() * source.cols()];
    for (row, out) in values.chunks_exact_mut(source.cols()).enumerate() {
        source.read_row(row, out);
    }
    values
}

#[test]
fn every_golden_checkpoint_opens_with_either_config() {
    for family in Family::ALL {
        let new = open(&golden(family)).unwrap_or_else(|error| panic!("{family:?}: {error}"));
        let dir = copy_of(family);
        fs::copy(golden(family).join("config.hub.json"), dir.path().join("config.json")).unwrap();
        let old = open(dir.path()).unwrap_or_else(|error| panic!("{family:?}: {error}"));
        assert_eq!(new.config(), old.config(), "{family:?}");
        assert_eq!(new.config_hash(), old.config_hash(), "{family:?}");
        assert_eq!(new.generation_config().eos_token_ids, [2], "{family:?}");
        assert_eq!(new.default_format(), NumberFormat::F32, "{family:?}");
    }
}

#[test]
fn the_trained_model_opens_in_its_own_format() {
    let dir = format!("{}/../../tests/models/tiny-bible-moe", env!("CARGO_MANIFEST_DIR"));
    let checkpoint = open(dir.as_ref()).unwrap();
    assert_eq!(checkpoint.default_format(), NumberFormat::Bf16);
    assert_eq!(checkpoint.generation_config().max_new_tokens, Some(128));
    assert!(!checkpoint.has(TensorRole::Head), "the head is tied");
    let counts = ParameterCounts::of(checkpoint.config());
    let stored = fs::metadata(format!("{dir}/model.safetensors")).unwrap().len();
    assert!(
        counts.total * 2 < stored && stored < counts.total * 2 + 65_536,
        "{counts:?} in {stored} bytes"
    );
}

#[test]
fn tensors_outside_the_experts_have_the_stored_values() {
    for family in Family::ALL {
        let checkpoint = open(&golden(family)).unwrap();
        let raw = files::read(&golden(family).join("model.safetensors"));
        for tensor in expected_tensors(checkpoint.config()) {
            let ModelPart::Dense(role) = tensor.part else { continue };
            let wanted = raw[&tensor.name].values();
            assert!(checkpoint.has(role));
            let is_vector = tensor.shape.len() == 1 || tensor.name.ends_with("e_score_correction_bias");
            let found = match is_vector {
                true => checkpoint.vector(role).unwrap(),
                false => values(&checkpoint.matrix(role).unwrap()),
            };
            assert_eq!(found, wanted, "{family:?} {}", tensor.name);
        }
    }
}

/// Elements of an expert's stack, picked by index arithmetic of the test's own.
fn pick(tensor: &RawTensor, expert: usize, [rows, cols]: [usize; 2], at: impl Fn(usize, usize) -> usize) -> Vec<f32> {
    let all = tensor.values();
    let size = all.len() / tensor.shape[0];
    (0..rows * cols)
        .map(|index| all[expert * size + at(index / cols, index % cols)])
        .collect()
}

fn wanted_expert(config: &ModelConfig, raw: &RawTensors, layer: u32, expert: usize) -> [Vec<f32>; 3] {
    let (hidden, width) = (config.hidden, config.moe.as_ref().unwrap().intermediate);
    let (up_shape, down_shape) = ([width, hidden], [hidden, width]);
    let tensor = |name: &str| &raw[&format!("model.layers.{layer}.{name}")];
    match config.family {
        Family::Mixtral | Family::PhiMoe => {
            ["w1", "w3", "w2"].map(|name| tensor(&format!("block_sparse_moe.experts.{expert}.{name}.weight")).values())
        }
        Family::GraniteMoe => {
            let gate_up = tensor("block_sparse_moe.input_linear.weight");
            [
                pick(gate_up, expert, up_shape, |row, col| row * hidden + col),
                pick(gate_up, expert, up_shape, |row, col| (width + row) * hidden + col),
                pick(
                    tensor("block_sparse_moe.output_linear.weight"),
                    expert,
                    down_shape,
                    |r, c| r * width + c,
                ),
            ]
        }
        Family::GptOss => {
            let gate_up = tensor("mlp.experts.gate_up_proj");
            [
                pick(gate_up, expert, up_shape, |row, col| col * 2 * width + 2 * row),
                pick(gate_up, expert, up_shape, |row, col| col * 2 * width + 2 * row + 1),
                pick(tensor("mlp.experts.down_proj"), expert, down_shape, |row, col| {
                    col * hidden + row
                }),
            ]
        }
        Family::Llama4Text => {
            let gate_up = tensor("feed_forward.experts.gate_up_proj");
            [
                pick(gate_up, expert, up_shape, |row, col| col * 2 * width + row),
                pick(gate_up, expert, up_shape, |row, col| col * 2 * width + width + row),
                pick(
                    tensor("feed_forward.experts.down_proj"),
                    expert,
                    down_shape,
                    |row, col| col * hidden + row,
                ),
            ]
        }
        _ => ["gate_proj", "up_proj", "down_proj"]
            .map(|name| tensor(&format!("mlp.experts.{expert}.{name}.weight")).values()),
    }
}

#[test]
fn experts_have_the_stored_values_whatever_their_layout() {
    for family in Family::ALL {
        let checkpoint = open(&golden(family)).unwrap();
        let raw = files::read(&golden(family).join("model.safetensors"));
        let config = checkpoint.config();
        for layer in config.moe_layers() {
            for expert in 0..config.moe.as_ref().unwrap().num_experts {
                let ExpertSource {
                    gate_proj,
                    up_proj,
                    down_proj,
                    gate_bias,
                    up_bias,
                    down_bias,
                } = checkpoint.expert(layer, ExpertId(expert as u16)).unwrap();
                let found = [&gate_proj, &up_proj, &down_proj].map(values);
                assert_eq!(
                    found,
                    wanted_expert(config, &raw, layer.0, expert),
                    "{family:?} {layer} {expert}"
                );
                let Some(gate_bias) = gate_bias else { continue };
                let biases = &raw[&format!("model.layers.{layer}.mlp.experts.gate_up_proj_bias")];
                let interleaved: Vec<f32> = gate_bias
                    .iter()
                    .zip(up_bias.unwrap())
                    .flat_map(|(&gate, up)| [gate, up])
                    .collect();
                assert_eq!(interleaved, biases.values()[expert * 64..(expert + 1) * 64]);
                let biases = &raw[&format!("model.layers.{layer}.mlp.experts.down_proj_bias")];
                assert_eq!(down_bias.unwrap(), biases.values()[expert * 32..(expert + 1) * 32]);
            }
        }
    }
}

#[test]
fn parts_and_blocks_of_rows_are_those_of_whole_rows() {
    for family in [Family::Mixtral, Family::GraniteMoe, Family::GptOss, Family::Llama4Text] {
        let checkpoint = open(&golden(family)).unwrap();
        let layer = checkpoint.config().moe_layers()[0];
        let expert = checkpoint.expert(layer, ExpertId(1)).unwrap();
        for source in [&expert.gate_proj, &expert.up_proj, &expert.down_proj] {
            let (all, cols) = (values(source), source.cols());
            for (row, first, length) in [(0, 0, cols), (3, 5, 7), (source.rows() - 1, cols - 1, 1), (1, 2, 0)] {
                let mut part = vec![0.0; length];
                source.read_row_part(row, first, &mut part);
                assert_eq!(
                    part,
                    all[row * cols + first..row * cols + first + length],
                    "{family:?} {row} {first}"
                );
            }
            let mut block = vec![0.0; 3 * cols];
            source.read_rows(2, &mut block);
            assert_eq!(block, all[2 * cols..5 * cols], "{family:?}");
        }
    }
}

#[test]
fn data_at_odd_addresses_is_read() {
    for padding in 0..8 {
        for (family, dtype) in [
            (Family::Qwen3Moe, Dtype::F32),
            (Family::GptOss, Dtype::Bf16),
            (Family::Llama, Dtype::F16),
        ] {
            let dir = copy_of(family);
            let path = dir.path().join("model.safetensors");
            let whole = files::read(&path);
            let stored: RawTensors = whole
                .iter()
                .map(|(name, tensor)| (name.clone(), as_type(tensor, dtype)))
                .collect();
            files::write_padded(&path, &stored, padding);
            let checkpoint = open(dir.path()).unwrap();
            let found = values(&checkpoint.matrix(TensorRole::Embedding).unwrap());
            let wanted = rounded(&whole["model.embed_tokens.weight"], dtype);
            assert_eq!(found, wanted, "{family:?} padding {padding}");
            let wanted = if dtype == Dtype::Bf16 {
                NumberFormat::Bf16
            } else {
                NumberFormat::F32
            };
            assert_eq!(checkpoint.default_format(), wanted);
        }
    }
}

fn as_type(tensor: &RawTensor, dtype: Dtype) -> RawTensor {
    let values = tensor.values();
    let data = match dtype {
        Dtype::F16 => values
            .iter()
            .flat_map(|&value| half::f16::from_f32(value).to_le_bytes())
            .collect(),
        Dtype::Bf16 => values
            .iter()
            .flat_map(|&value| half::bf16::from_f32(value).to_le_bytes())
            .collect(),
        _ => tensor.data.clone(),
    };
    RawTensor::bytes(dtype.name(), &tensor.shape, data)
}

fn rounded(tensor: &RawTensor, dtype: Dtype) -> Vec<f32> {
    let round = |value: f32| match dtype {
        Dtype::F16 => half::f16::from_f32(value).to_f32(),
        Dtype::Bf16 => half::bf16::from_f32(value).to_f32(),
        _ => value,
    };
    tensor.values().into_iter().map(round).collect()
}

#[test]
fn types_may_differ_from_tensor_to_tensor() {
    let dir = copy_of(Family::DeepseekV3);
    let path = dir.path().join("model.safetensors");
    let tensors = files::read(&path)
        .into_iter()
        .map(|(name, tensor)| {
            let keep = name.ends_with("mlp.gate.weight") || name.ends_with("correction_bias");
            let stored = if keep { tensor } else { as_type(&tensor, Dtype::Bf16) };
            (name, stored)
        })
        .collect();
    files::write(&path, &tensors);
    let checkpoint = open(dir.path()).unwrap();
    assert_eq!(checkpoint.default_format(), NumberFormat::Bf16);
    let layer = checkpoint.config().moe_layers()[0];
    let router = checkpoint
        .matrix(TensorRole::Layer(layer, LayerTensor::Router))
        .unwrap();
    assert_eq!(router.dtype(), Dtype::F32);
}

#[test]
fn parameters_are_counted_as_stored() {
    for family in Family::ALL {
        let checkpoint = open(&golden(family)).unwrap();
        let counts = ParameterCounts::of(checkpoint.config());
        let raw = files::read(&golden(family).join("model.safetensors"));
        let elements = |tensor: &RawTensor| tensor.data.len() as u64 / 4;
        assert_eq!(counts.total, raw.values().map(elements).sum::<u64>(), "{family:?}");
        let experts: u64 = raw
            .iter()
            .filter(|(name, _)| {
                name.contains(".experts.") || name.contains("input_linear") || name.contains("output_linear")
            })
            .map(|(_, tensor)| elements(tensor))
            .sum();
        assert_eq!(counts.experts, experts, "{family:?}");
        let moe = checkpoint.config().moe.as_ref();
        let share = moe.map_or(0, |moe| experts * moe.top_k as u64 / moe.num_experts as u64);
        assert_eq!(counts.active, counts.total - experts + share, "{family:?}");
    }
}

#[test]
fn memory_is_that_of_padded_panels() {
    let checkpoint = open(&golden(Family::Qwen3Moe)).unwrap();
    let need = MemoryNeed::of(checkpoint.config(), NumberFormat::Bf16);
    // Width 24 is padded to 32 output rows for gate and up; the 32 output rows of down are whole panels.
    assert_eq!(need.expert_bytes, 2 * (2 * 32 * 32 + 32 * 24));
    assert_eq!(need.all_experts_bytes, 2 * 8 * need.expert_bytes);
    let attention = 2 * (64 * 32 + 32 * 32 + 32 * 32 + 32 * 64) + 4 * (16 + 16);
    let router = 4 * 16 * 32; // 8 rows, padded
    let layer = attention + 4 * (32 + 32) + router;
    assert_eq!(need.gateway_bytes, 2 * (2 * 320 * 32) + 2 * layer + 4 * 32);
    // Two blocks of 16 rows share a line of scales; width 24 is one block.
    let lines = |lines: u64| 64 * lines;
    let need = MemoryNeed::of(checkpoint.config(), NumberFormat::Int8);
    assert_eq!(need.expert_bytes, 2 * 2 * lines(17) + 2 * lines(17));
    let need = MemoryNeed::of(checkpoint.config(), NumberFormat::Int4);
    assert_eq!(need.expert_bytes, 2 * 2 * lines(9) + 2 * lines(9));
}

#[test]
fn a_language_model_cut_from_a_multimodal_checkpoint_keeps_its_prefix() {
    let dir = copy_of(Family::Llama4Text);
    let path = dir.path().join("model.safetensors");
    let tensors: RawTensors = files::read(&path)
        .into_iter()
        .map(|(name, tensor)| (format!("language_model.{name}"), tensor))
        .collect();
    files::write(&path, &tensors);
    let checkpoint = open(dir.path()).unwrap();
    assert_eq!(
        checkpoint.expert_header_hash(),
        open(&golden(Family::Llama4Text)).unwrap().expert_header_hash()
    );
}

#[test]
fn known_extras_of_a_family_are_skipped() {
    for (family, name, changes) in [
        (Family::DeepseekV3, "model.layers.3.eh_proj.weight", json!({})),
        (
            Family::Glm4Moe,
            "model.layers.3.mlp.experts.0.up_proj.weight",
            json!({}),
        ),
        (Family::Ernie45Moe, "model.mtp_block.0.mlp.up_proj.weight", json!({})),
        (Family::Llama, "model.layers.0.self_attn.rotary_emb.inv_freq", json!({})),
        (Family::Llama, "lm_head.weight", json!({ "tie_word_embeddings": true })),
    ] {
        let dir = copy_of(family);
        change_config(dir.path(), changes);
        let path = dir.path().join("model.safetensors");
        let mut tensors = files::read(&path);
        tensors.insert(name.to_owned(), RawTensor::f32(&[2], &[1.0, 2.0]));
        files::write(&path, &tensors);
        let checkpoint = open(dir.path()).unwrap_or_else(|error| panic!("{family:?}: {error}"));
        assert!(!checkpoint.has(TensorRole::Head) || family != Family::Llama || name != "lm_head.weight");
    }
}

#[test]
fn what_a_model_does_not_have_is_an_error() {
    let checkpoint = Checkpoint::open(&golden(Family::DeepseekV3), Needs::All).unwrap();
    let layer = moerun_types::LayerId;
    assert!(checkpoint.expert(layer(0), ExpertId(0)).is_err(), "layer 0 is dense");
    assert!(checkpoint.expert(layer(9), ExpertId(0)).is_err());
    assert!(checkpoint.expert(layer(1), ExpertId(8)).is_err());
    assert!(checkpoint.matrix(TensorRole::HeadBias).is_err());
    assert!(checkpoint.matrix(TensorRole::FinalNorm).is_err(), "a vector");
    assert!(checkpoint.vector(TensorRole::Embedding).is_err(), "a matrix");
}
