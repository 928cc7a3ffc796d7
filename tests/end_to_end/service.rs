//! The gRPC door: concurrent requests, cancellation, foreign clients, draining.

use std::time::Duration;

use moerun_proto::v1::{
    self, FinishReason, GenerateRequest, GenerateResponse, SamplingParams, generate_request::Prompt,
    inference_service_client::InferenceServiceClient,
};
use moerun_tests::{Golden, Server, golden_dir, run_client};
use tonic::{Code, transport::Channel};

type Client = InferenceServiceClient<Channel>;

fn serve(family: &str, extra: &[&str]) -> Server {
    let dir = golden_dir(family);
    let args = [
        "serve",
        "--model",
        dir.to_str().expect("a plain path"),
        "--grpc-addr",
        "127.0.0.1:0",
    ];
    Server::start(&[&args[..], extra].concat())
}

async fn connect(server: &Server) -> Client {
    Client::connect(format!("http://{}", server.addr))
        .await
        .expect("the door is open")
}

fn greedy(prompt: &[u32], max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        prompt: Some(Prompt::TokenIds(v1::TokenIds { ids: prompt.to_vec() })),
        max_tokens,
        ignore_eos: true,
        sampling: Some(SamplingParams {
            temperature: Some(0.0),
            ..SamplingParams::default()
        }),
        ..GenerateRequest::default()
    }
}

async fn collect(client: &mut Client, request: GenerateRequest) -> Vec<GenerateResponse> {
    let mut stream = client.generate(request).await.expect("accepted").into_inner();
    let mut responses = Vec::new();
    while let Some(response) = stream.message().await.expect("no error in the stream") {
        responses.push(response);
    }
    responses
}

fn ids(responses: &[GenerateResponse]) -> Vec<u32> {
    responses
        .iter()
        .flat_map(|response| response.token_ids.clone())
        .collect()
}

fn text(responses: &[GenerateResponse]) -> String {
    responses.iter().map(|response| response.text_delta.as_str()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixteen_requests_together_give_what_each_gives_alone() {
    let server = serve(
        "qwen3_moe",
        &["--workers", "2", "--combine-block", "8", "--max-batch-tokens", "24"],
    );
    let prompts = Golden::read("qwen3_moe").prompts();
    let requests: Vec<GenerateRequest> = (0..16)
        .map(|index: usize| {
            let prompt = &prompts[index % prompts.len()];
            let prompt = &prompt[..prompt.len() - index / prompts.len()];
            let mut request = greedy(prompt, 8 + index as u32);
            if index % 2 == 1 {
                let sampling = SamplingParams {
                    temperature: Some(1.1),
                    top_p: Some(0.9),
                    seed: Some(index as u64),
                    ..SamplingParams::default()
                };
                request.sampling = Some(sampling);
            }
            request
        })
        .collect();
    let mut alone = Vec::new();
    let mut client = connect(&server).await;
    for request in &requests {
        let responses = collect(&mut client, request.clone()).await;
        alone.push((ids(&responses), text(&responses)));
    }
    let mut together = Vec::new();
    for request in &requests {
        let (mut client, request) = (client.clone(), request.clone());
        together.push(tokio::spawn(async move {
            let responses = collect(&mut client, request).await;
            (ids(&responses), text(&responses))
        }));
    }
    for (index, (task, alone)) in together.into_iter().zip(alone).enumerate() {
        assert_eq!(task.await.expect("no panic"), alone, "request {index}");
        assert_eq!(alone.0.len(), 8 + index, "request {index}");
    }
}

#[tokio::test]
async fn a_client_that_goes_away_makes_room_for_the_next() {
    // One sequence of 250 tokens fills the cache, so the second can only start when the first is gone.
    let server = serve("mixtral", &["--kv-memory", "64KiB", "--max-context", "256"]);
    let mut client = connect(&server).await;
    let mut first = client
        .generate(greedy(&[1, 45, 82], 250))
        .await
        .expect("accepted")
        .into_inner();
    first.message().await.expect("no error").expect("a token");
    drop(first);
    let second = tokio::time::timeout(Duration::from_secs(30), collect(&mut client, greedy(&[1, 45], 4))).await;
    assert_eq!(ids(&second.expect("the second is served")).len(), 4);
}

#[tokio::test]
async fn the_last_message_tells_why_and_what_it_cost() {
    let server = serve("olmoe", &[]);
    let golden = Golden::read("olmoe");
    let mut client = connect(&server).await;
    let mut request = greedy(&golden.prompts()[0], 6);
    request.logprobs = Some(2);
    let responses = collect(&mut client, request).await;
    let last = responses.last().expect("at least one message");
    assert_eq!(last.finish_reason(), FinishReason::Length);
    let usage = last.usage.expect("usage");
    assert_eq!(
        (usage.prompt_tokens as usize, usage.completion_tokens),
        (golden.prompts()[0].len(), 6)
    );
    assert_eq!(responses[0].combine_mode, "exact");
    for response in responses.iter().filter(|response| !response.token_ids.is_empty()) {
        assert_eq!(response.logprobs.len(), response.token_ids.len());
        assert_eq!(response.top_logprobs.len(), 2);
        assert!(response.top_logprobs[0].logprob >= response.top_logprobs[1].logprob);
        assert_eq!(
            response.logprobs[0].token_id, response.top_logprobs[0].token_id,
            "greedy takes the likeliest"
        );
    }
}

#[tokio::test]
async fn wrong_requests_get_their_code_and_the_server_lives_on() {
    let server = serve("granitemoe", &["--max-context", "64"]);
    let mut client = connect(&server).await;
    let sampling = |sampling| GenerateRequest {
        sampling: Some(sampling),
        ..greedy(&[1, 2], 4)
    };
    for (request, code, word) in [
        (
            GenerateRequest {
                model: "other".to_owned(),
                ..greedy(&[1], 1)
            },
            Code::NotFound,
            "other",
        ),
        (
            GenerateRequest {
                prompt: None,
                ..greedy(&[], 1)
            },
            Code::InvalidArgument,
            "prompt",
        ),
        (greedy(&[], 1), Code::InvalidArgument, "at least one token"),
        (greedy(&[320], 1), Code::InvalidArgument, "320"),
        (greedy(&[1; 64], 1), Code::InvalidArgument, "64"),
        (
            sampling(SamplingParams {
                temperature: Some(f32::NAN),
                ..SamplingParams::default()
            }),
            Code::InvalidArgument,
            "temperature",
        ),
        (
            sampling(SamplingParams {
                top_p: Some(0.0),
                ..SamplingParams::default()
            }),
            Code::InvalidArgument,
            "top_p",
        ),
        (
            GenerateRequest {
                stop: vec![String::new()],
                ..greedy(&[1], 1)
            },
            Code::InvalidArgument,
            "stop",
        ),
    ] {
        let status = match client.generate(request.clone()).await {
            Err(status) => status,
            Ok(stream) => stream.into_inner().message().await.expect_err("an error in the stream"),
        };
        assert_eq!(status.code(), code, "{status:?}");
        assert!(status.message().contains(word), "should say {word}: {status:?}");
    }
    assert_eq!(ids(&collect(&mut client, greedy(&[1, 2], 3)).await).len(), 3);
}

#[tokio::test]
async fn tokenize_and_detokenize_are_inverse_and_models_are_listed() {
    let server = serve("deepseek_v2", &["--served-name", "ds"]);
    let mut client = connect(&server).await;
    let sentence = "And there was light — größer, 光.";
    let request = v1::TokenizeRequest {
        input: Some(v1::tokenize_request::Input::Text(sentence.to_owned())),
        ..v1::TokenizeRequest::default()
    };
    let tokens = client.tokenize(request).await.expect("tokenised").into_inner();
    assert_eq!(tokens.tokens.len(), tokens.token_ids.len());
    let request = v1::DetokenizeRequest {
        token_ids: tokens.token_ids,
        ..v1::DetokenizeRequest::default()
    };
    assert_eq!(
        client.detokenize(request).await.expect("joined").into_inner().text,
        sentence
    );
    let models = client
        .list_models(v1::ListModelsRequest {})
        .await
        .expect("listed")
        .into_inner()
        .models;
    assert_eq!(
        (models[0].name.as_str(), models[0].family.as_str()),
        ("ds", "deepseek_v2")
    );
    assert_eq!(models[0].moe_layers, [1, 2], "layer 0 is dense");
}

#[tokio::test]
async fn forward_streams_the_golden_logits_of_the_positions_asked() {
    let golden = Golden::read("gpt_oss");
    let server = serve("gpt_oss", &["--workers", "2"]);
    let mut client = connect(&server).await;
    let (shape, logits) = &golden.tensors["logits"];
    let prompt = &golden.prompts()[0];
    let last = prompt.len() as u32 - 1;
    for (positions, wanted) in [(vec![], vec![last]), (vec![0, 3, last], vec![0, 3, last])] {
        let request = v1::ForwardRequest {
            token_ids: prompt.clone(),
            positions,
            ..v1::ForwardRequest::default()
        };
        let mut stream = client.forward(request).await.expect("accepted").into_inner();
        let mut seen = Vec::new();
        while let Some(row) = stream.message().await.expect("no error") {
            let values: Vec<f32> = row
                .logits
                .as_chunks::<4>()
                .0
                .iter()
                .map(|&b| f32::from_le_bytes(b))
                .collect();
            let first = row.position as usize * shape[2];
            moerun_tests::assert_close("logits", &values, &logits[first..first + shape[2]], &[true], 1e-4);
            seen.push(row.position);
        }
        assert_eq!(seen, wanted);
    }
}

#[test]
fn a_foreign_client_generates_and_runs_layers_through_reflection() {
    for (family, extra) in [
        ("qwen2_moe", &["--workers", "2"][..]),
        ("llama4_text", &[]),
        ("deepseek_v3", &[]),
    ] {
        let server = serve(family, extra);
        let report = run_client(
            "foreign_client.py",
            &[&server.addr, golden_dir(family).to_str().expect("a path")],
        );
        assert!(report.contains("ran 2 MoE layers"), "{report}");
    }
}

#[test]
fn sigterm_ends_an_idle_server_well() {
    let mut server = serve("olmoe", &["--workers", "2"]);
    server.terminate();
    assert_eq!(server.wait(Duration::from_secs(20)), Some(0));
}

/// A client that does not read keeps its request unfinished, however fast the model is.
#[tokio::test]
async fn a_second_sigterm_ends_a_server_that_drains_with_143() {
    let model = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-bible-moe");
    let model = model.to_str().expect("a plain path");
    let mut server = Server::start(&[
        "serve",
        "--model",
        model,
        "--workers",
        "2",
        "--grpc-addr",
        "127.0.0.1:0",
    ]);
    let mut client = connect(&server).await;
    let mut request = greedy(&[1, 45, 82], 1000);
    request.logprobs = Some(20);
    let mut stream = client.generate(request).await.expect("accepted").into_inner();
    stream.message().await.expect("no error").expect("a token");
    server.terminate();
    server.wait_for_log("draining");
    // The log line comes just before the door closes: a request may still slip in.
    let refused = loop {
        if let Err(status) = client.generate(greedy(&[1], 1)).await {
            break status;
        }
    };
    assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
    server.terminate();
    assert_eq!(server.wait(Duration::from_secs(20)), Some(143));
}

/// It would wait for its worker for minutes.
#[test]
fn a_signal_ends_a_gateway_that_is_not_ready_yet() {
    let dir = golden_dir("olmoe");
    let nobody = format!("127.0.0.1:{}", moerun_tests::free_port());
    let args = ["gateway", "--grpc-addr", "127.0.0.1:0", "--worker", &nobody, "--model"];
    let mut gateway = Server::spawn(&[&args[..], &[dir.to_str().expect("a plain path")]].concat());
    gateway.wait_for_log("waiting");
    gateway.terminate();
    assert_eq!(gateway.wait(Duration::from_secs(20)), Some(143));
}

#[tokio::test]
async fn requests_in_flight_end_well_while_the_server_drains() {
    let mut server = serve("olmoe", &["--workers", "2"]);
    let mut client = connect(&server).await;
    let mut stream = client
        .generate(greedy(&[1, 45, 82], 200))
        .await
        .expect("accepted")
        .into_inner();
    let first = stream.message().await.expect("no error").expect("a token");
    server.terminate();
    let mut tokens = first.token_ids.len();
    while let Some(response) = stream.message().await.expect("a drained request ends well") {
        tokens += response.token_ids.len();
    }
    assert_eq!(tokens, 200);
    assert_eq!(server.wait(Duration::from_secs(20)), Some(0));
}
