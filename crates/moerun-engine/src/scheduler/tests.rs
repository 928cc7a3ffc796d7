//! The scheduler against a model that does nothing: every chunk "runs", every finished prefill yields a token.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use moerun_types::SequenceId;
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use tokio::sync::mpsc;

use super::*;
use crate::reply::QueuePlace;
use crate::sequence::Answer;
use crate::{GenerateRequest, SamplingParams, TokenEvent};

const GREEDY: SamplingParams = SamplingParams {
    temperature: 0.0,
    top_k: 0,
    top_p: 1.0,
    min_p: 0.0,
    repetition_penalty: 1.0,
    seed: 0,
};

fn sequence(id: u64, prompt_tokens: usize, max_tokens: usize) -> (Sequence, mpsc::Receiver<TokenEvent>) {
    let place = QueuePlace::take(&Arc::new(AtomicUsize::new(0)), 1).expect("an empty queue");
    let request = GenerateRequest {
        prompt_ids: vec![1; prompt_tokens],
        max_tokens,
        stop_token_ids: Vec::new(),
        sampling: GREEDY,
        logprobs: None,
    };
    Sequence::generate(SequenceId(id), request, place)
}

fn scheduler(max_batch_tokens: usize, num_pages: u32) -> Scheduler {
    Scheduler::new(SchedulerConfig {
        max_batch_tokens,
        num_pages,
        long_rope_above: None,
    })
}

/// Plans a step, checks what must hold of any plan, and "runs" it.
fn step(scheduler: &mut Scheduler, context: &str) -> Vec<Chunk> {
    let oldest = scheduler.running().first().map(|sequence| sequence.id);
    let chunks = scheduler.plan();
    check(scheduler, &chunks, context);
    if let Some(oldest) = oldest {
        let progresses = chunks
            .iter()
            .any(|chunk| scheduler.running()[chunk.sequence].id == oldest);
        assert!(progresses, "{context}: the oldest sequence {oldest} stands still");
    }
    for chunk in &chunks {
        let sequence = scheduler.running_mut(chunk.sequence);
        let wanted = sequence.logits_wanted(&chunk.positions);
        sequence.cached = chunk.positions.end;
        for _ in wanted {
            sequence.answer(Answer::Token { id: 2, logprobs: None });
        }
    }
    scheduler.remove_ended();
    chunks
}

fn check(scheduler: &Scheduler, chunks: &[Chunk], context: &str) {
    let rows: usize = chunks.iter().map(|chunk| chunk.positions.len()).sum();
    assert!(rows <= scheduler.config.max_batch_tokens, "{context}: {rows} rows");
    let mut planned = HashSet::new();
    for chunk in chunks {
        let sequence = &scheduler.running()[chunk.sequence];
        assert!(
            planned.insert(chunk.sequence),
            "{context}: two chunks of sequence {}",
            sequence.id
        );
        assert!(!chunk.positions.is_empty(), "{context}: an empty chunk");
        assert_eq!(chunk.positions.start, sequence.cached, "{context}");
        assert!(chunk.positions.end <= sequence.tokens.len(), "{context}");
        assert!(
            sequence.pages.len() * KV_PAGE_TOKENS >= chunk.positions.end,
            "{context}: rows without a page"
        );
    }
    for (index, sequence) in scheduler.running().iter().enumerate() {
        let decodes = sequence.pending() == 1;
        assert!(
            !decodes || planned.contains(&index),
            "{context}: sequence {} cannot decode",
            sequence.id
        );
    }
    let held: Vec<u32> = scheduler
        .running()
        .iter()
        .flat_map(|sequence| sequence.pages.iter().copied())
        .collect();
    let distinct: HashSet<u32> = held.iter().copied().collect();
    assert_eq!(distinct.len(), held.len(), "{context}: a page has two owners");
    assert_eq!(held.len(), scheduler.pages().num_used(), "{context}: a page was lost");
    assert!(
        scheduler.waiting.iter().all(|sequence| sequence.pages.is_empty()),
        "{context}: pages while waiting"
    );
    let order: Vec<u64> = scheduler
        .running
        .iter()
        .chain(&scheduler.waiting)
        .map(|sequence| sequence.id.0)
        .collect();
    assert!(order.is_sorted(), "{context}: order of arrival lost: {order:?}");
}

#[test]
fn every_request_ends_in_order_of_arrival_and_no_page_is_lost() {
    let mut preemptions = 0;
    for seed in 0..200 {
        let context = format!("seed {seed}");
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let num_pages = rng.random_range(1..24);
        let slots = num_pages as usize * KV_PAGE_TOKENS;
        let mut scheduler = scheduler(rng.random_range(1..40), num_pages);
        let mut clients = Vec::new();
        let mut work = 0; // tokens of all requests: a bound on the steps, had each been served alone, row by row
        let mut steps = 0;
        for id in 0..rng.random_range(1..24) {
            let prompt_tokens = rng.random_range(1..=slots);
            let max_tokens = rng.random_range(1..=slots + 1 - prompt_tokens).min(60);
            let (sequence, events) = sequence(id, prompt_tokens, max_tokens);
            scheduler.push(sequence);
            work += prompt_tokens + max_tokens;
            clients.push((max_tokens, events));
            for _ in 0..rng.random_range(0..4) {
                step(&mut scheduler, &context);
                steps += 1;
            }
        }
        while !scheduler.is_idle() {
            step(&mut scheduler, &context);
            steps += 1;
            assert!(steps <= 4 * work, "{context}: {steps} steps for {work} tokens");
        }
        assert_eq!(scheduler.pages().num_used(), 0, "{context}");
        preemptions += scheduler.preemptions();
        for (max_tokens, mut events) in clients {
            let mut received = 0;
            while let Ok(TokenEvent::Token { .. }) = events.try_recv() {
                received += 1;
            }
            assert_eq!(received, max_tokens, "{context}");
        }
    }
    assert!(
        preemptions > 100,
        "the seeds must make the cache run full: {preemptions}"
    );
}

#[test]
fn a_long_prompt_does_not_stop_decodes() {
    let mut scheduler = scheduler(8, 100);
    let (short, mut short_events) = sequence(0, 1, 20);
    let (long, _long_events) = sequence(1, 500, 1);
    scheduler.push(short);
    scheduler.push(long);
    for produced in 1..=20 {
        let chunks = step(&mut scheduler, "long prompt");
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
    let mut scheduler = scheduler(8, 1000);
    let mut clients = Vec::new();
    for id in 0..50 {
        let prompt_tokens = if id == 5 { 64 } else { 1 };
        let (sequence, events) = sequence(id, prompt_tokens, 200);
        scheduler.push(sequence);
        clients.push(events);
    }
    let first_token = (0..200).position(|_| {
        step(&mut scheduler, "flood");
        assert!(
            scheduler.running().len() <= 6,
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
    let mut scheduler = scheduler(64, 4);
    let (old, _old_events) = sequence(0, KV_PAGE_TOKENS, 40);
    let (young, _young_events) = sequence(1, 2 * KV_PAGE_TOKENS - 1, 10);
    scheduler.push(old);
    scheduler.push(young);
    step(&mut scheduler, "both start");
    assert_eq!(scheduler.running().len(), 2);
    step(&mut scheduler, "the fourth page goes to the older one");
    assert_eq!(scheduler.pages().num_free(), 0);
    step(&mut scheduler, "the younger one asks for a fifth");
    assert_eq!(scheduler.running().len(), 1);
    assert_eq!(scheduler.num_preempted(), 1);
    assert_eq!(scheduler.preemptions(), 1);
    let preempted = &scheduler.waiting[0];
    assert_eq!(
        (preempted.id, preempted.tokens.len()),
        (SequenceId(1), 2 * KV_PAGE_TOKENS + 1)
    );
    while scheduler
        .running()
        .first()
        .is_some_and(|sequence| sequence.id == SequenceId(0))
    {
        step(&mut scheduler, "the older one goes on alone");
    }
    let chunks = step(&mut scheduler, "the younger one is back");
    assert_eq!(
        chunks,
        [Chunk {
            sequence: 0,
            positions: 0..2 * KV_PAGE_TOKENS + 1
        }]
    );
}

#[test]
fn a_newcomer_leaves_the_page_that_a_running_sequence_is_about_to_ask_for() {
    let mut scheduler = scheduler(64, 2);
    let (old, _old_events) = sequence(0, KV_PAGE_TOKENS - 1, 4);
    let (young, mut young_events) = sequence(1, 1, 1);
    scheduler.push(old);
    scheduler.push(young);
    while young_events.try_recv().is_err() {
        step(&mut scheduler, "the older one first");
    }
    assert_eq!(scheduler.preemptions(), 0);
}

#[test]
fn a_client_that_went_away_frees_pages_and_place() {
    let mut scheduler = scheduler(64, 8);
    let (running, running_events) = sequence(0, 40, 10);
    let (waiting, waiting_events) = sequence(1, 100, 10);
    scheduler.push(running);
    scheduler.push(waiting);
    step(&mut scheduler, "start");
    assert_eq!((scheduler.running().len(), scheduler.waiting.len()), (1, 1));
    drop((running_events, waiting_events));
    scheduler.remove_ended();
    assert!(scheduler.is_idle());
    assert_eq!(scheduler.pages().num_used(), 0);
}

#[test]
fn a_sequence_that_outgrows_the_short_factors_is_computed_again() {
    let config = SchedulerConfig {
        max_batch_tokens: 8,
        num_pages: 8,
        long_rope_above: Some(20),
    };
    let mut scheduler = Scheduler::new(config);
    let (sequence, _events) = sequence(0, 18, 10);
    scheduler.push(sequence);
    let mut planned = Vec::new();
    for _ in 0..10 {
        let chunks = step(&mut scheduler, "longrope");
        planned.push((chunks[0].positions.clone(), scheduler.running()[0].rope_length > 20));
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
        num_pages: 8,
        long_rope_above: Some(20),
    };
    let mut scheduler = Scheduler::new(config);
    let (sequence, _events) = sequence(0, 30, 2);
    scheduler.push(sequence);
    let first_positions: Vec<usize> = (0..4)
        .map(|_| step(&mut scheduler, "longrope")[0].positions.start)
        .collect();
    assert_eq!(first_positions, [0, 8, 16, 24]);
    assert_eq!(scheduler.running()[0].rope_length, 30);
}
