//! Row 2: the only holder of some experts dies.

use std::time::{Duration, Instant};

use moerun_loadtest::{GrpcTarget, Outcome};
use moerun_testkit::copy_without_experts;
use moerun_tests::{Golden, Server};
use tempfile::TempDir;
use tokio::time::sleep;

use super::{Load, assert_exact, figure, finished, gateway, golden_cases, path, worker, worker_stats};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_2_losing_the_only_holder_is_a_typed_error_until_it_is_back() {
    let golden = Golden::read("qwen3_moe");
    let folder = TempDir::new().expect("a temporary folder");
    // A gateway that could compute the experts itself would not need the worker.
    let stripped = folder.path().join("stripped");
    copy_without_experts(&golden.dir, &stripped).expect("a copy");
    let mut workers = [
        worker(&golden.dir, &["--shard", "0/2"]),
        worker(&golden.dir, &["--shard", "1/2"]),
    ];
    let lost = workers[1].addr.clone();
    let gateway = gateway(&stripped, &[&workers[0].addr, &lost]);
    let load = Load::start(&gateway.addr, &golden, 100, 3);
    sleep(Duration::from_secs(1)).await;
    let (_, busy) = worker_stats(&lost).await;
    assert!(busy.requests_executed > 0, "no live traffic: {busy:?}");
    let killed = load.clock.now();
    workers[1].kill();
    let history = load.history().await;
    assert_exact(&history);
    let failed: Vec<_> = history.requests.iter().filter(|it| !finished(it)).collect();
    assert!(!failed.is_empty(), "the kill met no request");
    let mut longest = 0;
    for request in &failed {
        let terminal = &request.terminals[0];
        match &terminal.outcome {
            Outcome::Error { code, message, .. } => {
                assert_eq!(code, "Unavailable", "{message}");
                assert!(message.contains(&lost), "{message}");
            }
            other => panic!("not an error of the gateway: {other:?}"),
        }
        longest = longest.max(terminal.at - killed.max(request.sent));
    }
    assert!(longest < 5_000_000, "{longest} µs");

    let args = [
        "worker",
        "--model",
        path(&golden.dir),
        "--listen",
        &lost,
        "--shard",
        "1/2",
    ];
    let _again = Server::start(&args);
    let ready = Instant::now();
    let target = GrpcTarget::new(&gateway.addr, 1).expect("an address");
    let (cases, references) = golden_cases(&golden);
    let tokens = loop {
        match target.tokens(&cases[0]).await {
            Ok(tokens) => break tokens,
            Err(status) => assert!(ready.elapsed() < Duration::from_secs(20), "{status:?}"),
        }
        sleep(Duration::from_millis(10)).await;
    };
    let recovered = ready.elapsed();
    assert_eq!(tokens, references[0].tokens);
    figure(
        2,
        format!(
            "the only holder killed under load: {} typed errors, the last {:.0} ms after the kill or its sending (bar: 1 s), \
             answers again {:.0} ms after the worker was ready (bar: 2 s)",
            failed.len(),
            longest as f64 / 1e3,
            recovered.as_secs_f64() * 1e3
        ),
    );
}
