//! What is shared between requests and what is guessed saves work and changes no bit.

use moerun_engine::{EngineHandle, GenerateRequest, SamplingParams};
use moerun_types::KvFormat;

use crate::faulty::Behaviour;
use crate::fixture::{
    CONFIG, Completion, Fixture, GREEDY, PLAIN, Sizes, collect, generate, greedy, ids, logits, pages_of, until,
    until_idle,
};
use crate::sameness::{all_at_once, one_by_one, requests};

const SPECULATING: Sizes = Sizes { speculate: 5, ..CONFIG };

/// Greedy and sampled, with everything that is computed along the way.
fn both_ways(prompt: &[u32], max_tokens: usize) -> [GenerateRequest; 2] {
    let sampled = SamplingParams {
        temperature: 0.8,
        top_k: 30,
        top_p: 0.95,
        min_p: 0.01,
        repetition_penalty: 1.1,
        seed: 7,
    };
    [GREEDY, sampled].map(|sampling| GenerateRequest {
        sampling,
        logprobs: Some(5),
        ..greedy(prompt.to_vec(), max_tokens)
    })
}

/// A penalty that favours what was said before, so that texts repeat themselves, greedy and sampled.
fn repetitive(prompt: &[u32], max_tokens: usize) -> [GenerateRequest; 2] {
    both_ways(prompt, max_tokens).map(|mut request| {
        request.sampling.repetition_penalty = 0.1;
        request
    })
}

async fn hit(handle: &EngineHandle, request: &GenerateRequest, cached_tokens: usize) -> Completion {
    let completion = generate(handle, request.clone()).await;
    assert_eq!(completion.cached_tokens, cached_tokens);
    completion
}

#[tokio::test]
async fn a_prompt_met_again_says_what_it_said_cold() {
    for family in ["qwen3_moe", "gpt_oss", "deepseek_v3"] {
        let fixture = Fixture::load(family);
        let prompt = fixture.long_prompt(70);
        for request in both_ways(&prompt, 20) {
            let cold = hit(&fixture.start(PLAIN).handle(), &request, 0).await;
            let engine = fixture.start(CONFIG);
            assert_eq!(hit(&engine.handle(), &request, 0).await, cold, "{family}: first");
            let before = fixture.experts.requests();
            assert_eq!(hit(&engine.handle(), &request, 64).await, cold, "{family}: again");
            assert!(fixture.experts.requests() > before);

            // What was generated is kept as well: a conversation goes on from there.
            let talk = [prompt.as_slice(), &cold.ids, &prompt[..5]].concat();
            let next = GenerateRequest {
                prompt_ids: talk,
                ..request
            };
            let cold = hit(&fixture.start(PLAIN).handle(), &next, 0).await;
            assert_eq!(hit(&engine.handle(), &next, 80).await, cold, "{family}: continued");
            let counted = |stats: moerun_engine::EngineStats| {
                (stats.prefix_queried_tokens, stats.prefix_hit_tokens) == (70 + 70 + 95, 64 + 80)
            };
            until(&engine.handle(), counted).await;
            until_idle(&engine.handle()).await;
        }
    }
}

#[tokio::test]
async fn many_requests_share_a_beginning_and_say_what_each_says_alone() {
    let fixture = Fixture::load("qwen3_moe");
    let beginning = fixture.long_prompt(50);
    let mut requests = requests(&fixture, 16);
    for request in &mut requests {
        request.prompt_ids.splice(..0, beginning.iter().copied());
    }
    let alone = one_by_one(&fixture.start(PLAIN).handle(), &requests).await;
    let longest = requests
        .iter()
        .map(|request| request.prompt_ids.len() + request.max_tokens)
        .max();
    for pages in [pages_of(longest.unwrap()), 16, 200] {
        for speculate in [0, 4] {
            let engine = fixture.start(Sizes {
                pages,
                speculate,
                ..CONFIG
            });
            let what = format!("{pages} pages, {speculate} drafted");
            assert_eq!(all_at_once(&engine.handle(), &requests).await, alone, "{what}");
            assert_eq!(all_at_once(&engine.handle(), &requests).await, alone, "{what}, again");
            until_idle(&engine.handle()).await;
            let stats = engine.handle().stats();
            assert!(stats.prefix_hit_tokens > 0, "{what}: {stats:?}");
            assert!(stats.preemptions > 0 || pages == 200, "{what}: {stats:?}");
        }
    }
}

#[tokio::test]
async fn drafts_change_no_token_and_no_logprob() {
    for family in ["qwen3_moe", "phimoe", "llama4_text"] {
        let fixture = Fixture::load(family);
        let mut requests = requests(&fixture, 12);
        requests.extend(both_ways(&fixture.long_prompt(110), 40)); // past phimoe's short longrope factors
        requests.extend(repetitive(&fixture.long_prompt(110), 40));
        requests.extend(repetitive(&fixture.prompt(1), 40));
        let alone = one_by_one(&fixture.start(PLAIN).handle(), &requests).await;
        for max_batch_tokens in [5, 32, 256] {
            let engine = fixture.start(Sizes {
                max_batch_tokens,
                ..SPECULATING
            });
            let what = format!("{family}, {max_batch_tokens} rows a step");
            assert_eq!(all_at_once(&engine.handle(), &requests).await, alone, "{what}");
            assert_eq!(
                one_by_one(&engine.handle(), &requests).await,
                alone,
                "{what}, one by one"
            );
            until_idle(&engine.handle()).await;
            let stats = engine.handle().stats();
            assert!(stats.drafted_tokens > stats.accepted_tokens, "{what}: {stats:?}");
            assert!(stats.accepted_tokens > 0, "{what}: {stats:?}");
        }
    }
}

#[tokio::test]
async fn a_text_that_repeats_itself_takes_fewer_steps() {
    let random = Fixture::load("qwen3_moe");
    let [request, _] = repetitive(&random.prompt(0), 200);
    let trained = Fixture::load("../models/tiny-bible-moe");
    let prompt = ids(&trained.golden["prompts"][0]["ids"]);
    let cases = [(random, 2, request), (trained, 6, greedy(prompt, 200))];
    for (fixture, moe_layers, request) in cases {
        let mut steps = Vec::new();
        let mut texts = Vec::new();
        for sizes in [PLAIN, SPECULATING] {
            let engine = fixture.start(sizes);
            let before = fixture.experts.requests();
            texts.push(generate(&engine.handle(), request.clone()).await);
            until_idle(&engine.handle()).await;
            let stats = engine.handle().stats();
            steps.push((fixture.experts.requests() - before) / moe_layers);
            // Every accepted token is one step fewer.
            assert_eq!(
                steps[steps.len() - 1] + stats.accepted_tokens as usize,
                steps[0],
                "{stats:?}"
            );
        }
        assert_eq!(texts[0], texts[1]);
        assert!(steps[1] * 3 < steps[0] * 2, "{:?}: {steps:?} steps", fixture.dir);
    }
}

#[tokio::test]
async fn a_draft_that_spoils_its_step_costs_its_request_nothing() {
    let fixture = Fixture::load("qwen3_moe");
    let [request, _] = repetitive(&fixture.prompt(0)[..1], 40);
    let plain = generate(&fixture.start(PLAIN).handle(), request.clone()).await;
    let engine = fixture.start(SPECULATING);
    fixture.experts.set(Behaviour::RefusesRowsAbove(1));
    let before = fixture.experts.requests();
    assert_eq!(generate(&engine.handle(), request).await, plain);
    assert!(fixture.experts.requests() - before > 2 * 40, "nothing was drafted");
    until_idle(&engine.handle()).await;
    assert_eq!(engine.handle().stats().drafted_tokens, 0);
}

fn bits(rows: Vec<Vec<f32>>) -> Vec<Vec<u32>> {
    let row = |row: Vec<f32>| row.into_iter().map(f32::to_bits).collect();
    rows.into_iter().map(row).collect()
}

/// Mean over rows of the Kullback-Leibler divergence of the distribution of `found` from that of `truth`.
fn divergence(truth: &[Vec<f32>], found: &[Vec<f32>]) -> f64 {
    let log_softmax = |row: &[f32]| -> Vec<f64> {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = row.iter().map(|&logit| f64::from(logit - max).exp()).sum();
        row.iter().map(|&logit| f64::from(logit - max) - sum.ln()).collect()
    };
    let of_row = |(truth, found): (&Vec<f32>, &Vec<f32>)| -> f64 {
        let (truth, found) = (log_softmax(truth), log_softmax(found));
        truth
            .iter()
            .zip(found)
            .map(|(truth, found)| truth.exp() * (truth - found))
            .sum()
    };
    truth.iter().zip(found).map(of_row).sum::<f64>() / truth.len() as f64
}

#[tokio::test]
async fn narrow_keys_and_values_stay_close_to_wide_ones() {
    // A random gate is near a tie so often that rounding changes experts; a trained one is not.
    for (family, bounds) in [
        ("../models/tiny-bible-moe", [1e-5, 1e-4]),
        ("qwen3_moe", [1e-2, 1e-1]),
        ("gpt_oss", [1e-2, 1e-1]),
        ("deepseek_v3", [1e-2, 1e-1]),
    ] {
        let fixture = Fixture::load(family);
        let prompt = match fixture.golden["prompts"][0].get("ids") {
            Some(prompt) => ids(prompt),
            None => fixture.long_prompt(100),
        };
        let all: Vec<usize> = (0..prompt.len()).collect();
        let mut rows = Vec::new();
        for kv_format in KvFormat::ALL {
            let engine = fixture.start(Sizes { kv_format, ..PLAIN });
            rows.push(logits(&engine.handle(), prompt.clone(), all.clone()).await);
        }
        for (kv_format, rows_found, most) in [
            (KvFormat::Bf16, &rows[1], bounds[0]),
            (KvFormat::Int8, &rows[2], bounds[1]),
        ] {
            let found = divergence(&rows[0], rows_found);
            assert!(found < most, "{family}, {kv_format}: {found}");
            assert!(found > 0.0, "{family}, {kv_format}: nothing was rounded");
        }
    }
}

#[tokio::test]
async fn one_prompt_gives_equal_bits_however_it_is_computed() {
    let mut cases: Vec<(&str, KvFormat)> = ["gpt_oss", "phimoe"].map(|family| (family, KvFormat::F32)).into();
    for family in ["qwen3_moe", "deepseek_v3"] {
        cases.extend(KvFormat::ALL.map(|kv_format| (family, kv_format)));
    }
    for (family, kv_format) in cases {
        let [plain, config, speculating] = [PLAIN, CONFIG, SPECULATING].map(|sizes| Sizes { kv_format, ..sizes });
        let family_and_format = format!("{family}, keys and values in {kv_format}");
        let fixture = Fixture::load(family);
        let prompt = fixture.long_prompt(100);
        let all: Vec<usize> = (0..prompt.len()).collect();
        let whole = fixture.start(Sizes {
            max_batch_tokens: 512,
            ..plain
        });
        let wanted = bits(logits(&whole.handle(), prompt.clone(), all.clone()).await);
        let texts = both_ways(&prompt, 24);
        let wanted_texts = one_by_one(&whole.handle(), &texts).await;
        for chunk in [1, 7, 64] {
            for sizes in [plain, config, speculating] {
                let what = format!("{family_and_format}, chunks of {chunk}, {sizes:?}");
                let engine = fixture.start(Sizes {
                    max_batch_tokens: chunk,
                    ..sizes
                });
                let handle = engine.handle();
                assert!(
                    bits(logits(&handle, prompt.clone(), all.clone()).await) == wanted,
                    "{what}"
                );
                // From a prefix hit, where there is one: any positions, and what follows.
                for first in [99, 64, 33, 16] {
                    let rows = bits(logits(&handle, prompt.clone(), all[first..].to_vec()).await);
                    assert!(rows == wanted[first..], "{what}: logits from {first}");
                }
                assert_eq!(one_by_one(&handle, &texts).await, wanted_texts, "{what}");
            }
        }
        // Two that do not fit together: the younger one is preempted and starts again, from its own pages at times.
        for sizes in [plain, config, speculating] {
            let engine = fixture.start(Sizes { pages: 15, ..sizes });
            let twice: Vec<GenerateRequest> = [&texts[..], &texts[..]].concat();
            let found = all_at_once(&engine.handle(), &twice).await;
            assert_eq!(found[..2], wanted_texts[..], "{family_and_format}: {sizes:?}");
            assert_eq!(found[2..], wanted_texts[..], "{family_and_format}: {sizes:?}");
            until_idle(&engine.handle()).await;
        }
        let engine = fixture.start(Sizes { pages: 15, ..plain });
        let other = GenerateRequest {
            prompt_ids: prompt[1..].to_vec(),
            ..texts[0].clone()
        };
        fixture.experts.set(Behaviour::Hangs); // until both are there
        let [other, text] =
            [other, texts[1].clone()].map(|request| engine.handle().generate(request).expect("accepted"));
        fixture.experts.set(Behaviour::Works);
        collect(other).await.expect("completed");
        let found = collect(text).await.expect("completed");
        assert_eq!(found, wanted_texts[1], "{family_and_format}: preempted");
        assert!(
            engine.handle().stats().preemptions > 0,
            "{family_and_format}: nothing was preempted"
        );
    }
}
