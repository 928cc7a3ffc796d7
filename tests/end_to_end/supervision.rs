//! What supervisors are told: the health door, systemd's notifications, and where a shard comes from.

use std::{
    os::unix::net::UnixDatagram,
    time::{Duration, Instant},
};

use moerun_tests::{Server, golden_dir, run};

fn model() -> String {
    golden_dir("mixtral").to_str().expect("a plain path").to_owned()
}

#[test]
fn a_health_door_tells_startup_readiness_and_liveness() {
    let model = model();
    let args = [
        "serve",
        "--model",
        &model,
        "--grpc-addr",
        "127.0.0.1:0",
        "--health-addr",
        "127.0.0.1:0",
    ];
    let mut server = Server::start(&args);
    let health = server.health.clone().expect("a health door");
    for service in ["", "startup", "readiness", "liveness"] {
        let said = run(&["health", "--connect", &health, "--service", service]).ok();
        assert_eq!(said.trim(), "SERVING", "{service}");
    }
    let error = run(&["health", "--connect", &health, "--service", "other"]).failed(1);
    assert!(error.contains("no service \"other\""), "{error}");
    // The main door knows its own services, and the whole server.
    run(&["health", "--connect", &server.addr]).ok();
    server.terminate();
    assert_eq!(server.wait(Duration::from_secs(20)), Some(0));
    let error = run(&["health", "--connect", &health]).failed(1);
    assert!(error.contains(&format!("nobody answers at {health}")), "{error}");
}

#[test]
fn systemd_is_told_ready_alive_and_stopping() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let variables = [("NOTIFY_SOCKET", path.to_str().unwrap()), ("WATCHDOG_USEC", "600000")];
    let model = model();
    let mut worker = Server::start_with(&variables, &["worker", "--model", &model, "--listen", "127.0.0.1:0"]);
    let wait_for = |wanted: &str| {
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut message = [0; 256];
        while Instant::now() < deadline {
            let length = socket
                .recv(&mut message)
                .unwrap_or_else(|error| panic!("{wanted}: {error}"));
            if String::from_utf8_lossy(&message[..length])
                .lines()
                .any(|line| line == wanted)
            {
                return;
            }
        }
        panic!("{wanted} was not told");
    };
    wait_for("READY=1");
    for _ in 0..3 {
        wait_for("WATCHDOG=1");
    }
    worker.terminate();
    wait_for("STOPPING=1");
    assert_eq!(worker.wait(Duration::from_secs(20)), Some(0));
}

#[test]
fn replicas_of_a_shard_are_held_by_neighbours() {
    let model = model();
    let start = |extra: &[&str]| {
        let args = ["worker", "--model", &model, "--listen", "127.0.0.1:0"];
        Server::start(&[&args[..], extra].concat())
    };
    // One worker with both shards of two is enough for a gateway.
    let worker = start(&["--shard", "1/2", "--replicas", "2"]);
    let args = [
        "gateway",
        "--model",
        &model,
        "--grpc-addr",
        "127.0.0.1:0",
        "--worker",
        &worker.addr,
    ];
    Server::start(&args);
    let error = run(&["worker", "--model", &model, "--shard", "0/2", "--replicas", "3"]).failed(2);
    assert!(error.contains("wanted 1 to 2 replicas, found 3"), "{error}");
    let error = run(&["worker", "--model", &model, "--experts", "*:*", "--replicas", "2"]).failed(2);
    assert!(error.contains("--replicas"), "{error}");
}
