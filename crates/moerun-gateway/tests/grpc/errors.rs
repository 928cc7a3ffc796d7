//! Bad requests get the right code and details, and nothing else.

use moerun_proto::v1::{self, generate_request::Prompt};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::harness::{Golden, MAX_CONTEXT, MAX_MESSAGE_BYTES, Served, greedy, start, token_prompt};

/// Code, `ErrorInfo.reason`, and the field of the first violation.
fn refusal(status: &Status) -> (Code, String, Option<String>) {
    let details = status.get_error_details();
    let info = details
        .error_info()
        .unwrap_or_else(|| panic!("no ErrorInfo in {status:?}"));
    assert_eq!(info.domain, "moerun");
    let field = details.bad_request().map(|bad| bad.field_violations[0].field.clone());
    (status.code(), info.reason.clone(), field)
}

fn bad_field(field: &str) -> (Code, String, Option<String>) {
    (
        Code::InvalidArgument,
        "INVALID_FIELD".to_owned(),
        Some(field.to_owned()),
    )
}

async fn served() -> Served {
    start(&Golden::open("qwen3_moe").dir).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unknown_model_is_not_found_everywhere() {
    let served = served().await;
    let model = || "other".to_owned();
    let generate = v1::GenerateRequest {
        model: model(),
        ..greedy(&[1], 1)
    };
    let layer = v1::RunLayerRequest {
        model: model(),
        ..Default::default()
    };
    let statuses = [
        served.generate(generate).await.err().unwrap(),
        served
            .inference()
            .tokenize(v1::TokenizeRequest {
                model: model(),
                ..Default::default()
            })
            .await
            .unwrap_err(),
        served
            .inference()
            .detokenize(v1::DetokenizeRequest {
                model: model(),
                ..Default::default()
            })
            .await
            .unwrap_err(),
        served
            .inference()
            .forward(v1::ForwardRequest {
                model: model(),
                ..Default::default()
            })
            .await
            .unwrap_err(),
        served.moe_layer().run_layer(layer).await.unwrap_err(),
    ];
    for status in statuses {
        assert_eq!(refusal(&status), (Code::NotFound, "MODEL_NOT_FOUND".to_owned(), None));
        let resource = status.get_error_details().resource_info().unwrap().clone();
        assert_eq!(resource.resource_name, "other");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_fields_of_generate_are_named() {
    let served = served().await;
    let sampling = |change: fn(&mut v1::SamplingParams)| {
        let mut sampling = v1::SamplingParams::default();
        change(&mut sampling);
        v1::GenerateRequest {
            sampling: Some(sampling),
            ..greedy(&[1], 1)
        }
    };
    let prompt = |prompt| v1::GenerateRequest {
        prompt,
        ..greedy(&[], 1)
    };
    let cases = [
        ("prompt", prompt(None)),
        ("text", prompt(Some(Prompt::Text(String::new())))),
        ("text", prompt(Some(Prompt::Text("x".repeat((1 << 20) + 1))))), // refused before it is tokenised
        ("token_ids", prompt(Some(token_prompt(&[])))),
        ("token_ids", prompt(Some(token_prompt(&[1, 320])))),
        ("chat.messages", prompt(Some(Prompt::Chat(v1::Chat::default())))),
        ("sampling.temperature", sampling(|s| s.temperature = Some(-1.0))),
        ("sampling.temperature", sampling(|s| s.temperature = Some(f32::NAN))),
        ("sampling.top_p", sampling(|s| s.top_p = Some(0.0))),
        ("sampling.min_p", sampling(|s| s.min_p = Some(2.0))),
        (
            "sampling.repetition_penalty",
            sampling(|s| s.repetition_penalty = Some(-2.0)),
        ),
        (
            "stop",
            v1::GenerateRequest {
                stop: vec![String::new()],
                ..greedy(&[1], 1)
            },
        ),
        (
            "stop",
            v1::GenerateRequest {
                stop: vec!["x".to_owned(); 17],
                ..greedy(&[1], 1)
            },
        ),
        (
            "stop_token_ids",
            v1::GenerateRequest {
                stop_token_ids: vec![400],
                ..greedy(&[1], 1)
            },
        ),
        (
            "logprobs",
            v1::GenerateRequest {
                logprobs: Some(21),
                ..greedy(&[1], 1)
            },
        ),
    ];
    for (field, request) in cases {
        let status = served.generate(request).await.err().unwrap();
        assert_eq!(refusal(&status), bad_field(field), "{status:?}");
    }
    served.idle().await;
    assert_eq!(served.experts.submitted(), 0, "no refused request reached the experts");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prompt_that_does_not_fit_is_refused_and_never_cut() {
    let served = served().await;
    let status = served.generate(greedy(&vec![5; MAX_CONTEXT], 1)).await.err().unwrap();
    assert_eq!(
        refusal(&status),
        (
            Code::InvalidArgument,
            "PROMPT_TOO_LONG".to_owned(),
            Some("prompt".to_owned())
        )
    );
    let metadata = status.get_error_details().error_info().unwrap().metadata.clone();
    assert_eq!(
        (metadata["prompt_tokens"].as_str(), metadata["max_context"].as_str()),
        ("200", "200")
    );

    let long = "In the beginning God created the heaven and the earth. ".repeat(40);
    let by_text = v1::GenerateRequest {
        prompt: Some(Prompt::Text(long)),
        ..greedy(&[], 1)
    };
    let status = served.generate(by_text).await.err().unwrap();
    assert_eq!(refusal(&status).1, "PROMPT_TOO_LONG");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_beyond_the_limit_is_refused_by_the_transport() {
    let served = served().await;
    let request = v1::GenerateRequest {
        prompt: Some(Prompt::Text("x".repeat(MAX_MESSAGE_BYTES + 1))),
        ..greedy(&[], 1)
    };
    let status = served.generate(request).await.err().unwrap();
    assert_eq!(status.code(), Code::OutOfRange, "{status:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chat_with_a_model_without_a_template_is_a_failed_precondition() {
    let served = start(&Golden::open("olmoe").dir).await;
    let messages = vec![v1::ChatMessage {
        role: "user".to_owned(),
        content: "Who?".to_owned(),
    }];
    let request = v1::GenerateRequest {
        prompt: Some(Prompt::Chat(v1::Chat { messages })),
        ..greedy(&[], 1)
    };
    let status = served.generate(request).await.err().unwrap();
    assert_eq!(
        refusal(&status),
        (Code::FailedPrecondition, "NO_CHAT_TEMPLATE".to_owned(), None)
    );
    assert!(status.get_error_details().precondition_failure().is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_fields_of_the_other_calls_are_named() {
    let served = served().await;
    let mut client = served.inference();
    let forward = |token_ids: Vec<u32>, positions: Vec<u32>| v1::ForwardRequest {
        token_ids,
        positions,
        ..Default::default()
    };
    for (field, request) in [
        ("token_ids", forward(vec![], vec![])),
        ("token_ids", forward(vec![1, 9999], vec![])),
        ("positions", forward(vec![1, 2], vec![0, 2])),
    ] {
        assert_eq!(refusal(&client.forward(request).await.unwrap_err()), bad_field(field));
    }
    let long = forward(vec![1; MAX_CONTEXT + 1], vec![]);
    assert_eq!(refusal(&client.forward(long).await.unwrap_err()).1, "PROMPT_TOO_LONG");
    let detokenize = v1::DetokenizeRequest {
        token_ids: vec![320],
        ..Default::default()
    };
    assert_eq!(
        refusal(&client.detokenize(detokenize).await.unwrap_err()),
        bad_field("token_ids")
    );
    assert_eq!(
        refusal(&client.tokenize(v1::TokenizeRequest::default()).await.unwrap_err()),
        bad_field("input")
    );

    let hidden = served.gateway.model().config.hidden;
    let layer = |layer: u32, rows: u32, bytes: Vec<u8>| v1::RunLayerRequest {
        model: String::new(),
        layer,
        rows,
        hidden_states: bytes.into(),
    };
    let nan = [f32::NAN.to_le_bytes().to_vec(), vec![0; hidden * 4 - 4]].concat();
    for (field, request) in [
        ("layer", layer(2, 1, vec![0; hidden * 4])),
        ("layer", layer(u32::MAX, 1, vec![0; hidden * 4])),
        ("hidden_states", layer(0, 1, vec![0; hidden * 4 - 1])),
        ("hidden_states", layer(0, 2, vec![0; hidden * 4])),
        ("hidden_states", layer(0, 0, vec![])),
        ("hidden_states", layer(0, u32::MAX, vec![0; 8])),
        ("hidden_states", layer(0, 1, nan)),
    ] {
        let status = served.moe_layer().run_layer(request).await.unwrap_err();
        assert_eq!(refusal(&status), bad_field(field), "{status:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_refuses_and_says_when_to_come_back() {
    let golden = Golden::open("qwen3_moe");
    // Room for one running sequence, and one place to wait.
    let served = crate::harness::start_with(&golden.dir, |config| {
        config.max_batch_tokens = 1;
        config.max_queue = 1;
    })
    .await;
    served.experts.close();
    let mut held = Vec::new();
    let refused = loop {
        assert!(held.len() < 8, "a queue of one must refuse the third request or so");
        match served.inference().generate(greedy(&[1, 45], 4)).await {
            Ok(response) => held.push(response.into_inner()),
            Err(status) => break status,
        }
    };
    assert_eq!(
        refusal(&refused),
        (Code::ResourceExhausted, "QUEUE_FULL".to_owned(), None)
    );
    assert!(refused.get_error_details().retry_info().unwrap().retry_delay.is_some());
    served.experts.open();
    for mut stream in held {
        let mut tokens = 0;
        while let Some(message) = stream.message().await.unwrap() {
            tokens += message.token_ids.len();
        }
        assert_eq!(tokens, 4, "the accepted requests are answered in full");
    }
}
