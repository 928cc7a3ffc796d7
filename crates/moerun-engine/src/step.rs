//! One step: the rows of a plan through the model, and what follows from their logits.

use std::any::Any;
use std::borrow::Cow;
use std::collections::HashSet;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use moerun_dispatch::{DispatchError, ExpertBackend};
use moerun_kernels::CpuPool;
use moerun_model::{KvCache, Model, Step, StepSequence};

use crate::chunk::Chunk;
use crate::forward::{Forward, ForwardMemory};
use crate::sampler;
use crate::sequence::{Answer, Generation, Sequence, Task};
use crate::{EngineError, LogprobEntry, SamplingParams};

/// Rows whose logits exist at one time: bounds memory where a request wants those of all its positions.
const LOGITS_ROWS: usize = 64;

/// What computes.
#[derive(Debug)]
pub(crate) struct Compute {
    /// The transformer without its experts.
    pub(crate) model: Arc<Model>,
    /// The experts.
    pub(crate) experts: Arc<dyn ExpertBackend>,
    /// The threads.
    pub(crate) pool: Arc<CpuPool>,
}

/// Memory of a step; the next one uses it again, and asks for none if it is like one before.
#[derive(Debug, Default)]
pub(crate) struct StepMemory {
    forward: ForwardMemory,
    token_ids: Vec<u32>,
    wanted: Vec<WantedRow>,
    /// By chunk, in order of position: each the answer or why there is none.
    answers: Vec<Vec<Result<Answer, EngineError>>>,
    /// By chunk: whether an expert was left out for one of its rows.
    degraded: Vec<bool>,
}

impl StepMemory {
    /// Takes out the last step's answers to the rows of chunk `chunk` that wanted one, in order of position: each the
    /// answer or why there is none.
    pub(crate) fn answers_of(&mut self, chunk: usize) -> impl Iterator<Item = Result<Answer, EngineError>> {
        self.answers[chunk].drain(..)
    }

    /// Whether the last step left out an expert for a row of chunk `chunk`, drafted rows included.
    pub(crate) fn is_degraded(&self, chunk: usize) -> bool {
        self.degraded[chunk]
    }
}

/// A row of the batch whose logits are wanted.
#[derive(Debug)]
struct WantedRow {
    /// Row of the batch.
    row: usize,
    /// Index of its chunk.
    chunk: usize,
    /// Its absolute position.
    position: usize,
    answer: Option<Result<Answer, EngineError>>,
}

impl Compute {
    /// What computes, lent.
    pub(crate) fn as_forward(&self) -> Forward<'_> {
        Forward {
            pool: &self.pool,
            model: &self.model,
            experts: &*self.experts,
        }
    }

    /// Runs `chunks` of `running` and answers the rows that want it ([`StepMemory::answers_of`]). Changes nothing but the cache, at the
    /// chunks' own positions, so a step that failed can be run again. A panic comes back as an error.
    pub(crate) fn run(
        &self,
        memory: &mut StepMemory,
        running: &[Sequence],
        chunks: &[Chunk],
        kv: &mut KvCache,
    ) -> Result<(), EngineError> {
        // A step that unwinds leaves behind only keys and values at positions that nobody reads before they are
        // written again, and memory whose contents nobody reads.
        guarded(AssertUnwindSafe(|| {
            self.forward(memory, running, chunks, kv)?;
            self.answer(memory, running, chunks);
            Ok(())
        }))
    }

    /// Lays the chunks out as one batch, runs all layers and answers.
    fn forward(
        &self,
        memory: &mut StepMemory,
        running: &[Sequence],
        chunks: &[Chunk],
        kv: &mut KvCache,
    ) -> Result<(), EngineError> {
        let StepMemory {
            forward,
            token_ids,
            wanted,
            degraded,
            ..
        } = memory;
        token_ids.clear();
        wanted.clear();
        degraded.clear();
        degraded.resize(chunks.len(), false);
        let workspace = self.pool.workspace();
        let sequences = workspace.collect(chunks.iter().enumerate().map(|(index, chunk)| {
            let sequence = &running[chunk.sequence];
            let Range { start, end } = chunk.positions;
            let first_row = token_ids.len();
            token_ids.extend_from_slice(&sequence.tokens[start..end]);
            token_ids.extend_from_slice(&chunk.draft);
            wanted.extend(sequence.logits_wanted(chunk).map(|position| WantedRow {
                row: first_row + position - start,
                chunk: index,
                position,
                answer: None,
            }));
            StepSequence {
                rows: first_row..token_ids.len(),
                first_position: start,
                start_position: 0,
                pages: &sequence.pages,
                rope_length: sequence.rope_length,
            }
        }));
        let step = Step { sequences };
        self.as_forward().run(forward, token_ids, &step, kv, None)?;
        for row in forward.degraded_rows() {
            // Chunks lie one after another.
            degraded[step.sequences.partition_point(|sequence| sequence.rows.end <= row)] = true;
        }
        Ok(())
    }

    /// Logits of the rows that are wanted, and what their sequences make of them.
    fn answer(&self, memory: &mut StepMemory, running: &[Sequence], chunks: &[Chunk]) {
        let StepMemory {
            forward,
            wanted,
            answers,
            ..
        } = memory;
        if answers.len() < chunks.len() {
            answers.resize_with(chunks.len(), Vec::new);
        }
        answers.iter_mut().for_each(Vec::clear);
        for piece in wanted.chunks_mut(LOGITS_ROWS) {
            let workspace = self.pool.workspace();
            let rows = piece.iter().map(|wanted| wanted.row);
            let logits = self.model.logits_of_rows(&workspace, forward.hidden_states(), rows); // [piece, vocab]
            let vocab = logits.ncols();
            let logits = logits.as_slice().expect("rows of logits lie one after another");
            let rows = piece.iter_mut().zip(logits.chunks(vocab.max(1)));
            self.pool.for_each(workspace.collect(rows), |(wanted, logits)| {
                let chunk = &chunks[wanted.chunk];
                let task = &running[chunk.sequence].task;
                wanted.answer = Some(answer_row(task, chunk, logits, wanted.position));
            });
        }
        for wanted in wanted {
            answers[wanted.chunk].push(wanted.answer.take().expect("every row was answered"));
        }
    }
}

/// What a sequence makes of the logits at `position` of its chunk, `[vocab]`.
fn answer_row(task: &Task, chunk: &Chunk, logits: &[f32], position: usize) -> Result<Answer, EngineError> {
    match task {
        Task::Forward(_) => Ok(Answer::Logits(logits.to_vec())),
        Task::Generate(Generation {
            sampling,
            logprobs,
            seen,
            ..
        }) => {
            let drafted = chunk.drafted_up_to(position);
            let seen = if sampling.repetition_penalty == 1.0 || drafted.is_empty() {
                Cow::Borrowed(seen)
            } else {
                Cow::Owned(seen.iter().chain(drafted).copied().collect())
            };
            let (id, logprobs) = next_token(logits, sampling, *logprobs, &seen, position + 1)?;
            Ok(Answer::Token { id, logprobs })
        }
    }
}

fn next_token(
    logits: &[f32],
    sampling: &SamplingParams,
    logprobs: Option<usize>,
    seen: &HashSet<u32>,
    position: usize,
) -> Result<(u32, Option<Vec<LogprobEntry>>), EngineError> {
    let id = sampler::sample(logits, sampling, seen, position)?;
    Ok((id, logprobs.map(|top| sampler::logprobs(logits, id, top))))
}

/// Whether `error` may come from the values of single rows, so that the other sequences of the step can be saved by
/// running each alone. A worker that is gone is gone for all of them.
pub(crate) fn may_be_one_sequences_fault(error: &EngineError) -> bool {
    match error {
        EngineError::Model(_) | EngineError::Panicked(_) => true,
        EngineError::Dispatch(error) => matches!(
            error,
            DispatchError::Local(_)
                | DispatchError::TermOutOfRange { .. }
                | DispatchError::Invalid { .. }
                | DispatchError::Internal { .. }
        ),
        _ => false,
    }
}

/// Runs `work`; a panic becomes an error.
pub(crate) fn guarded<T>(work: AssertUnwindSafe<impl FnOnce() -> Result<T, EngineError>>) -> Result<T, EngineError> {
    catch_unwind(work).unwrap_or_else(|payload| Err(EngineError::Panicked(panic_message(&*payload))))
}

fn panic_message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("a panic without a message").to_owned()
}
