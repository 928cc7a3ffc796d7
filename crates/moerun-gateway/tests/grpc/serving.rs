//! Health, reflection, cancellation, and how the server ends.

use std::time::Duration;

use moerun_proto::v1::{self, admin_service_client::AdminServiceClient, get_stats_response::Role};
use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_types::StatusExt;

use crate::harness::{Golden, Served, greedy, start, start_with};

const SERVICES: [&str; 3] = ["", "moerun.v1.InferenceService", "moerun.v1.MoeLayerService"];

async fn health(served: &Served, service: &str) -> ServingStatus {
    let request = HealthCheckRequest {
        service: service.to_owned(),
    };
    HealthClient::new(served.channel.clone())
        .check(request)
        .await
        .unwrap()
        .into_inner()
        .status()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_is_told_for_each_service() {
    let served = start(&Golden::open("qwen3_moe").dir).await;
    for service in SERVICES {
        assert_eq!(health(&served, service).await, ServingStatus::Serving, "{service:?}");
    }
    let unknown = HealthCheckRequest {
        service: "moerun.v1.Other".to_owned(),
    };
    let status = HealthClient::new(served.channel.clone())
        .check(unknown)
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
}

/// Names of all services, by one of the two versions of the protocol, whose messages are alike.
macro_rules! reflected_services {
    ($version:ident, $channel:expr) => {{
        use tonic_reflection::pb::$version::{
            ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
            server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
        };
        let ask = |question| ServerReflectionRequest {
            host: String::new(),
            message_request: Some(question),
        };
        let questions = futures::stream::iter([
            ask(MessageRequest::ListServices(String::new())),
            ask(MessageRequest::FileContainingSymbol(
                "moerun.v1.InferenceService".to_owned(),
            )),
        ]);
        let mut client = ServerReflectionClient::new($channel);
        let mut answers = client.server_reflection_info(questions).await.unwrap().into_inner();
        let services = match answers.message().await.unwrap().unwrap().message_response {
            Some(MessageResponse::ListServicesResponse(list)) => list.service.into_iter().map(|s| s.name).collect(),
            other => panic!("{other:?}"),
        };
        match answers.message().await.unwrap().unwrap().message_response {
            Some(MessageResponse::FileDescriptorResponse(files)) => assert!(!files.file_descriptor_proto.is_empty()),
            other => panic!("{other:?}"),
        }
        let services: Vec<String> = services;
        services
    }};
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reflection_of_both_versions_knows_all_services() {
    let served = start(&Golden::open("qwen3_moe").dir).await;
    let versions = [
        ("v1", reflected_services!(v1, served.channel.clone())),
        ("v1alpha", reflected_services!(v1alpha, served.channel.clone())),
    ];
    for (version, services) in versions {
        assert!(
            !services.iter().any(|service| service == "moerun.v1.ExpertService"),
            "{version}: a gateway holds no experts for others, but lists {services:?}"
        );
        for wanted in [
            "moerun.v1.InferenceService",
            "moerun.v1.MoeLayerService",
            "grpc.health.v1.Health",
        ] {
            assert!(
                services.iter().any(|service| service == wanted),
                "{version}: {wanted} not in {services:?}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_goes_away_frees_the_engine() {
    let golden = Golden::open("qwen3_moe");
    let served = start_with(&golden.dir, |config| config.max_context = 250).await;
    let layers_per_step = 2;
    served.experts.allow(3 * layers_per_step);
    let mut stream = served
        .inference()
        .generate(greedy(&[1, 45], 240))
        .await
        .unwrap()
        .into_inner();
    stream.message().await.unwrap().unwrap();
    drop(stream);
    // One step at a time, so that the answer cannot end before the server has heard that nobody wants it.
    let mut steps = 3;
    while served.gateway.stats().running > 0 {
        steps += 1;
        assert!(steps < 200, "the engine goes on with an answer that nobody reads");
        served.experts.allow(steps * layers_per_step);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    served.idle().await;
}

/// What the admin service tells.
async fn stats(served: &Served) -> (v1::ProcessStats, v1::GatewayStats) {
    let mut client = AdminServiceClient::new(served.channel.clone());
    let response = client.get_stats(v1::GetStatsRequest {}).await.unwrap().into_inner();
    match (response.process, response.role) {
        (Some(process), Some(Role::Gateway(gateway))) => (process, gateway),
        other => panic!("not the figures of a gateway: {other:?}"),
    }
}

/// What it tells once `wanted` is so.
async fn stats_when(served: &Served, wanted: impl Fn(&v1::GatewayStats) -> bool) -> v1::GatewayStats {
    for _ in 0..2_000 {
        let (_, gateway) = stats(served).await;
        if wanted(&gateway) {
            return gateway;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("not so within 10 s: {:?}", stats(served).await.1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_admin_service_counts_what_runs_and_how_answers_ended() {
    let golden = Golden::open("qwen3_moe");
    let served = start(&golden.dir).await;
    let (process, idle) = stats(&served).await;
    assert_eq!(process.pid, std::process::id());
    assert!(
        process.resident_bytes > 0 && process.open_files > 0 && process.async_tasks > 0,
        "{process:?}"
    );
    assert_eq!(
        (idle.running_requests, idle.kv_pages_used, idle.answers_begun),
        (0, 0, 0)
    );
    assert!(idle.kv_pages_total > 0 && idle.workers.is_empty() && !idle.draining);

    served.generate(greedy(&[1, 45], 4)).await.unwrap();
    served.experts.close();
    let asked_before = served.experts.submitted();
    let mut stream = served
        .inference()
        .generate(greedy(&[1, 45], 4))
        .await
        .unwrap()
        .into_inner();
    // One step, of two layers: the next waits at the gate, so the answer cannot end before its client goes.
    served.experts.allow(asked_before + 2);
    stream.message().await.unwrap();
    let running = stats_when(&served, |it| it.running_requests == 1).await;
    assert!(running.kv_pages_used > 0, "{running:?}");
    assert_eq!(
        (running.answers_begun, running.answers_finished, running.answers_failed),
        (2, 1, 0)
    );
    drop(stream);
    stats_when(&served, |it| it.answers_cancelled > 0).await;
    served.experts.open();
    served.idle().await;
    let after = stats(&served).await.1;
    assert_eq!(
        (after.answers_begun, after.answers_finished, after.answers_cancelled),
        (2, 1, 1)
    );
    assert_eq!(
        (after.running_requests, after.waiting_requests, after.kv_pages_used),
        (0, 0, 0)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn draining_refuses_new_requests_and_ends_running_ones() {
    let golden = Golden::open("qwen3_moe");
    let mut served = start(&golden.dir).await;
    served.experts.close();
    let prompt = golden.prompts()[0].clone();
    let mut running = served
        .inference()
        .generate(greedy(&prompt, 24))
        .await
        .unwrap()
        .into_inner();
    served.shutdown.cancel();
    while health(&served, "").await == ServingStatus::Serving {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    for service in SERVICES {
        // Set one after another; the first was seen.
        while health(&served, service).await != ServingStatus::NotServing {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
    let mut refused = served.generate(greedy(&[1], 1)).await;
    while refused.is_ok() {
        refused = served.generate(greedy(&[1], 1)).await;
    }
    let status = refused.err().unwrap();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert_eq!(status.get_error_details().error_info().unwrap().reason, "STOPPING");
    assert!(status.get_error_details().retry_info().is_some());

    served.experts.open();
    let mut ids = Vec::new();
    let mut finish = v1::FinishReason::Unspecified;
    while let Some(message) = running.message().await.unwrap() {
        ids.extend_from_slice(&message.token_ids);
        finish = message.finish_reason();
    }
    assert_eq!((ids, finish), (golden.greedy()[0].clone(), v1::FinishReason::Length));
    let ended = tokio::time::timeout(Duration::from_secs(10), &mut served.server)
        .await
        .expect("the server ends");
    ended.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_server_ends_at_once_even_with_a_watcher() {
    let mut served = start(&Golden::open("qwen3_moe").dir).await;
    let request = HealthCheckRequest { service: String::new() };
    let mut watch = HealthClient::new(served.channel.clone())
        .watch(request)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
    served.shutdown.cancel();
    assert_eq!(
        watch.message().await.unwrap().unwrap().status(),
        ServingStatus::NotServing
    );
    let ended = tokio::time::timeout(Duration::from_secs(10), &mut served.server)
        .await
        .expect("the server ends");
    ended.unwrap().unwrap();
}
