//! One step: the rows of a plan through the model, and what follows from their logits.

use std::any::Any;
use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};

use moerun_dispatch::{DispatchError, ExpertBackend};
use moerun_kernels::CpuPool;
use moerun_model::{KvCache, Model, Step, StepSequence};
use ndarray::{Array2, ArrayView1, Axis};

use crate::forward::forward_step;
use crate::sampler;
use crate::scheduler::Chunk;
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

/// The answer to one row: for which sequence, and the answer or why there is none.
pub(crate) type RowAnswer = (usize, Result<Answer, EngineError>);

/// A row of the batch whose logits are wanted.
#[derive(Debug, Clone, Copy)]
struct WantedRow {
    /// Row of the batch.
    row: usize,
    /// Index of its sequence.
    sequence: usize,
    /// Its absolute position.
    position: usize,
}

impl Compute {
    /// Runs `chunks` of `running` and answers the rows that want it, in order of sequence and position within each
    /// chunk. Changes nothing but the cache, at the chunks' own positions, so a step that failed can be run again.
    /// A panic comes back as an error.
    pub(crate) fn run(
        &self,
        running: &[Sequence],
        chunks: &[Chunk],
        kv: &mut KvCache,
    ) -> Result<Vec<RowAnswer>, EngineError> {
        // A step that unwinds leaves behind only keys and values at positions that nobody reads before they are
        // written again.
        guarded(AssertUnwindSafe(|| {
            let (hidden_states, wanted) = self.forward(running, chunks, kv)?;
            Ok(self.answer(running, &hidden_states, &wanted))
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
        for &Chunk {
            sequence: index,
            ref positions,
        } in chunks
        {
            let sequence = &running[index];
            let first_row = token_ids.len();
            token_ids.extend_from_slice(&sequence.tokens[positions.clone()]);
            sequences.push(StepSequence {
                rows: first_row..token_ids.len(),
                first_position: positions.start,
                start_position: 0,
                pages: &sequence.pages,
                rope_length: sequence.rope_length,
            });
            wanted.extend(sequence.logits_wanted(positions).into_iter().map(|position| WantedRow {
                row: first_row + position - positions.start,
                sequence: index,
                position,
            }));
        }
        let step = Step { sequences: &sequences };
        let hidden_states = forward_step(&self.pool, &self.model, &*self.experts, &token_ids, &step, kv, None)?;
        Ok((hidden_states, wanted))
    }

    /// Logits of the rows that are wanted, and what their sequences make of them.
    fn answer(&self, running: &[Sequence], hidden_states: &Array2<f32>, wanted: &[WantedRow]) -> Vec<RowAnswer> {
        let mut answers = Vec::with_capacity(wanted.len());
        for piece in wanted.chunks(LOGITS_ROWS) {
            let rows: Vec<usize> = piece.iter().map(|wanted| wanted.row).collect();
            let normed = self.model.final_norm(&hidden_states.select(Axis(0), &rows)); // [piece, hidden]
            let logits = self.model.logits(&self.pool, &normed); // [piece, vocab]
            let results: Vec<OnceLock<Result<Answer, EngineError>>> = piece.iter().map(|_| OnceLock::new()).collect();
            self.pool.run(piece.len(), &|row| {
                let wanted = piece[row];
                let answer = answer_row(&running[wanted.sequence].task, logits.row(row), wanted.position);
                results[row].set(answer).expect("each task runs once");
            });
            let results = results
                .into_iter()
                .map(|result| result.into_inner().expect("every task ran"));
            answers.extend(piece.iter().map(|wanted| wanted.sequence).zip(results));
        }
        answers
    }
}

/// What a sequence makes of the logits at `position`, `[vocab]`.
fn answer_row(task: &Task, logits: ArrayView1<'_, f32>, position: usize) -> Result<Answer, EngineError> {
    let logits = logits.to_slice().expect("a row of logits is contiguous");
    match task {
        Task::Forward(_) => Ok(Answer::Logits(logits.to_vec())),
        Task::Generate(Generation {
            sampling,
            logprobs,
            seen,
            ..
        }) => {
            let (id, logprobs) = next_token(logits, sampling, *logprobs, seen, position + 1)?;
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
