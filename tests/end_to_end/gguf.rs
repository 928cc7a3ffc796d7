//! A GGUF file in place of a checkpoint directory: the same bits, the same text, from file to answer.

use std::{fs, path::Path};

use moerun_testkit::RawGguf;
use moerun_tests::{Golden, golden_dir, run};
use serde_json::Value;
use tempfile::TempDir;

fn write_gguf(dir: &Path, folder: &TempDir) -> String {
    let file = folder.path().join("model.gguf");
    let gguf = RawGguf::from_checkpoint(dir).expect("a checkpoint that has a GGUF form");
    fs::write(&file, gguf.to_bytes()).expect("a temporary folder");
    file.to_str().expect("a plain path").to_owned()
}

#[test]
fn a_gguf_file_computes_the_bits_of_its_checkpoint() {
    for family in ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "qwen3"] {
        let golden = Golden::read(family);
        let folder = TempDir::new().expect("a temporary folder");
        let file = write_gguf(&golden.dir, &folder);
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
        let wanted = forward(golden.dir.to_str().expect("a plain path"), &[]);
        assert!(forward(&file, &[]) == wanted, "{family}");
        if family != "qwen3" {
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
