//! Types of element that are written.

use moerun_types::NumberFormat;

/// Type of all tensors of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Element {
    F32,
    Bf16,
}

impl Element {
    /// The element of a plain format; blocks of codes are no elements.
    pub(super) fn of(format: NumberFormat) -> Option<Self> {
        match format {
            NumberFormat::F32 => Some(Element::F32),
            NumberFormat::Bf16 => Some(Element::Bf16),
            NumberFormat::Int8 | NumberFormat::Int4 | NumberFormat::Mxfp4 => None,
        }
    }

    /// Bytes of one.
    pub(super) fn bytes(self) -> usize {
        match self {
            Element::F32 => 4,
            Element::Bf16 => 2,
        }
    }
}
