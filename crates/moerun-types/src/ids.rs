//! Identities: what names a layer, an expert, a piece of an expert, a sequence.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Index of a transformer layer in the model, from 0, dense layers counted too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LayerId(pub u32);

/// Index of an expert within its layer, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ExpertId(pub u16);

/// Identity of a running sequence within one engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u64);

/// Half-open run of combine blocks of an expert's intermediate dimension: `first..end`, counted from 0.
///
/// A slice of an expert is always a whole number of blocks, so that cutting it cannot change a bit of the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BlockRange {
    /// First block held.
    pub first: u16,
    /// One past the last block held.
    pub end: u16,
}

impl BlockRange {
    /// Number of blocks in the range.
    pub fn len(self) -> usize {
        usize::from(self.end.saturating_sub(self.first))
    }

    /// Whether the range holds no block.
    pub fn is_empty(self) -> bool {
        self.end <= self.first
    }

    /// Whether every block of `other` is in this range.
    pub fn contains(self, other: BlockRange) -> bool {
        self.first <= other.first && other.end <= self.end
    }
}

/// A run of blocks of one expert of one layer: the unit that a worker holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ExpertSlice {
    /// Model layer.
    pub layer: LayerId,
    /// Expert of that layer.
    pub expert: ExpertId,
    /// Blocks of its intermediate dimension.
    pub blocks: BlockRange,
}

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for ExpertId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for SequenceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for BlockRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.first, self.end)
    }
}

impl fmt::Display for ExpertSlice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "layer {} expert {} blocks {}", self.layer, self.expert, self.blocks)
    }
}
