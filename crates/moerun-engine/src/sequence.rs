//! One sequence: its tokens, what of it is in the cache, and whom to tell.

use std::collections::HashSet;
use std::ops::Range;

use moerun_kernels::KV_PAGE_TOKENS;
use moerun_types::SequenceId;
use tokio::sync::mpsc;

use crate::chunk::Chunk;
use crate::page_hash::{PageHashes, RopeSet};
use crate::reply::{QueuePlace, Reply};
use crate::{
    EngineError, FinishReason, ForwardRequest, GenerateRequest, LogitsRow, LogprobEntry, SamplingParams, TokenEvent,
};

/// A sequence that waits or runs.
#[derive(Debug)]
pub(crate) struct Sequence {
    /// Its name in logs.
    pub(crate) id: SequenceId,
    /// Prompt and output so far.
    pub(crate) tokens: Vec<u32>,
    /// Leading tokens whose keys and values are in the cache.
    pub(crate) cached: usize,
    /// Its pages, in order of position.
    pub(crate) pages: Vec<u32>,
    /// Leading pages that were found in the prefix cache or offered to it: full, and never written again.
    pub(crate) settled_pages: usize,
    /// Names of its full pages.
    pub(crate) hashes: PageHashes,
    /// Tokens known when the cache was begun: decides which longrope factors the cached keys were turned with.
    pub(crate) rope_length: usize,
    /// Its place in the queue until it starts for the first time.
    pub(crate) place: Option<QueuePlace>,
    /// Whether an expert was ever left out for one of its rows. Its tokens follow from that, so it stays.
    pub(crate) degraded: bool,
    /// What is to be told of it.
    pub(crate) task: Task,
}

/// What a client wants of a sequence.
#[derive(Debug)]
pub(crate) enum Task {
    /// Its continuation.
    Generate(Generation),
    /// Logits of its tokens.
    Forward(LogitsOf),
}

/// A continuation under way.
#[derive(Debug)]
pub(crate) struct Generation {
    prompt_tokens: usize,
    /// Leading tokens of the prompt that the prefix cache had when the sequence first started.
    cached_tokens: usize,
    max_tokens: usize,
    stop_token_ids: Vec<u32>,
    /// How the next token is chosen.
    pub(crate) sampling: SamplingParams,
    /// How many likeliest tokens to report.
    pub(crate) logprobs: Option<usize>,
    /// Distinct tokens of prompt and output; kept only where the repetition penalty asks for them.
    pub(crate) seen: HashSet<u32>,
    reply: Reply<TokenEvent>,
}

/// Logits under way.
#[derive(Debug)]
pub(crate) struct LogitsOf {
    positions: Vec<usize>,
    /// Leading positions that were answered, before a preemption perhaps.
    answered: usize,
    reply: Reply<Result<LogitsRow, EngineError>>,
}

/// What a step found out about one row.
#[derive(Debug)]
pub(crate) enum Answer {
    /// The next token.
    Token {
        /// Its id.
        id: u32,
        /// As asked for.
        logprobs: Option<Vec<LogprobEntry>>,
    },
    /// Logits of the next position asked for, `[vocab]`.
    Logits(Vec<f32>),
}

impl Sequence {
    /// A sequence to continue, whose request was checked and whose `max_tokens` fits context and cache.
    pub(crate) fn generate(
        id: SequenceId,
        request: GenerateRequest,
        place: QueuePlace,
    ) -> (Self, mpsc::Receiver<TokenEvent>) {
        let (reply, events) = Reply::new(request.max_tokens);
        let penalised = request.sampling.repetition_penalty != 1.0;
        let seen = if penalised {
            request.prompt_ids.iter().copied().collect()
        } else {
            HashSet::new()
        };
        let task = Task::Generate(Generation {
            prompt_tokens: request.prompt_ids.len(),
            cached_tokens: 0,
            max_tokens: request.max_tokens,
            stop_token_ids: request.stop_token_ids,
            sampling: request.sampling,
            logprobs: request.logprobs,
            seen,
            reply,
        });
        (Self::new(id, request.prompt_ids, place, task), events)
    }

    /// A sequence whose logits are wanted, whose request was checked.
    pub(crate) fn forward(
        id: SequenceId,
        request: ForwardRequest,
        place: QueuePlace,
    ) -> (Self, mpsc::Receiver<Result<LogitsRow, EngineError>>) {
        let (reply, rows) = Reply::new(request.positions.len());
        let task = Task::Forward(LogitsOf {
            positions: request.positions,
            answered: 0,
            reply,
        });
        (Self::new(id, request.token_ids, place, task), rows)
    }

    fn new(id: SequenceId, tokens: Vec<u32>, place: QueuePlace, task: Task) -> Self {
        Self {
            id,
            tokens,
            cached: 0,
            pages: Vec::new(),
            settled_pages: 0,
            hashes: PageHashes::new(RopeSet::Short),
            rope_length: 0,
            place: Some(place),
            degraded: false,
            task,
        }
    }

    /// Begins (again) to fill the cache, with the tokens known now and pages whose first `cached_pages` are full and
    /// hold what they should.
    pub(crate) fn begin_fill(&mut self, cached_pages: usize) {
        self.cached = cached_pages * KV_PAGE_TOKENS;
        self.settled_pages = cached_pages;
        self.rope_length = self.tokens.len();
        // Only the first start gives up a place in the queue.
        if self.place.take().is_some()
            && let Task::Generate(generation) = &mut self.task
        {
            generation.cached_tokens = self.cached;
        }
    }

    /// Leading tokens that need not be computed if the cache has them: all before the first whose logits are wanted.
    pub(crate) fn skippable(&self) -> usize {
        match &self.task {
            Task::Generate(_) => self.tokens.len() - 1,
            Task::Forward(logits) => logits.positions[logits.answered],
        }
    }

    /// Most tokens that may be drafted behind those that are known: one fewer than it may still generate, as the step
    /// finds one more than were drafted.
    pub(crate) fn max_draft(&self) -> usize {
        match &self.task {
            Task::Generate(generation) => {
                let generated = self.tokens.len() - generation.prompt_tokens;
                generation.max_tokens - generated - 1
            }
            Task::Forward(_) => 0,
        }
    }

    /// Tokens that are known and not yet in the cache.
    pub(crate) fn pending(&self) -> usize {
        self.tokens.len() - self.cached
    }

    /// Positions of `chunk` whose logits are wanted, ascending: drafted ones too, each the next token's if all drafted
    /// before it are right. `chunk` starts where the cache ends.
    pub(crate) fn logits_wanted(&self, chunk: &Chunk) -> impl Iterator<Item = usize> {
        let Range { end, .. } = chunk.positions;
        let (next, asked): (Range<usize>, &[usize]) = match &self.task {
            Task::Generate(_) if end == self.tokens.len() => (end - 1..end + chunk.draft.len(), &[]),
            Task::Generate(_) => (0..0, &[]),
            Task::Forward(logits) => {
                let open = &logits.positions[logits.answered..];
                (0..0, &open[..open.partition_point(|&position| position < end)])
            }
        };
        next.chain(asked.iter().copied())
    }

    /// Takes in what a step found out about `chunk`, in the order of [`Sequence::logits_wanted`], and tells the client.
    /// Returns how many of the drafted tokens were right; answers behind a wrong one mean nothing and are dropped,
    /// errors among them.
    pub(crate) fn take_in(
        &mut self,
        chunk: &Chunk,
        answers: impl IntoIterator<Item = Result<Answer, EngineError>>,
    ) -> Result<usize, EngineError> {
        self.cached = chunk.positions.end;
        let mut accepted = 0;
        for answer in answers {
            match (&mut self.task, answer?) {
                (Task::Generate(generation), Answer::Token { id, logprobs }) => {
                    self.tokens.push(id);
                    let generated = self.tokens.len() - generation.prompt_tokens;
                    generation.tell(id, logprobs, generated, self.degraded);
                    if generation.reply.is_over() || chunk.draft.get(accepted) != Some(&id) {
                        break;
                    }
                    accepted += 1;
                    self.cached += 1;
                }
                (Task::Forward(logits), Answer::Logits(row)) => logits.tell(row, self.degraded),
                (Task::Generate(_), Answer::Logits(_)) | (Task::Forward(_), Answer::Token { .. }) => {
                    unreachable!("a step answers a task with the task's own kind of answer")
                }
            }
        }
        Ok(accepted)
    }

    /// Ends the sequence with `error`.
    pub(crate) fn fail(&mut self, error: EngineError) {
        match &mut self.task {
            Task::Generate(generation) => generation.reply.fail(error),
            Task::Forward(logits) => logits.reply.fail(error),
        }
    }

    /// Whether nobody waits for more: it ended, or the client went away.
    pub(crate) fn is_over(&self) -> bool {
        match &self.task {
            Task::Generate(generation) => generation.reply.is_over(),
            Task::Forward(logits) => logits.reply.is_over(),
        }
    }
}

impl Generation {
    fn tell(&mut self, id: u32, logprobs: Option<Vec<LogprobEntry>>, generated: usize, degraded: bool) {
        if self.sampling.repetition_penalty != 1.0 {
            self.seen.insert(id);
        }
        let finish = if self.stop_token_ids.contains(&id) {
            Some(FinishReason::Stop)
        } else if generated >= self.max_tokens {
            Some(FinishReason::Length)
        } else {
            None
        };
        let event = TokenEvent::Token {
            id,
            logprobs,
            cached_tokens: self.cached_tokens,
            degraded,
            finish,
        };
        if finish.is_some() {
            self.reply.finish(event)
        } else {
            self.reply.send(event)
        }
    }
}

impl LogitsOf {
    fn tell(&mut self, logits: Vec<f32>, degraded: bool) {
        self.reply.send(Ok(LogitsRow { logits, degraded }));
        self.answered += 1;
        if self.answered == self.positions.len() {
            self.reply.end();
        }
    }
}
