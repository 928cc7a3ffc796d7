//! Rows 5, 6, 7, 10 and 14: the way between the gateway and one of three workers is broken, with two holders an expert and a
//! gateway that has none itself. No request fails and no token differs.

use std::time::Duration;

use moerun_loadtest::{History, RunFigures, Window};
use moerun_proto::v1::{self, get_stats_response::Role};
use moerun_testkit::{Corrupt, FaultProxy, Faults, Flow, ProxyCounts, Within, copy_without_experts};
use moerun_tests::{Golden, Server};
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

use super::{Load, assert_exact, figure, finished, gateway, stats, worker};

/// Undisturbed, before and after.
const QUIET: Duration = Duration::from_millis(1500);

/// A gateway over three workers, of which each is reached through a proxy.
struct Cluster {
    golden: Golden,
    gateway: Server,
    proxies: Vec<FaultProxy>,
    _workers: Vec<Server>,
    _folder: TempDir,
}

impl Cluster {
    fn start() -> Self {
        let golden = Golden::read("qwen3_moe");
        let folder = TempDir::new().expect("a temporary folder");
        let stripped = folder.path().join("stripped");
        copy_without_experts(&golden.dir, &stripped).expect("a copy");
        // Expert e is with workers e and e + 1, modulo 3.
        let held = ["*:0,*:2,*:3,*:5,*:6", "*:0,*:1,*:3,*:4,*:6,*:7", "*:1,*:2,*:4,*:5,*:7"];
        let workers: Vec<Server> = held
            .iter()
            .map(|held| worker(&golden.dir, &["--experts", held]))
            .collect();
        let proxies: Vec<FaultProxy> = workers
            .iter()
            .map(|worker| FaultProxy::start("127.0.0.1:0", &worker.addr).expect("a port"))
            .collect();
        let addresses: Vec<&str> = proxies.iter().map(FaultProxy::address).collect();
        Self {
            gateway: gateway(&stripped, &addresses),
            golden,
            proxies,
            _workers: workers,
            _folder: folder,
        }
    }

    async fn stats(&self) -> v1::GatewayStats {
        match stats(&self.gateway.addr).await.role {
            Some(Role::Gateway(gateway)) => gateway,
            other => panic!("not the figures of a gateway: {other:?}"),
        }
    }

    /// A load of so many seconds, in the middle of which something is done to the second worker's proxy. Nothing fails.
    async fn under_load(&self, seconds: u32, disturb: impl AsyncFnOnce(&FaultProxy)) -> (History, ProxyCounts) {
        let load = Load::start(&self.gateway.addr, &self.golden, 40, seconds);
        sleep(QUIET).await;
        let before = self.proxies[1].counts();
        disturb(&self.proxies[1]).await;
        let after = self.proxies[1].counts();
        let history = load.history().await;
        assert_exact(&history);
        let failed: Vec<_> = history.requests.iter().filter(|it| !finished(it)).collect();
        assert!(failed.is_empty(), "{} failed: {:?}", failed.len(), failed[0].terminals);
        let did = ProxyCounts {
            held: after.held - before.held,
            flipped: after.flipped - before.flipped,
            ..after
        };
        (history, did)
    }

    /// Waits until the gateway sees the second worker's link so; returns how long that took.
    async fn until_up(&self, up: bool) -> Duration {
        let begun = Instant::now();
        while self.stats().await.workers[1].up != up {
            assert!(
                begun.elapsed() < Duration::from_secs(20),
                "the link stays {}",
                if up { "down" } else { "up" }
            );
            sleep(Duration::from_millis(10)).await;
        }
        begun.elapsed()
    }
}

fn cut() -> Flow {
    Flow {
        cut: true,
        ..Flow::default()
    }
}

fn longest_gap(history: &History) -> f64 {
    RunFigures::of(history).gaps.longest_ms
}

async fn partitioned(row: u32, what: &str, faults: Faults) {
    let cluster = Cluster::start();
    let mut detected = Duration::ZERO;
    let (history, did) = cluster
        .under_load(6, async |proxy| {
            proxy.set(faults);
            detected = cluster.until_up(false).await;
            proxy.clear();
        })
        .await;
    assert!(did.held > 0, "no traffic was held up");
    let healed = cluster.until_up(true).await;
    figure(
        row,
        format!(
            "{what}: {} requests, 0 failed (bar: 0), 0 with another token (bar: 0); connection ended after {} ms (bar: 3 s), \
             longest gap {:.0} ms; up again within {} ms of the load's end",
            history.requests.len(),
            detected.as_millis(),
            longest_gap(&history),
            healed.as_millis()
        ),
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_5_a_partition_fails_nothing() {
    let faults = Faults {
        to_server: cut(),
        to_client: cut(),
        refuse: false,
    };
    partitioned(5, "full partition of one worker", faults).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_6_a_one_way_partition_fails_nothing() {
    let faults = Faults {
        to_client: cut(),
        ..Faults::default()
    };
    partitioned(6, "requests go through, answers do not", faults).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_7_a_flapping_link_makes_no_storm() {
    let cluster = Cluster::start();
    let before = cluster.stats().await;
    let (history, did) = cluster
        .under_load(9, async |proxy| {
            for _ in 0..3 {
                let down = Faults {
                    to_server: cut(),
                    to_client: cut(),
                    refuse: true,
                };
                proxy.set(down);
                proxy.reset_connections();
                sleep(Duration::from_secs(1)).await;
                proxy.clear();
                sleep(Duration::from_secs(1)).await;
            }
        })
        .await;
    assert!(did.held > 0 || did.refused > 0, "nothing was held up or refused");
    let after = cluster.stats().await;
    let (calls, retries) = (after.calls - before.calls, after.retries - before.retries);
    let share = (calls + retries) as f64 / calls.max(1) as f64;
    assert!(share <= 1.2, "{retries} retries of {calls} calls");
    figure(
        7,
        format!(
            "a link that is up and down for a second each, three times: {} requests, 0 failed (bar: 0.1 %), {retries} retries of \
             {calls} calls, {share:.4} messages a call (bar: 1.2), longest gap {:.0} ms",
            history.requests.len(),
            longest_gap(&history)
        ),
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_10_a_narrow_link_holds_back_and_fills_no_memory() {
    let cluster = Cluster::start();
    for (name, bytes_per_second) in [
        ("1 Gbit/s", 125_000_000),
        ("100 Mbit/s", 12_500_000),
        ("1 Mbit/s", 125_000),
    ] {
        let narrow = Flow {
            bytes_per_second: Some(bytes_per_second),
            ..Flow::default()
        };
        let (before, process) = (cluster.proxies[1].counts(), stats(&cluster.gateway.addr).await.process);
        let (history, _) = cluster
            .under_load(4, async |proxy| {
                proxy.set(Faults {
                    to_server: narrow.clone(),
                    to_client: narrow,
                    refuse: false,
                });
                sleep(Duration::from_secs(2)).await;
                proxy.clear();
            })
            .await;
        let after = cluster.proxies[1].counts();
        let grown = stats(&cluster.gateway.addr)
            .await
            .process
            .expect("figures")
            .resident_bytes;
        let grown = grown.saturating_sub(process.expect("figures").resident_bytes);
        assert!(grown < 64 << 20, "{grown} bytes more");
        let bytes = after.bytes_to_server + after.bytes_to_client - before.bytes_to_server - before.bytes_to_client;
        let tokens: usize = history.requests.iter().map(|request| request.tokens.len()).sum();
        let during = Window::of(&history, (1_500_000, 3_500_000)).tokens_per_second;
        figure(
            10,
            format!(
                "{name} to one worker for 2 s: 0 of {} requests failed, {during:.0} tokens/s, {:.0} bytes a token to and from it, \
                 gateway's memory grew by {:.1} MiB",
                history.requests.len(),
                bytes as f64 / tokens.max(1) as f64,
                grown as f64 / f64::from(1 << 20)
            ),
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_14_flipped_bits_are_found_and_asked_again() {
    let cluster = Cluster::start();
    let corrupt = |seed, within| Flow {
        corrupt: Some(Corrupt {
            one_in: 3000,
            seed,
            within,
        }),
        ..Flow::default()
    };
    for (what, within) in [
        ("messages", Within::DataFrames),
        ("the whole connection", Within::Anything),
    ] {
        let (history, did) = cluster
            .under_load(6, async |proxy| {
                proxy.set(Faults {
                    to_server: corrupt(1, within),
                    to_client: corrupt(2, within),
                    refuse: false,
                });
                sleep(Duration::from_secs(3)).await;
                proxy.clear();
            })
            .await;
        assert!(did.flipped > 0, "no bit was flipped");
        cluster.until_up(true).await;
        let failed = cluster.stats().await.workers[1].failed_calls;
        figure(
            14,
            format!(
                "bits flipped in {what}: {} bytes hit, {} requests, 0 failed, 0 with another token (bar: 0), {failed} failed calls so \
                 far, longest gap {:.0} ms",
                did.flipped,
                history.requests.len(),
                longest_gap(&history)
            ),
        );
    }
}
