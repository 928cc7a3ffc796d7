//! Malformed checkpoints: each is refused with a message that names what is wrong.

use std::{fs, os::unix::fs::symlink, path::Path};

use moerun_testkit::{ALL_FAMILIES, Stage, Storage, TinyCheckpoint, lies};
use moerun_types::Family;
use moerun_weights::Needs;
use serde_json::{Map, Value, json};

use crate::{
    directories::{assert_refused, change_config, copy_of, golden, open},
    files::{self, RawTensor, RawTensors},
};

fn refused(dir: &Path, words: &[&str]) {
    assert_refused(dir, Needs::All, words);
}

/// A copy of a golden checkpoint with its tensors changed.
fn edited(family: Family, edit: impl FnOnce(&mut RawTensors)) -> tempfile::TempDir {
    let dir = copy_of(family);
    let path = dir.path().join("model.safetensors");
    let mut tensors = files::read(&path);
    edit(&mut tensors);
    files::write(&path, &tensors);
    dir
}

/// A golden checkpoint with another file in place of its weights.
fn with_weights(file: &[u8]) -> tempfile::TempDir {
    let dir = copy_of(Family::Llama);
    fs::write(dir.path().join("model.safetensors"), file).unwrap();
    dir
}

/// A golden checkpoint with hand-written header and data.
fn with_header(header: &str, data: &[u8]) -> tempfile::TempDir {
    let dir = copy_of(Family::Llama);
    files::write_raw(&dir.path().join("model.safetensors"), header, data);
    dir
}

/// A sharded golden checkpoint with its index changed.
fn with_index(edit: impl FnOnce(&mut Map<String, Value>)) -> tempfile::TempDir {
    let dir = copy_of(Family::Llama);
    files::shard(dir.path(), |name| usize::from(name.contains("layers.1")));
    let path = dir.path().join("model.safetensors.index.json");
    let mut index: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    edit(index["weight_map"].as_object_mut().unwrap());
    fs::write(path, index.to_string()).unwrap();
    dir
}

#[test]
fn every_lie_of_the_testkit_is_refused_with_the_words_it_must_name() {
    let mut failures = Vec::new();
    for lie in lies() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("model");
        lie.write(&dir).unwrap();
        match (lie.stage, open(&dir)) {
            (Stage::Weights, Ok(_)) => failures.push(format!("{lie:?} was accepted")),
            (_, Err(error)) if !lie.missing_words(&error.to_string()).is_empty() => {
                failures.push(format!("{lie:?}: {error}"));
            }
            _ => {}
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn drawn_checkpoints_of_every_family_open() {
    for family in ALL_FAMILIES {
        for seed in 0..12 {
            let mut tiny = TinyCheckpoint::from_seed(family, seed);
            match family {
                moerun_testkit::Family::DeepseekV3 if seed % 2 == 0 => tiny.storage = Storage::Fp8Block,
                moerun_testkit::Family::GptOss if seed % 2 == 0 => {
                    (tiny.storage, tiny.hidden, tiny.expert_intermediate) = (Storage::Mxfp4, 64, 32);
                }
                _ => {}
            }
            let dir = tempfile::tempdir().unwrap();
            tiny.write(dir.path()).unwrap();
            open(dir.path()).unwrap_or_else(|error| panic!("seed {seed}: {tiny:?}: {error}"));
        }
    }
}

#[test]
fn missing_tensors_are_named_with_their_shape() {
    for (family, name, shape) in [
        (Family::Mixtral, "model.norm.weight", "[32]"),
        (Family::Mixtral, "lm_head.weight", "[320, 32]"),
        (
            Family::Mixtral,
            "model.layers.1.block_sparse_moe.experts.7.w3.weight",
            "[48, 32]",
        ),
        (Family::GptOss, "model.layers.0.self_attn.sinks", "[4]"),
        (Family::GptOss, "model.layers.1.mlp.experts.down_proj_bias", "[8, 32]"),
        (Family::PhiMoe, "lm_head.bias", "[320]"),
        (
            Family::Glm4Moe,
            "model.layers.1.mlp.gate.e_score_correction_bias",
            "[8]",
        ),
        (
            Family::Ernie45Moe,
            "model.layers.2.mlp.moe_statics.e_score_correction_bias",
            "[1, 8]",
        ),
        (
            Family::DeepseekV3,
            "model.layers.2.self_attn.kv_b_proj.weight",
            "[88, 16]",
        ),
        (
            Family::Qwen2Moe,
            "model.layers.0.mlp.shared_expert_gate.weight",
            "[1, 32]",
        ),
    ] {
        let dir = edited(family, |tensors| drop(tensors.remove(name).unwrap()));
        refused(dir.path(), &[name, "missing", shape, "found nothing"]);
    }
}

#[test]
fn a_tensor_of_another_name_is_named_beside_the_missing_one() {
    let dir = edited(Family::Mixtral, |tensors| {
        let router = tensors.remove("model.layers.1.block_sparse_moe.gate.weight").unwrap();
        tensors.insert("model.layers.1.mlp.gate.weight".to_owned(), router);
        tensors.insert("aaa".to_owned(), RawTensor::f32(&[1], &[0.0]));
    });
    let (wanted, found) = (
        "model.layers.1.block_sparse_moe.gate.weight",
        "model.layers.1.mlp.gate.weight",
    );
    refused(dir.path(), &[wanted, "missing", found]);
}

#[test]
fn misshaped_tensors_are_named_with_both_shapes() {
    let name = "model.layers.0.self_attn.k_proj.weight";
    let dir = edited(Family::Llama, |tensors| {
        tensors.get_mut(name).unwrap().shape = vec![32, 16]
    });
    refused(dir.path(), &[name, "[16, 32]", "[32, 16]"]);
    let dir = edited(Family::Llama, |tensors| {
        tensors.get_mut("model.norm.weight").unwrap().shape = vec![1, 32]
    });
    refused(dir.path(), &["model.norm.weight", "[32]", "[1, 32]"]);
    let dir = copy_of(Family::Llama);
    change_config(dir.path(), json!({ "vocab_size": 321 }));
    refused(dir.path(), &["model.embed_tokens.weight", "[321, 32]", "[320, 32]"]);
}

#[test]
fn wrongly_typed_tensors_are_named_with_both_types() {
    for (dtype, bytes) in [
        ("I32", 4),
        ("F64", 8),
        ("U8", 1),
        ("F8_E4M3", 1),
        ("BOOL", 1),
        ("I64", 8),
    ] {
        let dir = edited(Family::Llama, |tensors| {
            let tensor = RawTensor::bytes(dtype, &[32], vec![0; 32 * bytes]);
            tensors.insert("model.norm.weight".to_owned(), tensor);
        });
        refused(dir.path(), &["model.norm.weight", "F32, F16 or BF16", dtype]);
    }
}

#[test]
fn unexpected_tensors_are_named_with_their_file() {
    for (family, name) in [
        (Family::Llama, "model.layers.2.self_attn.q_proj.weight"),
        (Family::Llama, "model.layers.0.self_attn.q_proj.bias"),
        (Family::Qwen2Moe, "model.layers.1.mlp.experts.0.up_proj.weight"),
        (Family::DeepseekV3, "model.layers.4.mlp.gate.weight"),
        (Family::Mixtral, "model.layers.0.block_sparse_moe.experts.8.w1.weight"),
        (Family::Mixtral, "score.weight"),
    ] {
        let dir = edited(family, |tensors| {
            tensors.insert(name.to_owned(), RawTensor::f32(&[1, 2], &[0.0; 2]));
        });
        refused(dir.path(), &[name, "unexpected", "model.safetensors", "F32 [1, 2]"]);
    }
    let dir = copy_of(Family::Llama4Text);
    let path = dir.path().join("model.safetensors");
    let mut tensors: RawTensors = files::read(&path)
        .into_iter()
        .map(|(name, tensor)| (format!("language_model.{name}"), tensor))
        .collect();
    tensors.insert("vision_model.class_embedding".to_owned(), RawTensor::f32(&[1], &[0.0]));
    files::write(&path, &tensors);
    refused(dir.path(), &["model.embed_tokens.weight", "missing"]);
}

#[test]
fn truncated_and_overlong_files_are_refused() {
    let whole = fs::read(golden(Family::Llama).join("model.safetensors")).unwrap();
    let length = whole.len().to_string();
    for cut in [1, 4, 1000] {
        let dir = with_weights(&whole[..whole.len() - cut]);
        refused(
            dir.path(),
            &[
                "model.safetensors",
                "truncated",
                &length,
                &(whole.len() - cut).to_string(),
            ],
        );
    }
    for short in [0, 7] {
        refused(
            with_weights(&whole[..short]).path(),
            &["truncated", "wanted 8 bytes", &format!("found {short}")],
        );
    }
    refused(with_weights(&whole[..100]).path(), &["truncated", "found 100"]);
    refused(
        with_weights(&[&whole[..], &[0; 3]].concat()).path(),
        &["model.safetensors", &length],
    );
}

#[test]
fn impossible_headers_are_refused() {
    let mut beyond = 1_000_000u64.to_le_bytes().to_vec();
    beyond.extend_from_slice(b"{}");
    refused(with_weights(&beyond).path(), &["truncated", "1000008"]);
    for length in [u64::MAX, u64::MAX - 7, 1 << 40] {
        let mut file = length.to_le_bytes().to_vec();
        file.extend_from_slice(b"{}");
        refused(with_weights(&file).path(), &["header", &length.to_string()]);
    }
    let entry = |dtype: &str, shape: Value, offsets: Value| {
        json!({ "a": { "dtype": dtype, "shape": shape, "data_offsets": offsets } }).to_string()
    };
    for (header, data, words) in [
        ("not json".to_owned(), 0, &["header", "expected"] as &[&str]),
        ("[]".to_owned(), 0, &["header", "object"]),
        ("{} {}".to_owned(), 0, &["header"]),
        ("{\"a\": 3}".to_owned(), 0, &["header", "tensor a"]),
        (entry("F32", json!([1]), json!([0])), 4, &["tensor a"]),
        (entry("F32", json!([-1]), json!([0, 4])), 4, &["tensor a", "-1"]),
        (entry("F33", json!([1]), json!([0, 4])), 4, &["tensor a", "F33"]),
        (entry("F32", json!([1]), json!([4, 0])), 4, &["tensor a", "4..0"]),
        (
            entry("F32", json!([2]), json!([0, 4])),
            4,
            &["tensor a", "8 bytes", "4 bytes"],
        ),
        (
            entry("F32", json!([u64::MAX, 2]), json!([0, 4])),
            4,
            &["tensor a", "counted"],
        ),
        (entry("F32", json!(vec![1; 9]), json!([0, 4])), 4, &["tensor a", "9"]),
        (entry("F32", json!([1]), json!([0, 4])), 2, &["truncated"]),
        (
            entry("F32", json!([1]), json!([u64::MAX - 4, u64::MAX])),
            4,
            &["truncated"],
        ),
        (entry("F32", json!([1]), json!([4, 8])), 8, &["tensor a", "byte 4"]),
        (entry("F32", json!([1]), json!([0, 4])), 8, &["header", "wanted"]),
        (
            json!({ "a": { "dtype": "F32", "shape": [2], "data_offsets": [0, 8] },
                "b": { "dtype": "F32", "shape": [2], "data_offsets": [4, 12] } })
            .to_string(),
            12,
            &["tensor b", "byte 8", "byte 4"],
        ),
        (
            "{\"a\": {\"dtype\": \"F32\", \"shape\": [1], \"data_offsets\": [0, 4]}, \
              \"a\": {\"dtype\": \"F32\", \"shape\": [1], \"data_offsets\": [4, 8]}}"
                .to_owned(),
            8,
            &["tensor a", "twice"],
        ),
        (
            entry("F32", json!([1]), json!([0, 4])).replace("\"a\"", &format!("\"{}\"", "n".repeat(513))),
            4,
            &["512", "513"],
        ),
        ("[".repeat(100_000), 0, &["header"]),
    ] {
        refused(with_header(&header, &vec![0; data]).path(), words);
    }
}

#[test]
fn an_empty_header_lacks_every_tensor() {
    refused(with_header("{}", &[]).path(), &["model.embed_tokens.weight", "missing"]);
    refused(
        with_header("{\"__metadata__\": {\"format\": \"pt\"}}", &[]).path(),
        &["missing"],
    );
}

#[test]
fn pickles_are_never_read() {
    for name in ["pytorch_model.bin", "consolidated.00.pth", "weights.pt"] {
        let dir = copy_of(Family::Llama);
        fs::remove_file(dir.path().join("model.safetensors")).unwrap();
        fs::write(dir.path().join(name), b"\x80\x02}q\x00.").unwrap();
        refused(dir.path(), &[name, "pickle"]);
    }
    refused(
        with_weights(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.").path(),
        &["model.safetensors", "pickle"],
    );
    refused(
        with_weights(b"PK\x03\x04\x00\x00\x08\x08\x00\x00\x00\x00").path(),
        &["model.safetensors", "pickle"],
    );
    let dir = copy_of(Family::Llama);
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    refused(
        dir.path(),
        &["model.safetensors", "packed.safetensors", "index", "found none"],
    );
}

#[test]
fn shard_names_that_lead_out_of_the_directory_are_refused() {
    for name in [
        "../model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "sub\\model.safetensors",
        "..\\model.safetensors",
        "C:model.safetensors",
        "model..safetensors",
        ".safetensors",
        "model.bin",
        "model.safetensors\0",
        "",
    ] {
        let dir = with_index(|map| {
            map.insert("model.norm.weight".to_owned(), name.into());
        });
        refused(dir.path(), &[&format!("{name:?}"), "plain file name"]);
    }
}

#[test]
fn links_that_lead_out_of_the_directory_are_refused() {
    let outside = copy_of(Family::Llama);
    for name in ["model.safetensors", "config.json", "generation_config.json"] {
        let dir = copy_of(Family::Llama);
        fs::remove_file(dir.path().join(name)).unwrap();
        symlink(outside.path().join(name), dir.path().join(name)).unwrap();
        refused(dir.path(), &[name, "outside", outside.path().to_str().unwrap()]);
    }
    let dir = copy_of(Family::Llama);
    fs::rename(dir.path().join("model.safetensors"), dir.path().join("weights")).unwrap();
    symlink("weights", dir.path().join("model.safetensors")).unwrap();
    open(dir.path()).expect("a link within the directory is fine");
    fs::remove_file(dir.path().join("weights")).unwrap();
    refused(dir.path(), &["model.safetensors"]);
}

#[test]
fn the_links_of_a_hub_cache_are_followed() {
    let cache = tempfile::tempdir().unwrap();
    let (blobs, snapshot) = (cache.path().join("blobs"), cache.path().join("snapshots/abc"));
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(golden(Family::Llama).join(name), blobs.join(name)).unwrap();
        symlink(Path::new("../../blobs").join(name), snapshot.join(name)).unwrap();
    }
    open(&snapshot).unwrap();
}

#[test]
fn what_is_no_regular_file_is_refused() {
    for name in ["model.safetensors", "config.json"] {
        let dir = copy_of(Family::Llama);
        fs::remove_file(dir.path().join(name)).unwrap();
        fs::create_dir(dir.path().join(name)).unwrap();
        refused(dir.path(), &[name, "regular file"]);
    }
    // Reading from a device would not end.
    let dir = copy_of(Family::Llama);
    fs::remove_file(dir.path().join("config.json")).unwrap();
    symlink("/dev/zero", dir.path().join("config.json")).unwrap();
    refused(dir.path(), &["config.json", "/dev/zero"]);
}

#[test]
fn an_index_that_does_not_fit_its_shards_is_refused() {
    let (first, second) = (files::shard_name(0), files::shard_name(1));
    let dir = with_index(|map| {
        map.insert("model.norm.weight".to_owned(), "model-00009.safetensors".into());
    });
    refused(dir.path(), &["model.norm.weight", "model-00009.safetensors", &first]);
    let dir = with_index(|map| {
        map.insert("model.norm.weight".to_owned(), second.clone().into());
    });
    refused(dir.path(), &["model.norm.weight", &first, &second]);
    let dir = with_index(|map| drop(map.remove("model.norm.weight")));
    refused(dir.path(), &["model.norm.weight", &first, "no shard"]);
    let dir = with_index(|map| {
        map.insert("zzz".to_owned(), second.clone().into());
    });
    refused(dir.path(), &["zzz", &second]);
    let dir = with_index(|_| {});
    fs::remove_file(dir.path().join(&second)).unwrap();
    refused(dir.path(), &[&second, "not there"]);
}

#[test]
fn a_tensor_in_two_shards_is_refused() {
    let dir = with_index(|_| {});
    let (first, second) = (files::shard_name(0), files::shard_name(1));
    let norm = files::read(&dir.path().join(&first))["model.norm.weight"].clone();
    let mut tensors = files::read(&dir.path().join(&second));
    tensors.insert("model.norm.weight".to_owned(), norm);
    files::write(&dir.path().join(&second), &tensors);
    refused(dir.path(), &["model.norm.weight", "twice", &first, &second]);
}

#[test]
fn malformed_index_files_are_refused() {
    for (text, words) in [
        ("", &["index.json"] as &[&str]),
        ("{}", &["index.json", "weight_map"]),
        ("{\"weight_map\": {}}", &["index.json", "weight_map"]),
        ("{\"weight_map\": {\"a\": 1}}", &["index.json", "string"]),
        ("{\"weight_map\": [\"a\"]}", &["index.json", "object"]),
        (
            "{\"weight_map\": {\"a\": \"x.safetensors\", \"a\": \"y.safetensors\"}}",
            &["tensor a", "twice", "x.s", "y.s"],
        ),
    ] {
        let dir = with_index(|_| {});
        fs::write(dir.path().join("model.safetensors.index.json"), text).unwrap();
        refused(dir.path(), words);
    }
}

#[test]
fn bad_configs_and_missing_directories_are_refused() {
    let dir = copy_of(Family::Llama);
    fs::remove_file(dir.path().join("config.json")).unwrap();
    refused(dir.path(), &["config.json"]);
    refused(&dir.path().join("nowhere"), &["nowhere"]);

    let dir = copy_of(Family::Llama);
    change_config(dir.path(), json!({ "num_key_value_heads": 3 }));
    refused(dir.path(), &["num_key_value_heads", "3"]);

    let dir = copy_of(Family::Llama);
    fs::write(dir.path().join("config.json"), [0xff, 0xfe, b'{']).unwrap();
    refused(dir.path(), &["config.json", "UTF-8"]);

    let dir = copy_of(Family::Llama);
    fs::write(dir.path().join("config.json"), vec![b' '; (4 << 20) + 1]).unwrap();
    refused(dir.path(), &["config.json", "at most 4194304"]);

    let dir = copy_of(Family::Llama);
    fs::write(dir.path().join("generation_config.json"), "{\"temperature\": -1}").unwrap();
    refused(dir.path(), &["generation_config.json", "temperature", "-1"]);
    fs::remove_file(dir.path().join("generation_config.json")).unwrap();
    assert_eq!(open(dir.path()).unwrap().generation_config(), &Default::default());
}

#[test]
fn encoders_and_classifiers_are_refused_by_name() {
    for (folder, words) in [
        ("bert", &["model_type", "bert", "mixtral"] as &[&str]),
        ("t5", &["model_type", "t5"]),
        ("switch_transformers", &["model_type", "switch_transformers"]),
        ("nllb_moe", &["model_type", "nllb-moe"]),
        ("nomic_moe", &["model_type", "nomic_bert"]),
        ("mixtral_seqcls", &["architectures", "MixtralForSequenceClassification"]),
        (
            "qwen3_moe_seqcls",
            &["architectures", "Qwen3MoeForSequenceClassification"],
        ),
    ] {
        let dir = golden(Family::Llama).parent().unwrap().join(folder);
        refused(&dir, words);
    }
}
