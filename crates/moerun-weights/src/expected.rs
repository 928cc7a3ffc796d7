//! Every tensor that a checkpoint of a config must hold.

use moerun_types::{LayerId, ModelConfig, WeightQuantization};

use crate::{
    Dtype, LayerTensor, TensorRole,
    dense_tensors::dense_tensors,
    expert_tensors::{ExpertLayout, ExpertTensorKind, expert_tensors},
    tensor_names,
};

/// One tensor that a checkpoint must hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpectedTensor {
    /// Its name on disk.
    pub name: String,
    /// Its shape on disk.
    pub shape: Vec<usize>,
    /// Which types it may have.
    pub types: ExpectedTypes,
    /// Who reads it.
    pub part: ModelPart,
}

/// Which types a tensor may have on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpectedTypes {
    /// F32, F16 or BF16.
    Plain,
    /// F32, F16 or BF16, or F8_E4M3 with the scales of its blocks of `[rows, cols]` beside it.
    PlainOrFp8 {
        /// Rows that share a scale.
        rows: usize,
        /// Columns that share a scale.
        cols: usize,
    },
    /// U8: 4-bit codes, or their exponents.
    Packed,
}

/// Who reads a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelPart {
    /// The gateway.
    Dense(TensorRole),
    /// Whoever computes experts of this layer.
    Experts(LayerId),
}

impl ExpectedTypes {
    /// Whether a tensor may have this type.
    pub fn allow(self, dtype: Dtype) -> bool {
        match dtype {
            // Blocks come from GGUF alone, which has them in place of plain elements.
            Dtype::F32 | Dtype::F16 | Dtype::Bf16 | Dtype::Block(_) => self != ExpectedTypes::Packed,
            Dtype::F8E4M3 => matches!(self, ExpectedTypes::PlainOrFp8 { .. }),
            Dtype::U8 => self == ExpectedTypes::Packed,
        }
    }

    /// The types as an error says them.
    pub(crate) fn wanted(self) -> &'static str {
        match self {
            ExpectedTypes::Plain => crate::error::PLAIN_TYPES,
            ExpectedTypes::PlainOrFp8 { .. } => "F32, F16, BF16 or F8_E4M3",
            ExpectedTypes::Packed => "U8",
        }
    }
}

/// Every tensor that a checkpoint of `config` must hold, the gateway's first, then the experts' layer by layer. The
/// scales of fp8 tensors are not listed: they follow from the type that a tensor turns out to have.
pub fn expected_tensors(config: &ModelConfig) -> Vec<ExpectedTensor> {
    expected_in(config, ExpertLayout::of(config))
}

/// As [`expected_tensors`], with the experts in another layout than the family's own.
pub(crate) fn expected_in(config: &ModelConfig, layout: ExpertLayout) -> Vec<ExpectedTensor> {
    let mut expected: Vec<ExpectedTensor> = dense_tensors(config)
        .into_iter()
        .map(|(role, shape)| ExpectedTensor {
            name: tensor_names::name(config.family, role),
            types: if is_linear(role) {
                linear_types(config)
            } else {
                ExpectedTypes::Plain
            },
            shape,
            part: ModelPart::Dense(role),
        })
        .collect();
    let Some(moe) = &config.moe else { return expected };
    for layer in config.moe_layers() {
        expected.extend(
            expert_tensors(config, moe, layout, layer)
                .into_iter()
                .map(|tensor| ExpectedTensor {
                    name: tensor.name,
                    shape: tensor.shape,
                    types: match tensor.kind {
                        ExpertTensorKind::Weights => linear_types(config),
                        ExpertTensorKind::Bias => ExpectedTypes::Plain,
                        ExpertTensorKind::Packed => ExpectedTypes::Packed,
                    },
                    part: ModelPart::Experts(layer),
                }),
        );
    }
    expected
}

fn linear_types(config: &ModelConfig) -> ExpectedTypes {
    match config.quantization {
        WeightQuantization::Fp8Block { rows, cols } => ExpectedTypes::PlainOrFp8 { rows, cols },
        WeightQuantization::None | WeightQuantization::Mxfp4 => ExpectedTypes::Plain,
    }
}

/// Whether a tensor is a projection, which quantisers convert; embeddings, heads, routers and vectors stay plain.
fn is_linear(role: TensorRole) -> bool {
    use LayerTensor::*;
    match role {
        TensorRole::Layer(_, tensor) => matches!(
            tensor,
            QProj
                | KProj
                | VProj
                | OProj
                | QAProj
                | QBProj
                | KvAProj
                | KvBProj
                | GateProj
                | UpProj
                | DownProj
                | SharedGateProj
                | SharedUpProj
                | SharedDownProj
        ),
        _ => false,
    }
}

/// Name of the scales of an fp8 tensor.
pub(crate) fn scale_name(tensor: &str) -> String {
    format!("{tensor}_scale_inv")
}
