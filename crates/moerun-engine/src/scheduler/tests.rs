//! The scheduler against a fake model: what must hold of any plan, and what must come out of any schedule.

mod simulation;

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use moerun_types::SequenceId;
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use tokio::sync::mpsc;

use self::simulation::{Simulation, continuation, rows_of};
use super::*;
use crate::reply::QueuePlace;
use crate::{ForwardRequest, GenerateRequest, SamplingParams, TokenEvent};

const GREEDY: SamplingParams = SamplingParams {
    temperature: 0.0,
    top_k: 0,
    top_p: 1.0,
    min_p: 0.0,
    repetition_penalty: 1.0,
    seed: 0,
};

const CONFIG: SchedulerConfig = SchedulerConfig {
    max_batch_tokens: 64,
    num_pages: 8,
    long_rope_above: None,
    prefix_cache: false,
    speculate: 0,
};

fn place() -> QueuePlace {
    QueuePlace::take(&Arc::new(AtomicUsize::new(0)), 1).expect("an empty queue")
}

fn sequence_of(id: u64, prompt_ids: Vec<u32>, max_tokens: usize) -> (Sequence, mpsc::Receiver<TokenEvent>) {
    let request = GenerateRequest {
        prompt_ids,
        max_tokens,
        stop_token_ids: Vec::new(),
        sampling: GREEDY,
        logprobs: None,
    };
    Sequence::generate(SequenceId(id), request, place())
}

fn sequence(id: u64, prompt_tokens: usize, max_tokens: usize) -> (Sequence, mpsc::Receiver<TokenEvent>) {
    sequence_of(id, vec![1; prompt_tokens], max_tokens)
}

fn scheduler(max_batch_tokens: usize, num_pages: u32) -> Simulation {
    Simulation::new(SchedulerConfig {
        max_batch_tokens,
        num_pages,
        ..CONFIG
    })
}

fn step(simulation: &mut Simulation, context: &str) -> Vec<Chunk> {
    simulation.step(context)
}

/// Everything that came on a channel, and whether the sequence has ended.
fn received(events: &mut mpsc::Receiver<TokenEvent>) -> (Vec<u32>, bool) {
    let (mut ids, mut ended) = (Vec::new(), false);
    while let Ok(TokenEvent::Token { id, finish, .. }) = events.try_recv() {
        ids.push(id);
        ended = finish.is_some();
    }
    (ids, ended)
}

/// Texts that often begin alike.
fn prompt(rng: &mut ChaCha8Rng, tokens: usize) -> Vec<u32> {
    let (text, common) = (rng.random_range(0..3), rng.random_range(0..=tokens));
    let own = rng.random_range(3..6);
    (0..tokens).map(|at| if at < common { text } else { own }).collect()
}

#[test]
fn every_request_says_what_it_says_alone_under_any_schedule() {
    let mut sum = EngineStats::default();
    for seed in 0..300 {
        let context = format!("seed {seed}");
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let num_pages = rng.random_range(1..24);
        let slots = num_pages as usize * KV_PAGE_TOKENS;
        let config = SchedulerConfig {
            max_batch_tokens: rng.random_range(1..40),
            num_pages,
            long_rope_above: rng.random_bool(0.5).then(|| rng.random_range(1..100)),
            prefix_cache: rng.random_bool(0.7),
            speculate: [0, 3, 9][rng.random_range(0..3)],
        };
        let mut simulation = Simulation::new(config);
        let mut clients = Vec::new();
        let mut work = 0; // tokens of all requests: a bound on the steps, had each been served alone, row by row
        let mut steps = 0;
        for id in 0..rng.random_range(1..24) {
            let prompt_tokens = rng.random_range(1..=slots);
            let max_tokens = rng.random_range(1..=slots + 1 - prompt_tokens).min(60);
            let prompt = prompt(&mut rng, prompt_tokens);
            let (sequence, events) = sequence_of(id, prompt.clone(), max_tokens);
            simulation.scheduler.push(sequence);
            work += 2 * (prompt_tokens + max_tokens); // twice, where the longrope factors change
            clients.push((prompt, max_tokens, events));
            for _ in 0..rng.random_range(0..4) {
                simulation.step(&context);
                steps += 1;
            }
            if rng.random_bool(0.1) {
                let (.., mut events) = clients.swap_remove(rng.random_range(0..clients.len()));
                events.close();
            }
        }
        while !simulation.scheduler.is_idle() {
            simulation.step(&context);
            steps += 1;
            assert!(steps <= 4 * work, "{context}: {steps} steps for {work} tokens");
        }
        let stats = simulation.scheduler.stats();
        assert_eq!(stats.pages_used, 0, "{context}");
        sum.preemptions += stats.preemptions;
        sum.prefix_hit_tokens += stats.prefix_hit_tokens;
        sum.drafted_tokens += stats.drafted_tokens;
        sum.accepted_tokens += stats.accepted_tokens;
        for (prompt, max_tokens, mut events) in clients {
            let wanted = continuation(&config, &prompt, max_tokens);
            assert_eq!(received(&mut events), (wanted, true), "{context}");
        }
    }
    assert!(
        sum.preemptions > 100 && sum.prefix_hit_tokens > 10_000,
        "the seeds must make the cache run full and hit: {sum:?}"
    );
    assert!(
        sum.accepted_tokens > 1000 && sum.drafted_tokens > sum.accepted_tokens + 1000,
        "the seeds must make drafts right and wrong: {sum:?}"
    );
}

#[test]
fn a_prompt_is_not_computed_where_another_has_left_it() {
    let mut simulation = Simulation::new(SchedulerConfig {
        prefix_cache: true,
        ..CONFIG
    });
    let text: Vec<u32> = (0..40).collect();
    let starts = |simulation: &mut Simulation, id, tokens: &[u32]| {
        let (sequence, mut events) = sequence_of(id, tokens.to_vec(), 1);
        simulation.scheduler.push(sequence);
        let start = simulation.step("prefix")[0].positions.start;
        match events.try_recv() {
            Ok(TokenEvent::Token { cached_tokens, .. }) => assert_eq!(cached_tokens, start),
            other => panic!("no token: {other:?}"),
        }
        start
    };
    assert_eq!(starts(&mut simulation, 0, &text), 0);
    assert_eq!(simulation.scheduler.stats().pages_cached, 2);
    assert_eq!(starts(&mut simulation, 1, &text), 32);
    assert_eq!(
        starts(&mut simulation, 2, &text[..32]),
        16,
        "the last token is always computed"
    );
    assert_eq!(starts(&mut simulation, 3, &text[..33]), 32);
    let other: Vec<u32> = text.iter().map(|&id| if id == 20 { 99 } else { id }).collect();
    assert_eq!(starts(&mut simulation, 4, &other), 16, "the second page differs");
    let stats = simulation.scheduler.stats();
    assert_eq!((stats.prefix_queried_tokens, stats.prefix_hit_tokens), (185, 96));
}

#[test]
fn logits_of_early_positions_are_computed() {
    let mut simulation = Simulation::new(SchedulerConfig {
        prefix_cache: true,
        ..CONFIG
    });
    let text: Vec<u32> = (0..50).collect();
    for (first, start) in [(49, 0), (49, 48), (40, 32), (15, 0), (16, 16)] {
        let request = ForwardRequest {
            token_ids: text.clone(),
            positions: vec![first, 49].into_iter().take(50 - first).collect(),
        };
        let (sequence, mut rows) = Sequence::forward(SequenceId(0), request, place());
        simulation.scheduler.push(sequence);
        assert_eq!(
            simulation.step("forward")[0].positions,
            start..50,
            "logits from {first}"
        );
        assert!(rows.try_recv().is_ok_and(|row| row.is_ok()));
    }
}

#[test]
fn a_text_that_repeats_itself_takes_fewer_steps_with_drafts() {
    let steps = |speculate| {
        let mut simulation = Simulation::new(SchedulerConfig { speculate, ..CONFIG });
        let (sequence, mut events) = sequence(0, 8, 64);
        simulation.scheduler.push(sequence);
        let mut steps = 0;
        while !simulation.scheduler.is_idle() {
            simulation.step("repeats");
            steps += 1;
        }
        (received(&mut events), steps)
    };
    let ((text, plain), (drafted_text, drafted)) = (steps(0), steps(4));
    assert_eq!(text, drafted_text);
    assert_eq!(plain, 64);
    assert!(drafted < 32, "{drafted} steps");
}

#[test]
fn drafts_leave_rows_to_prompts_and_decodes() {
    let mut simulation = Simulation::new(SchedulerConfig {
        max_batch_tokens: 8,
        num_pages: 100,
        speculate: 4,
        ..CONFIG
    });
    let (short, _short_events) = sequence(0, 4, 100);
    simulation.scheduler.push(short);
    simulation.step("the short one starts");
    let (long, _long_events) = sequence(1, 30, 1);
    simulation.scheduler.push(long);
    for start in [0, 7, 14, 21] {
        let chunks = simulation.step("beside a prompt");
        assert_eq!(chunks[1].positions, start..start + 7);
        assert!(chunks[0].draft.is_empty());
    }
    let last = simulation.step("two rows of the prompt are left");
    assert_eq!((rows_of(&last[1]), rows_of(&last[0])), (2, 5));
}

#[test]
fn a_long_prompt_does_not_stop_decodes() {
    let mut simulation = scheduler(8, 100);
    let (short, mut short_events) = sequence(0, 1, 20);
    let (long, _long_events) = sequence(1, 500, 1);
    simulation.scheduler.push(short);
    simulation.scheduler.push(long);
    for produced in 1..=20 {
        let chunks = step(&mut simulation, "long prompt");
        assert_eq!(
            chunks.iter().map(|chunk| chunk.positions.len()).sum::<usize>(),
            8,
            "the rest goes to the prompt"
        );
        assert!(short_events.try_recv().is_ok(), "no token in step {produced}");
    }
}

#[test]
fn a_flood_of_decodes_does_not_stop_a_prompt() {
    let mut simulation = scheduler(8, 1000);
    let mut clients = Vec::new();
    for id in 0..50 {
        let prompt_tokens = if id == 5 { 64 } else { 1 };
        let (sequence, events) = sequence(id, prompt_tokens, 200);
        simulation.scheduler.push(sequence);
        clients.push(events);
    }
    let first_token = (0..200).position(|_| {
        step(&mut simulation, "flood");
        assert!(
            simulation.scheduler.running().len() <= 6,
            "a quarter of the rows is left to prefill"
        );
        clients[5].try_recv().is_ok()
    });
    assert_eq!(
        first_token,
        Some(64 / 3),
        "five of eight rows decode, three are left to the prompt"
    );
}

#[test]
fn the_youngest_gives_way_and_starts_again_with_what_it_has() {
    let mut simulation = scheduler(64, 4);
    let (old, _old_events) = sequence(0, KV_PAGE_TOKENS, 40);
    let (young, _young_events) = sequence(1, 2 * KV_PAGE_TOKENS - 1, 10);
    simulation.scheduler.push(old);
    simulation.scheduler.push(young);
    step(&mut simulation, "both start");
    assert_eq!(simulation.scheduler.running().len(), 2);
    step(&mut simulation, "the fourth page goes to the older one");
    assert_eq!(simulation.scheduler.pages.num_free(), 0);
    step(&mut simulation, "the younger one asks for a fifth");
    assert_eq!(simulation.scheduler.running().len(), 1);
    assert_eq!(simulation.scheduler.num_preempted(), 1);
    assert_eq!(simulation.scheduler.stats().preemptions, 1);
    let preempted = &simulation.scheduler.waiting[0];
    assert_eq!(
        (preempted.id, preempted.tokens.len()),
        (SequenceId(1), 2 * KV_PAGE_TOKENS + 1)
    );
    while simulation
        .scheduler
        .running()
        .first()
        .is_some_and(|sequence| sequence.id == SequenceId(0))
    {
        step(&mut simulation, "the older one goes on alone");
    }
    let chunks = step(&mut simulation, "the younger one is back");
    assert_eq!(
        chunks,
        [Chunk {
            sequence: 0,
            positions: 0..2 * KV_PAGE_TOKENS + 1,
            draft: Vec::new(),
        }]
    );
}

#[test]
fn a_newcomer_leaves_the_page_that_a_running_sequence_is_about_to_ask_for() {
    let mut simulation = scheduler(64, 2);
    let (old, _old_events) = sequence(0, KV_PAGE_TOKENS - 1, 4);
    let (young, mut young_events) = sequence(1, 1, 1);
    simulation.scheduler.push(old);
    simulation.scheduler.push(young);
    while young_events.try_recv().is_err() {
        step(&mut simulation, "the older one first");
    }
    assert_eq!(simulation.scheduler.stats().preemptions, 0);
}

#[test]
fn a_client_that_went_away_frees_pages_and_place() {
    let mut simulation = scheduler(64, 8);
    let (running, running_events) = sequence(0, 40, 10);
    let (waiting, waiting_events) = sequence(1, 100, 10);
    simulation.scheduler.push(running);
    simulation.scheduler.push(waiting);
    step(&mut simulation, "start");
    assert_eq!(
        (simulation.scheduler.running().len(), simulation.scheduler.waiting.len()),
        (1, 1)
    );
    drop((running_events, waiting_events));
    simulation.scheduler.remove_ended();
    assert!(simulation.scheduler.is_idle());
    assert_eq!(simulation.scheduler.pages.num_used(), 0);
}

#[test]
fn a_sequence_that_outgrows_the_short_factors_is_computed_again() {
    let config = SchedulerConfig {
        max_batch_tokens: 8,
        long_rope_above: Some(20),
        ..CONFIG
    };
    let mut simulation = Simulation::new(config);
    let (sequence, _events) = sequence(0, 18, 10);
    simulation.scheduler.push(sequence);
    let mut planned = Vec::new();
    for _ in 0..10 {
        let chunks = step(&mut simulation, "longrope");
        planned.push((
            chunks[0].positions.clone(),
            simulation.scheduler.running()[0].rope_length > 20,
        ));
    }
    let expected = [
        (0..8, false),
        (8..16, false),
        (16..18, false),
        (18..19, false),
        (19..20, false),
        (0..8, true), // 21 tokens are known
        (8..16, true),
        (16..21, true),
        (21..22, true),
        (22..23, true),
    ];
    assert_eq!(planned, expected);
}

#[test]
fn a_prompt_longer_than_the_short_factors_reach_starts_with_the_long_ones() {
    let config = SchedulerConfig {
        max_batch_tokens: 8,
        long_rope_above: Some(20),
        ..CONFIG
    };
    let mut simulation = Simulation::new(config);
    let (sequence, _events) = sequence(0, 30, 2);
    simulation.scheduler.push(sequence);
    let first_positions: Vec<usize> = (0..4)
        .map(|_| step(&mut simulation, "longrope")[0].positions.start)
        .collect();
    assert_eq!(first_positions, [0, 8, 16, 24]);
    assert_eq!(simulation.scheduler.running()[0].rope_length, 30);
}
