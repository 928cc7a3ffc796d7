use moerun_types::{ActivationFormat, BlockRange, ExpertId, ExpertSlice, LayerId};

/// Why a batch was refused or failed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ExpertError {
    /// Not held here.
    #[error("layer {layer} expert {expert} blocks {blocks} is not held here")]
    NotHeld {
        /// Model layer.
        layer: LayerId,
        /// Expert.
        expert: ExpertId,
        /// Blocks asked for.
        blocks: BlockRange,
    },
    /// A slice to be loaded does not exist.
    #[error("{slice} is not in the model")]
    NotInModel {
        /// What was to be loaded.
        slice: ExpertSlice,
    },
    /// The batch does not fit the model.
    #[error("{what}: wanted {wanted}, found {found}")]
    Shape {
        /// Which dimension.
        what: &'static str,
        /// Wanted.
        wanted: usize,
        /// Found.
        found: usize,
    },
    /// The activations are not rounded as the weights are.
    #[error("activations: wanted {wanted}, found {found}")]
    Format {
        /// What the weights' format asks for.
        wanted: ActivationFormat,
        /// What was given.
        found: ActivationFormat,
    },
    /// An assignment names a row beyond the last.
    #[error("an assignment names row {row}: wanted a row below {rows}")]
    Row {
        /// The row named.
        row: u32,
        /// Rows of the batch.
        rows: usize,
    },
    /// An assignment runs nothing.
    #[error("row {row}, expert {expert}: blocks {blocks} hold no block")]
    NoBlocks {
        /// Row of the batch.
        row: u32,
        /// Expert.
        expert: ExpertId,
        /// Blocks asked for.
        blocks: BlockRange,
    },
    /// A block of an expert is assigned to one row twice.
    #[error("row {row}, expert {expert}: block {block} is assigned twice")]
    Duplicate {
        /// Row of the batch.
        row: u32,
        /// Expert.
        expert: ExpertId,
        /// The block, counted in the whole expert.
        block: u16,
    },
    /// A row has more experts than a token of this model takes.
    #[error("row {row} has {found} experts, wanted at most {top_k}")]
    TooManyExperts {
        /// Row of the batch.
        row: u32,
        /// Experts per token.
        top_k: usize,
        /// Experts found.
        found: usize,
    },
    /// A routing weight is NaN or infinite.
    #[error("row {row}, expert {expert}: routing weight {weight}, wanted a finite number")]
    Weight {
        /// Row of the batch.
        row: u32,
        /// Expert.
        expert: ExpertId,
        /// The weight.
        weight: f32,
    },
    /// A term was not finite or too large for fixed point.
    #[error("layer {layer} expert {expert} {}: term {term} is not finite or not below {limit}", part(*.block))]
    Term {
        /// Model layer.
        layer: LayerId,
        /// Expert.
        expert: ExpertId,
        /// Combine block of the whole expert; `None` for the down bias.
        block: Option<u16>,
        /// Its value.
        term: f32,
        /// The bound.
        limit: f32,
    },
}

fn part(block: Option<u16>) -> String {
    block.map_or_else(|| "down bias".to_owned(), |block| format!("block {block}"))
}
