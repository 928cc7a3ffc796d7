//! Why a worker does not hold what it was asked to.

use moerun_types::{ExpertId, LayerId, NumberFormat};
use tonic::{Code, Status};

/// Why a worker does not hold what it was asked to; what it held before it holds still.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HoldingError {
    /// It was started on experts that were handed to it.
    #[error("this worker has no checkpoint to take experts from")]
    NoSource,
    /// The files have been replaced since it started.
    #[error("the checkpoint's config hash is {found} now, wanted {wanted} as at the start")]
    OtherModel {
        /// At the start.
        wanted: String,
        /// Now.
        found: String,
    },
    /// An expert here is not the one that was meant.
    #[error("layer {layer} expert {expert} block {block} hashes to {found} here, wanted {wanted}")]
    Content {
        /// Model layer.
        layer: LayerId,
        /// Expert.
        expert: ExpertId,
        /// Combine block.
        block: u16,
        /// Wanted, in hex.
        wanted: String,
        /// Found, in hex.
        found: String,
    },
    /// There is no room.
    #[error(
        "{slices} expert slices in {format} take {needed_bytes} bytes more than the {held_bytes} held, but only \
         {free_bytes} bytes are left{}", limit(*.max_expert_bytes)
    )]
    OutOfMemory {
        /// Slices to load.
        slices: usize,
        /// How weights are held.
        format: NumberFormat,
        /// Bytes that they take.
        needed_bytes: u64,
        /// Bytes that are held.
        held_bytes: u64,
        /// What is left.
        free_bytes: u64,
        /// Most that experts may take, if the operator set a limit.
        max_expert_bytes: Option<u64>,
    },
    /// Nobody has an expert that this worker's checkpoint lacks.
    #[error("layer {layer} expert {expert} is not in this worker's checkpoint, and no holder was named")]
    NowhereToBeHad {
        /// Model layer.
        layer: LayerId,
        /// Expert.
        expert: ExpertId,
    },
    /// The work ended in a panic.
    #[error("the change of what is held failed: {reason}")]
    Panicked {
        /// What it said.
        reason: String,
    },
    /// A holder did not hand an expert over.
    #[error("fetch from {holder}: {reason}")]
    Fetch {
        /// Its address.
        holder: String,
        /// Its words, or what became of the call.
        reason: String,
    },
    /// The checkpoint was refused, or lacks an expert.
    #[error(transparent)]
    Weights(#[from] moerun_weights::WeightsError),
    /// The experts could not be loaded.
    #[error(transparent)]
    Model(#[from] moerun_model::ModelError),
}

fn limit(max_expert_bytes: Option<u64>) -> String {
    max_expert_bytes.map_or_else(String::new, |most| format!(" of {most} allowed"))
}

impl HoldingError {
    /// As it is told to whoever asked.
    pub(crate) fn to_status(&self) -> Status {
        let code = match self {
            HoldingError::OutOfMemory { .. } => Code::ResourceExhausted,
            HoldingError::Content { .. } => Code::DataLoss,
            HoldingError::Fetch { .. } => Code::Unavailable,
            HoldingError::Panicked { .. } => Code::Internal,
            _ => Code::FailedPrecondition,
        };
        Status::new(code, self.to_string())
    }
}
