//! Row 2 where the operator allows it: the only holder of some experts dies, they are left out, and every answer says so.

use std::time::{Duration, Instant};

use moerun_loadtest::{Limits, RunFigures, check};
use moerun_proto::v1::{self, generate_request::Prompt, inference_service_client::InferenceServiceClient};
use moerun_proto::v1::{get_stats_response::Role, moe_layer_service_client::MoeLayerServiceClient};
use moerun_testkit::copy_without_experts;
use moerun_tests::{Golden, Server};
use tempfile::TempDir;
use tokio::time::sleep;

use super::{Load, assert_exact, figure, finished, gateway_args, path, stats, worker};

/// Greedy tokens of a prompt, whether the last message is marked, and how many tokens of the prompt were not computed.
async fn ask(address: &str, prompt: &[u32], max_tokens: u32) -> (Vec<u32>, bool, u32) {
    let client = InferenceServiceClient::connect(format!("http://{address}")).await;
    let request = v1::GenerateRequest {
        prompt: Some(Prompt::TokenIds(v1::TokenIds { ids: prompt.to_vec() })),
        max_tokens,
        ignore_eos: true,
        ..v1::GenerateRequest::default()
    };
    let mut stream = client
        .expect("the gateway listens")
        .generate(request)
        .await
        .expect("an answer")
        .into_inner();
    let (mut ids, mut last) = (Vec::new(), v1::GenerateResponse::default());
    while let Some(response) = stream.message().await.expect("no failure") {
        ids.extend(&response.token_ids);
        last = response;
    }
    let usage = last.usage.expect("the last message has the usage");
    (ids, last.degraded, usage.cached_tokens)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn experts_are_left_out_where_that_is_allowed_and_every_answer_says_so() {
    let golden = Golden::read("qwen3_moe");
    let folder = TempDir::new().expect("a temporary folder");
    let stripped = folder.path().join("stripped");
    copy_without_experts(&golden.dir, &stripped).expect("a copy");
    let mut workers = [
        worker(&golden.dir, &["--shard", "0/2"]),
        worker(&golden.dir, &["--shard", "1/2"]),
    ];
    let lost = workers[1].addr.clone();
    let mut args = gateway_args(&stripped, &[&workers[0].addr, &lost]);
    args.extend(["--on-expert-loss", "skip"].map(str::to_owned));
    let gateway = Server::start(&args);
    let load = Load::start(&gateway.addr, &golden, 50, 3);
    sleep(Duration::from_secs(1)).await;
    workers[1].kill();
    let history = load.history().await;

    assert_exact(&history);
    assert!(history.requests.iter().all(finished), "nothing fails");
    let figures = RunFigures::of(&history);
    assert!(
        figures.degraded > 0 && figures.degraded < figures.requests,
        "{figures:?}"
    );
    // The marks are not there for nothing: without them the checker finds other tokens.
    let mut unmarked = history.clone();
    unmarked
        .requests
        .iter_mut()
        .for_each(|request| request.degraded_from = None);
    let without_marks = check(&unmarked, &Limits::default()).swap_remove(0);
    assert!(!without_marks.holds(), "no token hung on the lost experts");
    let Some(Role::Gateway(counted)) = stats(&gateway.addr).await.role else {
        panic!("not the figures of a gateway")
    };
    assert_eq!(counted.answers_degraded, figures.degraded as u64);
    assert!(counted.assignments_left_out >= counted.answers_degraded);
    gateway.wait_for_log("an expert was left out: the answer is marked as degraded");

    // Longer than a page, and never asked before.
    let prompt: Vec<u32> = (1..41).map(|token| token * 7 % 90).collect();
    let (_, degraded, _) = ask(&gateway.addr, &prompt, 8).await;
    assert!(degraded);
    let layers = MoeLayerServiceClient::connect(format!("http://{}", gateway.addr)).await;
    let rows = v1::RunLayerRequest {
        rows: 8,
        hidden_states: (0..8 * 32)
            .flat_map(|at| ((at * 37 % 101) as f32 / 50.0 - 1.0).to_le_bytes())
            .collect::<Vec<u8>>()
            .into(),
        ..v1::RunLayerRequest::default()
    };
    let answer = layers
        .expect("it listens")
        .run_layer(rows)
        .await
        .expect("rows")
        .into_inner();
    assert!(!answer.degraded_rows.is_empty(), "no row wanted a lost expert");

    let again = [
        "worker",
        "--model",
        path(&golden.dir),
        "--listen",
        &lost,
        "--shard",
        "1/2",
    ];
    let _again = Server::start(&again);
    let ready = Instant::now();
    let (whole, cached) = loop {
        let (ids, degraded, cached) = ask(&gateway.addr, &prompt, 8).await;
        if !degraded {
            break (ids, cached);
        }
        assert!(ready.elapsed() < Duration::from_secs(20), "it stays degraded");
        sleep(Duration::from_millis(20)).await;
    };
    assert_eq!(cached, 0, "pages that a degraded answer filled were kept");
    let alone = Server::start(&["serve", "--model", path(&golden.dir), "--grpc-addr", "127.0.0.1:0"]);
    assert_eq!((whole, false), {
        let (ids, marked, _) = ask(&alone.addr, &prompt, 8).await;
        (ids, marked)
    });
    figure(
        2,
        format!(
            "experts left out (--on-expert-loss skip): {} of {} answers marked, 0 failed, 0 other tokens without a mark, {} \
             requests with other tokens behind it; whole again {:.0} ms after the worker was ready",
            figures.degraded,
            figures.requests,
            without_marks.count,
            ready.elapsed().as_secs_f64() * 1e3
        ),
    );
}
