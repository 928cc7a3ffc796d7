//! Workers that are killed or stopped in the middle of a generation: the text is that of an undisturbed run.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use moerun_proto::v1::{
    self, GenerateRequest, SamplingParams, generate_request::Prompt, inference_service_client::InferenceServiceClient,
};
use moerun_testkit::copy_without_experts;
use moerun_tests::Server;
use tempfile::TempDir;
use tokio::sync::mpsc;

/// Tokens of one answer: many more than are there when a worker dies.
const TOKENS: u32 = 200;
const PATIENCE: Duration = Duration::from_secs(120);

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-bible-moe")
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

fn worker(experts: &str) -> Server {
    let model = model();
    Server::start(&[
        "worker",
        "--model",
        text(&model),
        "--listen",
        "127.0.0.1:0",
        "--experts",
        experts,
    ])
}

/// Three workers that hold every expert twice.
fn three_workers() -> Vec<Server> {
    ["*:0-5", "*:2-7", "*:0-1,*:6-7"].map(worker).into()
}

fn gateway(model: &Path, workers: &[Server]) -> Server {
    let mut args = vec!["gateway", "--model", text(model), "--grpc-addr", "127.0.0.1:0"];
    args.extend(["--log-level", "info,moerun_dispatch=debug"]);
    for worker in workers {
        args.extend(["--worker", &worker.addr]);
    }
    Server::start(&args)
}

/// Greedy tokens of one prompt; tells `progress` of each.
async fn generate(addr: String, prompt: u32, progress: Option<mpsc::Sender<usize>>) -> Vec<u32> {
    let mut client = InferenceServiceClient::connect(format!("http://{addr}"))
        .await
        .expect("the gateway listens");
    let request = GenerateRequest {
        prompt: Some(Prompt::TokenIds(v1::TokenIds {
            ids: vec![prompt, 17, 3 * prompt],
        })),
        max_tokens: TOKENS,
        ignore_eos: true,
        sampling: Some(SamplingParams {
            temperature: Some(0.0),
            ..SamplingParams::default()
        }),
        ..GenerateRequest::default()
    };
    let mut stream = client.generate(request).await.expect("an answer").into_inner();
    let mut ids = Vec::new();
    while let Some(response) = stream.message().await.expect("no failure") {
        ids.extend(response.token_ids);
        if let Some(progress) = &progress {
            let _ = progress.try_send(ids.len());
        }
    }
    ids
}

/// Several answers at once; `disturb` is done when the first of them has begun. Returns the tokens of each.
async fn generate_all(addr: &str, disturb: impl FnOnce()) -> Vec<Vec<u32>> {
    let (progress, mut heard) = mpsc::channel(TOKENS as usize);
    let mut under_way = Vec::new();
    for prompt in [11, 23, 42] {
        under_way.push(tokio::spawn(generate(addr.to_owned(), prompt, Some(progress.clone()))));
    }
    drop(progress);
    let begun = tokio::time::timeout(PATIENCE, heard.recv())
        .await
        .expect("tokens in time");
    assert!(
        begun.expect("a token") < TOKENS as usize / 2,
        "the answer is far from its end"
    );
    disturb();
    let mut all = Vec::new();
    for answer in under_way {
        let answer = tokio::time::timeout(PATIENCE, answer).await.expect("an answer in time");
        all.push(answer.expect("no panic"));
    }
    all
}

fn signal(server: &Server, signal: &str) {
    let status = Command::new("kill").args([signal, &server.pid().to_string()]).status();
    assert!(status.expect("kill runs").success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_is_killed_or_stopped_while_it_is_asked_changes_no_token() {
    let folder = TempDir::new().expect("a temporary folder");
    // Without experts of its own the gateway cannot stand in.
    let stripped = folder.path().join("stripped");
    copy_without_experts(&model(), &stripped).expect("a copy");
    let mut workers = three_workers();
    let gateway = gateway(&stripped, &workers);
    let undisturbed = generate_all(&gateway.addr, || ()).await;
    assert!(undisturbed.iter().all(|ids| ids.len() == TOKENS as usize));

    let found = generate_all(&gateway.addr, || signal(&workers[1], "-STOP")).await;
    assert_eq!(found, undisturbed, "stopped");
    gateway.wait_for_log("worker is suspect");
    gateway.wait_for_log("worker is gone");
    signal(&workers[1], "-CONT");
    // The lines of the start lie before the one that was waited for.
    gateway.wait_for_log("worker is connected");

    let found = generate_all(&gateway.addr, || workers[0].kill()).await;
    assert_eq!(found, undisturbed, "killed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_with_the_experts_on_its_disk_outlives_their_only_holder() {
    let model = model();
    let mut only = vec![worker("*:*")];
    let gateway = gateway(&model, &only);
    let undisturbed = generate_all(&gateway.addr, || ()).await;
    let found = generate_all(&gateway.addr, || only[0].kill()).await;
    assert_eq!(found, undisturbed);
    gateway.wait_for_log("computed here for want of a holder");
}
