//! Which rows run next: admission, chunks, preemption. Moves sequences and pages about; knows no model.
//!
//! Both lists are in order of arrival. Decode rows come first, then prefill chunks, oldest first, then newcomers, as
//! long as the step has rows left. What makes progress certain: the oldest running sequence is never preempted for
//! another one, and a sequence alone always fits (requests are checked for that before they come here).

use std::collections::VecDeque;
use std::ops::Range;

use moerun_kernels::KV_PAGE_TOKENS;

use crate::pages::{PageAllocator, pages_for};
use crate::sequence::Sequence;

/// Bounds of a scheduler.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SchedulerConfig {
    /// Most rows in one step, at least 1.
    pub(crate) max_batch_tokens: usize,
    /// Pages of the cache, at least 1.
    pub(crate) num_pages: u32,
    /// For longrope: the length above which the long factors apply, and a cache filled with the short ones is void.
    pub(crate) long_rope_above: Option<usize>,
}

/// Sequences that wait and that run, and their pages.
#[derive(Debug)]
pub(crate) struct Scheduler {
    config: SchedulerConfig,
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    pages: PageAllocator,
    preemptions: u64,
}

/// One sequence's share of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Chunk {
    /// Index in [`Scheduler::running`].
    pub(crate) sequence: usize,
    /// Positions to run; they start where the sequence's cache ends.
    pub(crate) positions: Range<usize>,
}

impl Scheduler {
    /// Nothing waits or runs.
    pub(crate) fn new(config: SchedulerConfig) -> Self {
        let pages = PageAllocator::new(config.num_pages);
        Self {
            config,
            waiting: VecDeque::new(),
            running: Vec::new(),
            pages,
            preemptions: 0,
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
    /// `max_batch_tokens` positions in all.
    pub(crate) fn plan(&mut self) -> Vec<Chunk> {
        self.restart_long_sequences();
        let preempted = self.grow();
        let mut chunks = Vec::new();
        let mut budget = self.config.max_batch_tokens;
        let (decode, prefill): (Vec<usize>, Vec<usize>) =
            (0..self.running.len()).partition(|&index| self.running[index].pending() == 1);
        for index in decode.into_iter().chain(prefill) {
            budget -= self.plan_chunk(index, budget, &mut chunks);
        }
        // Pages were short a moment ago: a newcomer would only be preempted in its turn.
        while !preempted && budget > 0 && self.admit() {
            budget -= self.plan_chunk(self.running.len() - 1, budget, &mut chunks);
        }
        chunks
    }

    /// Plans up to `budget` positions of one sequence and returns how many.
    fn plan_chunk(&self, index: usize, budget: usize, chunks: &mut Vec<Chunk>) -> usize {
        let sequence = &self.running[index];
        let rows = sequence.pending().min(budget);
        if rows > 0 {
            chunks.push(Chunk {
                sequence: index,
                positions: sequence.cached..sequence.cached + rows,
            });
        }
        rows
    }

    /// A sequence that has outgrown the short longrope factors is computed anew with the long ones, as transformers
    /// does. It keeps its pages: every position is written again before it is read.
    fn restart_long_sequences(&mut self) {
        let Some(limit) = self.config.long_rope_above else {
            return;
        };
        for sequence in &mut self.running {
            if sequence.tokens.len() > limit && sequence.rope_length <= limit {
                sequence.begin_fill();
            }
        }
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
        self.preemptions += 1;
    }

    /// Starts the sequence that has waited longest, if there is room for all the tokens it has; says whether it did.
    fn admit(&mut self) -> bool {
        if self.running.len() >= self.max_running() {
            return false;
        }
        let Some(front) = self.waiting.front() else {
            return false;
        };
        // What the running sequences ask for in one step on average stays free, or the newcomer would soon be preempted.
        let reserve = self.running.len().div_ceil(KV_PAGE_TOKENS);
        let needed = pages_for(front.tokens.len());
        if needed + reserve > self.pages.num_free() {
            return false;
        }
        let mut sequence = self.waiting.pop_front().expect("there is a front");
        let taken = self.pages.take(needed, &mut sequence.pages);
        debug_assert!(taken, "pages were counted above");
        sequence.begin_fill();
        sequence.place = None;
        self.running.push(sequence);
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

    /// How often a sequence was preempted, so far.
    pub(crate) fn preemptions(&self) -> u64 {
        self.preemptions
    }

    /// The pages.
    pub(crate) fn pages(&self) -> &PageAllocator {
        &self.pages
    }
}

#[cfg(test)]
mod tests;
