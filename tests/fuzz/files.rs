//! Files: what a checkpoint, a plan or a configuration may be.

use std::{
    fs,
    path::{Path, PathBuf},
};

use moerun_gateway::{ChatMessage, TextCodec};
use moerun_routing::planner::PlanFile;
use moerun_testkit::RawGguf;
use moerun_tests::{decoder_families, golden_dir};
use moerun_types::{CombineMode, ModelConfig, NumberFormat, Numerics};
use moerun_weights::{Checkpoint, ConvertRequest, Needs, convert};
use tempfile::TempDir;

use crate::{Form, Target};

const FAMILY: &str = "qwen3_moe";

pub(crate) fn targets() -> Vec<Target> {
    vec![
        config_json(),
        safetensors(),
        shard_index(),
        packed(),
        gguf(),
        text_file("tokenizer.json", &golden_dir(FAMILY), "tokenizer.json", |codec| {
            if let Ok(ids) = codec.encode("In the beginning") {
                let _ = codec.decode(&ids, true);
            }
        }),
        chat_template(),
        plan_file(),
        settings(),
    ]
}

fn config_json() -> Target {
    let of = |family: &str| fs::read(golden_dir(family).join("config.json")).expect("a golden config");
    let inputs = decoder_families().iter().map(|family| of(family)).collect();
    Target::new("config.json", Form::Json, inputs, |bytes| {
        let _ = ModelConfig::from_json(&String::from_utf8_lossy(bytes));
    })
}

/// A folder with a golden config, and a file in it that changes.
fn folder_with(name: &str) -> (TempDir, PathBuf) {
    let folder = TempDir::new().expect("a temporary folder");
    fs::copy(
        golden_dir(FAMILY).join("config.json"),
        folder.path().join("config.json"),
    )
    .expect("a copy");
    let file = folder.path().join(name);
    (folder, file)
}

/// A new file each time: what is mapped must not change under it.
fn replace(file: &Path, bytes: &[u8]) {
    let _ = fs::remove_file(file);
    fs::write(file, bytes).expect("writable");
}

fn safetensors() -> Target {
    let (folder, file) = folder_with("model.safetensors");
    let input = fs::read(golden_dir(FAMILY).join("model.safetensors")).expect("a golden file");
    Target::new("safetensors", Form::Safetensors, vec![input], move |bytes| {
        replace(&file, bytes);
        let _ = Checkpoint::open(folder.path(), Needs::All);
    })
}

fn shard_index() -> Target {
    let (folder, file) = folder_with("model.safetensors.index.json");
    let shard = "model-00001-of-00001.safetensors";
    fs::copy(golden_dir(FAMILY).join("model.safetensors"), folder.path().join(shard)).expect("a copy");
    let index = br#"{"metadata": {"total_size": 1}, "weight_map": {"model.embed_tokens.weight":
        "model-00001-of-00001.safetensors", "model.norm.weight": "model-00001-of-00001.safetensors"}}"#;
    Target::new("shard index", Form::Json, vec![index.to_vec()], move |bytes| {
        replace(&file, bytes);
        let _ = Checkpoint::open(folder.path(), Needs::All);
    })
}

fn packed() -> Target {
    let source = Checkpoint::open(&golden_dir(FAMILY), Needs::All).expect("a golden checkpoint");
    let folder = TempDir::new().expect("a temporary folder");
    let out = folder.path().join("packed");
    convert(&ConvertRequest::new(&source, NumberFormat::Int8, &out)).expect("it converts");
    let is_weights = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "safetensors");
    let file = fs::read_dir(&out)
        .expect("a folder")
        .map(|entry| entry.expect("a file").path())
        .find(is_weights)
        .expect("packed weights");
    let input = fs::read(&file).expect("readable");
    Target::new("packed", Form::Safetensors, vec![input], move |bytes| {
        let _kept = &folder;
        replace(&file, bytes);
        let _ = Checkpoint::open(&out, Needs::All);
    })
}

fn gguf() -> Target {
    let folder = TempDir::new().expect("a temporary folder");
    let file = folder.path().join("model.gguf");
    let input = RawGguf::from_checkpoint(&golden_dir("olmoe"))
        .expect("it has a GGUF form")
        .to_bytes();
    Target::new("gguf", Form::Bytes, vec![input], move |bytes| {
        let _kept = &folder;
        replace(&file, bytes);
        let _ = Checkpoint::open(&file, Needs::All);
        let _ = TextCodec::load(&file);
    })
}

/// A folder with the texts of a checkpoint, of which one file changes.
fn text_file(target: &'static str, dir: &Path, name: &str, use_codec: impl Fn(&TextCodec) + 'static) -> Target {
    let folder = TempDir::new().expect("a temporary folder");
    for text in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(dir.join(text), folder.path().join(text)).expect("a copy");
    }
    let (input, file) = (
        fs::read(dir.join(name)).expect("a golden file"),
        folder.path().join(name),
    );
    Target::new(target, Form::Json, vec![input], move |bytes| {
        replace(&file, bytes);
        if let Ok(codec) = TextCodec::load(folder.path()) {
            use_codec(&codec);
        }
    })
}

fn chat_template() -> Target {
    let messages = [ChatMessage {
        role: "user".to_owned(),
        content: "What is a river?".to_owned(),
    }];
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-bible-moe");
    text_file("chat template", &dir, "tokenizer_config.json", move |codec| {
        let _ = codec.render_chat(&messages);
    })
}

fn plan_file() -> Target {
    let text = fs::read_to_string(golden_dir(FAMILY).join("config.json")).expect("a golden config");
    let config = ModelConfig::from_json(&text).expect("it is valid");
    let numerics = Numerics {
        format: NumberFormat::F32,
        combine: CombineMode::Exact,
        combine_block: 8,
    };
    let input =
        br#"{"version": 1, "epoch": 3, "model": {"config_hash": "a", "numerics": "f32-exact-8"}, "layout": "whole",
        "replicas": 2, "balance": 0.9, "balance_after_worst_death": 0.8, "workers": [
        {"name": "w0", "memory_bytes": 1000000, "bandwidth": 1e9, "round_trip_seconds": 0.001, "domain": "a",
         "experts": "*:0-3,1:4-7:0-1"},
        {"name": "w1", "memory_bytes": 1000000, "bandwidth": 1e9, "round_trip_seconds": 0.001, "experts": ""}]}"#;
    Target::new("plan file", Form::Json, vec![input.to_vec()], move |bytes| {
        if let Ok(mut plan) = PlanFile::from_json(&String::from_utf8_lossy(bytes)) {
            let _ = plan.to_json();
            plan.model.numerics = numerics.id();
            let _ = plan.resolve(&plan.model, &config, &numerics);
        }
    })
}

fn settings() -> Target {
    let folder = TempDir::new().expect("a temporary folder");
    let file = folder.path().join("moerun.toml");
    let input = br#"model = "DIR"
threads = 2
max_queue = 7
kv_memory = "64MiB"
worker = ["10.0.0.2:50061", "unix:/run/a.sock"]
weights = "int8"
log_level = "info"
on_expert_loss = "skip"
"#;
    Target::new("settings", Form::Bytes, vec![input.to_vec()], move |bytes| {
        let _kept = &folder;
        replace(&file, bytes);
        let _ = moerun::check_config_file(&file);
    })
}
