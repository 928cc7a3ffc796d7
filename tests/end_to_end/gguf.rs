//! A GGUF file in place of a checkpoint directory: the same bits, the same text, from file to answer.

use std::{fs, path::Path};

use moerun_testkit::RawGguf;
use moerun_tests::{Golden, golden_dir, run};
use serde_json::{Value, json};
use tempfile::TempDir;

fn write_gguf(dir: &Path, folder: &TempDir) -> String {
    let file = folder.path().join("model.gguf");
    let gguf = RawGguf::from_checkpoint(dir).expect("a checkpoint that has a GGUF form");
    fs::write(&file, gguf.to_bytes()).expect("a temporary folder");
    file.to_str().expect("a plain path").to_owned()
}

/// A copy of a checkpoint with some fields of its config changed.
fn with_config(dir: &Path, changes: Value) -> TempDir {
    let copy = TempDir::new().expect("a temporary folder");
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        fs::copy(dir.join(name), copy.path().join(name)).expect("a temporary folder");
    }
    let path = copy.path().join("config.json");
    let text = fs::read_to_string(&path).expect("just copied");
    let mut config: Value = serde_json::from_str(&text).expect("a config is JSON");
    for (name, value) in changes.as_object().into_iter().flatten() {
        config[name] = value.clone();
    }
    fs::write(&path, config.to_string()).expect("a temporary folder");
    copy
}

#[test]
fn a_gguf_file_computes_the_bits_of_its_checkpoint() {
    let plain = [
        "mixtral",
        "qwen2_moe",
        "qwen3_moe",
        "olmoe",
        "granitemoe",
        "deepseek_v3",
        "glm4_moe",
        "ernie4_5_moe",
        "llama",
        "qwen3",
    ];
    let mut cases = plain.map(|family| (family, json!({}))).to_vec();
    // What a GGUF file cannot say of these.
    cases.push(("gpt_oss", json!({ "swiglu_limit": 7.0 })));
    cases.push((
        "deepseek_v2",
        json!({ "topk_method": "greedy", "n_group": 1, "topk_group": 1 }),
    ));
    cases.push((
        "llama4_text",
        json!({ "attention_chunk_size": 8192, "floor_scale": 8192 }),
    ));
    for (family, changes) in cases {
        let golden = Golden::read(family);
        let folder = TempDir::new().expect("a temporary folder");
        let checkpoint = with_config(&golden.dir, changes);
        let file = write_gguf(checkpoint.path(), &folder);
        let inputs = golden.dir.join("golden.safetensors");
        let forward = |model: &str, extra: &[&str]| {
            let out = folder.path().join("out.safetensors");
            let [inputs, out_text] = [&inputs, &out].map(|path| path.to_str().expect("a plain path"));
            let args = [
                "forward",
                "--capture",
                "--model",
                model,
                "--inputs",
                inputs,
                "--out",
                out_text,
            ];
            run(&[&args[..], extra].concat()).ok();
            fs::read(out).expect("forward writes its output")
        };
        let wanted = forward(checkpoint.path().to_str().expect("a plain path"), &[]);
        assert!(forward(&file, &[]) == wanted, "{family}");
        if !["llama", "qwen3"].contains(&family) {
            assert!(
                forward(&file, &["--workers", "2"]) == wanted,
                "{family} with two workers"
            );
        }
    }
}

#[test]
fn a_gguf_file_goes_on_with_a_prompt_as_its_checkpoint_does() {
    let bible = golden_dir("mixtral").join("../../models/tiny-bible-moe");
    let folder = TempDir::new().expect("a temporary folder");
    let file = write_gguf(&bible, &folder);
    let generate = |model: &str| -> Value {
        let prompt = "And it came to pass in those days, that";
        let args = ["generate", "--model", model, "--prompt", prompt, "--json"];
        let answer = run(&[&args[..], &["--temperature", "0", "--max-tokens", "24"]].concat()).ok();
        serde_json::from_str(&answer).expect("--json prints JSON")
    };
    let (found, wanted) = (generate(&file), generate(bible.to_str().expect("a plain path")));
    assert_eq!(found["token_ids"], wanted["token_ids"]);
    assert_eq!(found["text"], wanted["text"]);
    let facts = run(&["inspect", "--model", &file]).ok();
    assert!(facts.contains("qwen3_moe"), "{facts}");
}

#[test]
fn a_file_that_is_no_gguf_is_refused_by_name() {
    let file = golden_dir("mixtral").join("model.safetensors");
    let error = run(&["inspect", "--model", file.to_str().expect("a plain path")]).failed(1);
    assert!(error.contains("model.safetensors") && error.contains("GGUF"), "{error}");
}
