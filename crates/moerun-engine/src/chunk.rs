//! One sequence's share of a step.

use std::ops::Range;

/// Known tokens to run and, behind them, guesses at those that follow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Chunk {
    /// Index in [`crate::scheduler::Scheduler::running`].
    pub(crate) sequence: usize,
    /// Positions to run; they start where the sequence's cache ends.
    pub(crate) positions: Range<usize>,
    /// Tokens guessed for the positions from `positions.end` on; none unless that is the end of the known tokens.
    pub(crate) draft: Vec<u32>,
}

impl Chunk {
    /// The guesses at positions up to `position`, that one included.
    pub(crate) fn drafted_up_to(&self, position: usize) -> &[u32] {
        &self.draft[..(position + 1).saturating_sub(self.positions.end)]
    }

    /// The known tokens alone.
    pub(crate) fn without_draft(&self) -> Self {
        Self {
            draft: Vec::new(),
            ..self.clone()
        }
    }
}
