//! Why a model could not be loaded or run.

use moerun_types::LayerId;

/// Why a model could not be loaded or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The checkpoint lacks something, does not fit the config or has a value that the number format cannot hold.
    #[error(transparent)]
    Weights(#[from] moerun_weights::WeightsError),
    /// A slice of an expert that was asked for is not in the model.
    #[error(transparent)]
    Expert(#[from] crate::ExpertError),
    /// A gate refused its input.
    #[error("gate of layer {layer}: {source}")]
    Gate {
        /// Model layer.
        layer: LayerId,
        /// Why.
        source: moerun_routing::GateError,
    },
    /// The layer has no experts.
    #[error("layer {layer} has no experts; the layers that have: {moe_layers:?}")]
    NotMoe {
        /// Model layer asked for.
        layer: LayerId,
        /// Layers that have experts.
        moe_layers: Vec<LayerId>,
    },
    /// Rows given to a MoE block are not as wide as the residual stream.
    #[error("rows for layer {layer} have {found} columns, wanted {wanted}")]
    Width {
        /// Model layer.
        layer: LayerId,
        /// The model's `hidden`.
        wanted: usize,
        /// Columns found.
        found: usize,
    },
}
