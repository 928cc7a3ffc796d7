//! Same request, same text: alone, in company, after a preemption, past the reach of the short longrope factors.

use moerun_engine::{EngineHandle, FinishReason, GenerateRequest, SamplingParams};

use crate::faulty::Behaviour;
use crate::fixture::{
    CONFIG, Completion, Fixture, GREEDY, PLAIN, Sizes, collect, generate, greedy, ids, logits, pages_of, until_idle,
};

/// Requests of many kinds and lengths.
pub(crate) fn requests(fixture: &Fixture, count: usize) -> Vec<GenerateRequest> {
    let request = |index: usize| {
        let sampled = SamplingParams {
            temperature: 0.7 + 0.1 * (index % 5) as f32,
            top_k: [0, 40][index % 2],
            top_p: [1.0, 0.9, 0.5][index % 3],
            min_p: [0.0, 0.02][index / 2 % 2],
            repetition_penalty: [1.0, 1.2][index / 3 % 2],
            seed: 1000 + index as u64 / 2, // some share a seed
        };
        let prompt = fixture.prompt(index % 3);
        let length = prompt.len() - (index * 5) % prompt.len().min(11);
        GenerateRequest {
            prompt_ids: prompt[..length].to_vec(),
            max_tokens: 8 + index * 3 % 20,
            stop_token_ids: if index.is_multiple_of(4) { vec![51] } else { Vec::new() },
            sampling: if index.is_multiple_of(3) { GREEDY } else { sampled },
            logprobs: [None, Some(0), Some(5)][index % 3],
        }
    };
    (0..count).map(request).collect()
}

pub(crate) async fn one_by_one(handle: &EngineHandle, requests: &[GenerateRequest]) -> Vec<Completion> {
    let mut completions = Vec::new();
    for request in requests {
        completions.push(generate(handle, request.clone()).await);
    }
    completions
}

pub(crate) async fn all_at_once(handle: &EngineHandle, requests: &[GenerateRequest]) -> Vec<Completion> {
    let events: Vec<_> = requests
        .iter()
        .map(|request| handle.generate(request.clone()).expect("accepted"))
        .collect();
    let mut completions = Vec::new();
    for events in events {
        completions.push(collect(events).await.expect("completed"));
    }
    completions
}

#[tokio::test]
async fn sixteen_requests_together_say_what_each_says_alone() {
    let fixture = Fixture::load("qwen3_moe");
    let requests = requests(&fixture, 16);
    let alone = one_by_one(&fixture.start(PLAIN).handle(), &requests).await;
    let requests_alone = fixture.experts.requests();
    for max_batch_tokens in [24, 7] {
        let engine = fixture.start(Sizes {
            max_batch_tokens,
            ..CONFIG
        });
        let before = fixture.experts.requests();
        fixture.experts.set(Behaviour::Hangs); // until all of them are there
        let events: Vec<_> = requests
            .iter()
            .map(|request| engine.handle().generate(request.clone()).expect("accepted"))
            .collect();
        fixture.experts.set(Behaviour::Works);
        for (index, (events, alone)) in events.into_iter().zip(&alone).enumerate() {
            let together = collect(events).await.expect("completed");
            assert_eq!(&together, alone, "request {index}, {max_batch_tokens} rows a step");
        }
        let requests_together = fixture.experts.requests() - before;
        assert!(
            requests_together * 2 < requests_alone,
            "{requests_together} of {requests_alone}: not batched"
        );
        until_idle(&engine.handle()).await;
    }
}

#[tokio::test]
async fn greedy_text_is_that_of_the_golden_file() {
    for family in ["qwen3_moe", "phimoe"] {
        let fixture = Fixture::load(family);
        let engine = fixture.start(Sizes {
            max_batch_tokens: 10,
            ..CONFIG
        });
        let requests: Vec<_> = (0..3).map(|index| greedy(fixture.prompt(index), 24)).collect();
        for (index, completion) in all_at_once(&engine.handle(), &requests).await.into_iter().enumerate() {
            assert_eq!(
                completion.ids,
                ids(&fixture.golden["greedy"][index]),
                "{family}, prompt {index}"
            );
            assert_eq!(completion.finish, FinishReason::Length);
        }
        let stop = &fixture.golden["stop_demo"];
        let prompt = usize::try_from(stop["prompt"].as_u64().unwrap()).unwrap();
        let stop_token_ids = vec![u32::try_from(stop["eos_token_id"].as_u64().unwrap()).unwrap()];
        let request = GenerateRequest {
            stop_token_ids,
            ..greedy(fixture.prompt(prompt), 24)
        };
        let completion = generate(&engine.handle(), request).await;
        assert_eq!(
            (completion.ids, completion.finish),
            (ids(&stop["expected"]), FinishReason::Stop),
            "{family}"
        );
    }
}

#[tokio::test]
async fn preempted_requests_say_what_they_say_with_room() {
    let fixture = Fixture::load("qwen3_moe");
    let requests = requests(&fixture, 12);
    let alone = one_by_one(&fixture.start(PLAIN).handle(), &requests).await;
    let longest = requests
        .iter()
        .map(|request| request.prompt_ids.len() + request.max_tokens)
        .max()
        .unwrap();
    for pages in [pages_of(longest), pages_of(longest) + 3] {
        let engine = fixture.start(Sizes { pages, ..CONFIG });
        assert_eq!(all_at_once(&engine.handle(), &requests).await, alone, "{pages} pages");
        until_idle(&engine.handle()).await;
        assert!(
            engine.handle().stats().preemptions > 0,
            "{pages} pages were enough: nothing was tested"
        );
    }
}

#[tokio::test]
async fn a_sequence_that_outgrows_the_short_longrope_factors_goes_on_with_the_long_ones() {
    let fixture = Fixture::load("phimoe"); // short factors up to 128
    let engine = fixture.start(PLAIN);
    let prompt = fixture.long_prompt(122);
    let completion = generate(&engine.handle(), greedy(prompt.clone(), 14)).await;
    let mut tokens = prompt;
    for &id in &completion.ids {
        // Each token once more from nothing, where the factors follow from the length alone.
        let row = logits(&engine.handle(), tokens.clone(), vec![tokens.len() - 1])
            .await
            .remove(0);
        let best = (0..row.len()).rev().max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
        assert_eq!(best, id as usize, "after {} tokens", tokens.len());
        tokens.push(id);
    }
    assert!(tokens.len() > 132);
}

#[tokio::test]
async fn a_repetition_penalty_covers_prompt_and_output() {
    let fixture = Fixture::load("qwen3_moe");
    let engine = fixture.start(CONFIG);
    // So large that no token comes twice while any other has a positive logit.
    let sampling = SamplingParams {
        repetition_penalty: 1e9,
        ..GREEDY
    };
    let request = GenerateRequest {
        sampling,
        ..greedy(fixture.prompt(0), 24)
    };
    let completion = generate(&engine.handle(), request).await;
    let mut seen = fixture.prompt(0);
    for id in completion.ids {
        assert!(!seen.contains(&id), "{id} comes again");
        seen.push(id);
    }
}

#[tokio::test]
async fn output_ends_where_the_context_or_the_cache_does() {
    let fixture = Fixture::load("qwen3_moe");
    let prompt = fixture.prompt(0); // 36 tokens
    for (sizes, output) in [
        (
            Sizes {
                max_context: 50,
                ..CONFIG
            },
            14,
        ),
        (Sizes { pages: 3, ..CONFIG }, 13),
    ] {
        let engine = fixture.start(sizes);
        let completion = generate(&engine.handle(), greedy(prompt.clone(), usize::MAX)).await;
        assert_eq!(
            (completion.ids.len(), completion.finish),
            (output, FinishReason::Length),
            "{sizes:?}"
        );
    }
}

#[tokio::test]
async fn two_micro_batches_by_turns_compute_what_one_does() {
    // Grouped and latent attention, dense first layers, shared experts, windows, chunks.
    for family in ["qwen3_moe", "deepseek_v2", "gpt_oss", "llama4_text"] {
        let fixture = Fixture::load(family);
        let sizes = Sizes {
            max_batch_tokens: 90,
            ..PLAIN
        };
        let prompts: Vec<Vec<u32>> = [150, 70, 33].map(|tokens| fixture.long_prompt(tokens)).to_vec();
        let all_logits = async || {
            let engine = fixture.start(sizes);
            let mut bits = Vec::new();
            for prompt in &prompts {
                let rows = logits(&engine.handle(), prompt.clone(), (0..prompt.len()).collect()).await;
                bits.extend(rows.into_iter().flatten().map(f32::to_bits));
            }
            bits
        };
        let before = fixture.experts.requests();
        let one_batch = all_logits().await;
        let requests = fixture.experts.requests() - before;
        fixture.experts.move_elsewhere();
        let by_turns = all_logits().await;
        let requests_by_turns = fixture.experts.requests() - before - requests;
        assert!(by_turns == one_batch, "{family}");
        assert!(
            requests_by_turns > requests,
            "{family}: {requests_by_turns} requests, {requests} in one batch"
        );
    }
}
