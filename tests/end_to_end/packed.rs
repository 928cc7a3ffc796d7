//! Packed checkpoints as users make and run them: the same bytes as the original, and nothing left of what failed.

use std::{
    fs,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use moerun_testkit::{Family, RawGguf, Storage, TinyCheckpoint};
use moerun_tests::{Server, golden_dir, moerun, run};
use safetensors::{Dtype, tensor::TensorView};
use tempfile::TempDir;

const FORMATS: [&str; 5] = ["f32", "bf16", "int8", "int4", "mxfp4"];

fn path(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

fn write_ids(path: &Path, count: u32) {
    let ids: Vec<u32> = (0..count).map(|index| (index * index * 17 + 3) % 320).collect();
    let bytes: Vec<u8> = ids.iter().flat_map(|&id| i64::from(id).to_le_bytes()).collect();
    let view = TensorView::new(Dtype::I64, vec![1, ids.len()], &bytes).expect("shape and bytes agree");
    fs::write(
        path,
        safetensors::serialize([("input_ids", view)], None).expect("serialises"),
    )
    .expect("writable");
}

/// Experts of five blocks of 32 and of two of the default 128, both cut by two workers.
fn checkpoint(family: Family, dir: &Path) {
    let whole_blocks = family == Family::GptOss;
    TinyCheckpoint {
        storage: if whole_blocks { Storage::Mxfp4 } else { Storage::Plain },
        hidden: if whole_blocks { 96 } else { 72 },
        head_dim: 12,
        dense_intermediate: 100,
        expert_intermediate: 160,
        layers: 2,
        ..TinyCheckpoint::new(family, 9)
    }
    .write(dir)
    .expect("a tiny checkpoint");
}

#[test]
fn a_packed_checkpoint_gives_the_bytes_of_the_original_for_any_number_of_workers() {
    let folder = TempDir::new().expect("a temporary folder");
    let (inputs, out) = (
        folder.path().join("in.safetensors"),
        folder.path().join("out.safetensors"),
    );
    write_ids(&inputs, 41);
    for family in [Family::Qwen3Moe, Family::GptOss, Family::DeepseekV3] {
        let model = folder.path().join(format!("{family:?}"));
        checkpoint(family, &model);
        for format in FORMATS {
            let packed = folder.path().join(format!("{family:?}-{format}"));
            let made = run(&[
                "convert",
                "--model",
                path(&model),
                "--weights",
                format,
                "--out",
                path(&packed),
            ])
            .ok();
            assert!(made.contains(&format!("packed in {format}")), "{made}");
            let forward = |model: &Path, extra: &[&str]| {
                let args = ["forward", "--capture", "--model", path(model), "--weights", format];
                let files = ["--inputs", path(&inputs), "--out", path(&out)];
                run(&[&args[..], &files, extra].concat()).ok();
                fs::read(&out).expect("forward writes its output")
            };
            for block in [&[][..], &["--combine-block", "32"]] {
                let wanted = forward(&model, block);
                for extra in [
                    &[][..],
                    &["--load", "copy"],
                    &["--workers", "2"],
                    &["--workers", "2", "--load", "copy"],
                ] {
                    let extra = [block, extra].concat();
                    assert!(
                        forward(&packed, &extra) == wanted,
                        "{family:?} {format} {extra:?}: other bits"
                    );
                }
            }
        }
    }
}

#[test]
fn text_of_a_packed_checkpoint_is_that_of_the_original() {
    let folder = TempDir::new().expect("a temporary folder");
    let model = golden_dir("mixtral").join("../../models/tiny-bible-moe");
    let packed = folder.path().join("packed");
    run(&[
        "convert",
        "--model",
        path(&model),
        "--weights",
        "int8",
        "--out",
        path(&packed),
    ])
    .ok();
    let text = |model: &Path, extra: &[&str]| {
        let args = [
            "generate",
            "--model",
            path(model),
            "--weights",
            "int8",
            "--max-tokens",
            "24",
        ];
        run(&[&args[..], &["--prompt", "In the beginning"], extra].concat()).ok()
    };
    let wanted = text(&model, &[]);
    assert!(!wanted.trim().is_empty());
    assert_eq!(text(&packed, &[]), wanted);
    assert_eq!(text(&packed, &["--workers", "1"]), wanted);
}

#[test]
fn workers_on_packed_and_original_files_serve_one_gateway_of_either_kind() {
    let folder = TempDir::new().expect("a temporary folder");
    let model = folder.path().join("model");
    checkpoint(Family::GptOss, &model);
    let packed = folder.path().join("packed");
    run(&[
        "convert",
        "--model",
        path(&model),
        "--weights",
        "int4",
        "--out",
        path(&packed),
    ])
    .ok();
    let worker = |model: &Path, shard: &str| {
        let args = [
            "worker",
            "--model",
            path(model),
            "--weights",
            "int4",
            "--combine-block",
            "32",
        ];
        Server::start(&[&args[..], &["--listen", "127.0.0.1:0", "--shard", shard]].concat())
    };
    let (first, second) = (worker(&model, "slice:0/2"), worker(&packed, "slice:1/2"));
    let mut answers = Vec::new();
    for gateway_model in [&model, &packed] {
        let args = [
            "gateway",
            "--model",
            path(gateway_model),
            "--weights",
            "int4",
            "--combine-block",
            "32",
        ];
        let workers = [
            "--worker",
            &first.addr,
            "--worker",
            &second.addr,
            "--grpc-addr",
            "127.0.0.1:0",
        ];
        let gateway = Server::start(&[&args[..], &workers].concat());
        let ask = [
            "generate",
            "--connect",
            &gateway.addr,
            "--prompt-ids",
            "5,9,31",
            "--max-tokens",
            "12",
            "--json",
        ];
        let answer: serde_json::Value = serde_json::from_str(&run(&ask).ok()).expect("JSON");
        answers.push(answer["token_ids"].clone());
    }
    assert!(answers[0].as_array().is_some_and(|ids| !ids.is_empty()), "{answers:?}");
    assert_eq!(answers[0], answers[1]);
}

#[test]
fn gguf_is_packed_with_its_tokenizer() {
    let folder = TempDir::new().expect("a temporary folder");
    let file = folder.path().join("model.gguf");
    let gguf = RawGguf::from_checkpoint(&golden_dir("qwen3_moe")).expect("a family that has a GGUF form");
    fs::write(&file, gguf.to_bytes()).expect("writable");
    let packed = folder.path().join("packed");
    run(&[
        "convert",
        "--model",
        path(&file),
        "--weights",
        "int8",
        "--out",
        path(&packed),
    ])
    .ok();
    let text = |model: &Path| {
        let args = [
            "generate",
            "--model",
            path(model),
            "--weights",
            "int8",
            "--max-tokens",
            "8",
        ];
        run(&[&args[..], &["--prompt", "Hello world", "--json"]].concat()).ok()
    };
    let ids = |text: String| serde_json::from_str::<serde_json::Value>(&text).expect("JSON")["token_ids"].clone();
    assert_eq!(ids(text(&packed)), ids(text(&file)));
}

#[test]
fn another_format_is_refused_before_anything_is_loaded() {
    let folder = TempDir::new().expect("a temporary folder");
    let packed = folder.path().join("packed");
    let model = golden_dir("olmoe");
    run(&[
        "convert",
        "--model",
        path(&model),
        "--weights",
        "int8",
        "--out",
        path(&packed),
    ])
    .ok();
    for command in [&["generate", "--prompt-ids", "1"][..], &["worker"]] {
        let error = run(&[command, &["--model", path(&packed), "--weights", "bf16"]].concat()).failed(1);
        assert!(error.contains("is packed in int8, not in bf16"), "{error}");
    }
    let inspected = run(&["inspect", "--model", path(&packed), "--json"]).ok();
    let inspected: serde_json::Value = serde_json::from_str(&inspected).expect("JSON");
    assert_eq!(
        (&inspected["packed"], &inspected["default_format"]),
        (&true.into(), &"int8".into())
    );
    let again = folder.path().join("again");
    let error = run(&["convert", "--model", path(&packed), "--out", path(&again)]).failed(1);
    assert!(
        error.contains("is packed in int8 already") && !again.exists(),
        "{error}"
    );
}

#[test]
fn a_signal_during_convert_leaves_nothing() {
    let folder = TempDir::new().expect("a temporary folder");
    let model = folder.path().join("model");
    // Large enough to be caught at work: some hundred megabytes.
    run(&[
        "synthesize",
        "--shape",
        "granite-3.1-1b-a400m",
        "--layers",
        "3",
        "--out",
        path(&model),
    ])
    .ok();
    let (out, partial) = (folder.path().join("out"), folder.path().join("out.partial"));
    let mut child = Command::new(moerun())
        .args([
            "convert",
            "--model",
            path(&model),
            "--weights",
            "int4",
            "--out",
            path(&out),
        ])
        .spawn()
        .expect("moerun starts");
    let weights = partial.join("packed-00001-of-00002.safetensors");
    let deadline = Instant::now() + Duration::from_secs(60);
    while !weights.exists() {
        assert!(Instant::now() < deadline, "no weights are written");
        assert!(
            child.try_wait().expect("a child of ours").is_none(),
            "convert ended early"
        );
        thread::sleep(Duration::from_millis(1));
    }
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(sent.expect("kill starts").success());
    let status = child.wait().expect("a child of ours");
    assert!(!status.success());
    assert!(!out.exists() && !partial.exists(), "something is left");
}

#[test]
fn a_packed_checkpoint_is_synthesized_and_serves() {
    let folder = TempDir::new().expect("a temporary folder");
    let model = folder.path().join("model");
    let config = golden_dir("qwen3_moe").join("config.json");
    let text = fs::read_to_string(&config)
        .expect("a golden file")
        .replace("\"vocab_size\": 320", "\"vocab_size\": 400");
    let config = folder.path().join("config.json");
    fs::write(&config, text).expect("writable");
    run(&[
        "synthesize",
        "--config",
        path(&config),
        "--weights",
        "int4",
        "--out",
        path(&model),
    ])
    .ok();
    let generate = |workers: &str| {
        let args = [
            "generate",
            "--model",
            path(&model),
            "--prompt",
            "abc",
            "--max-tokens",
            "8",
            "--ignore-eos",
        ];
        run(&[&args[..], &["--workers", workers, "--json"]].concat()).ok()
    };
    let ids = |text: String| serde_json::from_str::<serde_json::Value>(&text).expect("JSON")["token_ids"].clone();
    let wanted = ids(generate("0"));
    assert_eq!(wanted.as_array().map(Vec::len), Some(8), "{wanted}");
    assert_eq!(ids(generate("2")), wanted);
}
