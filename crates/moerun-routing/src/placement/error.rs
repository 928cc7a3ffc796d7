use moerun_types::ExpertSlice;

/// Why no placement could be made.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum PlanError {
    /// Some block of an expert is held by nobody.
    #[error("no worker holds {missing} (and {others} more slices)")]
    Uncovered {
        /// The first missing slice.
        missing: ExpertSlice,
        /// How many more runs of blocks are missing.
        others: usize,
    },
    /// A worker says it holds something that the model does not have.
    #[error("worker {worker} holds {slice}, which the model does not have")]
    Unknown {
        /// Index of the worker.
        worker: usize,
        /// What it says it holds.
        slice: ExpertSlice,
    },
    /// Blocks are numbered by `u16`.
    #[error("experts of {num_blocks} combine blocks: wanted at most {}", u16::MAX)]
    TooManyBlocks {
        /// Blocks of an expert.
        num_blocks: usize,
    },
}
