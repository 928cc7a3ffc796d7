//! `inspect` and `synthesize`.

use std::{fs, path::Path};

use moerun_tests::{Golden, decoder_families, golden_dir, run};
use serde_json::Value;
use tempfile::TempDir;

fn inspect(dir: &Path) -> Value {
    let text = run(&["inspect", "--json", "--model", dir.to_str().expect("a plain path")]).ok();
    serde_json::from_str(&text).expect("--json prints JSON")
}

#[test]
fn inspect_counts_the_parameters_of_every_family() {
    for family in decoder_families() {
        let golden = Golden::read(family);
        let facts = inspect(&golden.dir);
        let tensors = golden.json["checkpoint_tensors"].as_object().expect("names to shapes");
        let counted: u64 = tensors
            .values()
            .map(|shape| {
                shape
                    .as_array()
                    .expect("a shape")
                    .iter()
                    .map(|n| n.as_u64().expect("a size"))
                    .product::<u64>()
            })
            .sum();
        assert_eq!(facts["parameters"]["total"], counted, "{family}");
        assert_eq!(facts["config"]["family"], family);
        assert_eq!(facts["moe_layers"], golden.json["moe_layers"], "{family}");
        let text = run(&["inspect", "--model", golden.dir.to_str().expect("a plain path")]).ok();
        assert!(text.contains(family) && text.contains("memory in bf16"), "{text}");
        assert!(!text.contains(['{', '}']), "words, not structs: {text}");
    }
}

#[test]
fn a_synthesized_checkpoint_of_a_real_shape_generates() {
    let folder = TempDir::new().expect("a temporary folder");
    let out = folder.path().join("granite");
    let out = out.to_str().expect("a plain path");
    let report = run(&[
        "synthesize",
        "--shape",
        "granite-3.1-1b-a400m",
        "--layers",
        "1",
        "--out",
        out,
    ])
    .ok();
    assert!(report.contains("1 layers"), "{report}");
    let facts = inspect(Path::new(out));
    assert_eq!(facts["config"]["hidden"], 1024);
    assert_eq!(facts["config"]["moe"]["num_experts"], 32);
    let args = [
        "generate",
        "--model",
        out,
        "--chat",
        "--prompt",
        "hello",
        "--max-tokens",
        "4",
        "--ignore-eos",
        "--json",
    ];
    let ask = |extra: &[&str]| -> Value {
        serde_json::from_str(&run(&[&args[..], extra].concat()).ok()).expect("--json prints JSON")
    };
    let local = ask(&[]);
    assert_eq!(local["token_ids"].as_array().expect("ids").len(), 4);
    assert_eq!(ask(&["--workers", "2"])["token_ids"], local["token_ids"]);
    let error = run(&[
        "synthesize",
        "--shape",
        "granite-3.1-1b-a400m",
        "--layers",
        "1",
        "--out",
        out,
    ])
    .failed(1);
    assert!(error.contains(out) && error.contains("exist"), "{error}");
}

#[test]
fn synthesize_takes_any_config_and_is_a_function_of_its_seed() {
    let folder = TempDir::new().expect("a temporary folder");
    let config = golden_dir("deepseek_v3").join("config.json");
    let config = config.to_str().expect("a plain path");
    let make = |name: &str, seed: &str| {
        let out = folder.path().join(name);
        run(&[
            "synthesize",
            "--config",
            config,
            "--seed",
            seed,
            "--out",
            out.to_str().expect("a plain path"),
        ])
        .ok();
        fs::read(out.join("model.safetensors")).expect("one file")
    };
    let first = make("a", "1");
    assert!(first == make("b", "1"), "the same seed gives other weights");
    assert!(first != make("c", "2"), "another seed gives the same weights");
    assert!(
        fs::read_dir(folder.path()).expect("readable").count() == 3,
        "something partial is left"
    );
}

#[test]
fn unknown_shapes_are_refused_with_the_known_ones() {
    let error = run(&["synthesize", "--shape", "gpt-9", "--out", "no-such-folder"]).failed(2);
    for shape in ["granite-3.1-1b-a400m", "olmoe-1b-7b", "qwen3-30b-a3b", "mixtral-8x7b"] {
        assert!(error.contains(shape), "{error}");
        assert!(run(&["synthesize", "--list"]).ok().contains(shape));
    }
}
