//! `InferenceService`: what it answers is what the reference computed.

use moerun_proto::v1;

use crate::harness::{Golden, assert_close, floats, greedy, ids, start, token_prompt};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prompt_asked_again_is_answered_from_the_cache() {
    let golden = Golden::open("qwen3_moe");
    let served = start(&golden.dir).await;
    let (prompt, ids) = (&golden.prompts()[0], &golden.greedy()[0]);
    let kept = (prompt.len() - 1) / 16 * 16; // whole pages, and the last token is always computed
    assert!(kept > 0);
    for cached_tokens in [0, kept] {
        let answer = served.generate(greedy(prompt, 24)).await.unwrap();
        assert_eq!(&answer.token_ids(), ids);
        assert_eq!(answer.last().usage.unwrap().cached_tokens as usize, cached_tokens);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn greedy_ids_and_text_are_the_references() {
    let golden = Golden::open("qwen3_moe");
    let served = start(&golden.dir).await;
    for ((prompt, ids), text) in golden.prompts().iter().zip(golden.greedy()).zip(golden.greedy_texts()) {
        let answer = served.generate(greedy(prompt, 24)).await.unwrap();
        assert_eq!(answer.token_ids(), ids);
        assert_eq!(answer.text(), text);
        assert_eq!(answer.last().finish_reason(), v1::FinishReason::Length);
        let usage = answer.last().usage.unwrap();
        assert_eq!(usage.cached_tokens, 0);
        assert_eq!(
            (usage.prompt_tokens as usize, usage.completion_tokens),
            (prompt.len(), 24)
        );
        assert_eq!(answer.messages[0].combine_mode, "exact");
        let before_the_last = &answer.messages[..23];
        assert!(
            before_the_last
                .iter()
                .all(|message| message.finish_reason() == v1::FinishReason::Unspecified)
        );
        assert!(
            answer.messages[1..]
                .iter()
                .all(|message| message.combine_mode.is_empty())
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_combine_mode_stands_in_the_metadata() {
    let golden = Golden::open("qwen3_moe");
    let served = start(&golden.dir).await;
    let response = served.inference().generate(greedy(&[1, 45], 1)).await.unwrap();
    assert_eq!(response.metadata().get("moerun-combine-mode").unwrap(), "exact");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_id_ends_the_answer_and_is_its_last_token() {
    let golden = Golden::open("qwen3_moe");
    let served = start(&golden.dir).await;
    let demo = &golden.json["stop_demo"];
    let prompt = &golden.prompts()[demo["prompt"].as_u64().unwrap() as usize];
    let stop = demo["eos_token_id"].as_u64().unwrap() as u32;
    let answer = served
        .generate(v1::GenerateRequest {
            stop_token_ids: vec![stop],
            ..greedy(prompt, 24)
        })
        .await
        .unwrap();
    let expected = ids(&demo["expected"]);
    assert_eq!(answer.token_ids(), expected);
    assert_eq!(answer.last().finish_reason(), v1::FinishReason::Stop);
    assert_eq!(answer.last().usage.unwrap().completion_tokens as usize, expected.len());

    let shown = v1::DetokenizeRequest {
        token_ids: expected[..expected.len() - 1].to_vec(),
        ..Default::default()
    };
    let shown = served.inference().detokenize(shown).await.unwrap().into_inner().text;
    assert_eq!(answer.text(), shown);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_string_ends_the_text_and_frees_the_engine() {
    let golden = Golden::open("qwen3_moe");
    let served = start(&golden.dir).await;
    let (prompt, text) = (&golden.prompts()[1], &golden.greedy_texts()[1]);
    for stop in ["and", "G$en", "nd�a"] {
        let expected = text.split_once(stop).unwrap().0;
        let request = v1::GenerateRequest {
            stop: vec!["never seen".into(), stop.into()],
            ..greedy(prompt, 150)
        };
        let answer = served.generate(request).await.unwrap();
        assert_eq!(answer.text(), expected, "stop {stop:?}");
        assert_eq!(answer.last().finish_reason(), v1::FinishReason::Stop);
        assert!(answer.token_ids().len() < 24, "the answer ended early");
        served.idle().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn text_and_chat_prompts_are_tokenised_as_tokenize_says() {
    let golden = Golden::open("qwen3_moe");
    let served = start(&golden.dir).await;
    let text = golden.json["texts"][0].as_str().unwrap().to_owned();
    let input = v1::tokenize_request::Input::Text(text.clone());
    let tokens = served
        .inference()
        .tokenize(v1::TokenizeRequest {
            input: Some(input),
            ..Default::default()
        })
        .await;
    let tokens = tokens.unwrap().into_inner();
    assert_eq!(
        tokens.token_ids,
        golden.prompts()[0][1..],
        "the reference's prompts begin with an id of their own"
    );
    assert_eq!(tokens.tokens[0], "I");

    let by_text = v1::GenerateRequest {
        prompt: Some(v1::generate_request::Prompt::Text(text)),
        ..greedy(&[], 8)
    };
    let by_text = served.generate(by_text).await.unwrap();
    assert_eq!(
        by_text.token_ids(),
        served.generate(greedy(&tokens.token_ids, 8)).await.unwrap().token_ids()
    );

    let messages = golden.json["chat"]["messages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|message| v1::ChatMessage {
            role: message["role"].as_str().unwrap().to_owned(),
            content: message["content"].as_str().unwrap().to_owned(),
        });
    let chat = v1::Chat {
        messages: messages.collect(),
    };
    let input = v1::tokenize_request::Input::Chat(chat.clone());
    let tokens = served
        .inference()
        .tokenize(v1::TokenizeRequest {
            input: Some(input),
            ..Default::default()
        })
        .await;
    let chat_ids = tokens.unwrap().into_inner().token_ids;
    assert_eq!(chat_ids, ids(&golden.json["chat"]["ids"]));
    let by_chat = v1::GenerateRequest {
        prompt: Some(v1::generate_request::Prompt::Chat(chat)),
        ..greedy(&[], 8)
    };
    let by_chat = served.generate(by_chat).await.unwrap();
    assert_eq!(
        by_chat.token_ids(),
        served.generate(greedy(&chat_ids, 8)).await.unwrap().token_ids()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_become_their_text_again() {
    let golden = Golden::open("qwen3_moe");
    let served = start(&golden.dir).await;
    let text = "Let there be light — 日本語 🌍\n<|im_end|>";
    let input = v1::tokenize_request::Input::Text(text.to_owned());
    let tokens = served
        .inference()
        .tokenize(v1::TokenizeRequest {
            input: Some(input),
            ..Default::default()
        })
        .await;
    let token_ids = tokens.unwrap().into_inner().token_ids;
    for (keep_special_tokens, expected) in [(true, text), (false, text.strip_suffix("<|im_end|>").unwrap())] {
        let request = v1::DetokenizeRequest {
            token_ids: token_ids.clone(),
            keep_special_tokens,
            ..Default::default()
        };
        assert_eq!(
            served.inference().detokenize(request).await.unwrap().into_inner().text,
            expected
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forward_gives_the_references_logits() {
    let golden = Golden::open("qwen3_moe");
    let served = start(&golden.dir).await;
    let (shape, logits) = golden.tensor("logits");
    let [_, sequence, vocab] = shape[..] else {
        panic!("{shape:?}")
    };
    for (row, prompt) in golden.prompts().iter().enumerate() {
        let mut positions: Vec<u32> = (0..prompt.len() as u32).rev().collect();
        positions.push(0); // a repetition counts once
        let request = v1::ForwardRequest {
            token_ids: prompt.clone(),
            positions,
            ..Default::default()
        };
        let mut stream = served.inference().forward(request).await.unwrap().into_inner();
        for position in 0..prompt.len() {
            let message = stream.message().await.unwrap().unwrap();
            assert_eq!(message.position as usize, position);
            let start = (row * sequence + position) * vocab;
            let what = format!("prompt {row}, position {position}");
            assert_close(&floats(&message.logits), &logits[start..start + vocab], &what);
        }
        assert!(stream.message().await.unwrap().is_none());

        let request = v1::ForwardRequest {
            token_ids: prompt.clone(),
            ..Default::default()
        };
        let mut stream = served.inference().forward(request).await.unwrap().into_inner();
        assert_eq!(
            stream.message().await.unwrap().unwrap().position as usize,
            prompt.len() - 1
        );
        assert!(stream.message().await.unwrap().is_none());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logprobs_are_those_of_the_logits() {
    let golden = Golden::open("qwen3_moe");
    let served = start(&golden.dir).await;
    let prompt = &golden.prompts()[2];
    let answer = served
        .generate(v1::GenerateRequest {
            logprobs: Some(3),
            ..greedy(prompt, 1)
        })
        .await
        .unwrap();
    let message = answer.last();

    let (shape, logits) = golden.tensor("logits");
    let start = (2 * shape[1] + prompt.len() - 1) * shape[2];
    let row = &logits[start..start + shape[2]];
    let log_sum = row.iter().map(|logit| f64::from(*logit).exp()).sum::<f64>().ln() as f32;
    let mut best: Vec<usize> = (0..row.len()).collect();
    best.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
    assert_eq!(
        message.logprobs[0].token_id as usize, best[0],
        "greedy takes the likeliest"
    );
    assert_close(
        &[message.logprobs[0].logprob],
        &[row[best[0]] - log_sum],
        "its log-probability",
    );
    let top: Vec<usize> = message
        .top_logprobs
        .iter()
        .map(|entry| entry.token_id as usize)
        .collect();
    assert_eq!(top, best[..3]);
    assert!(
        answer.messages[0].logprobs[0].text == "R",
        "{:?}",
        answer.messages[0].logprobs[0].text
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_together_answer_as_they_do_alone() {
    let golden = Golden::open("qwen3_moe");
    let served = start(&golden.dir).await;
    let requests: Vec<v1::GenerateRequest> = (0..16)
        .map(|at| {
            let mut request = greedy(&golden.prompts()[at % 3], 20);
            if at % 2 == 1 {
                let temperature = Some(0.8);
                request.sampling = Some(v1::SamplingParams {
                    temperature,
                    seed: Some(at as u64),
                    ..Default::default()
                });
            }
            request
        })
        .collect();
    let mut alone = Vec::new();
    for request in &requests {
        alone.push(served.generate(request.clone()).await.unwrap().token_ids());
    }
    let together = futures::future::join_all(requests.into_iter().map(|request| served.generate(request))).await;
    for (at, (together, alone)) in together.into_iter().zip(&alone).enumerate() {
        assert_eq!(&together.unwrap().token_ids(), alone, "request {at}");
    }
    assert_ne!(alone[1], alone[7], "other seeds give other texts");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_trained_model_continues_its_prompt_and_stops_where_it_should() {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/models/tiny-bible-moe");
    let served = start(&dir).await;
    let golden: serde_json::Value = serde_json::from_slice(&std::fs::read(dir.join("golden.json")).unwrap()).unwrap();
    let case = &golden["prompts"][3]; // a question; the answer ends with the model's own end-of-turn id
    let request = v1::GenerateRequest {
        ignore_eos: false,
        ..greedy(&ids(&case["ids"]), 64)
    };
    let answer = served.generate(request).await.unwrap();
    assert_eq!(answer.token_ids(), ids(&case["greedy"]));
    assert_eq!(answer.text(), case["text"].as_str().unwrap());
    assert_eq!(answer.last().finish_reason(), v1::FinishReason::Stop);

    // Its generation_config samples; the seed is 0 unless given, so the same request gives the same text.
    let prompt = v1::generate_request::Prompt::Text("<|endoftext|>And it came to pass".to_owned());
    let request = v1::GenerateRequest {
        prompt: Some(prompt),
        max_tokens: 12,
        ..Default::default()
    };
    let first = served.generate(request.clone()).await.unwrap();
    assert_eq!(first.text(), served.generate(request.clone()).await.unwrap().text());
    let sampling = Some(v1::SamplingParams {
        seed: Some(1),
        ..Default::default()
    });
    assert_ne!(
        first.text(),
        served
            .generate(v1::GenerateRequest { sampling, ..request })
            .await
            .unwrap()
            .text()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_model_is_listed_with_its_sizes() {
    let golden = Golden::open("qwen2_moe");
    let served = start(&golden.dir).await;
    let models = served
        .inference()
        .list_models(v1::ListModelsRequest {})
        .await
        .unwrap()
        .into_inner()
        .models;
    let [model] = &models[..] else { panic!("{models:?}") };
    assert_eq!((model.name.as_str(), model.family.as_str()), ("tiny", "qwen2_moe"));
    let moe_layers: Vec<u32> = ids(&golden.json["moe_layers"]);
    assert_eq!(model.moe_layers, moe_layers);
    assert_eq!((model.num_experts, model.top_k), (8, 4));
    assert_eq!(model.max_context as usize, crate::harness::MAX_CONTEXT);
    assert!(model.numerics_id.contains("f32-exact-8"), "{}", model.numerics_id);
    assert_eq!(model.config_hash.len(), 64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prompt_of_one_token_and_one_that_fills_the_context_are_answered() {
    let golden = Golden::open("qwen3_moe");
    let served = start(&golden.dir).await;
    assert_eq!(served.generate(greedy(&[1], 2)).await.unwrap().token_ids().len(), 2);
    let full = vec![5; crate::harness::MAX_CONTEXT - 1];
    let request = v1::GenerateRequest {
        prompt: Some(token_prompt(&full)),
        ..greedy(&[], 50)
    };
    let answer = served.generate(request).await.unwrap();
    assert_eq!(answer.token_ids().len(), 1, "there is room for one token");
    assert_eq!(answer.last().finish_reason(), v1::FinishReason::Length);
}
