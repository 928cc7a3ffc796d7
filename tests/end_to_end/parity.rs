//! Every family against golden tensors: local experts, 1–4 worker processes, whole experts and slices, bit for bit.

use std::{fs, path::Path};

use moerun_tests::{Golden, assert_close, read_tensors, run};
use serde_json::Value;
use tempfile::TempDir;

/// Forces small blocks, so that the golden experts (20 to 48 wide) really are cut into slices.
const SMALL_BLOCKS: [&str; 2] = ["--combine-block", "8"];

fn forward(model: &Path, inputs: &Path, out: &Path, extra: &[&str]) -> Vec<u8> {
    let path = |path: &Path| path.to_str().expect("a plain path").to_owned();
    let mut args = ["forward", "--capture", "--model"].map(str::to_owned).to_vec();
    args.extend([
        path(model),
        "--inputs".to_owned(),
        path(inputs),
        "--out".to_owned(),
        path(out),
    ]);
    args.extend(extra.iter().map(|&arg| arg.to_owned()));
    run(&args).ok();
    fs::read(out).expect("forward writes its output")
}

/// Tensors of the golden files that a forward pass does not compute.
const INPUTS_AND_ANSWERS: [&str; 4] = ["input_ids", "attention_mask", "greedy_ids", "greedy_margin"];

/// Names and types of a file's tensors, in the order of their data.
fn names_and_types(path: &Path) -> Vec<(String, String)> {
    let bytes = fs::read(path).expect("readable");
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    let header: serde_json::Map<String, Value> = serde_json::from_slice(&bytes[8..8 + length]).expect("a header");
    let mut tensors: Vec<_> = header.into_iter().filter(|(name, _)| name != "__metadata__").collect();
    tensors.sort_by_key(|(_, entry)| entry["data_offsets"][0].as_u64());
    tensors
        .into_iter()
        .map(|(name, entry)| (name, entry["dtype"].as_str().expect("a type").to_owned()))
        .collect()
}

fn compare_with_golden(golden: &Golden, out: &Path) {
    let golden_file = golden.dir.join("golden.safetensors");
    let wanted: Vec<_> = names_and_types(&golden_file)
        .into_iter()
        .filter(|(name, _)| !INPUTS_AND_ANSWERS.contains(&name.as_str()))
        .collect();
    assert_eq!(
        names_and_types(out),
        wanted,
        "{}: names, types and order",
        golden.family
    );
    let found = read_tensors(out);
    let valid = golden.valid();
    let computed = |name: &str| !INPUTS_AND_ANSWERS.contains(&name);
    for (name, (shape, wanted)) in golden.tensors.iter().filter(|(name, _)| computed(name)) {
        let (found_shape, values) = found
            .get(name)
            .unwrap_or_else(|| panic!("{}: no {name}", golden.family));
        assert_eq!(found_shape, shape, "{}: shape of {name}", golden.family);
        let tolerance = match name.rsplit('.').next() {
            Some("topk_ids") => 0.0,
            Some("topk_weights") => 1e-5,
            _ => 1e-4,
        };
        assert_close(&format!("{} {name}", golden.family), values, wanted, &valid, tolerance);
    }
}

/// Greedy continuation of each golden prompt by `moerun generate`, and the answer as JSON.
fn generate(model: &Path, prompt: &[u32], extra: &[&str]) -> Value {
    let ids: Vec<String> = prompt.iter().map(u32::to_string).collect();
    let ids = ids.join(",");
    let mut args = vec![
        "generate",
        "--model",
        model.to_str().expect("a plain path"),
        "--prompt-ids",
        &ids,
    ];
    args.extend(["--json", "--temperature", "0", "--max-tokens", "24"]);
    args.extend(extra);
    serde_json::from_str(&run(&args).ok()).expect("--json prints JSON")
}

fn token_ids(answer: &Value) -> Vec<u32> {
    serde_json::from_value(answer["token_ids"].clone()).expect("token ids")
}

fn a_family_is_golden_and_the_same_for_any_number_of_workers(family: &str) {
    let golden = Golden::read(family);
    let inputs = golden.dir.join("golden.safetensors");
    let folder = TempDir::new().expect("a temporary folder");
    let out = folder.path().join("out.safetensors");
    let routed = !golden.json["moe_layers"].as_array().is_none_or(Vec::is_empty);
    for blocks in [&[][..], &SMALL_BLOCKS[..]] {
        let local = forward(&golden.dir, &inputs, &out, blocks);
        compare_with_golden(&golden, &out);
        for workers in 1..=if routed { 4 } else { 0 } {
            let workers = workers.to_string();
            let extra = [&["--workers", &workers][..], blocks].concat();
            let remote = forward(&golden.dir, &inputs, &out, &extra);
            assert!(local == remote, "{family}: {extra:?} differs from local experts");
        }
    }
    let hub = hub_spelling(&golden.dir, folder.path());
    let local = forward(&golden.dir, &inputs, &out, &[]);
    assert!(
        local == forward(&hub, &inputs, &out, &[]),
        "{family}: config.hub.json gives other bits"
    );
}

/// The checkpoint with the other spelling of its config.
fn hub_spelling(dir: &Path, folder: &Path) -> std::path::PathBuf {
    let hub = folder.join("hub");
    fs::create_dir(&hub).expect("a temporary folder");
    for (from, to) in [
        ("config.hub.json", "config.json"),
        ("model.safetensors", "model.safetensors"),
        ("tokenizer.json", "tokenizer.json"),
        ("tokenizer_config.json", "tokenizer_config.json"),
    ] {
        fs::copy(dir.join(from), hub.join(to)).expect("golden files are there");
    }
    hub
}

fn a_family_generates_its_golden_tokens(family: &str) {
    let golden = Golden::read(family);
    let routed = !golden.json["moe_layers"].as_array().is_none_or(Vec::is_empty);
    for (index, (prompt, wanted)) in golden.prompts().iter().zip(golden.greedy()).enumerate() {
        let answer = generate(&golden.dir, prompt, &["--ignore-eos"]);
        assert_eq!(token_ids(&answer), wanted, "{family} prompt {index}");
        assert_eq!(answer["finish_reason"], "length", "{family}");
        assert_eq!(answer["prompt_tokens"], prompt.len(), "{family}");
        assert_eq!(
            answer["text"], golden.json["greedy_text"][index],
            "{family} prompt {index}"
        );
    }
    if routed {
        let prompt = &golden.prompts()[1];
        let answer = generate(
            &golden.dir,
            prompt,
            &["--ignore-eos", "--workers", "3", "--combine-block", "8"],
        );
        assert_eq!(
            token_ids(&answer),
            golden.greedy()[1],
            "{family} over three sliced workers"
        );
    }
}

macro_rules! families {
    ($($family:ident),*) => {$(
        mod $family {
            #[test]
            fn is_golden_and_the_same_for_any_number_of_workers() {
                super::a_family_is_golden_and_the_same_for_any_number_of_workers(stringify!($family));
            }

            #[test]
            fn generates_its_golden_tokens() {
                super::a_family_generates_its_golden_tokens(stringify!($family));
            }
        }
    )*

        #[test]
        fn every_decoder_family_is_compared() {
            assert_eq!(moerun_tests::decoder_families(), [$(stringify!($family)),*]);
        }
    };
}

families!(
    mixtral,
    qwen2_moe,
    qwen3_moe,
    olmoe,
    granitemoe,
    phimoe,
    deepseek_v2,
    deepseek_v3,
    gpt_oss,
    glm4_moe,
    ernie4_5_moe,
    llama4_text,
    llama,
    qwen3
);

#[test]
fn an_end_of_sequence_id_ends_the_text_and_is_its_last_token() {
    let golden = Golden::read("qwen3_moe");
    let demo = &golden.json["stop_demo"];
    let folder = TempDir::new().expect("a temporary folder");
    let dir = hub_spelling(&golden.dir, folder.path());
    fs::write(
        dir.join("generation_config.json"),
        format!("{{\"eos_token_id\": {}}}", demo["eos_token_id"]),
    )
    .expect("writable");
    let answer = generate(&dir, &golden.prompts()[0], &[]);
    assert_eq!(answer["token_ids"], demo["expected"]);
    assert_eq!(answer["finish_reason"], "stop");
}
