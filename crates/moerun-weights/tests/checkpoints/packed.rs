//! Packed checkpoints: equal to what they were made from, and refused where they lie.

use std::{fs, path::Path};

use moerun_kernels::FeedForward;
use moerun_testkit::{Family, RawGguf, TinyCheckpoint};
use moerun_types::{BlockRange, ExpertId, LayerId, NumberFormat};
use moerun_weights::{
    Checkpoint, ConvertRequest, LayerTensor, Load, Needs, TensorRole, WeightsError, convert, expected_tensors,
};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Rows and columns on and off the borders of panels and blocks.
fn tiny(family: Family) -> TinyCheckpoint {
    TinyCheckpoint::wide_as_released(family, 9)
}

fn packed(source: &Checkpoint, format: NumberFormat, out: &Path) -> Checkpoint {
    convert(&ConvertRequest {
        max_shard_bytes: 60_000,
        ..ConvertRequest::new(source, format, out)
    })
    .unwrap();
    Checkpoint::open(out, Needs::All).unwrap()
}

fn bytes(expert: &FeedForward) -> Vec<Vec<u8>> {
    let matrices = [&expert.gate_proj, &expert.up_proj, &expert.down_proj];
    let biases = [&expert.gate_bias, &expert.up_bias, &expert.down_bias];
    let bias_bytes = biases.map(|bias| format!("{bias:?}").into_bytes());
    matrices
        .map(|matrix| matrix.as_bytes().to_vec())
        .into_iter()
        .chain(bias_bytes)
        .collect()
}

fn roles(checkpoint: &Checkpoint) -> Vec<(TensorRole, Vec<usize>)> {
    expected_tensors(checkpoint.config())
        .into_iter()
        .filter_map(|tensor| match tensor.part {
            moerun_weights::ModelPart::Dense(role) => Some((role, tensor.shape)),
            moerun_weights::ModelPart::Experts(_) => None,
        })
        .collect()
}

fn assert_equal(source: &Checkpoint, found: &Checkpoint, format: NumberFormat, what: &str) {
    assert_eq!(found.config_hash(), source.config_hash(), "{what}");
    assert_eq!(found.expert_header_hash(), source.expert_header_hash(), "{what}");
    assert_eq!(found.dense_header_hash(), source.dense_header_hash(), "{what}");
    assert_eq!(found.router_hash(), source.router_hash(), "{what}");
    assert_eq!((found.packed_format(), found.default_format()), (Some(format), format));
    for (role, shape) in roles(source) {
        if shape.len() == 1 || role_is_vector(role) {
            assert_eq!(
                found.vector(role).unwrap(),
                source.vector(role).unwrap(),
                "{what} {role:?}"
            );
            continue;
        }
        let wanted = source.load_matrices(role, format).unwrap();
        for load in [Load::Map, Load::Copy] {
            let found = Checkpoint::open(found.dir(), Needs::All).unwrap().loading(load);
            let found = found.load_matrices(role, format).unwrap();
            assert_eq!(found.len(), wanted.len(), "{what} {role:?}");
            for (found, wanted) in found.iter().zip(&wanted) {
                assert_eq!(
                    (found.format(), found.rows(), found.cols()),
                    (wanted.format(), wanted.rows(), wanted.cols())
                );
                assert!(found.as_bytes() == wanted.as_bytes(), "{what} {role:?}");
            }
        }
    }
    let Some(moe) = source.config().moe.clone() else { return };
    let width = moe.intermediate;
    for layer in source.config().moe_layers() {
        for expert in (0..moe.num_experts as u16).map(ExpertId) {
            for held in [0..width, 0..32, 32..64, 64..width, 32..width] {
                let wanted = source.load_expert(layer, expert, format, held.clone()).unwrap();
                let loaded = found.load_expert(layer, expert, format, held.clone()).unwrap();
                assert!(loaded.gate_proj.is_mapped() && loaded.down_proj.is_mapped() == (held.len() == width));
                assert!(bytes(&loaded) == bytes(&wanted), "{what} {layer} {expert} {held:?}");
            }
            for combine_block in [32, 64, 128] {
                let blocks = BlockRange {
                    first: 0,
                    end: width.div_ceil(combine_block) as u16,
                };
                let hashes = |of: &Checkpoint| of.expert_block_hashes(layer, expert, blocks, combine_block).unwrap();
                assert_eq!(hashes(found), hashes(source), "{what} {layer} {expert}");
            }
        }
    }
}

fn role_is_vector(role: TensorRole) -> bool {
    matches!(role, TensorRole::Layer(_, LayerTensor::CorrectionBias))
}

#[test]
fn every_tensor_and_hash_is_that_of_the_original_in_every_format() {
    for family in [
        Family::Qwen3Moe,
        Family::GptOss,
        Family::DeepseekV3,
        Family::Qwen2Moe,
        Family::GraniteMoe,
        Family::Ernie45Moe,
        Family::Llama4Text,
        Family::Llama,
    ] {
        let root = TempDir::new().unwrap();
        let dir = root.path().join("source");
        tiny(family).write(&dir).unwrap();
        let source = Checkpoint::open(&dir, Needs::All).unwrap();
        for format in NumberFormat::ALL {
            let found = packed(&source, format, &root.path().join(format.to_string()));
            assert_equal(&source, &found, format, &format!("{family:?} {format}"));
        }
    }
}

#[test]
fn gguf_is_packed_with_its_config() {
    let root = TempDir::new().unwrap();
    let dir = root.path().join("source");
    tiny(Family::Mixtral).write(&dir).unwrap();
    let file = root.path().join("model.gguf");
    fs::write(&file, RawGguf::from_checkpoint(&dir).unwrap().to_bytes()).unwrap();
    let source = Checkpoint::open(&file, Needs::All).unwrap();
    let found = packed(&source, NumberFormat::Int8, &root.path().join("out"));
    assert_equal(&source, &found, NumberFormat::Int8, "gguf");
}

/// A packed checkpoint of two files in `int8`.
fn written() -> TempDir {
    let root = TempDir::new().unwrap();
    let dir = root.path().join("source");
    tiny(Family::Qwen3Moe).write(&dir).unwrap();
    let source = Checkpoint::open(&dir, Needs::All).unwrap();
    convert(&ConvertRequest::new(
        &source,
        NumberFormat::Int8,
        &root.path().join("out"),
    ))
    .unwrap();
    root
}

const DENSE: &str = "packed-00001-of-00002.safetensors";
const EXPERTS: &str = "packed-00002-of-00002.safetensors";

#[test]
fn another_format_and_stored_elements_are_refused_by_name() {
    let root = written();
    let checkpoint = Checkpoint::open(&root.path().join("out"), Needs::All).unwrap();
    let error = checkpoint
        .load_matrices(TensorRole::Embedding, NumberFormat::Int4)
        .unwrap_err();
    assert!(
        matches!(
            error,
            WeightsError::PackedFormat {
                stored: NumberFormat::Int8,
                wanted: NumberFormat::Int4,
                ..
            }
        ),
        "{error}"
    );
    let (layer, expert) = (LayerId(1), ExpertId(0));
    let error = checkpoint
        .load_expert(layer, expert, NumberFormat::F32, 0..80)
        .unwrap_err();
    assert!(error.to_string().contains("is packed in int8, not in f32"), "{error}");
    assert!(matches!(
        checkpoint.matrix(TensorRole::Embedding),
        Err(WeightsError::IsPacked { .. })
    ));
    assert!(matches!(
        checkpoint.expert(layer, expert),
        Err(WeightsError::IsPacked { .. })
    ));
    let blocks = BlockRange { first: 0, end: 1 };
    let error = checkpoint.expert_block_hashes(layer, expert, blocks, 40).unwrap_err();
    assert!(
        matches!(
            error,
            WeightsError::PackedHashes {
                unit: 32,
                combine_block: 40,
                ..
            }
        ),
        "{error}"
    );
    assert!(
        checkpoint
            .load_expert(LayerId(1), ExpertId(999), NumberFormat::Int8, 0..80)
            .is_err()
    );
    assert!(
        checkpoint
            .load_expert(LayerId(9), expert, NumberFormat::Int8, 0..80)
            .is_err()
    );
}

#[test]
fn each_process_needs_its_files_alone() {
    let root = written();
    let out = root.path().join("out");
    fs::rename(out.join(EXPERTS), root.path().join(EXPERTS)).unwrap();
    assert!(Checkpoint::open(&out, Needs::All).is_err() && Checkpoint::open(&out, Needs::ExpertsOnly).is_err());
    let gateway = Checkpoint::open(&out, Needs::GatewayOnly).unwrap();
    assert!(!gateway.has_expert(LayerId(1), ExpertId(0)));
    assert!(gateway.expert_header_hash().is_none() && gateway.dense_header_hash().is_some());
    fs::rename(root.path().join(EXPERTS), out.join(EXPERTS)).unwrap();
    fs::remove_file(out.join(DENSE)).unwrap();
    let worker = Checkpoint::open(&out, Needs::ExpertsOnly).unwrap();
    assert!(worker.has_expert(LayerId(1), ExpertId(0)));
    assert!(worker.dense_header_hash().is_none() && worker.router_hash().is_none());
    assert!(worker.vector(TensorRole::FinalNorm).is_err());
}

/// Changes the header of a file; the data stays as it is, `shift` bytes off its border.
fn edit(path: &Path, shift: usize, change: impl FnOnce(&mut Value)) {
    let file = fs::read(path).unwrap();
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&file[8..8 + length]).unwrap();
    change(&mut header);
    let mut text = header.to_string();
    let end = (8 + text.len()).next_multiple_of(64) + shift;
    text.extend(std::iter::repeat_n(' ', end - 8 - text.len()));
    let mut changed = (text.len() as u64).to_le_bytes().to_vec();
    changed.extend(text.as_bytes());
    changed.extend(&file[8 + length..]);
    fs::write(path, changed).unwrap();
}

#[test]
fn lies_are_refused_by_what_was_wanted_and_what_was_found() {
    type Change = fn(&mut Value);
    let rename: Change = |header| {
        let entry = header.as_object_mut().unwrap().remove("model.norm.weight").unwrap();
        header["model.norm.wight"] = entry;
    };
    let lies: [(&str, usize, Change, &[&str]); 10] = [
        (
            DENSE,
            0,
            |header| header["__metadata__"]["moerun_packed"] = json!("2"),
            &["version 1", "found 2"],
        ),
        (
            DENSE,
            0,
            |header| header["__metadata__"]["weights"] = json!("int7"),
            &["weights: wanted f32, bf16", "int7"],
        ),
        (
            EXPERTS,
            0,
            |header| header["__metadata__"]["weights"] = json!("int4"),
            &["__metadata__", "int4"],
        ),
        (
            EXPERTS,
            0,
            |header| header["__metadata__"]["router_hash"] = json!(7),
            &["router_hash", "a string", "7"],
        ),
        (
            DENSE,
            0,
            |header| header["__metadata__"] = json!({}),
            &["moerun_packed", "nothing"],
        ),
        (
            DENSE,
            0,
            |header| header["__metadata__"] = json!([1]),
            &["moerun_packed", "nothing"],
        ),
        (EXPERTS, 8, |_| {}, &["multiple of 64"]),
        (
            DENSE,
            0,
            |header| header["model.norm.weight"]["dtype"] = json!("I8"),
            &["model.norm.weight", "U8", "I8"],
        ),
        (DENSE, 0, rename, &["model.norm.wight", DENSE]),
        (
            DENSE,
            0,
            |header| {
                header["model.norm.weight"]["shape"] = json!([2, 160]);
                let end = header["model.norm.weight"]["data_offsets"][1].as_u64().unwrap();
                let start = header["model.norm.weight"]["data_offsets"][0].as_u64().unwrap();
                assert_eq!(end - start, 320);
            },
            &["model.norm.weight", "[320]", "[2, 160]"],
        ),
    ];
    for (file, shift, change, words) in lies {
        let root = written();
        let out = root.path().join("out");
        edit(&out.join(file), shift, change);
        let error = Checkpoint::open(&out, Needs::All).expect_err(words[0]).to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{words:?}: {error}");
    }
}

#[test]
fn a_truncated_file_and_a_config_of_other_sizes_are_refused() {
    let root = written();
    let out = root.path().join("out");
    let path = out.join("config.json");
    let config = fs::read_to_string(&path).unwrap();
    fs::write(
        &path,
        config.replace("\"moe_intermediate_size\": 80", "\"moe_intermediate_size\": 112"),
    )
    .unwrap();
    let error = Checkpoint::open(&out, Needs::All).unwrap_err();
    assert!(matches!(error, WeightsError::Shape { .. }), "{error}");
    fs::write(&path, config).unwrap();
    let file = fs::File::options().write(true).open(out.join(EXPERTS)).unwrap();
    let length = file.metadata().unwrap().len();
    file.set_len(length - 64).unwrap();
    let error = Checkpoint::open(&out, Needs::All).unwrap_err();
    assert!(matches!(error, WeightsError::Truncated { .. }), "{error}");
    file.set_len(0).unwrap();
    assert!(Checkpoint::open(&out, Needs::All).is_err());
}
