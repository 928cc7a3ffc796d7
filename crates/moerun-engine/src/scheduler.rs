//! Which rows run next: admission, chunks, drafts, preemption. Moves sequences and pages about; knows no model.
//!
//! Both lists are in order of arrival. Decode rows come first, then prefill chunks, oldest first, then newcomers, as
//! long as the step has rows left. What makes progress certain: the oldest running sequence is never preempted for
//! another one, and a sequence alone always fits (requests are checked for that before they come here).

use std::collections::VecDeque;

use moerun_kernels::KV_PAGE_TOKENS;

use crate::chunk::Chunk;
use crate::draft;
use crate::page_hash::RopeSet;
use crate::pages::{PagePool, pages_for};
use crate::sequence::{Answer, Sequence};
use crate::{EngineError, EngineStats};

/// Bounds of a scheduler.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SchedulerConfig {
    /// Most rows in one step, at least 1.
    pub(crate) max_batch_tokens: usize,
    /// Pages of the cache, at least 1.
    pub(crate) num_pages: u32,
    /// For longrope: the length above which the long factors apply, and a cache filled with the short ones is void.
    pub(crate) long_rope_above: Option<usize>,
    /// Whether full pages are named and shared.
    pub(crate) prefix_cache: bool,
    /// Most tokens drafted for one sequence in one step; 0 = none.
    pub(crate) speculate: usize,
}

/// Sequences that wait and that run, and their pages.
#[derive(Debug)]
pub(crate) struct Scheduler {
    config: SchedulerConfig,
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    pages: PagePool,
    /// What is counted from the start on; the other counts stay 0.
    counted: EngineStats,
}

impl Scheduler {
    /// Nothing waits or runs.
    pub(crate) fn new(config: SchedulerConfig) -> Self {
        let pages = PagePool::new(config.num_pages);
        Self {
            config,
            waiting: VecDeque::new(),
            running: Vec::new(),
            pages,
            counted: EngineStats::default(),
        }
    }

    /// Queues a sequence behind all others.
    pub(crate) fn push(&mut self, sequence: Sequence) {
        debug_assert!(
            pages_for(sequence.tokens.len()) <= self.pages.total(),
            "requests are checked against the cache"
        );
        self.waiting.push_back(sequence);
    }

    /// Decides the next step; empty if nothing can run. At most one chunk per sequence, and at most
    /// `max_batch_tokens` positions in all. They come into `chunks`, whatever that was before.
    pub(crate) fn plan(&mut self, chunks: &mut Vec<Chunk>) {
        self.restart_long_sequences();
        let preempted = self.grow();
        chunks.clear();
        let mut budget = self.config.max_batch_tokens;
        for decodes in [true, false] {
            for index in 0..self.running.len() {
                if (self.running[index].pending() == 1) == decodes {
                    budget -= self.plan_chunk(index, budget, chunks);
                }
            }
        }
        // Pages were short a moment ago: a newcomer would only be preempted in its turn.
        while !preempted && budget > 0 && self.admit() {
            budget -= self.plan_chunk(self.running.len() - 1, budget, chunks);
        }
        // Last, so that a guess never takes a row that somebody certainly needs.
        for chunk in chunks {
            self.draft(chunk, budget);
            budget -= chunk.draft.len();
        }
    }

    /// Plans up to `budget` positions of one sequence and returns how many.
    fn plan_chunk(&self, index: usize, budget: usize, chunks: &mut Vec<Chunk>) -> usize {
        let sequence = &self.running[index];
        let rows = sequence.pending().min(budget);
        if rows > 0 {
            chunks.push(Chunk {
                sequence: index,
                positions: sequence.cached..sequence.cached + rows,
                draft: Vec::new(),
            });
        }
        rows
    }

    /// Adds up to `budget` drafted tokens to a chunk that reaches the end of what is known, as far as there are pages
    /// that nobody is about to need.
    fn draft(&mut self, chunk: &mut Chunk, budget: usize) {
        let reserve = self.reserve();
        let sequence = &mut self.running[chunk.sequence];
        let known = sequence.tokens.len();
        if chunk.positions.end < known {
            return;
        }
        // A token past the limit would be computed with the long factors, and all before it again.
        let same_rope = match self.config.long_rope_above {
            Some(limit) if sequence.rope_length <= limit => limit - known,
            _ => usize::MAX,
        };
        let most = self
            .config
            .speculate
            .min(budget)
            .min(sequence.max_draft())
            .min(same_rope);
        if most == 0 {
            return;
        }
        chunk.draft = draft::look_up(&sequence.tokens, most);
        let missing = pages_for(known + chunk.draft.len()).saturating_sub(sequence.pages.len());
        let has_room = missing + reserve <= self.pages.num_free() || missing == 0;
        if !(has_room && self.pages.take(missing, &mut sequence.pages)) {
            chunk.draft.truncate(sequence.pages.len() * KV_PAGE_TOKENS - known);
        }
    }

    /// Takes in what a step found out about `chunk`, tells the client, and names the pages that are full now. `degraded`
    /// says whether an expert was left out in it: no page that the sequence fills from then on is shared.
    pub(crate) fn take_in(
        &mut self,
        chunk: &Chunk,
        degraded: bool,
        answers: impl IntoIterator<Item = Result<Answer, EngineError>>,
    ) -> Result<(), EngineError> {
        let sequence = &mut self.running[chunk.sequence];
        if degraded && !std::mem::replace(&mut sequence.degraded, true) {
            self.counted.degraded_sequences += 1;
            tracing::warn!(sequence = %sequence.id, "an expert was left out: the answer is marked as degraded");
        }
        let accepted = sequence.take_in(chunk, answers)?;
        self.counted.drafted_tokens += chunk.draft.len() as u64;
        self.counted.accepted_tokens += accepted as u64;
        if self.config.prefix_cache && !sequence.degraded {
            let names = sequence.hashes.of_full_pages(&sequence.tokens[..sequence.cached]);
            for (&page, &name) in sequence.pages.iter().zip(names).skip(sequence.settled_pages) {
                self.pages.name(page, name);
            }
            sequence.settled_pages = names.len();
        }
        Ok(())
    }

    /// A sequence that has outgrown the short longrope factors is computed anew with the long ones, as transformers
    /// does, in other pages: others may read those that it has.
    fn restart_long_sequences(&mut self) {
        let Some(limit) = self.config.long_rope_above else {
            return;
        };
        for index in 0..self.running.len() {
            let sequence = &mut self.running[index];
            if sequence.tokens.len() > limit && sequence.rope_length <= limit {
                self.pages.give_back(&mut sequence.pages);
                let prefix = cached_prefix(&self.config, &self.pages, sequence);
                self.begin_fill(index, prefix);
            }
        }
    }

    /// Starts a running sequence that has no pages with those of `prefix`, just found.
    fn begin_fill(&mut self, index: usize, prefix: Vec<u32>) {
        let sequence = &mut self.running[index];
        debug_assert!(sequence.pages.is_empty(), "pages of a sequence that starts");
        self.pages.share(&prefix);
        sequence.pages = prefix;
        sequence.begin_fill(sequence.pages.len());
        if self.config.prefix_cache {
            self.counted.prefix_queried_tokens += sequence.tokens.len() as u64;
            self.counted.prefix_hit_tokens += sequence.cached as u64;
        }
    }

    /// Pages that the running sequences ask for in one step on average.
    fn reserve(&self) -> usize {
        self.running.len().div_ceil(KV_PAGE_TOKENS)
    }

    /// Gives every running sequence, oldest first, the pages that its tokens need, preempting the youngest where there
    /// are none left. Returns whether it had to.
    fn grow(&mut self) -> bool {
        let mut preempted = false;
        let mut index = 0;
        while index < self.running.len() {
            let sequence = &mut self.running[index];
            let missing = pages_for(sequence.tokens.len()).saturating_sub(sequence.pages.len());
            if self.pages.take(missing, &mut sequence.pages) {
                index += 1;
            } else {
                self.preempt_youngest();
                preempted = true;
            }
        }
        preempted
    }

    /// The youngest running sequence (the one that asked, perhaps) gives its pages back and waits at the front, to be
    /// computed again from the tokens it has.
    fn preempt_youngest(&mut self) {
        let Some(mut sequence) = self.running.pop() else { return };
        tracing::debug!(sequence = %sequence.id, tokens = sequence.tokens.len(), "preempted: the cache is full");
        self.pages.give_back(&mut sequence.pages);
        self.waiting.push_front(sequence);
        self.counted.preemptions += 1;
    }

    /// Starts the sequence that has waited longest, if there is room for all the tokens it has; says whether it did.
    fn admit(&mut self) -> bool {
        if self.running.len() >= self.max_running() {
            return false;
        }
        let Some(front) = self.waiting.front_mut() else {
            return false;
        };
        let prefix = cached_prefix(&self.config, &self.pages, front);
        let new = pages_for(front.tokens.len()) - prefix.len();
        let woken = prefix.iter().filter(|&&page| self.pages.is_free(page)).count();
        // A reserve stays free, or the newcomer would soon be preempted.
        if new + woken + self.reserve() > self.pages.num_free() {
            return false;
        }
        let sequence = self.waiting.pop_front().expect("there is a front");
        self.running.push(sequence);
        let index = self.running.len() - 1;
        self.begin_fill(index, prefix);
        let taken = self.pages.take(new, &mut self.running[index].pages);
        debug_assert!(taken, "pages were counted above");
        true
    }

    /// A quarter of a step (at least one row) is left to prefill when all other sequences decode, so neither can
    /// starve the other.
    fn max_running(&self) -> usize {
        let rows = self.config.max_batch_tokens;
        (rows - (rows / 4).max(1)).max(1)
    }

    /// Removes every sequence that ended or whose client went away; their pages are free.
    pub(crate) fn remove_ended(&mut self) {
        let pages = &mut self.pages;
        self.running.retain_mut(|sequence| {
            let over = sequence.is_over();
            if over {
                pages.give_back(&mut sequence.pages);
            }
            !over
        });
        self.waiting.retain(|sequence| !sequence.is_over());
    }

    /// Sequences with pages, oldest first.
    pub(crate) fn running(&self) -> &[Sequence] {
        &self.running
    }

    /// A running sequence.
    pub(crate) fn running_mut(&mut self, index: usize) -> &mut Sequence {
        &mut self.running[index]
    }

    /// Whether nothing waits and nothing runs.
    pub(crate) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Sequences that ran before and wait to run again.
    pub(crate) fn num_preempted(&self) -> usize {
        self.waiting
            .iter()
            .take_while(|sequence| sequence.place.is_none())
            .count()
    }

    /// Counts, as of now.
    pub(crate) fn stats(&self) -> EngineStats {
        EngineStats {
            running: self.running.len(),
            waiting: self.num_preempted(),
            pages_used: self.pages.num_used(),
            pages_cached: self.pages.num_idle(),
            pages_total: self.pages.total(),
            ..self.counted
        }
    }
}

/// Pages that hold the longest prefix of a sequence that starts now, of those that it need not compute.
fn cached_prefix(config: &SchedulerConfig, pages: &PagePool, sequence: &mut Sequence) -> Vec<u32> {
    if !config.prefix_cache {
        return Vec::new();
    }
    let is_long = config
        .long_rope_above
        .is_some_and(|limit| sequence.tokens.len() > limit);
    sequence
        .hashes
        .set_rope(if is_long { RopeSet::Long } else { RopeSet::Short });
    let skippable = sequence.skippable();
    pages.find(sequence.hashes.of_full_pages(&sequence.tokens[..skippable]))
}

#[cfg(test)]
mod tests;
