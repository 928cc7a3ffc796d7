//! What two processes must share for their results to be equal bit for bit.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::BlockRange;

/// Fraction bits of the fixed-point numbers in which expert terms are summed: a term is multiplied by 2^40.
pub const COMBINE_FRACTION_BITS: u32 = 40;

/// Columns of a block of the quantised formats: each block of a row has one scale.
pub const QUANTIZED_BLOCK: usize = 32;

/// How weights are held in memory, and therefore how activations are rounded before they meet them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NumberFormat {
    /// IEEE single precision; activations are not rounded.
    F32,
    /// bfloat16; activations are rounded to bfloat16 (nearest even) where they enter a product.
    Bf16,
    /// Blocks of 32 along the input dimension: signed 8-bit codes and an f16 scale (GGUF's `Q8_0`). Activations are
    /// rounded to blocks of 8-bit codes.
    Int8,
    /// Blocks of 32: 4-bit codes, their value the code less 8, and an f16 scale (GGUF's `Q4_0`). Activations as with
    /// `Int8`.
    Int4,
    /// Blocks of 32: 4-bit floats (E2M1) and a power of two as scale (E8M0), as the OCP Microscaling formats
    /// specification says. Activations as with `Int8`.
    Mxfp4,
}

/// How activations are rounded where they enter a product: what a kernel eats, and what travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ActivationFormat {
    /// Not rounded.
    F32,
    /// bfloat16, nearest even.
    Bf16,
    /// Blocks of 32 along the row, the last one short: signed 8-bit codes and an f32 scale each.
    Int8,
}

impl NumberFormat {
    /// All of them.
    pub const ALL: [NumberFormat; 5] = [
        NumberFormat::F32,
        NumberFormat::Bf16,
        NumberFormat::Int8,
        NumberFormat::Int4,
        NumberFormat::Mxfp4,
    ];

    /// How activations are rounded before they meet weights of this format.
    #[inline]
    pub fn activations(self) -> ActivationFormat {
        match self {
            NumberFormat::F32 => ActivationFormat::F32,
            NumberFormat::Bf16 => ActivationFormat::Bf16,
            NumberFormat::Int8 | NumberFormat::Int4 | NumberFormat::Mxfp4 => ActivationFormat::Int8,
        }
    }

    /// Columns that a kernel takes at once: a block of the exact combine is a whole number of them.
    #[inline]
    pub fn column_unit(self) -> usize {
        match self {
            NumberFormat::F32 => 1,
            NumberFormat::Bf16 => 2,
            NumberFormat::Int8 | NumberFormat::Int4 | NumberFormat::Mxfp4 => QUANTIZED_BLOCK,
        }
    }

    /// Whether weights are blocks of codes with a scale.
    #[inline]
    pub fn is_quantized(self) -> bool {
        self.column_unit() == QUANTIZED_BLOCK
    }

    /// Format of the other matrices (attention, dense feed-forwards, shared experts) beside experts of this format:
    /// models that come with MXFP4 experts were trained with the rest in bfloat16.
    pub fn for_dense(self) -> NumberFormat {
        match self {
            NumberFormat::Mxfp4 => NumberFormat::Bf16,
            other => other,
        }
    }

    /// Format of the embedding and the logits' head beside other weights of this format: 4-bit codes are too coarse
    /// for them.
    pub fn for_vocabulary(self) -> NumberFormat {
        match self {
            NumberFormat::Int4 | NumberFormat::Mxfp4 => NumberFormat::Int8,
            other => other,
        }
    }
}

impl ActivationFormat {
    /// Bytes that a row of `cols` activations takes; `usize::MAX` if that is beyond the address space.
    pub fn row_bytes(self, cols: usize) -> usize {
        match self {
            ActivationFormat::F32 => cols.saturating_mul(4),
            ActivationFormat::Bf16 => cols.saturating_mul(2),
            ActivationFormat::Int8 => cols.saturating_add(cols.div_ceil(QUANTIZED_BLOCK).saturating_mul(4)),
        }
    }
}

impl fmt::Display for ActivationFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ActivationFormat::F32 => "f32",
            ActivationFormat::Bf16 => "bf16",
            ActivationFormat::Int8 => "int8",
        })
    }
}

impl fmt::Display for NumberFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            NumberFormat::F32 => "f32",
            NumberFormat::Bf16 => "bf16",
            NumberFormat::Int8 => "int8",
            NumberFormat::Int4 => "int4",
            NumberFormat::Mxfp4 => "mxfp4",
        })
    }
}

impl FromStr for NumberFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        NumberFormat::ALL
            .into_iter()
            .find(|format| format.to_string() == text)
            .ok_or_else(|| format!("unknown number format {text:?}: wanted f32, bf16, int8, int4 or mxfp4"))
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

/// A combine block that a number format cannot have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a combine block of {combine_block} columns with {format} weights: wanted a positive multiple of {unit}")]
#[allow(missing_docs)]
pub struct NumericsError {
    pub combine_block: usize,
    pub format: NumberFormat,
    pub unit: usize,
}

impl Numerics {
    /// Numerics whose blocks are whole numbers of the format's column unit, and not empty.
    pub fn checked(format: NumberFormat, combine: CombineMode, combine_block: usize) -> Result<Self, NumericsError> {
        let unit = format.column_unit();
        if combine_block == 0 || !combine_block.is_multiple_of(unit) {
            return Err(NumericsError {
                combine_block,
                format,
                unit,
            });
        }
        Ok(Numerics {
            format,
            combine,
            combine_block,
        })
    }

    /// Text that is equal exactly when the bits will be; the version counts changes of the arithmetic of a format that
    /// was there before (a new format has a name of its own).
    pub fn id(&self) -> String {
        format!("fma1-{}-{}-{}", self.format, self.combine, self.combine_block)
    }

    /// Elements of an intermediate dimension that `blocks` cover; the last block may be short.
    pub fn columns(&self, blocks: BlockRange, intermediate: usize) -> std::ops::Range<usize> {
        let element = |block: u16| usize::from(block).saturating_mul(self.combine_block).min(intermediate);
        element(blocks.first)..element(blocks.end)
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
