//! `moerun doctor`: what it says of a cluster that is well, and of one that is not.

use std::path::Path;

use moerun_tests::{Golden, Server, free_port, golden_dir, run};
use serde_json::Value;
use tempfile::TempDir;

fn path(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

fn worker(model: &Path, extra: &[&str]) -> Server {
    Server::start(&[&["worker", "--model", path(model), "--listen", "127.0.0.1:0"], extra].concat())
}

/// Of a cluster on free ports.
fn doctor<'a>(model: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
    [&["doctor", "--model", path(model), "--grpc-addr", "127.0.0.1:0"], more].concat()
}

/// Levels of the lines about `check`.
fn levels(report: &str, check: &str) -> Vec<String> {
    let lines = report
        .lines()
        .filter(|line| line.get(6..).is_some_and(|rest| rest.starts_with(check)));
    lines.map(|line| line[..4].trim().to_owned()).collect()
}

#[test]
fn a_cluster_that_is_well_is_told_so() {
    let golden = Golden::read("qwen3_moe");
    let workers = [worker(&golden.dir, &[]), worker(&golden.dir, &[])];
    let [one, two] = [&workers[0].addr, &workers[1].addr];
    let report = run(&doctor(&golden.dir, &["--worker", one, "--worker", two])).ok();
    assert_eq!(
        levels(&report, "experts: all are held by two workers or more"),
        ["OK"],
        "{report}"
    );
    for worker in [one, two] {
        let of_it = levels(&report, &format!("worker {worker}"));
        assert!(of_it.len() >= 5 && !of_it.contains(&"FAIL".to_owned()), "{report}");
    }
    for check in [
        "model",
        "memory",
        "clock",
        "grpc_addr",
        "links",
        "open files",
        "processor",
    ] {
        assert_eq!(levels(&report, check).len(), 1, "{check}: {report}");
    }
    assert!(
        report.contains("round trip") && report.contains("MB/s") && report.ends_with("0 wrong\n"),
        "{report}"
    );
}

#[test]
fn what_is_wrong_is_named_with_what_would_help() {
    let golden = Golden::read("qwen3_moe");
    let other = worker(&golden_dir("mixtral"), &[]);
    let half = worker(&golden.dir, &["--shard", "0/2"]);
    let nobody = format!("127.0.0.1:{}", free_port());
    let args = [
        "--worker",
        &other.addr,
        "--worker",
        &half.addr,
        "--worker",
        &nobody,
        "--json",
    ];
    let finished = run(&doctor(&golden.dir, &args));
    assert_eq!(finished.code, Some(1), "{}", finished.stderr);
    let report: Value = serde_json::from_str(&finished.stdout).expect("JSON");
    assert_eq!(report["worst"], "FAIL");
    let findings = report["findings"].as_array().expect("a list");
    let failures: Vec<&Value> = findings.iter().filter(|it| it["level"] == "FAIL").collect();
    let found = |check: &str, word: &str| {
        failures.iter().any(|it| {
            let text = |key: &str| it[key].as_str().unwrap_or_default().to_owned();
            text("check") == check && text("found").contains(word) && !text("remedy").is_empty()
        })
    };
    assert!(found(&format!("worker {}", other.addr), "config hash"), "{failures:#?}");
    assert!(found(&format!("worker {nobody}"), "refused"), "{failures:#?}");
    assert!(found("experts", "are held by no worker"), "{failures:#?}");
}

#[test]
fn certificates_are_read_and_their_time_is_told() {
    let golden = Golden::read("qwen3_moe");
    let folder = TempDir::new().expect("a temporary folder");
    let made = [
        "certs",
        "--out",
        path(folder.path()),
        "--worker",
        "w0=127.0.0.1",
        "--days",
        "9",
    ];
    run(&made).ok();
    let file = |name: &str| folder.path().join(name).display().to_string();
    let tls = |name: &str| {
        let (cert, key) = (file(&format!("{name}.pem")), file(&format!("{name}.key")));
        ["--tls-cert", &cert, "--tls-key", &key, "--tls-ca", &file("ca.pem")].map(str::to_owned)
    };
    let (own, its) = (tls("gateway"), tls("w0"));
    let worker = worker(&golden.dir, &its.each_ref().map(String::as_str));
    let own = own.each_ref().map(String::as_str);
    let report = run(&doctor(
        &golden.dir,
        &[&["--worker", worker.addr.as_str()], &own[..]].concat(),
    ))
    .ok();
    let of_own = levels(&report, &format!("tls_cert {}: gateway", own[1]));
    assert_eq!(of_own, ["WARN"], "{report}");
    assert!(
        report.contains("8 days left") || report.contains("9 days left"),
        "{report}"
    );
    assert_eq!(levels(&report, "links: TLS 1.3"), ["OK"], "{report}");
    // Without them the worker turns it away.
    let report = run(&doctor(&golden.dir, &["--worker", &worker.addr]));
    assert_eq!(report.code, Some(1));
    assert!(report.stdout.contains("it wants TLS"), "{}", report.stdout);
}
