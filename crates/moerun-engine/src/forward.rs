//! One forward pass over a batch of rows: the only place that waits for experts.

use moerun_dispatch::{ExpertBackend, ExpertRequest, PendingExperts};
use moerun_kernels::{CpuPool, flush_denormals};
use moerun_model::{KvCache, Model, MoeInput, Routed, Step, StepSequence};
use moerun_types::LayerId;
use ndarray::{Array2, ArrayView2, Axis, concatenate};

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

/// Runs all layers on `token_ids` (`[tokens]`, laid out as `step` says) and returns the residual stream after the last
/// layer, `[tokens, hidden]`, before the final norm.
///
/// Where the experts compute elsewhere and there are rows enough, they go in two micro-batches by turns: while the
/// experts of one are under way, the other attends. The bits are those of one batch.
pub fn forward_step(
    pool: &CpuPool,
    model: &Model,
    experts: &dyn ExpertBackend,
    token_ids: &[u32],
    step: &Step<'_>,
    kv: &mut KvCache,
    mut capture: Option<&mut dyn Capture>,
) -> Result<Array2<f32>, EngineError> {
    debug_assert_eq!(token_ids.len(), step.tokens());
    // The few element-wise operations outside the pool must round as those inside do.
    flush_denormals();
    let overlaps = experts.computes_elsewhere() && capture.is_none() && token_ids.len() >= 2 * MICRO_BATCH_ROWS;
    let border = if overlaps { token_ids.len() / 2 } else { token_ids.len() };
    let (first, second) = step.split(border);
    let mut batches = vec![MicroBatch::new(model, &token_ids[..border], first)];
    if overlaps {
        batches.push(MicroBatch::new(model, &token_ids[border..], second));
    }
    for layer in (0..).map(LayerId).take(model.config().layers.len()) {
        for batch in &mut batches {
            batch.finish(model, &mut capture)?;
            batch.begin(pool, model, experts, layer, kv, &mut capture)?;
        }
    }
    for batch in &mut batches {
        batch.finish(model, &mut capture)?;
    }
    let parts: Vec<ArrayView2<'_, f32>> = batches.iter().map(|batch| batch.hidden_states.view()).collect();
    match parts[..] {
        [_] => Ok(batches.swap_remove(0).hidden_states),
        _ => Ok(concatenate(Axis(0), &parts).expect("all parts are `hidden` wide")),
    }
}

/// Rows that go through the layers together.
struct MicroBatch<'a> {
    sequences: Vec<StepSequence<'a>>,
    /// Residual stream, `[rows, hidden]`, without what is under way.
    hidden_states: Array2<f32>,
    under_way: Option<UnderWay>,
}

/// A MoE block whose experts have been asked.
struct UnderWay {
    layer: LayerId,
    experts: Box<dyn PendingExperts>,
    /// Output of the shared experts, `[rows, hidden]`.
    shared: Option<Array2<f32>>,
    /// The block's input, if somebody looks on.
    input: Option<MoeInput>,
}

impl<'a> MicroBatch<'a> {
    fn new(model: &Model, token_ids: &[u32], sequences: Vec<StepSequence<'a>>) -> Self {
        MicroBatch {
            sequences,
            hidden_states: model.embed(token_ids),
            under_way: None,
        }
    }

    /// Attention and gate of a layer; then its dense feed-forward, or its experts are asked, and the shared ones run
    /// meanwhile.
    fn begin(
        &mut self,
        pool: &CpuPool,
        model: &Model,
        experts: &dyn ExpertBackend,
        layer: LayerId,
        kv: &mut KvCache,
        capture: &mut Option<&mut dyn Capture>,
    ) -> Result<(), EngineError> {
        let step = Step {
            sequences: &self.sequences,
        };
        model.attend(pool, layer, &step, kv, &mut self.hidden_states);
        let routed = model
            .route(pool, layer, &self.hidden_states)
            .map_err(|error| EngineError::Model(error.to_string()))?;
        match routed {
            Routed::Dense(normed) => {
                let output = model.dense_output(pool, layer, &normed);
                model.finish(&mut self.hidden_states, &output);
                if let Some(capture) = capture {
                    capture.layer_output(layer, &self.hidden_states);
                }
            }
            Routed::Moe(input) => {
                // The experts take the rounded rows away with them, so a capture keeps a copy.
                let kept = capture.is_some().then(|| input.clone());
                self.under_way = Some(UnderWay::begin(pool, model, experts, layer, input, kept)?);
            }
        }
        Ok(())
    }

    /// Waits for the experts that are under way and adds what they give.
    fn finish(&mut self, model: &Model, capture: &mut Option<&mut dyn Capture>) -> Result<(), EngineError> {
        let Some(UnderWay {
            layer,
            experts,
            shared,
            input,
        }) = self.under_way.take()
        else {
            return Ok(());
        };
        let output = model.moe_output(experts.wait()?.hidden_states, shared);
        model.finish(&mut self.hidden_states, &output);
        if let (Some(capture), Some(input)) = (capture, input) {
            capture.moe(layer, &input, &output);
            capture.layer_output(layer, &self.hidden_states);
        }
        Ok(())
    }
}

impl UnderWay {
    fn begin(
        pool: &CpuPool,
        model: &Model,
        experts: &dyn ExpertBackend,
        layer: LayerId,
        input: MoeInput,
        kept: Option<MoeInput>,
    ) -> Result<Self, EngineError> {
        let MoeInput {
            hidden_states,
            activations,
            routing,
            ..
        } = input;
        let experts = experts.submit(ExpertRequest {
            layer,
            activations,
            routing,
        })?;
        let shared = model.shared_output(pool, layer, &hidden_states);
        Ok(UnderWay {
            layer,
            experts,
            shared,
            input: kept,
        })
    }
}

/// Output of a MoE block, shared experts included, `[tokens, hidden]`: they run while the routed ones are under way.
pub(crate) fn run_moe_block(
    pool: &CpuPool,
    model: &Model,
    experts: &dyn ExpertBackend,
    layer: LayerId,
    input: MoeInput,
) -> Result<Array2<f32>, EngineError> {
    let UnderWay { experts, shared, .. } = UnderWay::begin(pool, model, experts, layer, input, None)?;
    Ok(model.moe_output(experts.wait()?.hidden_states, shared))
}
