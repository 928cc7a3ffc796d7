//! `moerun chaos` as its users run it: a kill and a pause beside a load.

use std::time::Duration;

use moerun_loadtest::{History, chaos::FaultKind};
use moerun_tests::{golden_dir, run, run_for};
use serde_json::Value;
use tempfile::TempDir;

use super::path;

#[test]
fn after_a_kill_and_a_reset_every_invariant_holds_and_the_report_says_what_was_seen() {
    let folder = TempDir::new().expect("a temporary folder");
    let model = golden_dir("qwen3_moe");
    let args = [
        "chaos",
        "--model",
        path(&model),
        "--workers",
        "3",
        "--duration",
        "9",
        "--rate",
        "20",
        "--seed",
        "3",
    ];
    let more = ["--faults", "kill,reset", "--report", path(folder.path())];
    let said = run_for(&[&args[..], &more].concat(), Duration::from_secs(120)).ok();
    assert!(
        said.contains("I6 holds") && said.contains("again: moerun chaos"),
        "{said}"
    );
    let report = std::fs::read_to_string(folder.path().join("report.json")).expect("a report");
    let report: Value = serde_json::from_str(&report).expect("JSON");
    assert_eq!(report["holds"], true, "{report:#}");
    assert_eq!(report["figures"]["differing"], 0);
    let history = History::read(&folder.path().join("history.jsonl")).expect("a history");
    assert_eq!(
        history.requests.len() as u64,
        report["figures"]["requests"].as_u64().expect("a number")
    );
    let hit = history.faults.iter().filter(|fault| fault.hit()).count();
    assert!(hit >= 1, "{:?}", history.faults);
    for (kind, _) in FaultKind::ALL {
        let known = ["kill", "reset"].contains(&kind.to_string().as_str());
        assert!(known || history.faults.iter().all(|fault| fault.action != kind.to_string()));
    }
    super::figure(
        32,
        format!(
            "{hit} of {} faults met traffic, {} of {} requests finished, {} with another token, longest gap {:.1} ms; {}",
            history.faults.len(),
            report["figures"]["finished"],
            report["figures"]["requests"],
            report["figures"]["differing"],
            report["figures"]["gaps"]["longest_ms"].as_f64().expect("a number"),
            report["replay"].as_str().expect("a text"),
        ),
    );
}

#[test]
fn single_faults_fail_no_request_and_change_no_token() {
    let folder = TempDir::new().expect("a temporary folder");
    let model = golden_dir("qwen3_moe");
    let args = ["chaos", "--model", path(&model), "--figures", "50", "--duration", "2"];
    let said = run_for(
        &[&args[..], &["--report", path(folder.path())]].concat(),
        Duration::from_secs(180),
    )
    .ok();
    let rows: Vec<u32> = said
        .lines()
        .map(|line| {
            let (row, text) = line
                .strip_prefix("row ")
                .and_then(|line| line.split_once(": "))
                .expect("a row");
            let row = row.parse().expect("its number");
            super::figure(row, format!("50 streams: {text}"));
            row
        })
        .collect();
    assert_eq!(rows, [1, 3, 4, 12, 29]);
    let kept = std::fs::read_to_string(folder.path().join("figures.txt")).expect("figures");
    assert_eq!(kept, said);
}

#[test]
fn what_makes_no_sense_is_refused_in_words() {
    let folder = TempDir::new().expect("a temporary folder");
    let model = golden_dir("qwen3_moe");
    for (flags, code, words) in [
        (["--faults", "melt"], 2, "faults: wanted kill, stop"),
        (["--workers", "0"], 1, "workers: wanted 1 to 64, found 0"),
        (["--holders", "4"], 1, "holders: wanted 1 to 3, found 4"),
        (["--rate", "0"], 1, "rate: wanted above 0"),
        (["--max-tokens", "100000"], 1, "max_tokens: wanted at most"),
    ] {
        let args = ["chaos", "--model", path(&model), "--report", path(folder.path())];
        let error = run(&[&args[..], &flags].concat()).failed(code);
        assert!(error.contains(words), "{error}");
    }
}
