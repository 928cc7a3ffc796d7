//! `moerun plan`: workers that hold what was planned serve the same text, and what cannot be is refused.

use std::{fs, path::Path};

use moerun_tests::{Server, run};
use serde_json::Value;
use tempfile::TempDir;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny-bible-moe");
const LOADS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/loads/bible.json");
const OTHER_LOADS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/loads/definitions.json");

fn plan(extra: &[&str]) -> Value {
    let text = run(&[&["plan", "--model", MODEL, "--json"][..], extra].concat()).ok();
    serde_json::from_str(&text).expect("--json prints JSON")
}

fn generated(addr: &[&str]) -> Value {
    let args = [
        "generate",
        "--prompt",
        "And it came to pass",
        "--max-tokens",
        "24",
        "--temperature",
        "0",
        "--json",
    ];
    let text = run(&[&args[..], addr].concat()).ok();
    let answer: Value = serde_json::from_str(&text).expect("--json prints JSON");
    answer["token_ids"].clone()
}

#[test]
fn workers_that_hold_what_was_planned_serve_the_same_text() {
    let settings = ["--weights", "bf16", "--combine-block", "32"];
    let local = generated(&[&["--model", MODEL][..], &settings].concat());
    assert_eq!(local.as_array().expect("ids").len(), 24);
    for (layout, replicas) in [
        ("whole", "1"),
        ("whole", "2"),
        ("slices:3", "1"),
        ("slices:5", "2"),
        ("mix:2:5", "2"),
    ] {
        let workers = [
            "--workers",
            "3",
            "--memory",
            "16MiB",
            "--force",
            layout,
            "--replicas",
            replicas,
            "--loads",
            LOADS,
        ];
        let report = plan(&[&workers[..], &settings].concat());
        assert_eq!(report["plan"]["layout"], layout);
        let workers: Vec<Server> = report["plan"]["workers"]
            .as_array()
            .expect("workers")
            .iter()
            .map(|worker| {
                let experts = worker["experts"].as_str().expect("a list");
                let args = [
                    "worker",
                    "--model",
                    MODEL,
                    "--listen",
                    "127.0.0.1:0",
                    "--experts",
                    experts,
                ];
                Server::start(&[&args[..], &settings].concat())
            })
            .collect();
        let mut gateway = ["gateway", "--model", MODEL, "--grpc-addr", "127.0.0.1:0"].to_vec();
        gateway.extend(settings);
        for worker in &workers {
            gateway.extend(["--worker", &worker.addr]);
        }
        let gateway = Server::start(&gateway);
        assert_eq!(
            generated(&["--connect", &gateway.addr]),
            local,
            "{layout}, {replicas} holders"
        );
    }
}

#[test]
fn a_plan_tells_what_to_expect_and_moves_nothing_while_nothing_changes() {
    let folder = TempDir::new().expect("a temporary folder");
    let out = folder.path().join("plan.json");
    let out = out.to_str().expect("a plain path");
    let workers = [
        "--workers",
        "4",
        "--memory",
        "8MiB",
        "--replicas",
        "2",
        "--force",
        "whole",
    ];
    let text = run(&[
        &["plan", "--model", MODEL, "--loads", LOADS, "--out", out][..],
        &workers,
    ]
    .concat())
    .ok();
    for words in [
        "balance   ",
        "after the worst death",
        "moerun worker --model",
        "--experts",
        "epoch 1",
        "whole *",
    ] {
        assert!(text.contains(words), "{text}");
    }
    let again = plan(&[&["--loads", LOADS, "--present", out][..], &workers].concat());
    assert_eq!((&again["moved_bytes"], &again["plan"]["epoch"]), (&0.into(), &2.into()));
    let shifted = plan(&[&["--loads", OTHER_LOADS, "--present", out][..], &workers].concat());
    let all: u64 = shifted["workers"]
        .as_array()
        .expect("workers")
        .iter()
        .filter_map(|it| it["memory_bytes"].as_u64())
        .sum();
    assert!(shifted["moved_bytes"].as_u64().expect("bytes") * 2 < all, "{shifted}");
    assert!(shifted["balance"].as_f64().expect("a balance") > 0.9, "{shifted}");
}

#[test]
fn what_cannot_be_planned_is_refused_with_the_arithmetic() {
    let folder = TempDir::new().expect("a temporary folder");
    let refused = |code: i32, extra: &[&str]| run(&[&["plan", "--model", MODEL][..], extra].concat()).failed(code);
    let small = refused(1, &["--worker", "a=1MiB", "--worker", "b=3MiB", "--force", "whole"]);
    for words in ["48 pieces of", "need 48 places", "a has", "b has"] {
        assert!(small.contains(words), "{small}");
    }
    let bad = folder.path().join("bad.json");
    fs::write(&bad, "{\"version\": 1, \"layers\": {}}").expect("written");
    let bad = bad.to_str().expect("a plain path");
    for (code, extra, words) in [
        (2, &["--worker", "a"][..], "wanted NAME=MEMORY"),
        (2, &["--workers", "2"], "--memory"),
        (2, &[], "--worker"),
        (
            2,
            &["--workers", "2", "--memory", "1GiB", "--force", "slices:1"],
            "wanted whole, slices:N",
        ),
        (
            1,
            &["--workers", "2", "--memory", "1GiB", "--replicas", "3"],
            "3 holders of every expert",
        ),
        (
            1,
            &["--workers", "2", "--memory", "1GiB", "--force", "slices:9"],
            "layout slices:9",
        ),
        (
            1,
            &["--workers", "2", "--memory", "1GiB", "--loads", bad],
            "layer 0 is missing",
        ),
        (1, &["--workers", "2", "--memory", "1GiB", "--present", bad], "bad.json"),
    ] {
        let error = refused(code, extra);
        assert!(error.contains(words), "{error}");
    }
    assert!(!Path::new("plan.json").exists());
}

#[test]
fn the_planner_is_compared_with_eplb_on_recorded_loads() {
    let text = run(&["bench", "plan", "--quick", "--seeds", "2", "--loads", LOADS, "--json"]).ok();
    let report: Value = serde_json::from_str(&text).expect("--json prints JSON");
    let figures = report["plan"].as_array().expect("figures");
    assert_eq!(figures.len(), 15, "four exponents and one file, three ways each");
    let median = |figure: &Value, which: &str| figure[which]["balance"]["median"].as_f64().expect("a balance");
    let mut bounded = 0;
    for figure in figures {
        if figure["loads"] == "Zipf 1.2" && figure["slots"] == "16 (2+0)" {
            // The busiest expert has more than two workers' part of the load: two holders can do no better than this.
            let sum: f64 = (1..=64).map(|rank| f64::from(rank).powf(-1.2)).sum();
            assert!((median(figure, "planner") - 2.0 * sum / 8.0).abs() < 1e-6, "{figure}");
            bounded += 1;
        } else {
            assert!(median(figure, "planner") >= median(figure, "eplb") - 1e-9, "{figure}");
        }
    }
    assert_eq!(bounded, 1);
}
