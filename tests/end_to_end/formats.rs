//! Number formats: the same bytes on every instruction set and for any number of workers, and what each format costs in
//! accuracy.

use std::{fs, path::Path};

use moerun_testkit::{Family, TinyCheckpoint};
use moerun_tests::{golden_dir, read_tensors, run, run_with};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::Value;
use tempfile::TempDir;

const FORMATS: [&str; 5] = ["f32", "bf16", "int8", "int4", "mxfp4"];

fn path(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

fn write_ids(path: &Path, ids: &[u32]) {
    let bytes: Vec<u8> = ids.iter().flat_map(|&id| i64::from(id).to_le_bytes()).collect();
    let view = TensorView::new(Dtype::I64, vec![1, ids.len()], &bytes).expect("shape and bytes agree");
    fs::write(
        path,
        safetensors::serialize([("input_ids", view)], None).expect("serialises"),
    )
    .expect("writable");
}

/// Instruction sets that this machine has: `moerun` says which it lacks.
fn instruction_sets() -> Vec<&'static str> {
    let known = ["portable", "avx2", "avx512"];
    let lacks = |isa: &str| {
        let listing = run_with(&[("MOERUN_ISA", isa)], &["synthesize", "--list"]);
        let refused = listing.stderr.contains("which this processor cannot run");
        assert!(
            refused || listing.code == Some(0),
            "MOERUN_ISA={isa}: {}",
            listing.stderr
        );
        refused
    };
    known.into_iter().filter(|isa| !lacks(isa)).collect()
}

/// Rows of several blocks of codes, the last one short, and experts of three combine blocks of 32.
fn checkpoint(family: Family, dir: &Path) {
    TinyCheckpoint::wide_as_released(family, 9)
        .write(dir)
        .expect("a tiny checkpoint");
}

#[test]
fn every_format_has_the_same_bits_on_every_instruction_set_and_for_any_number_of_workers() {
    let isas = instruction_sets();
    assert!(isas.contains(&"portable"));
    let folder = TempDir::new().expect("a temporary folder");
    let (inputs, out) = (
        folder.path().join("in.safetensors"),
        folder.path().join("out.safetensors"),
    );
    write_ids(
        &inputs,
        &(0..41)
            .map(|index| (index * index * 17 + 3) % 320)
            .collect::<Vec<u32>>(),
    );
    for family in [Family::Qwen3Moe, Family::GptOss, Family::DeepseekV3, Family::Qwen2Moe] {
        let model = folder.path().join(format!("{family:?}"));
        checkpoint(family, &model);
        for format in FORMATS {
            let forward = |isa: &str, extra: &[&str]| {
                let args = ["forward", "--capture", "--combine-block", "32", "--weights", format];
                let files = ["--model", path(&model), "--inputs", path(&inputs), "--out", path(&out)];
                run_with(&[("MOERUN_ISA", isa)], &[&args[..], &files, extra].concat()).ok();
                fs::read(&out).expect("forward writes its output")
            };
            let wanted = forward("portable", &[]);
            for isa in isas.iter().filter(|&&isa| isa != "portable") {
                assert!(forward(isa, &[]) == wanted, "{family:?} {format}: {isa} has other bits");
            }
            let best = isas[isas.len() - 1];
            for workers in ["2", "3"] {
                let found = forward(best, &["--workers", workers]);
                assert!(
                    found == wanted,
                    "{family:?} {format}: {workers} workers have other bits"
                );
            }
        }
    }
}

#[test]
fn a_combine_block_that_a_format_cannot_have_is_refused() {
    let model = golden_dir("qwen3_moe");
    for command in ["generate", "worker"] {
        let args = [
            command,
            "--model",
            path(&model),
            "--weights",
            "int4",
            "--combine-block",
            "40",
        ];
        let extra: &[&str] = if command == "generate" {
            &["--prompt-ids", "1"]
        } else {
            &[]
        };
        let error = run(&[&args[..], extra].concat()).failed(2);
        assert!(
            error.contains("a combine block of 40 columns with int4 weights: wanted a positive multiple of 32"),
            "{command}: {error}"
        );
    }
}

/// `[tokens][vocab]` logarithms of the next token's probability.
fn log_probabilities(logits: &[f32], vocab: usize) -> Vec<Vec<f64>> {
    let of_row = |row: &[f32]| {
        let largest = row.iter().fold(f32::NEG_INFINITY, |largest, &logit| largest.max(logit));
        let shifted = row.iter().map(|&logit| f64::from(logit - largest));
        let total = shifted.clone().map(f64::exp).sum::<f64>().ln();
        shifted.map(|logit| logit - total).collect()
    };
    logits.chunks_exact(vocab).map(of_row).collect()
}

/// What quantising costs: the mean Kullback-Leibler divergence of the next token's distribution from that in f32, in
/// nats, on the trained model's recorded texts. Most of it comes from the few tokens whose experts were nearly tied.
#[test]
fn the_trained_model_keeps_its_distribution_in_every_format() {
    let model = golden_dir("mixtral").join("../../models/tiny-bible-moe");
    let golden = fs::read_to_string(model.join("golden.json")).expect("golden.json is in the repository");
    let golden: Value = serde_json::from_str(&golden).expect("golden.json is JSON");
    let ids = |list: &Value| -> Vec<u32> { serde_json::from_value(list.clone()).expect("ids") };
    let prompts = golden["prompts"].as_array().expect("a list");
    let texts: Vec<Vec<u32>> = prompts
        .iter()
        .map(|prompt| [ids(&prompt["ids"]), ids(&prompt["greedy"])].concat())
        .collect();
    let tokens: usize = texts.iter().map(Vec::len).sum();
    assert!(tokens > 200, "{tokens} tokens");
    let folder = TempDir::new().expect("a temporary folder");
    let (inputs, out) = (
        folder.path().join("in.safetensors"),
        folder.path().join("out.safetensors"),
    );
    let distributions = |format: &str| -> Vec<Vec<f64>> {
        let of_text = |ids: &Vec<u32>| {
            write_ids(&inputs, ids);
            let args = ["forward", "--weights", format, "--model", path(&model)];
            run(&[&args[..], &["--inputs", path(&inputs), "--out", path(&out)]].concat()).ok();
            let (shape, logits) = &read_tensors(&out)["logits"];
            assert_eq!(shape[..2], [1, ids.len()]);
            log_probabilities(logits, shape[2])
        };
        texts.iter().flat_map(of_text).collect()
    };
    let wanted = distributions("f32");
    for (format, most) in [("bf16", 1e-4), ("int8", 1e-3), ("int4", 3e-2)] {
        let found = distributions(format);
        let of_row = |(wanted, found): (&Vec<f64>, &Vec<f64>)| {
            let terms = wanted
                .iter()
                .zip(found)
                .map(|(wanted, found)| wanted.exp() * (wanted - found));
            terms.sum::<f64>()
        };
        let mean = wanted.iter().zip(&found).map(of_row).sum::<f64>() / tokens as f64;
        println!("{format}: {mean:.2e}");
        assert!(
            (0.0..=most).contains(&mean),
            "{format}: mean divergence {mean}, wanted at most {most}"
        );
    }
}
