//! The seam between the model and its experts, in two calls so that other work can run between them.

use moerun_kernels::Activations;
use moerun_routing::Routing;
use moerun_types::LayerId;
use ndarray::Array2;

use crate::DispatchError;

/// Rows that want their experts.
#[derive(Debug, Clone)]
pub struct ExpertRequest {
    /// Model layer.
    pub layer: LayerId,
    /// Rounded rows, `[tokens, hidden]`.
    pub activations: Activations,
    /// Experts and final weights, `[tokens, top_k]`.
    pub routing: Routing,
}

/// Runs experts on rows, wherever they are.
pub trait ExpertBackend: Send + Sync + std::fmt::Debug {
    /// Hands the work over and returns at once (as far as the transport lets it).
    fn submit(&self, request: ExpertRequest) -> Result<Box<dyn PendingExperts>, DispatchError>;

    /// Runs the work at once where the experts are in this process, on the caller's threads: the combined sum, `[tokens,
    /// hidden]`, comes into `output`, whatever that was, in its memory if that is enough. `None`, and nothing done, where they
    /// are elsewhere.
    fn run_here(
        &self,
        layer: LayerId,
        activations: &Activations,
        routing: &Routing,
        output: &mut Array2<f32>,
    ) -> Option<Result<(), DispatchError>> {
        let _ = (layer, activations, routing, output);
        None
    }

    /// Whether the experts compute while the caller does something else, so that two requests under way by turns keep
    /// both sides busy.
    fn computes_elsewhere(&self) -> bool {
        false
    }
}

/// Work under way.
pub trait PendingExperts: Send {
    /// Blocks until all is computed, or cannot be. Never waits for ever: every dispatch has a deadline.
    fn wait(self: Box<Self>) -> Result<Combined, DispatchError>;
}

/// What the experts give.
#[derive(Debug, Clone, PartialEq)]
pub struct Combined {
    /// The combined sum, `[tokens, hidden]`.
    pub hidden_states: Array2<f32>,
    /// Rows for which an expert was left out because nobody could compute it, ascending. Always empty unless the operator
    /// allowed that.
    pub degraded_rows: Vec<u32>,
}

impl Combined {
    /// A result in which nothing was left out.
    pub fn whole(hidden_states: Array2<f32>) -> Self {
        Self {
            hidden_states,
            degraded_rows: Vec::new(),
        }
    }
}
