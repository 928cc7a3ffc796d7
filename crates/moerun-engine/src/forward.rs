//! One forward pass over a batch of rows: the only place that waits for experts.

use std::ops::Range;

use moerun_dispatch::{Combined, ExpertBackend, ExpertRequest, PendingExperts};
use moerun_kernels::{Activations, CpuPool, Workspace, flush_denormals};
use moerun_model::{KvCache, Model, MoeInput, Routed, Step, StepSequence};
use moerun_types::LayerId;
use ndarray::{Array2, Axis, concatenate};

use crate::EngineError;

/// Sees what a forward pass computes, for `moerun forward --capture`.
pub trait Capture {
    /// Input and output of a MoE block.
    fn moe(&mut self, layer: LayerId, input: &MoeInput, output: &Array2<f32>);
    /// Residual stream after a layer, `[tokens, hidden]`.
    fn layer_output(&mut self, layer: LayerId, hidden_states: &Array2<f32>);
}

/// Rows of a micro-batch at least: with fewer, reading the weights twice costs more than the overlap saves.
const MICRO_BATCH_ROWS: usize = 32;

/// What computes a forward pass.
#[derive(Debug, Clone, Copy)]
pub struct Forward<'a> {
    /// The threads, and memory for the length of a call.
    pub pool: &'a CpuPool,
    /// The transformer without its experts.
    pub model: &'a Model,
    /// The experts.
    pub experts: &'a dyn ExpertBackend,
}

/// Memory of a forward pass; the next one uses it again, and asks for none if it is like one before.
#[derive(Debug, Default)]
pub struct ForwardMemory {
    /// One, or two that go by turns.
    batches: [BatchMemory; 2],
    /// Residual stream after the last layer, where there were two.
    joined: Option<Array2<f32>>,
}

impl ForwardMemory {
    /// The residual stream after the last layer of the last pass, `[tokens, hidden]`; meaningless if that failed.
    pub fn hidden_states(&self) -> &Array2<f32> {
        self.joined.as_ref().unwrap_or(&self.batches[0].hidden_states)
    }

    /// Rows of the last pass for which an expert was left out in some layer, in no order, perhaps more than once.
    pub fn degraded_rows(&self) -> impl Iterator<Item = usize> {
        self.batches
            .iter()
            .flat_map(|batch| batch.degraded_rows.iter().copied())
    }
}

/// Memory of rows that go through the layers together.
#[derive(Debug, Default)]
struct BatchMemory {
    /// Residual stream, `[rows, hidden]`, without what is under way.
    hidden_states: Array2<f32>,
    /// What the layer's feed-forward is given.
    input: MoeInput,
    /// What it gives, `[rows, hidden]`.
    output: Array2<f32>,
    /// Output of the shared experts, `[rows, hidden]`.
    shared: Array2<f32>,
    /// Rows of the pass for which an expert was left out.
    degraded_rows: Vec<usize>,
}

impl Forward<'_> {
    /// Runs all layers on `token_ids` (`[tokens]`, laid out as `step` says) and returns the residual stream after the
    /// last layer, `[tokens, hidden]`, before the final norm.
    ///
    /// Where the experts compute elsewhere and there are rows enough, they go in two micro-batches by turns: while the
    /// experts of one are under way, the other attends. The bits are those of one batch.
    pub fn run<'m>(
        &self,
        memory: &'m mut ForwardMemory,
        token_ids: &[u32],
        step: &Step<'_>,
        kv: &mut KvCache,
        mut capture: Option<&mut dyn Capture>,
    ) -> Result<&'m Array2<f32>, EngineError> {
        debug_assert_eq!(token_ids.len(), step.tokens());
        // The few element-wise operations outside the pool must round as those inside do.
        flush_denormals();
        let tokens = token_ids.len();
        let overlaps = self.experts.computes_elsewhere() && capture.is_none() && tokens >= 2 * MICRO_BATCH_ROWS;
        let border = if overlaps { tokens / 2 } else { tokens };
        let workspace = self.pool.workspace();
        memory.batches.iter_mut().for_each(|batch| batch.degraded_rows.clear());
        let [first, second] = &mut memory.batches;
        let mut first = self.begin_batch(&workspace, first, token_ids, step, 0..border);
        let mut second = overlaps.then(|| self.begin_batch(&workspace, second, token_ids, step, border..tokens));
        for layer in (0..).map(LayerId).take(self.model.config().layers.len()) {
            for batch in std::iter::once(&mut first).chain(&mut second) {
                batch.finish(self.model, &mut capture)?;
                batch.begin(self, layer, kv, &mut capture)?;
            }
        }
        for batch in std::iter::once(&mut first).chain(&mut second) {
            batch.finish(self.model, &mut capture)?;
        }
        let [first, second] = &memory.batches;
        memory.joined = overlaps.then(|| {
            let parts = [first.hidden_states.view(), second.hidden_states.view()];
            concatenate(Axis(0), &parts).expect("both parts are `hidden` wide")
        });
        Ok(memory.hidden_states())
    }

    /// Looks up the rows `rows` of the step.
    fn begin_batch<'a>(
        &self,
        workspace: &'a Workspace<'_>,
        memory: &'a mut BatchMemory,
        token_ids: &[u32],
        step: &Step<'a>,
        rows: Range<usize>,
    ) -> MicroBatch<'a> {
        self.model.embed(&token_ids[rows.clone()], &mut memory.hidden_states);
        MicroBatch {
            first_row: rows.start,
            sequences: workspace.collect(step.part(rows)),
            memory,
            under_way: None,
        }
    }

    /// Output of a MoE block, shared experts included, `[tokens, hidden]`, and rows for which an expert was left out.
    pub(crate) fn moe_block(&self, layer: LayerId, input: &mut MoeInput) -> Result<Combined, EngineError> {
        let (mut output, mut shared) = (Array2::default((0, 0)), Array2::default((0, 0)));
        let pending = self.begin_experts(layer, input, &mut output, &mut shared)?;
        let degraded_rows = finish_experts(self.model, layer, pending, &mut output, &shared)?;
        Ok(Combined {
            hidden_states: output,
            degraded_rows,
        })
    }

    /// Runs the experts, into `output`, or asks for them, and runs the shared ones, into `shared`, which those that are
    /// elsewhere do not wait for.
    fn begin_experts(
        &self,
        layer: LayerId,
        input: &mut MoeInput,
        output: &mut Array2<f32>,
        shared: &mut Array2<f32>,
    ) -> Result<Option<Box<dyn PendingExperts>>, EngineError> {
        let pending = match self.experts.run_here(layer, &input.activations, &input.routing, output) {
            Some(done) => {
                done?;
                None
            }
            None => {
                // They take the rounded rows and the choice away with them.
                let format = input.activations.format();
                let request = ExpertRequest {
                    layer,
                    activations: std::mem::replace(&mut input.activations, Activations::empty(format)),
                    routing: std::mem::take(&mut input.routing),
                };
                Some(self.experts.submit(request)?)
            }
        };
        if self.model.has_shared_experts(layer) {
            self.model.shared_output(self.pool, layer, &input.hidden_states, shared);
        }
        Ok(pending)
    }
}

/// Waits for the experts if they are under way; `output` is then that of the block, shared experts included. Returns the
/// rows for which an expert was left out.
fn finish_experts(
    model: &Model,
    layer: LayerId,
    pending: Option<Box<dyn PendingExperts>>,
    output: &mut Array2<f32>,
    shared: &Array2<f32>,
) -> Result<Vec<u32>, EngineError> {
    let mut degraded_rows = Vec::new();
    if let Some(pending) = pending {
        let combined = pending.wait()?;
        *output = combined.hidden_states;
        degraded_rows = combined.degraded_rows;
    }
    if model.has_shared_experts(layer) {
        *output += shared;
    }
    Ok(degraded_rows)
}

/// Rows that go through the layers together.
struct MicroBatch<'a> {
    /// Of the pass.
    first_row: usize,
    sequences: &'a [StepSequence<'a>],
    memory: &'a mut BatchMemory,
    under_way: Option<UnderWay>,
}

/// A MoE block whose experts have run or been asked.
struct UnderWay {
    layer: LayerId,
    /// None if they have run.
    experts: Option<Box<dyn PendingExperts>>,
    /// The block's input, if somebody looks on.
    input: Option<MoeInput>,
}

impl MicroBatch<'_> {
    /// Attention and gate of a layer; then its dense feed-forward, or its experts are asked, and the shared ones run
    /// meanwhile.
    fn begin(
        &mut self,
        forward: &Forward<'_>,
        layer: LayerId,
        kv: &mut KvCache,
        capture: &mut Option<&mut dyn Capture>,
    ) -> Result<(), EngineError> {
        let &Forward { pool, model, .. } = forward;
        let step = Step {
            sequences: self.sequences,
        };
        let BatchMemory {
            hidden_states,
            input,
            output,
            shared,
            ..
        } = &mut *self.memory;
        model.attend(pool, layer, &step, kv, hidden_states);
        let routed = model
            .route(pool, layer, hidden_states, input)
            .map_err(|error| EngineError::Model(error.to_string()))?;
        match routed {
            Routed::Dense => {
                model.dense_output(pool, layer, &input.hidden_states, output);
                model.finish(hidden_states, output);
                if let Some(capture) = capture {
                    capture.layer_output(layer, hidden_states);
                }
            }
            Routed::Moe => {
                // The experts may take the rounded rows away with them, so a capture keeps a copy.
                let kept = capture.is_some().then(|| input.clone());
                let experts = forward.begin_experts(layer, input, output, shared)?;
                self.under_way = Some(UnderWay {
                    layer,
                    experts,
                    input: kept,
                });
            }
        }
        Ok(())
    }

    /// Waits for the experts that are under way and adds what they give.
    fn finish(&mut self, model: &Model, capture: &mut Option<&mut dyn Capture>) -> Result<(), EngineError> {
        let Some(UnderWay { layer, experts, input }) = self.under_way.take() else {
            return Ok(());
        };
        let BatchMemory {
            hidden_states,
            output,
            shared,
            degraded_rows,
            ..
        } = &mut *self.memory;
        let degraded = finish_experts(model, layer, experts, output, shared)?;
        degraded_rows.extend(degraded.iter().map(|&row| self.first_row + row as usize));
        model.finish(hidden_states, output);
        if let (Some(capture), Some(input)) = (capture, input) {
            capture.moe(layer, &input, output);
            capture.layer_output(layer, hidden_states);
        }
        Ok(())
    }
}
