//! The checker finds what is planted, in real processes: each violation in the invariant that it violates.

use std::{path::PathBuf, time::Duration};

use moerun_loadtest::chaos::{self, ChaosConfig, FaultKind};
use moerun_tests::{golden_dir, moerun_planted};
use tempfile::TempDir;

/// Runs a load, beside faults if there are some, on processes with `plant`; returns the invariants that are violated and
/// the whole report.
async fn violated(plant: &str, faults: Vec<FaultKind>) -> (Vec<&'static str>, String) {
    let folder = TempDir::new().expect("a temporary folder");
    let program: PathBuf = tokio::task::spawn_blocking(|| moerun_planted().to_owned())
        .await
        .expect("it builds");
    let mut environment = vec![("MOERUN_PLANT".to_owned(), plant.to_owned())];
    if plant == "hidden-fault" {
        // Whoever hides a fault hides it from the log too.
        environment.push(("MOERUN_LOG".to_owned(), "off".to_owned()));
    }
    if plant == "no-recovery" {
        // Nothing goes wrong first where the gateway computes what its workers have lost.
        environment.push(("MOERUN_ON_EXPERT_LOSS".to_owned(), "fail".to_owned()));
    }
    let config = ChaosConfig {
        environment,
        workers: 2,
        duration: Duration::from_secs(1),
        rate: 20.0,
        faults,
        ..ChaosConfig::new(program, golden_dir("qwen3_moe"), folder.path())
    };
    let report = chaos::run(config).await.expect("the run is made");
    let broken = report.verdicts.iter().filter(|verdict| !verdict.holds());
    let names = broken.map(|verdict| verdict.invariant).collect();
    let text = std::fs::read_to_string(folder.path().join("report.md")).expect("a report");
    (names, text)
}

/// The invariants violated are those named, and the report says so in these words.
async fn expect(plant: &str, faults: Vec<FaultKind>, wanted: &[&str], words: &str) {
    let (found, report) = violated(plant, faults).await;
    assert_eq!(found, wanted, "{plant}: {report}");
    assert!(report.contains(words), "{plant}: {words:?} is not in {report}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_planted_is_nothing_found() {
    expect("nothing", Vec::new(), &[], "I1 holds").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_reply_applied_twice_is_found() {
    expect("late-reply-twice", Vec::new(), &["I1"], "I1 VIOLATED").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_token_is_found() {
    expect("flipped-token", Vec::new(), &["I1"], "I1 VIOLATED").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leaked_block_is_found() {
    expect(
        "leaked-block",
        Vec::new(),
        &["I3"],
        "kv_pages_used: wanted 0 after the load",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_terminal_event_is_found() {
    expect("lost-terminal", Vec::new(), &["I2"], "nothing said that it had ended").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_swallowed_panic_is_found() {
    expect("swallowed-panic", Vec::new(), &["I4"], "panicked at").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hidden_fault_is_found() {
    expect("hidden-fault", vec![FaultKind::Kill], &["I5"], "no log line names it").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_that_does_not_recover_is_found() {
    expect(
        "no-recovery",
        vec![FaultKind::Kill],
        &["I6"],
        "0.0 % of the tokens asked for came",
    )
    .await;
}
