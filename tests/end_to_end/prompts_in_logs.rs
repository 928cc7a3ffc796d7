//! What people ask and are told is in no output of any process, at any level, unless the operator asks for it.

use moerun_proto::v1::{
    self, ChatMessage, DetokenizeRequest, GenerateRequest, RunLayerRequest, TokenizeRequest, generate_request::Prompt,
    inference_service_client::InferenceServiceClient, moe_layer_service_client::MoeLayerServiceClient,
    tokenize_request,
};
use moerun_tests::{Golden, Server, golden_dir};
use tonic::transport::Channel;

/// No log says this by itself.
const CANARY: &str = "xylophone-quagmire-4711";

fn serve(level: &str, extra: &[&str]) -> Server {
    let dir = golden_dir("qwen2_moe");
    let args = [
        "serve",
        "--model",
        dir.to_str().expect("a plain path"),
        "--grpc-addr",
        "127.0.0.1:0",
        "--workers",
        "2",
        "--log-level",
        level,
    ];
    Server::start(&[&args[..], extra].concat())
}

/// Requests that are answered and requests that are refused, the canary in every field that takes text.
async fn talk(server: &Server) {
    let endpoint = Channel::from_shared(format!("http://{}", server.addr)).expect("an address");
    let channel = endpoint.connect().await.expect("the door is open");
    let mut inference = InferenceServiceClient::new(channel.clone());
    let text = || CANARY.to_owned();
    let good = GenerateRequest {
        prompt: Some(Prompt::Text(text())),
        max_tokens: 4,
        stop: vec![text()],
        ..GenerateRequest::default()
    };
    let mut stream = inference.generate(good.clone()).await.expect("accepted").into_inner();
    while stream.message().await.expect("an answer").is_some() {}
    let chat = v1::Chat {
        messages: vec![ChatMessage {
            role: text(),
            content: text(),
        }],
    };
    let too_long = CANARY.repeat(2000);
    let refused = [
        GenerateRequest {
            model: text(),
            ..good.clone()
        },
        GenerateRequest {
            prompt: Some(Prompt::Text(too_long.clone())),
            ..good.clone()
        },
        GenerateRequest {
            prompt: Some(Prompt::Chat(chat)),
            max_tokens: 4,
            ..GenerateRequest::default()
        },
        GenerateRequest {
            stop: vec![text(); 1000],
            ..good.clone()
        },
        GenerateRequest {
            stop: vec![too_long],
            ..good.clone()
        },
        GenerateRequest {
            logprobs: Some(10_000),
            ..good.clone()
        },
    ];
    let mut errors = 0;
    for request in refused {
        match inference.generate(request).await {
            Err(_) => errors += 1,
            Ok(stream) => {
                let mut stream = stream.into_inner();
                while let Ok(Some(_)) = stream.message().await {}
            }
        }
    }
    assert!(errors >= 4, "{errors} of the bad requests were refused");
    let ids = inference
        .tokenize(TokenizeRequest {
            input: Some(tokenize_request::Input::Text(text())),
            ..TokenizeRequest::default()
        })
        .await
        .expect("tokens")
        .into_inner()
        .token_ids;
    let back = inference
        .detokenize(DetokenizeRequest {
            token_ids: ids,
            ..DetokenizeRequest::default()
        })
        .await
        .expect("text");
    assert!(
        back.into_inner().text.contains(CANARY),
        "the canary is text like any other"
    );
    // One that is dropped in the middle, one whose rows are nonsense.
    let long = GenerateRequest {
        max_tokens: 100,
        ignore_eos: true,
        stop: Vec::new(),
        ..good
    };
    let mut dropped = inference.generate(long).await.expect("accepted").into_inner();
    dropped.message().await.expect("a token");
    drop(dropped);
    let rows = RunLayerRequest {
        hidden_states: text().into_bytes().into(),
        rows: 1,
        ..RunLayerRequest::default()
    };
    MoeLayerServiceClient::new(channel)
        .run_layer(rows)
        .await
        .expect_err("no rows");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_level_of_any_process_shows_a_prompt_or_an_answer() {
    for (level, format) in [
        ("error", "text"),
        ("info", "json"),
        ("debug", "text"),
        ("trace", "text"),
        ("trace", "json"),
    ] {
        let mut server = serve(level, &["--log-format", format]);
        talk(&server).await;
        let output = server.finish();
        let mut forms = vec![CANARY.to_owned(), format!("{:?}", CANARY.as_bytes())];
        // Bytes are sometimes printed as numbers or in hexadecimal.
        forms.push(CANARY.bytes().map(|it| format!("{it:02x}")).collect());
        forms.push(CANARY.bytes().map(|it| it.to_string()).collect::<Vec<_>>().join(", "));
        for form in forms {
            assert!(!output.contains(&form), "{level} {format}: {form} is in the output");
        }
        if level == "trace" {
            assert!(
                output.lines().count() > 100,
                "{} lines at {level}",
                output.lines().count()
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn log_prompts_shows_them_after_a_warning() {
    let golden = Golden::read("qwen2_moe");
    assert!(!golden.prompts().is_empty());
    let mut server = serve("info", &["--log-prompts"]);
    server.wait_for_log("--log-prompts: what people ask and are told goes into the log, in full");
    talk(&server).await;
    assert!(server.finish().contains(CANARY));
}
