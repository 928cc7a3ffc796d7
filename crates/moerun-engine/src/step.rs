//! One step: the rows of a plan through the model, and what follows from their logits.

use std::any::Any;
use std::borrow::Cow;
use std::collections::HashSet;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};

use moerun_dispatch::{DispatchError, ExpertBackend};
use moerun_kernels::CpuPool;
use moerun_model::{KvCache, Model, Step, StepSequence};
use ndarray::{Array2, ArrayView1, Axis};

use crate::chunk::Chunk;
use crate::forward::forward_step;
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

/// Answers to the rows of one chunk that want it, in order of position: each the answer or why there is none.
pub(crate) type ChunkAnswers = Vec<Result<Answer, EngineError>>;

/// A row of the batch whose logits are wanted.
#[derive(Debug, Clone, Copy)]
struct WantedRow {
    /// Row of the batch.
    row: usize,
    /// Index of its chunk.
    chunk: usize,
    /// Its absolute position.
    position: usize,
}

impl Compute {
    /// Runs `chunks` of `running` and answers the rows that want it, chunk by chunk. Changes nothing but the cache, at the chunks' own positions, so a step that failed can be run again.
    /// A panic comes back as an error.
    pub(crate) fn run(
        &self,
        running: &[Sequence],
        chunks: &[Chunk],
        kv: &mut KvCache,
    ) -> Result<Vec<ChunkAnswers>, EngineError> {
        // A step that unwinds leaves behind only keys and values at positions that nobody reads before they are
        // written again.
        guarded(AssertUnwindSafe(|| {
            let (hidden_states, wanted) = self.forward(running, chunks, kv)?;
            Ok(self.answer(running, chunks, &hidden_states, &wanted))
        }))
    }

    /// Lays the chunks out as one batch and runs all layers, `[tokens, hidden]`.
    fn forward(
        &self,
        running: &[Sequence],
        chunks: &[Chunk],
        kv: &mut KvCache,
    ) -> Result<(Array2<f32>, Vec<WantedRow>), EngineError> {
        let mut token_ids = Vec::new();
        let mut sequences = Vec::with_capacity(chunks.len());
        let mut wanted = Vec::new();
        for (index, chunk) in chunks.iter().enumerate() {
            let sequence = &running[chunk.sequence];
            let Range { start, end } = chunk.positions;
            let first_row = token_ids.len();
            token_ids.extend_from_slice(&sequence.tokens[start..end]);
            token_ids.extend_from_slice(&chunk.draft);
            sequences.push(StepSequence {
                rows: first_row..token_ids.len(),
                first_position: start,
                start_position: 0,
                pages: &sequence.pages,
                rope_length: sequence.rope_length,
            });
            wanted.extend(sequence.logits_wanted(chunk).into_iter().map(|position| WantedRow {
                row: first_row + position - start,
                chunk: index,
                position,
            }));
        }
        let step = Step { sequences: &sequences };
        let hidden_states = forward_step(&self.pool, &self.model, &*self.experts, &token_ids, &step, kv, None)?;
        Ok((hidden_states, wanted))
    }

    /// Logits of the rows that are wanted, and what their sequences make of them.
    fn answer(
        &self,
        running: &[Sequence],
        chunks: &[Chunk],
        hidden_states: &Array2<f32>,
        wanted: &[WantedRow],
    ) -> Vec<ChunkAnswers> {
        let mut answers: Vec<ChunkAnswers> = chunks.iter().map(|_| Vec::new()).collect();
        for piece in wanted.chunks(LOGITS_ROWS) {
            let rows: Vec<usize> = piece.iter().map(|wanted| wanted.row).collect();
            let normed = self.model.final_norm(&hidden_states.select(Axis(0), &rows)); // [piece, hidden]
            let logits = self.model.logits(&self.pool, &normed); // [piece, vocab]
            let results: Vec<OnceLock<Result<Answer, EngineError>>> = piece.iter().map(|_| OnceLock::new()).collect();
            self.pool.run(piece.len(), &|row| {
                let WantedRow { chunk, position, .. } = piece[row];
                let chunk = &chunks[chunk];
                let answer = answer_row(&running[chunk.sequence].task, chunk, logits.row(row), position);
                results[row].set(answer).expect("each task runs once");
            });
            for (wanted, result) in piece.iter().zip(results) {
                answers[wanted.chunk].push(result.into_inner().expect("every task ran"));
            }
        }
        answers
    }
}

/// What a sequence makes of the logits at `position` of its chunk, `[vocab]`.
fn answer_row(task: &Task, chunk: &Chunk, logits: ArrayView1<'_, f32>, position: usize) -> Result<Answer, EngineError> {
    let logits = logits.to_slice().expect("a row of logits is contiguous");
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
