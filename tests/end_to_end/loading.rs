//! What is seen of a load, and what is refused before anything large is read.

use std::{
    fs::{self, File},
    io::Write,
    path::Path,
    process::Command,
};

use moerun_tests::{golden_dir, moerun, run};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

/// Experts as wide as these take 96 MiB each in f32; there are so many in each of two layers.
const HUGE_INTERMEDIATE: u64 = 1 << 18;
const MANY_EXPERTS: u64 = 4096;

/// A checkpoint of olmoe whose file has a header and a length, but no block of data on the disk.
fn write_huge(dir: &Path) {
    let golden = golden_dir("olmoe");
    fs::create_dir(dir).expect("a temporary folder");
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        fs::copy(golden.join(name), dir.join(name)).expect("golden files are there");
    }
    let text = fs::read_to_string(golden.join("config.json")).expect("golden files are there");
    let mut config: Value = serde_json::from_str(&text).expect("JSON");
    config["num_experts"] = json!(MANY_EXPERTS);
    config["intermediate_size"] = json!(HUGE_INTERMEDIATE);
    fs::write(dir.join("config.json"), config.to_string()).expect("writable");

    let text = fs::read_to_string(golden.join("golden.json")).expect("golden files are there");
    let facts: Value = serde_json::from_str(&text).expect("JSON");
    let (mut header, mut end) = (Map::new(), 0);
    let mut add = |name: String, shape: &[u64]| {
        let begin = end;
        end += 4 * shape.iter().product::<u64>();
        header.insert(
            name,
            json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}),
        );
    };
    let hidden = config["hidden_size"].as_u64().expect("a size");
    for (name, shape) in facts["checkpoint_tensors"].as_object().expect("names to shapes") {
        if name.contains(".experts.") {
            continue;
        }
        match name.strip_suffix("mlp.gate.weight") {
            Some(layer) => {
                add(name.clone(), &[MANY_EXPERTS, hidden]);
                for expert in 0..MANY_EXPERTS {
                    let tensor = |projection| format!("{layer}mlp.experts.{expert}.{projection}.weight");
                    add(tensor("gate_proj"), &[HUGE_INTERMEDIATE, hidden]);
                    add(tensor("up_proj"), &[HUGE_INTERMEDIATE, hidden]);
                    add(tensor("down_proj"), &[hidden, HUGE_INTERMEDIATE]);
                }
            }
            None => {
                let shape: Vec<u64> = serde_json::from_value(shape.clone()).expect("a shape");
                add(name.clone(), &shape);
            }
        }
    }
    let header = Value::Object(header).to_string();
    let mut file = File::create(dir.join("model.safetensors")).expect("writable");
    file.write_all(&(header.len() as u64).to_le_bytes()).expect("writable");
    file.write_all(header.as_bytes()).expect("writable");
    file.set_len(8 + header.len() as u64 + end).expect("a sparse file");
}

#[test]
fn a_model_that_does_not_fit_in_memory_is_refused_with_the_arithmetic() {
    let folder = TempDir::new().expect("a temporary folder");
    let dir = folder.path().join("huge");
    write_huge(&dir);
    let model = dir.to_str().expect("a plain path");
    let facts = run(&["inspect", "--json", "--model", model]).ok();
    let facts: Value = serde_json::from_str(&facts).expect("--json prints JSON");
    let experts = 3 * 4 * 32 * HUGE_INTERMEDIATE * 2 * MANY_EXPERTS;
    assert_eq!(facts["memory"]["f32"]["all_experts_bytes"], experts);
    for command in [
        &["generate", "--prompt", "x", "--model", model][..],
        &[
            "serve",
            "--grpc-addr",
            "127.0.0.1:0",
            "--workers",
            "2",
            "--model",
            model,
        ],
    ] {
        let error = run(command).failed(1);
        for words in [
            "does not fit in memory",
            "768.00 GiB for experts in f32",
            "are available",
        ] {
            assert!(error.contains(words), "{command:?} should say {words:?}: {error}");
        }
    }
    let error = run(&["worker", "--listen", "127.0.0.1:0", "--model", model]).failed(1);
    assert!(
        error.contains(&experts.to_string()) && error.contains("available"),
        "{error}"
    );
    // What a gateway needs for itself does fit: it gets as far as its workers.
    let error = run(&["gateway", "--grpc-addr", "127.0.0.1:0", "--model", model]).failed(2);
    assert!(error.contains("no workers given"), "{error}");
}

/// Python's pty gives the binary a terminal for its three streams.
#[test]
fn a_load_shows_a_bar_on_a_terminal_and_none_elsewhere() {
    let dir = golden_dir("olmoe");
    let args = [
        "generate",
        "--prompt",
        "x",
        "--max-tokens",
        "1",
        "--model",
        dir.to_str().expect("a plain path"),
    ];
    let on_terminal = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))";
    let seen = Command::new("python3")
        .args(["-c", on_terminal])
        .arg(moerun())
        .args(args)
        .output();
    let seen = seen.expect("python3 is installed");
    let text = String::from_utf8_lossy(&seen.stdout);
    assert!(seen.status.success(), "{text}");
    assert!(
        text.contains("the gateway's tensors [") && text.contains("experts ["),
        "{text:?}"
    );
    let elsewhere = run(&args);
    assert!(!elsewhere.stderr.contains("tensors ["), "{}", elsewhere.stderr);
}
