//! Rows 11 and 12: a gateway that dies, and one that drains.

use std::time::{Duration, Instant};

use moerun_loadtest::Outcome;
use moerun_tests::Golden;
use tokio::time::sleep;

use super::{Load, assert_exact, figure, finished, gateway, worker, worker_stats};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_11_workers_forget_a_killed_gateway_and_serve_the_next() {
    let golden = Golden::read("qwen3_moe");
    let workers = [
        worker(&golden.dir, &["--shard", "0/2"]),
        worker(&golden.dir, &["--shard", "1/2"]),
    ];
    let addresses: Vec<&str> = workers.iter().map(|worker| worker.addr.as_str()).collect();
    let mut first = gateway(&golden.dir, &addresses);
    let load = Load::start(&first.addr, &golden, 100, 2);
    sleep(Duration::from_millis(500)).await;
    let (before, busy) = worker_stats(addresses[0]).await;
    assert!(
        busy.requests_executed > 0 && busy.streams == 1,
        "no live traffic: {busy:?}"
    );
    first.kill();

    let killed = Instant::now();
    let mut idle = Duration::ZERO;
    for address in &addresses {
        loop {
            let (_, stats) = worker_stats(address).await;
            idle = idle.max(killed.elapsed());
            if stats.outstanding_requests == 0 && stats.streams == 0 {
                break;
            }
            assert!(killed.elapsed() < Duration::from_secs(5), "{stats:?}");
            sleep(Duration::from_millis(5)).await;
        }
    }
    let history = load.history().await;
    assert_exact(&history);
    let cut = history.requests.iter().filter(|it| !finished(it));
    assert!(cut.clone().count() > 0, "the kill met no request");
    for request in cut {
        let outcome = &request.terminals[0].outcome;
        assert!(matches!(outcome, Outcome::Disconnected(_)), "{outcome:?}");
    }

    let restart = Instant::now();
    let second = gateway(&golden.dir, &addresses);
    let ready = restart.elapsed();
    let again = Load::start(&second.addr, &golden, 50, 1).history().await;
    assert_exact(&again);
    assert!(again.requests.iter().all(finished));
    let (after, _) = worker_stats(addresses[0]).await;
    assert_eq!(after.pid, before.pid);
    let leaked = after.resident_bytes.saturating_sub(before.resident_bytes);
    assert!(leaked < 16 << 20, "{before:?} {after:?}");
    figure(
        11,
        format!(
            "workers idle {:.0} ms after the gateway's death (bar: 5 s), next gateway ready after {:.0} ms with its model \
             (bar: 2 s + attach), a worker's memory grew by {leaked} bytes",
            idle.as_secs_f64() * 1e3,
            ready.as_secs_f64() * 1e3
        ),
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_12_a_gateway_that_drains_finishes_what_it_began() {
    let golden = Golden::read("qwen3_moe");
    let workers = [
        worker(&golden.dir, &["--shard", "0/2"]),
        worker(&golden.dir, &["--shard", "1/2"]),
    ];
    let addresses: Vec<&str> = workers.iter().map(|worker| worker.addr.as_str()).collect();
    let mut gateway = gateway(&golden.dir, &addresses);
    let load = Load::start(&gateway.addr, &golden, 100, 2);
    sleep(Duration::from_secs(1)).await;
    let (clock, terminated) = (load.clock, load.clock.now());
    gateway.terminate();
    let code = tokio::task::spawn_blocking(move || gateway.wait(Duration::from_secs(40))).await;
    let drained = clock.now() - terminated;
    assert_eq!(code.expect("no panic"), Some(0));
    let history = load.history().await;
    assert_exact(&history);
    let mut begun = 0;
    for request in history
        .requests
        .iter()
        .filter(|it| !it.tokens.is_empty() || it.sent + 200_000 < terminated)
    {
        begun += 1;
        assert!(finished(request), "cut off: {request:?}");
    }
    let refused = history.requests.iter().filter(|it| !finished(it)).count();
    assert!(
        begun > 0 && refused > 0,
        "{begun} begun, {refused} refused: the drain met no traffic"
    );
    figure(
        12,
        format!(
            "gateway drained under load in {:.0} ms with exit code 0: 0 of {begun} begun answers failed, {refused} later \
             requests refused",
            drained as f64 / 1e3
        ),
    );
}
