//! A model that is a function of tokens, position and longrope factors, over a cache that remembers what each slot
//! holds: a row that would read anything but its own sequence's keys, or write what another reads, is found out.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use super::*;
use crate::sequence::Task;

/// Scheduler, fake model and fake cache.
pub(super) struct Simulation {
    pub(super) scheduler: Scheduler,
    /// By page and slot: what the keys there follow from.
    kv: HashMap<(u32, usize), u64>,
}

/// What keys and logits at the last of `tokens` follow from.
fn state(tokens: &[u32], long_rope: bool) -> u64 {
    let mut hasher = DefaultHasher::new();
    (tokens, long_rope).hash(&mut hasher);
    hasher.finish()
}

/// The token after `tokens`: as a rule a function of the last two, so that texts repeat themselves; sometimes of all.
fn next_token(tokens: &[u32], long_rope: bool) -> u32 {
    let all = state(tokens, long_rope);
    let source = if all.is_multiple_of(16) {
        all / 16
    } else {
        state(&tokens[tokens.len().saturating_sub(2)..], long_rope)
    };
    (source % 5) as u32
}

fn is_long(config: &SchedulerConfig, length: usize) -> bool {
    config.long_rope_above.is_some_and(|limit| length > limit)
}

/// What follows `prompt`, token by token.
pub(super) fn continuation(config: &SchedulerConfig, prompt: &[u32], count: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..count {
        tokens.push(next_token(&tokens, is_long(config, tokens.len())));
    }
    tokens.split_off(prompt.len())
}

/// Rows of the batch, drafted ones included.
pub(super) fn rows_of(chunk: &Chunk) -> usize {
    chunk.positions.len() + chunk.draft.len()
}

impl Simulation {
    pub(super) fn new(config: SchedulerConfig) -> Self {
        Self {
            scheduler: Scheduler::new(config),
            kv: HashMap::new(),
        }
    }

    /// Plans a step, checks what must hold of any plan, and runs it.
    pub(super) fn step(&mut self, context: &str) -> Vec<Chunk> {
        self.scheduler.remove_ended();
        let oldest = self.scheduler.running().first().map(|sequence| sequence.id);
        let mut chunks = Vec::new();
        self.scheduler.plan(&mut chunks);
        check_plan(&self.scheduler, &chunks, context);
        check_pages(&self.scheduler, context);
        if let Some(oldest) = oldest {
            let progresses = chunks
                .iter()
                .any(|chunk| self.scheduler.running()[chunk.sequence].id == oldest);
            assert!(progresses, "{context}: the oldest sequence {oldest} stands still");
        }
        // All write before any reads, as rows of one batch may.
        for chunk in &chunks {
            self.write(chunk, context);
        }
        for chunk in &chunks {
            let answers = self.read(chunk, context);
            self.scheduler
                .take_in(chunk, false, answers)
                .expect("no answer is an error");
        }
        self.scheduler.remove_ended();
        chunks
    }

    /// The chunk's sequence, its tokens with the draft, and whether its keys are turned with the long factors.
    fn of(&self, chunk: &Chunk) -> (&Sequence, Vec<u32>, bool) {
        let sequence = &self.scheduler.running()[chunk.sequence];
        let tokens = [&sequence.tokens[..chunk.positions.end], &chunk.draft].concat();
        let long_rope = is_long(&self.scheduler.config, sequence.rope_length);
        (sequence, tokens, long_rope)
    }

    fn write(&mut self, chunk: &Chunk, context: &str) {
        let (sequence, tokens, long_rope) = self.of(chunk);
        let writes: Vec<_> = (chunk.positions.start..tokens.len())
            .map(|position| {
                let page = sequence.pages[position / KV_PAGE_TOKENS];
                let readers = (self.scheduler.running().iter()).filter(|other| other.pages.contains(&page));
                assert_eq!(readers.count(), 1, "{context}: a row is written to a page of others");
                assert!(
                    position / KV_PAGE_TOKENS >= sequence.settled_pages,
                    "{context}: a full page is written"
                );
                (
                    (page, position % KV_PAGE_TOKENS),
                    state(&tokens[..=position], long_rope),
                )
            })
            .collect();
        self.kv.extend(writes);
    }

    /// Answers to the rows that want it; a drafted one is answered as if the draft were right.
    fn read(&self, chunk: &Chunk, context: &str) -> Vec<Result<Answer, EngineError>> {
        let (sequence, tokens, long_rope) = self.of(chunk);
        for position in 0..tokens.len() {
            let slot = (sequence.pages[position / KV_PAGE_TOKENS], position % KV_PAGE_TOKENS);
            let wanted = Some(state(&tokens[..=position], long_rope));
            assert_eq!(
                self.kv.get(&slot).copied(),
                wanted,
                "{context}: keys of another text at {position}"
            );
        }
        let answer = |position| match sequence.task {
            Task::Generate(_) => Answer::Token {
                id: next_token(&tokens[..=position], is_long(&self.scheduler.config, position + 1)),
                logprobs: None,
            },
            Task::Forward(_) => Answer::Logits(vec![position as f32]),
        };
        let wanted = sequence.logits_wanted(chunk);
        wanted.map(|position| Ok(answer(position))).collect()
    }
}

fn check_plan(scheduler: &Scheduler, chunks: &[Chunk], context: &str) {
    let rows: usize = chunks.iter().map(rows_of).sum();
    assert!(rows <= scheduler.config.max_batch_tokens, "{context}: {rows} rows");
    let mut planned = HashSet::new();
    for chunk in chunks {
        let sequence = &scheduler.running()[chunk.sequence];
        assert!(
            planned.insert(chunk.sequence),
            "{context}: two chunks of {}",
            sequence.id
        );
        assert!(!chunk.positions.is_empty(), "{context}: an empty chunk");
        assert_eq!(chunk.positions.start, sequence.cached, "{context}");
        assert!(chunk.positions.end <= sequence.tokens.len(), "{context}");
        assert!(
            chunk.draft.is_empty() || chunk.positions.end == sequence.tokens.len(),
            "{context}: a draft in the middle"
        );
        assert!(chunk.draft.len() <= scheduler.config.speculate, "{context}");
        assert!(
            sequence.pages.len() * KV_PAGE_TOKENS >= chunk.positions.start + rows_of(chunk),
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
}

fn check_pages(scheduler: &Scheduler, context: &str) {
    let mut held = HashSet::new();
    for sequence in scheduler.running() {
        held.extend(sequence.pages.iter().copied());
    }
    assert_eq!(held.len(), scheduler.pages.num_used(), "{context}: a page was lost");
    assert!(
        held.iter().all(|&page| !scheduler.pages.is_free(page)),
        "{context}: a page in use is free"
    );
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
