//! Row 31, discovery that is down; and workers that are found, come and go while a gateway serves.

use std::{
    net::Ipv4Addr,
    path::Path,
    time::{Duration, Instant},
};

use moerun_testkit::{Mood, NameServer, Record};
use moerun_tests::{Golden, Server, free_port, metric, run};
use tempfile::TempDir;
use tokio::time::sleep;

use super::{Load, assert_exact, figure, finished, path, worker};

const BOUND: Duration = Duration::from_secs(30);

/// Arguments of a gateway that finds its workers, and computes no expert itself.
fn finding<'a>(model: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
    let args = [
        "gateway",
        "--model",
        path(model),
        "--grpc-addr",
        "127.0.0.1:0",
        "--on-expert-loss",
        "fail",
    ];
    [&args[..], more].concat()
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + BOUND;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        sleep(Duration::from_millis(20)).await;
    }
}

async fn assert_serves(gateway: &Server, golden: &Golden) {
    let history = Load::start(&gateway.addr, golden, 20, 1).history().await;
    assert_exact(&history);
    assert!(history.requests.iter().all(finished));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_31_requests_go_on_while_no_name_server_answers() {
    let golden = Golden::read("qwen3_moe");
    let server = NameServer::start();
    let local = |last| Record::A(Ipv4Addr::new(127, 0, 0, last));
    let port = free_port();
    let on = |last: u8| format!("127.0.0.{last}:{port}");
    let start = |last, shard: &str| {
        let listen = on(last);
        Server::start(&[
            "worker",
            "--model",
            path(&golden.dir),
            "--listen",
            &listen,
            "--shard",
            shard,
        ])
    };
    let (source, asked) = (format!("dns:workers.test:{port}"), server.address().to_string());
    let metrics = format!("127.0.0.1:{}", free_port());
    let mut gateway = Server::spawn(&finding(
        &golden.dir,
        &[
            "--discover",
            &source,
            "--dns-server",
            &asked,
            "--discover-interval",
            "1",
            "--metrics-addr",
            &metrics,
        ],
    ));
    let _workers = [start(1, "0/2"), start(2, "1/2")];
    server.set("workers.test", &[local(1), local(2)]);
    gateway.wait_until_ready();
    let errors = || metric(&metrics, "moerun_discovery_errors_total");
    let before = errors();

    let load = Load::start(&gateway.addr, &golden, 30, 8);
    for mood in [Mood::Silent, Mood::NoSuchName] {
        server.be(mood);
        sleep(Duration::from_secs(4)).await;
    }
    let history = load.history().await;
    assert_exact(&history);
    let (failed, met) = (
        history.requests.iter().filter(|it| !finished(it)).count(),
        errors() - before,
    );
    assert_eq!(failed, 0);
    assert!(met >= 2.0, "discovery was not down: {met} errors");
    assert_eq!(metric(&metrics, "moerun_discovery_up"), 0.0);
    assert_eq!(metric(&metrics, "moerun_discovery_workers"), 2.0);

    // What changes is followed again: another worker takes the first one's place.
    let _third = start(3, "0/2");
    server.be(Mood::Answers);
    server.set("workers.test", &[local(2), local(3)]);
    until("the third worker is asked", || {
        metric(&metrics, &format!("moerun_worker_up{{worker=\"{}\"}}", on(3))) == 1.0
            && metric(&metrics, "moerun_workers") == 2.0
    })
    .await;
    assert_serves(&gateway, &golden).await;
    figure(
        31,
        format!(
            "no name server answered for 8 s ({met} lookups failed): 0 of {} requests failed, last known workers kept",
            history.requests.len()
        ),
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_31_registered_workers_come_fall_silent_and_find_the_next_gateway() {
    let golden = Golden::read("qwen3_moe");
    let [registry, health, metrics] = [(); 3].map(|()| format!("127.0.0.1:{}", free_port()));
    let args = finding(
        &golden.dir,
        &[
            "--registry-addr",
            &registry,
            "--health-addr",
            &health,
            "--metrics-addr",
            &metrics,
        ],
    );
    let mut gateway = Server::spawn(&args);
    gateway.wait_for_log("waiting until all experts are held");
    let first = worker(&golden.dir, &["--shard", "0/2", "--register", &registry]);
    // Half of the experts is not enough: it lives, and is not ready.
    gateway.wait_for_log("worker is connected");
    run(&["health", "--connect", &health, "--service", "readiness"]).failed(1);
    run(&["health", "--connect", &health, "--service", "liveness"]).ok();
    let second = worker(&golden.dir, &["--register", &registry]);
    gateway.wait_until_ready();
    let workers = || metric(&metrics, "moerun_discovery_workers");
    assert_eq!(workers(), 2.0);

    // One stops; the other holds everything. It is struck off, and comes back by itself.
    let load = Load::start(&gateway.addr, &golden, 20, 12);
    sleep(Duration::from_secs(1)).await;
    first.pause(true);
    until("the silent worker is struck off", || workers() == 1.0).await;
    first.pause(false);
    until("it registers again", || workers() == 2.0).await;
    let up = format!("moerun_worker_up{{worker=\"{}\"}}", first.addr);
    until("it is connected again", || metric(&metrics, &up) == 1.0).await;
    let history = load.history().await;
    assert_exact(&history);
    assert!(history.requests.iter().all(finished), "a stopped worker cost a request");

    // It leaves under load: told before it ends, so that nothing is asked of it any more.
    let load = Load::start(&gateway.addr, &golden, 30, 3);
    sleep(Duration::from_secs(1)).await;
    let mut first = first;
    first.terminate();
    assert_eq!(first.wait(Duration::from_secs(20)), Some(0));
    until("the worker has left", || workers() == 1.0).await;
    let history = load.history().await;
    assert_exact(&history);
    assert!(history.requests.iter().all(finished), "a leaving worker cost a request");

    // The gateway is killed, and with it all that it knew.
    gateway.kill();
    let restart = Instant::now();
    let mut next = Server::spawn(&args);
    next.wait_until_ready();
    let ready = restart.elapsed();
    assert_serves(&next, &golden).await;
    drop(second);
    figure(
        31,
        format!(
            "a registered worker fell silent, came back and left: 0 requests failed; a killed gateway's successor knew the \
             workers and was ready after {:.0} ms",
            ready.as_secs_f64() * 1e3
        ),
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_workers_on_the_list_register() {
    let golden = Golden::read("qwen3_moe");
    let folder = TempDir::new().expect("a temporary folder");
    let made = [
        "certs",
        "--out",
        path(folder.path()),
        "--worker",
        "w0=127.0.0.1",
        "--worker",
        "w1=127.0.0.1",
    ];
    run(&made).ok();
    let file = |name: &str| folder.path().join(name).display().to_string();
    let tls = |name: &str| {
        let (cert, key) = (file(&format!("{name}.pem")), file(&format!("{name}.key")));
        ["--tls-cert", &cert, "--tls-key", &key, "--tls-ca", &file("ca.pem")].map(str::to_owned)
    };
    let registry = format!("127.0.0.1:{}", free_port());
    let mut args: Vec<String> = finding(
        &golden.dir,
        &[
            "--registry-addr",
            &registry,
            "--allow-peer",
            "spiffe://moerun/worker/w0",
        ],
    )
    .into_iter()
    .map(str::to_owned)
    .collect();
    args.extend(tls("gateway"));
    let mut gateway = Server::spawn(&args);
    gateway.wait_for_log("waiting until all experts are held");
    let start = |name: &str, extra: &[&str]| {
        let mut args: Vec<String> = ["worker", "--model", path(&golden.dir), "--listen", "127.0.0.1:0"]
            .iter()
            .chain(extra)
            .map(|&it| it.to_owned())
            .collect();
        args.extend(["--register".to_owned(), registry.clone()]);
        args.extend(tls(name));
        Server::start(&args)
    };
    let stranger = start("w1", &["--allow-peer", "gateway"]);
    stranger.wait_for_log("not registered");
    let plain = worker(&golden.dir, &["--register", &registry]);
    plain.wait_for_log("not registered");
    let _known = start("w0", &["--allow-peer", "gateway"]);
    gateway.wait_until_ready();
    assert_serves(&gateway, &golden).await;
    let log = gateway.log();
    assert!(!log.contains(&stranger.addr) && !log.contains(&plain.addr), "{log}");
}

#[test]
fn settings_of_discovery_that_make_no_sense_are_refused() {
    let golden = Golden::read("qwen3_moe");
    for (more, word) in [
        (&["--discover", "workers"][..], "wanted dns:HOST:PORT"),
        (&["--discover", "etcd:127.0.0.1:2379"], "built without the feature etcd"),
        (&["--registry-addr", "0.0.0.0:0"], "--insecure"),
        (&["--discover-interval", "0"], "discover_interval: wanted 1 to 3600"),
        (&[], "--discover or --registry-addr"),
    ] {
        let error = run(&finding(&golden.dir, more)).failed(2);
        assert!(error.contains(word), "{more:?}: {error}");
    }
    let args = [
        "worker",
        "--model",
        path(&golden.dir),
        "--listen",
        "0.0.0.0:0",
        "--insecure",
        "--register",
        "a:1",
    ];
    let error = run(&args).failed(2);
    assert!(error.contains("wanted advertise"), "{error}");
}
