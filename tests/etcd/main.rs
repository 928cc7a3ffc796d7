//! Clusters that find each other in etcd: real gateways, workers and etcd server.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use moerun_proto::v1::{
    self, GenerateRequest, SamplingParams, generate_request::Prompt, inference_service_client::InferenceServiceClient,
};
use moerun_tests::{EtcdServer, Golden, Server, free_port, metric};
use tempfile::TempDir;
use tokio::time::sleep;

const BOUND: Duration = Duration::from_secs(30);

fn path(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

async fn generate(addr: &str, prompt: &[u32], max_tokens: usize) -> Result<Vec<u32>, tonic::Status> {
    let mut client = InferenceServiceClient::connect(format!("http://{addr}"))
        .await
        .expect("it listens");
    let request = GenerateRequest {
        prompt: Some(Prompt::TokenIds(v1::TokenIds { ids: prompt.to_vec() })),
        max_tokens: max_tokens as u32,
        ignore_eos: true,
        sampling: Some(SamplingParams {
            temperature: Some(0.0),
            ..SamplingParams::default()
        }),
        ..GenerateRequest::default()
    };
    let mut stream = client.generate(request).await?.into_inner();
    let mut ids = Vec::new();
    while let Some(response) = stream.message().await? {
        ids.extend(response.token_ids);
    }
    Ok(ids)
}

/// Asks one after another for so long; how many were answered, each with the golden tokens.
async fn answered(gateway: &Server, golden: &Golden, time: Duration) -> usize {
    let (prompts, greedy) = (golden.prompts(), golden.greedy());
    let (begun, mut count) = (Instant::now(), 0);
    while begun.elapsed() < time {
        let case = count % prompts.len();
        let found = generate(&gateway.addr, &prompts[case], greedy[case].len()).await;
        assert_eq!(found.expect("answered"), greedy[case], "request {count}");
        count += 1;
    }
    count
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + BOUND;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        sleep(Duration::from_millis(20)).await;
    }
}

/// A gateway that finds its workers in etcd, and its door for metrics; not ready yet.
fn gateway(model: &Path, etcd: &EtcdServer) -> (Server, String) {
    let metrics = format!("127.0.0.1:{}", free_port());
    let args = [
        "gateway",
        "--model",
        path(model),
        "--grpc-addr",
        "127.0.0.1:0",
        "--on-expert-loss",
        "fail",
    ];
    let found = [
        "--discover",
        &format!("etcd:{}", etcd.address),
        "--metrics-addr",
        &metrics,
    ];
    (Server::spawn(&[&args[..], &found].concat()), metrics)
}

fn worker(model: &Path, etcd: &EtcdServer, shard: &str) -> Server {
    let register = format!("etcd:{}", etcd.address);
    let args = [
        "worker",
        "--model",
        path(model),
        "--listen",
        "127.0.0.1:0",
        "--shard",
        shard,
    ];
    Server::start(&[&args[..], &["--register", &register]].concat())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_31_requests_go_on_while_etcd_is_down_and_changes_are_followed_when_it_is_back() {
    let folder = TempDir::new().expect("a temporary folder");
    let Some(mut etcd) = EtcdServer::start(folder.path()) else {
        return;
    };
    let golden = Golden::read("qwen3_moe");
    let (mut gateway, metrics) = gateway(&golden.dir, &etcd);
    gateway.wait_for_log("waiting until all experts are held");
    let mut workers = [worker(&golden.dir, &etcd, "0/2"), worker(&golden.dir, &etcd, "1/2")];
    gateway.wait_until_ready();
    assert!(answered(&gateway, &golden, Duration::from_millis(500)).await > 0);
    let errors = || metric(&metrics, "moerun_discovery_errors_total");
    let before = errors();

    etcd.kill();
    // Longer than every lease.
    let count = answered(&gateway, &golden, Duration::from_secs(8)).await;
    let met = errors() - before;
    assert!(count > 0 && met >= 1.0, "etcd was not down: {met}");
    assert_eq!(metric(&metrics, "moerun_discovery_up"), 0.0);
    assert_eq!(metric(&metrics, "moerun_discovery_workers"), 2.0);

    etcd.restart();
    let restarted = Instant::now();
    until("etcd answers again", || metric(&metrics, "moerun_discovery_up") == 1.0).await;
    let recovered = restarted.elapsed();
    // Beyond the time in which nobody is struck off.
    let after = answered(&gateway, &golden, Duration::from_secs(6)).await;
    assert_eq!(metric(&metrics, "moerun_discovery_workers"), 2.0);
    // A worker joins, another leaves.
    let _third = worker(&golden.dir, &etcd, "0/2");
    until("the third worker is connected", || {
        metric(&metrics, "moerun_worker_up") == 3.0
    })
    .await;
    workers[0].terminate();
    assert_eq!(workers[0].wait(Duration::from_secs(20)), Some(0));
    until("the first worker has left", || {
        metric(&metrics, "moerun_workers") == 2.0
    })
    .await;
    assert!(answered(&gateway, &golden, Duration::from_millis(500)).await > 0);
    eprintln!(
        "row 31: etcd down for 8 s ({met} errors): 0 of {count} requests failed; it answered again {:.0} ms after its \
         restart, then 0 of {after} failed, and a join and a leave were followed",
        recovered.as_secs_f64() * 1e3
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateways_share_workers_and_one_of_them_leads() {
    let folder = TempDir::new().expect("a temporary folder");
    let Some(etcd) = EtcdServer::start(folder.path()) else {
        return;
    };
    let golden = Golden::read("qwen3_moe");
    let _workers = [worker(&golden.dir, &etcd, "0/2"), worker(&golden.dir, &etcd, "1/2")];
    let mut gateways = [gateway(&golden.dir, &etcd), gateway(&golden.dir, &etcd)];
    for (gateway, _) in &mut gateways {
        gateway.wait_until_ready();
        assert!(answered(gateway, &golden, Duration::from_millis(300)).await > 0);
    }
    let doors = gateways.each_ref().map(|(_, door)| door.clone());
    let leads = |door: &String| metric(door, "moerun_leads") == 1.0;
    until("one leads", || doors.iter().filter(|door| leads(door)).count() == 1).await;
    let leader = doors.iter().position(leads).expect("one leads");
    gateways[leader].0.kill();
    let killed = Instant::now();
    let other = 1 - leader;
    until("the other one leads", || leads(&doors[other])).await;
    eprintln!(
        "row 31: a killed leader's successor led after {:.0} ms",
        killed.elapsed().as_secs_f64() * 1e3
    );
    assert!(answered(&gateways[other].0, &golden, Duration::from_millis(300)).await > 0);
}
