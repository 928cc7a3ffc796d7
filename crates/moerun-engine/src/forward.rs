//! One forward pass over a batch of rows: the only place that waits for experts.

use moerun_dispatch::{ExpertBackend, ExpertRequest};
use moerun_kernels::{CpuPool, flush_denormals};
use moerun_model::{KvCache, Model, MoeInput, Routed, Step};
use moerun_types::LayerId;
use ndarray::Array2;

use crate::EngineError;

/// Sees what a forward pass computes, for `moerun forward --capture`.
pub trait Capture {
    /// Input and output of a MoE block.
    fn moe(&mut self, layer: LayerId, input: &MoeInput, output: &Array2<f32>);
    /// Residual stream after a layer, `[tokens, hidden]`.
    fn layer_output(&mut self, layer: LayerId, hidden_states: &Array2<f32>);
}

/// Runs all layers on `token_ids` (`[tokens]`, laid out as `step` says) and returns the residual stream after the last
/// layer, `[tokens, hidden]`, before the final norm.
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
    let mut hidden_states = model.embed(token_ids); // [tokens, hidden]
    for layer in (0..).map(LayerId).take(model.config().layers.len()) {
        model.attend(pool, layer, step, kv, &mut hidden_states);
        let output = match model
            .route(pool, layer, &hidden_states)
            .map_err(|error| EngineError::Model(error.to_string()))?
        {
            Routed::Dense(normed) => model.dense_output(pool, layer, &normed),
            Routed::Moe(input) => {
                // The experts take the rounded rows away with them, so a capture keeps a copy.
                let captured = capture.is_some().then(|| input.clone());
                let output = run_moe_block(pool, model, experts, layer, input)?;
                if let (Some(capture), Some(input)) = (&mut capture, &captured) {
                    capture.moe(layer, input, &output);
                }
                output
            }
        };
        model.finish(&mut hidden_states, &output);
        if let Some(capture) = &mut capture {
            capture.layer_output(layer, &hidden_states);
        }
    }
    Ok(hidden_states)
}

/// Output of a MoE block, shared experts included, `[tokens, hidden]`: they run while the routed ones are under way.
pub(crate) fn run_moe_block(
    pool: &CpuPool,
    model: &Model,
    experts: &dyn ExpertBackend,
    layer: LayerId,
    input: MoeInput,
) -> Result<Array2<f32>, EngineError> {
    let MoeInput {
        hidden_states,
        activations,
        routing,
        ..
    } = input;
    let pending = experts.submit(ExpertRequest {
        layer,
        activations,
        routing,
    })?;
    let shared = model.shared_output(pool, layer, &hidden_states);
    let combined = pending.wait()?;
    Ok(model.moe_output(combined, shared))
}
