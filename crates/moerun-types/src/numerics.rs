//! What two processes must share for their results to be equal bit for bit.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Fraction bits of the fixed-point numbers in which expert terms are summed: a term is multiplied by 2^40.
pub const COMBINE_FRACTION_BITS: u32 = 40;

/// How weights are held in memory, and therefore how activations are rounded before they meet them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NumberFormat {
    /// IEEE single precision; activations are not rounded.
    F32,
    /// bfloat16; activations are rounded to bfloat16 (nearest even) where they enter a product.
    Bf16,
}

impl NumberFormat {
    /// Bytes that one weight or one activation takes.
    pub fn bytes(self) -> usize {
        match self {
            NumberFormat::F32 => 4,
            NumberFormat::Bf16 => 2,
        }
    }
}

impl fmt::Display for NumberFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            NumberFormat::F32 => "f32",
            NumberFormat::Bf16 => "bf16",
        })
    }
}

impl FromStr for NumberFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "f32" => Ok(NumberFormat::F32),
            "bf16" => Ok(NumberFormat::Bf16),
            other => Err(format!("unknown number format {other:?}: wanted f32 or bf16")),
        }
    }
}

/// How the partial sums of different holders become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CombineMode {
    /// Fixed-point sums of blocks: the same bits whatever the number of workers.
    Exact,
    /// f32 partial sums: closeness only.
    Fast,
}

impl fmt::Display for CombineMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CombineMode::Exact => "exact",
            CombineMode::Fast => "fast",
        })
    }
}

impl FromStr for CombineMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "exact" => Ok(CombineMode::Exact),
            "fast" => Ok(CombineMode::Fast),
            other => Err(format!("unknown combine mode {other:?}: wanted exact or fast")),
        }
    }
}

/// Number format, combine mode and block: gateway and worker compare its [`Numerics::id`] before they work together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Numerics {
    /// Format of the expert weights, and of the activations on the wire.
    pub format: NumberFormat,
    /// How partial sums are added.
    pub combine: CombineMode,
    /// Length, in elements of the intermediate dimension, of one block of the exact combine.
    pub combine_block: usize,
}

impl Numerics {
    /// Text that is equal exactly when the bits will be; the version counts changes of the arithmetic itself.
    pub fn id(&self) -> String {
        format!("fma1-{}-{}-{}", self.format, self.combine, self.combine_block)
    }

    /// Number of combine blocks of an intermediate dimension; the last may be short.
    pub fn num_blocks(&self, intermediate: usize) -> usize {
        intermediate.div_ceil(self.combine_block)
    }
}

/// Block length used unless another is asked for: 128, or 256 where `intermediate` is 8192 or more.
pub fn default_combine_block(intermediate: usize) -> usize {
    if intermediate >= 8192 { 256 } else { 128 }
}
