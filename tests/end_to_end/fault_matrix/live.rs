//! Rows 12 and 29: workers that come, go, are drained and restarted, and experts that move, all under load. The gateway has
//! no expert on its own disk, so what it answers comes from workers.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use moerun_loadtest::History;
use moerun_proto::v1::{self, admin_service_client::AdminServiceClient};
use moerun_testkit::copy_without_experts;
use moerun_tests::{Finished, Golden, Server, free_port, run};
use tempfile::TempDir;
use tokio::{task::spawn_blocking, time::sleep};

use super::{Load, assert_exact, figure, finished, gateway_args, path, worker};

const FAMILY: &str = "qwen3_moe";

/// A golden model, and a copy of it without experts for the gateway.
struct Models {
    golden: Golden,
    stripped: PathBuf,
    _folder: TempDir,
}

impl Models {
    fn new() -> Self {
        let golden = Golden::read(FAMILY);
        let folder = TempDir::new().expect("a temporary folder");
        let stripped = folder.path().join("stripped");
        copy_without_experts(&golden.dir, &stripped).expect("a copy");
        Self {
            golden,
            stripped,
            _folder: folder,
        }
    }

    fn worker(&self, experts: &[&str]) -> Server {
        worker(&self.golden.dir, experts)
    }

    fn gateway(&self, workers: &[&str], more: &[&str]) -> Server {
        let args = gateway_args(&self.stripped, workers);
        let args: Vec<&str> = args.iter().map(String::as_str).chain(more.iter().copied()).collect();
        Server::start(&args)
    }
}

fn worker_at(model: &Path, address: &str, more: &[&str]) -> Server {
    Server::start(&[&["worker", "--model", path(model), "--listen", address], more].concat())
}

async fn placement(gateway: &Server) -> v1::GetPlacementResponse {
    let mut client = AdminServiceClient::connect(format!("http://{}", gateway.addr))
        .await
        .expect("the gateway listens");
    let asked = client.get_placement(v1::GetPlacementRequest {}).await;
    asked.expect("it has workers").into_inner()
}

async fn placed(gateway: &Server, worker: &str) -> v1::PlacedWorker {
    let workers = placement(gateway).await.workers;
    let found = workers.into_iter().find(|it| it.address == worker);
    found.expect("a worker of this gateway")
}

/// Asks again and again until it is so.
async fn until(gateway: &Server, worker: &str, is_so: impl Fn(&v1::PlacedWorker) -> bool) -> Duration {
    let begun = Instant::now();
    loop {
        let now = placed(gateway, worker).await;
        if is_so(&now) {
            return begun.elapsed();
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "{now:?}");
        sleep(Duration::from_millis(2)).await;
    }
}

/// A command on the gateway's admin service.
async fn command(gateway: &Server, args: &[&str]) -> Finished {
    let args: Vec<String> = args
        .iter()
        .chain(&["--admin", &gateway.addr])
        .map(|arg| (*arg).to_owned())
        .collect();
    spawn_blocking(move || run(&args)).await.expect("no panic")
}

async fn stopped(mut worker: Server) -> Option<i32> {
    worker.terminate();
    let waiting = spawn_blocking(move || worker.wait(Duration::from_secs(20)));
    waiting.await.expect("no panic")
}

#[track_caller]
fn assert_nothing_failed(history: &History) {
    assert_exact(history);
    let failed: Vec<_> = history.requests.iter().filter(|it| !finished(it)).collect();
    assert!(failed.is_empty(), "{} failed, the first: {:?}", failed.len(), failed[0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_29_a_worker_that_joins_with_nothing_is_given_experts_under_load() {
    let models = Models::new();
    let workers = ["0/2", "1/2"].map(|shard| models.worker(&["--shard", shard]));
    let newcomer = format!("127.0.0.1:{}", free_port());
    let gateway = models.gateway(
        &[&workers[0].addr, &workers[1].addr, &newcomer],
        &["--placement", "auto"],
    );
    let load = Load::start(&gateway.addr, &models.golden, 100, 5);
    sleep(Duration::from_secs(1)).await;
    assert!(placed(&gateway, &workers[0].addr).await.calls > 0, "no live traffic");
    let before = placement(&gateway).await;
    let joined = worker_at(&models.golden.dir, &newcomer, &["--experts", "none"]);
    let useful = until(&gateway, &newcomer, |it| it.calls > 0).await;
    assert!(useful < Duration::from_secs(10), "{useful:?}");

    let history = load.history().await;
    assert_nothing_failed(&history);
    let after = placement(&gateway).await;
    let held: Vec<u64> = after.workers.iter().map(|it| it.held_slices).collect();
    let all: u64 = before.workers.iter().map(|it| it.held_slices).sum();
    assert!(after.epoch > before.epoch && held[2] > 0, "{after:?}");
    assert_eq!(held.iter().sum::<u64>(), all, "copied, then let go: {held:?}");
    assert!(held[0] < all / 2 && held[1] < all / 2, "{held:?}");
    // Leaves again, as it came.
    let load = Load::start(&gateway.addr, &models.golden, 100, 2);
    sleep(Duration::from_millis(300)).await;
    command(&gateway, &["drain", &newcomer]).await.ok();
    let drained = placed(&gateway, &newcomer).await;
    assert_eq!(stopped(joined).await, Some(0));
    let history = load.history().await;
    assert_nothing_failed(&history);
    assert_eq!(
        placed(&gateway, &newcomer).await.calls,
        drained.calls,
        "a drained worker was called"
    );
    figure(
        29,
        format!(
            "a worker with no experts joined under load: first useful work {:.0} ms after it was ready (bar: 2 s), it held \
             {} of {all} slices; drained and stopped under load; 0 of {} requests failed in the latter, no token differs",
            useful.as_secs_f64() * 1e3,
            held[2],
            history.requests.len()
        ),
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_12_every_worker_is_drained_and_restarted_under_load() {
    let models = Models::new();
    let shards = ["0/3", "1/3", "2/3"];
    let mut workers: Vec<Server> = shards.iter().map(|shard| models.worker(&["--shard", shard])).collect();
    let addresses: Vec<String> = workers.iter().map(|it| it.addr.clone()).collect();
    let gateway = models.gateway(&addresses.iter().map(String::as_str).collect::<Vec<_>>(), &[]);
    let load = Load::start(&gateway.addr, &models.golden, 60, 8);
    sleep(Duration::from_millis(500)).await;
    let mut slowest = Duration::ZERO;
    for (shard, address) in shards.iter().zip(&addresses) {
        let begun = Instant::now();
        assert!(placed(&gateway, address).await.calls > 0, "no live traffic");
        command(&gateway, &["drain", address]).await.ok();
        let old = workers.remove(0);
        assert_eq!(stopped(old).await, Some(0));
        let new = worker_at(&models.golden.dir, address, &["--shard", shard]);
        until(&gateway, address, |it| it.down_reason.is_empty() && it.held_slices > 0).await;
        command(&gateway, &["resume", address]).await.ok();
        workers.push(new);
        slowest = slowest.max(begun.elapsed());
    }
    assert!(load.clock.now() < 8_000_000, "the load ended before the last restart");
    let history = load.history().await;
    assert_nothing_failed(&history);
    figure(
        12,
        format!(
            "three workers that hold each expert once drained, stopped, started and resumed one after another under load: 0 \
             of {} requests failed, no token differs, {:.0} ms for the slowest worker",
            history.requests.len(),
            slowest.as_secs_f64() * 1e3
        ),
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn experts_move_by_hand_under_load_and_no_token_differs() {
    let models = Models::new();
    let (full, empty) = (models.worker(&[]), models.worker(&["--experts", "none"]));
    let gateway = models.gateway(&[&full.addr, &empty.addr], &[]);
    let load = Load::start(&gateway.addr, &models.golden, 100, 4);
    sleep(Duration::from_millis(500)).await;

    let before = placement(&gateway).await;
    let text = command(&gateway, &["rebalance", "--dry-run"]).await.ok();
    assert!(text.contains("experts would be moved"), "{text}");
    let unmoved = placement(&gateway).await;
    assert_eq!(unmoved.epoch, before.epoch);
    assert_eq!(unmoved.workers[1].held_slices, 0);

    let report: serde_json::Value =
        serde_json::from_str(&command(&gateway, &["rebalance", "--json"]).await.ok()).expect("JSON");
    assert_eq!(report["carried_out"], true, "{report}");
    until(&gateway, &empty.addr, |it| it.calls > 0).await;
    let after = placement(&gateway).await;
    assert_eq!(report["epoch"], after.epoch, "{report}");
    let held = |it: &v1::GetPlacementResponse| it.workers.iter().map(|it| it.held_slices).collect::<Vec<_>>();
    assert_eq!(
        held(&after).iter().sum::<u64>(),
        held(&before)[0],
        "each expert once: {after:?}"
    );
    assert!(held(&after).iter().all(|&held| held > 0), "{after:?}");
    assert_nothing_failed(&load.history().await);

    // Loads were counted, and the same plan moves nothing more.
    let status: serde_json::Value =
        serde_json::from_str(&command(&gateway, &["status", "--json"]).await.ok()).expect("JSON");
    let loads = status["loads"]["0"].as_array().expect("loads of layer 0");
    assert!(
        loads.iter().any(|load| load.as_f64().is_some_and(|load| load > 0.0)),
        "{status}"
    );
    let again = command(&gateway, &["rebalance"]).await.ok();
    assert!(again.contains("nothing to move"), "{again}");
    let table = command(&gateway, &["status"]).await.ok();
    assert!(
        table.contains(&empty.addr) && table.contains("placement held"),
        "{table}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_29_a_worker_with_a_config_alone_fetches_experts_over_tls() {
    let models = Models::new();
    let folder = TempDir::new().expect("a temporary folder");
    let bare = folder.path().join("bare");
    std::fs::create_dir(&bare).expect("a folder");
    std::fs::copy(models.golden.dir.join("config.json"), bare.join("config.json")).expect("a copy");
    let certificates = folder.path().join("certificates");
    let named = ["--worker", "w0=127.0.0.1", "--worker", "w1=127.0.0.1"];
    run(&[&["certs", "--out", path(&certificates)][..], &named].concat()).ok();
    let tls = |name: &str| -> Vec<String> {
        let file = |file: String| certificates.join(file).display().to_string();
        let (cert, key, ca) = (
            file(format!("{name}.pem")),
            file(format!("{name}.key")),
            file("ca.pem".to_owned()),
        );
        ["--tls-cert", &cert, "--tls-key", &key, "--tls-ca", &ca]
            .map(str::to_owned)
            .into()
    };
    let flags = |words: &[&str], name: &str| -> Vec<String> {
        words.iter().map(|&word| word.to_owned()).chain(tls(name)).collect()
    };
    let start = |model: &Path, experts: &str, name: &str| {
        let words = [
            "worker",
            "--model",
            path(model),
            "--listen",
            "127.0.0.1:0",
            "--weights",
            "f32",
            "--experts",
            experts,
        ];
        Server::start(&flags(&words, name))
    };
    let (full, bare) = (start(&models.golden.dir, "*:*", "w0"), start(&bare, "none", "w1"));
    let args = gateway_args(&models.stripped, &[&full.addr, &bare.addr]);
    let gateway = Server::start(&[args, tls("gateway")].concat());
    let load = Load::start(&gateway.addr, &models.golden, 100, 3);
    sleep(Duration::from_millis(500)).await;
    let text = command(&gateway, &["drain", &full.addr]).await.ok();
    assert!(text.contains("held by others too"), "{text}");
    let useful = until(&gateway, &bare.addr, |it| it.calls > 0).await;
    assert!(useful < Duration::from_secs(5), "{useful:?}");
    assert_eq!(stopped(full).await, Some(0));
    assert_nothing_failed(&load.history().await);
    let moved = placed(&gateway, &bare.addr).await;
    figure(
        29,
        format!(
            "a worker with nothing but a config fetched all {} slices of {} bytes from the one holder over mutual TLS, which \
             then left: 0 requests failed, no token differs",
            moved.held_slices,
            moved.held_bytes.unwrap_or_default()
        ),
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_that_cannot_be_is_refused_with_the_arithmetic() {
    let models = Models::new();
    let one = models.worker(&["--shard", "0/2"]);
    let held_bytes = {
        let alone = models.gateway(&[&one.addr, &models.worker(&["--shard", "1/2"]).addr], &[]);
        until(&alone, &one.addr, |it| it.held_bytes.is_some()).await;
        placed(&alone, &one.addr).await.held_bytes.expect("it tells")
    };
    let tight = models.worker(&["--shard", "1/2", "--expert-memory", &held_bytes.to_string()]);
    let gateway = models.gateway(&[&one.addr, &tight.addr], &[]);
    let before = placement(&gateway).await;
    let error = command(&gateway, &["drain", &one.addr]).await.failed(1);
    assert!(
        error.contains("find no room with the others") && error.contains(&format!("{} has 0 bytes left", tight.addr)),
        "{error}"
    );
    let error = command(&gateway, &["drain", "127.0.0.1:1"]).await.failed(1);
    assert!(
        error.contains("no worker \"127.0.0.1:1\"") && error.contains(&one.addr),
        "{error}"
    );
    assert_eq!(placement(&gateway).await.workers, before.workers);
    let error = run(&["status", "--admin", &one.addr]).failed(1);
    assert!(error.contains("this is a worker"), "{error}");
    let nobody = format!("127.0.0.1:{}", free_port());
    let error = run(&["status", "--admin", &nobody]).failed(1);
    assert!(error.contains("nobody answers"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_that_hold_nothing_are_given_what_a_plan_says() {
    let golden = Golden::read(FAMILY);
    let workers = [0, 1, 2].map(|_| worker(&golden.dir, &["--experts", "none"]));
    let folder = TempDir::new().expect("a temporary folder");
    let plan = folder.path().join("plan.json");
    let named = workers.each_ref().map(|it| format!("{}=1GiB", it.addr));
    let mut args = vec![
        "plan",
        "--model",
        path(&golden.dir),
        "--replicas",
        "2",
        "--out",
        path(&plan),
    ];
    named.iter().for_each(|worker| args.extend(["--worker", worker]));
    run(&args).ok();
    let written: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&plan).expect("written")).expect("JSON");

    // The gateway computes experts itself until the workers hold them.
    let mut args = gateway_args(&golden.dir, &workers.each_ref().map(|it| it.addr.as_str()));
    args.extend(["--placement".to_owned(), path(&plan).to_owned()]);
    let gateway = Server::start(&args);
    let load = Load::start(&gateway.addr, &golden, 50, 2);
    for (worker, planned) in workers.iter().zip(written["workers"].as_array().expect("workers")) {
        let experts = planned["experts"].as_str().expect("a list");
        until(&gateway, &worker.addr, |it| it.experts == experts).await;
    }
    assert_nothing_failed(&load.history().await);
    assert_eq!(placement(&gateway).await.fewest_holders, 2);

    let other = folder.path().join("other.json");
    let text = std::fs::read_to_string(&plan).expect("written").replace("f32", "bf16");
    std::fs::write(&other, text).expect("written");
    let mut args = gateway_args(&golden.dir, &[&workers[0].addr]);
    args.extend(["--placement".to_owned(), path(&other).to_owned()]);
    let error = Server::try_start(&args)
        .expect_err("a plan of other numerics")
        .failed(1);
    assert!(error.contains("numerics") && error.contains("bf16"), "{error}");
}
