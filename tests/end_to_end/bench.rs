//! `moerun bench` and its parts, on models small enough for a test: the form of the reports, and figures that can be told.

use std::{fs, path::Path, time::Duration};

use moerun_tests::{golden_dir, run, run_for};
use serde_json::Value;
use tempfile::TempDir;

/// Long enough for machines that are busy with other tests.
const PATIENCE: Duration = Duration::from_secs(300);

fn bench(args: &[&str]) -> Value {
    let text = run_for(&[&["bench"][..], args, &["--json"]].concat(), PATIENCE).ok();
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn number(value: &Value) -> f64 {
    value
        .as_f64()
        .unwrap_or_else(|| panic!("wanted a number, found {value}"))
}

#[track_caller]
fn check_spread(spread: &Value) {
    let [min, median, max] = ["min", "median", "max"].map(|key| number(&spread[key]));
    assert!(0.0 < min && min <= median && median <= max, "{spread}");
}

#[track_caller]
fn check_machine(report: &Value) {
    assert!(number(&report["machine"]["read_bytes_per_second"]) > 1e6, "{report}");
    assert!(
        number(&report["machine"]["multiply_ops_per_second"]["f32"]) > 1e6,
        "{report}"
    );
    assert!(["portable", "avx2", "avx512"].contains(&report["isa"].as_str().expect("a name")));
}

#[test]
fn a_model_is_measured_with_its_experts_here_and_in_workers_and_without_a_tokenizer() {
    let folder = TempDir::new().expect("a temporary folder");
    let dir = folder.path().join("granite");
    let dir = dir.to_str().expect("a plain path");
    run(&[
        "synthesize",
        "--shape",
        "granite-3.1-1b-a400m",
        "--layers",
        "1",
        "--out",
        dir,
    ])
    .ok();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs::remove_file(Path::new(dir).join(file)).expect("removed");
    }
    let small = [
        "--model",
        dir,
        "--prompt-tokens",
        "9",
        "--gen-tokens",
        "5",
        "--repeat",
        "2",
    ];
    let text = run_for(&[&["bench"][..], &small].concat(), PATIENCE).ok();
    for words in [
        "machine, at best: reads",
        "prefill of 9",
        "decode, batch 1",
        "time to first token",
    ] {
        assert!(text.contains(words), "{text}");
    }
    let mut bytes = Vec::new();
    for workers in ["0", "2"] {
        let report = bench(&[&small[..], &["--batch", "1,3", "--workers", workers]].concat());
        check_machine(&report);
        assert_eq!(report["model"]["weights"], "bf16");
        assert_eq!(report["model"]["workers"].to_string(), workers);
        assert_eq!(report["prefill"]["prompt_tokens"], 9);
        check_spread(&report["prefill"]["tokens_per_second"]);
        check_spread(&report["prefill"]["time_to_first_token_seconds"]);
        let decode = report["decode"].as_array().expect("a list");
        assert_eq!(decode.len(), 2);
        for (decode, batch) in decode.iter().zip([1.0, 3.0]) {
            assert_eq!(number(&decode["batch"]), batch);
            check_spread(&decode["tokens_per_second"]);
            // One row reads just the 8 experts it chose, several share some.
            let experts = number(&decode["experts_per_step"]);
            assert!(
                experts >= 8.0 && experts <= batch * 8.0 && (batch > 1.0 || experts == 8.0),
                "{decode}"
            );
            let share = number(&decode["fraction_of_read_bandwidth"]);
            assert!(0.0 < share && share < 1.5, "{decode}");
            assert_eq!(decode["preemptions"], 0);
        }
        bytes.push(number(&decode[0]["bytes_per_token"]));
    }
    let difference = (bytes[0] - bytes[1]).abs();
    assert!(
        difference < 0.1 * bytes[0],
        "what is read does not depend on where: {bytes:?}"
    );
}

#[test]
fn a_bench_that_cannot_be_run_is_refused_before_anything_is_loaded() {
    let dir = golden_dir("mixtral");
    let dir = dir.to_str().expect("a plain path");
    let refused = |extra: &[&str]| run(&[&["bench", "--model", dir][..], extra].concat()).failed(1);
    let error = refused(&["--prompt-tokens", "1000000"]);
    assert!(
        error.contains("a sequence takes") && error.contains("supports"),
        "{error}"
    );
    let error = refused(&["--batch", "1,0"]);
    assert!(error.contains("--batch: wanted 1 to 384"), "{error}");
    let error = refused(&["--repeat", "0"]);
    assert!(error.contains("--repeat: wanted at least 1, found 0"), "{error}");
}

#[test]
fn kernels_are_measured_on_the_shapes_and_formats_asked_for() {
    let args = [
        "kernels",
        "--shape",
        "granite-3.1-1b-a400m",
        "--weights",
        "bf16",
        "--rows",
        "1,8",
    ];
    let report = bench(&args);
    check_machine(&report);
    let cases = report["kernels"].as_array().expect("a list");
    assert_eq!(cases.len(), 2);
    for (case, rows) in cases.iter().zip([1, 8]) {
        assert_eq!(
            (&case["shape"], &case["weights"]),
            (&"granite-3.1-1b-a400m".into(), &"bf16".into())
        );
        assert_eq!(case["rows"], rows);
        // Eight experts of three matrices of 512 by 1024.
        assert_eq!(case["weight_bytes"], 8 * 3 * 512 * 1024 * 2);
        assert_eq!(case["ops"], 8 * 3 * 512 * 1024 * 2 * rows);
        check_spread(&case["seconds"]);
        // Of what the machine could do beside it, which the best of the whole run is not below.
        let nearby = number(&case["limits"]["read_bytes_per_second"]);
        assert!(
            nearby <= number(&report["machine"]["read_bytes_per_second"]),
            "{report}"
        );
        let share = number(&case["bytes_per_second"]) / nearby;
        assert!(
            (number(&case["fraction_of_read_bandwidth"]) / share - 1.0).abs() < 1e-9,
            "{case}"
        );
    }
    let error = run(&["bench", "kernels", "--rows", "0"]).failed(1);
    assert!(error.contains("--rows: wanted 1 to 4096, found 0"), "{error}");
}

#[test]
fn a_hop_is_measured_beside_plain_sockets() {
    let report = bench(&["hop", "--bytes", "4096"]);
    let cases = report["hop"].as_array().expect("a list");
    let of = |cores: &str, transport: &str, kind: &str| {
        cases
            .iter()
            .filter(|case| {
                [&case["cores"], &case["transport"], &case["kind"]].map(|value| value.as_str())
                    == [cores, transport, kind].map(Some)
            })
            .count()
    };
    for transport in ["tcp", "unix"] {
        for kind in ["plain", "stream"] {
            assert_eq!(of("same", transport, kind), 1, "{report}");
        }
    }
    assert!(
        matches!(cases.len(), 4 | 8),
        "same core, and different ones where there are two"
    );
    for case in cases {
        let (p50, p99) = (number(&case["p50_micros"]), number(&case["p99_micros"]));
        assert!(0.0 < p50 && p50 <= p99, "{case}");
        assert_eq!(case["bytes"], 4096);
        let over = number(&case["p50_over_plain_tcp"]);
        assert!(
            over > 0.0 && (over == 1.0 || case["kind"] == "stream" || case["transport"] == "unix"),
            "{case}"
        );
    }
}
