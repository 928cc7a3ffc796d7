//! How each family stores its experts: a tensor per expert and matrix, or all experts of a layer stacked.

use moerun_types::{ExpertId, Family, LayerId, ModelConfig, MoeConfig, WeightQuantization};

use crate::{tensor::MXFP4_GROUP, tensor_names::feed_forward};

/// The form in which a family stores its experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ExpertLayout {
    /// Three matrices per expert, of these names, with a bias each where the model has them.
    Separate {
        /// `[intermediate, hidden]`.
        gate: &'static str,
        /// `[intermediate, hidden]`.
        up: &'static str,
        /// `[hidden, intermediate]`.
        down: &'static str,
    },
    /// granite: `input_linear` `[experts, 2 * intermediate, hidden]`, gate rows then up rows, and `output_linear`
    /// `[experts, hidden, intermediate]`.
    StackedRows,
    /// llama4: `gate_up_proj` `[experts, hidden, 2 * intermediate]`, gate columns then up columns, and `down_proj`
    /// `[experts, intermediate, hidden]`.
    StackedColumns,
    /// gpt_oss: as llama4, but gate and up columns alternate, and there are biases `[experts, 2 * intermediate]` and
    /// `[experts, hidden]`.
    StackedInterleaved,
    /// gpt_oss in 4 bits: rows are output features, gate and up rows alternate; codes
    /// `[experts, rows, cols / 32, 16]` and exponents `[experts, rows, cols / 32]`; biases as above.
    Mxfp4,
}

/// What an expert tensor holds, and so which types it may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ExpertTensorKind {
    /// A matrix or a stack of them.
    Weights,
    /// A stack of vectors.
    Bias,
    /// 4-bit codes or their exponents.
    Packed,
}

/// One tensor that holds experts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ExpertTensor {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) kind: ExpertTensorKind,
}

/// What the matrices of GGUF's experts are called here, whatever the family: a stack per matrix becomes one tensor per
/// expert when it is read.
pub(crate) const GGUF_GATE: &str = "gate_proj";
pub(crate) const GGUF_UP: &str = "up_proj";
pub(crate) const GGUF_DOWN: &str = "down_proj";

impl ExpertLayout {
    /// The layout of GGUF files.
    pub(crate) const GGUF: ExpertLayout = ExpertLayout::Separate {
        gate: GGUF_GATE,
        up: GGUF_UP,
        down: GGUF_DOWN,
    };

    pub(crate) fn of(config: &ModelConfig) -> Self {
        match config.family {
            Family::Mixtral | Family::PhiMoe => ExpertLayout::Separate {
                gate: "w1",
                up: "w3",
                down: "w2",
            },
            Family::GraniteMoe => ExpertLayout::StackedRows,
            Family::Llama4Text => ExpertLayout::StackedColumns,
            Family::GptOss if config.quantization == WeightQuantization::Mxfp4 => ExpertLayout::Mxfp4,
            Family::GptOss => ExpertLayout::StackedInterleaved,
            _ => ExpertLayout::Separate {
                gate: "gate_proj",
                up: "up_proj",
                down: "down_proj",
            },
        }
    }
}

/// Name of one matrix of one expert where each has a tensor of its own.
pub(crate) fn separate_name(family: Family, layer: LayerId, expert: ExpertId, matrix: &str) -> String {
    format!(
        "model.layers.{layer}.{}experts.{expert}.{matrix}.weight",
        feed_forward(family)
    )
}

/// Name of one bias of one expert where each has a tensor of its own.
pub(crate) fn separate_bias_name(family: Family, layer: LayerId, expert: ExpertId, matrix: &str) -> String {
    format!(
        "model.layers.{layer}.{}experts.{expert}.{matrix}.bias",
        feed_forward(family)
    )
}

/// Name of a tensor that holds something of all experts of a layer.
pub(crate) fn stacked_name(family: Family, layer: LayerId, tensor: &str) -> String {
    let experts = if family == Family::GraniteMoe { "" } else { "experts." };
    format!("model.layers.{layer}.{}{experts}{tensor}", feed_forward(family))
}

/// Names and shapes of the tensors that hold the experts of one MoE layer.
pub(crate) fn expert_tensors(
    config: &ModelConfig,
    moe: &MoeConfig,
    layout: ExpertLayout,
    layer: LayerId,
) -> Vec<ExpertTensor> {
    use ExpertTensorKind::{Bias, Packed, Weights};
    let (experts, hidden, intermediate) = (moe.num_experts, config.hidden, moe.intermediate);
    let stacked = |tensor, shape: &[usize], kind| ExpertTensor {
        name: stacked_name(config.family, layer, tensor),
        shape: shape.to_vec(),
        kind,
    };
    match layout {
        ExpertLayout::Separate { gate, up, down } => (0..experts)
            .flat_map(|expert| {
                let expert = ExpertId(expert as u16);
                let weights = [
                    (gate, [intermediate, hidden]),
                    (up, [intermediate, hidden]),
                    (down, [hidden, intermediate]),
                ];
                let biases = [
                    (gate, moe.gate_up_bias, intermediate),
                    (up, moe.gate_up_bias, intermediate),
                    (down, moe.down_bias, hidden),
                ];
                let weights = weights.map(|(matrix, shape)| ExpertTensor {
                    name: separate_name(config.family, layer, expert, matrix),
                    shape: shape.to_vec(),
                    kind: Weights,
                });
                let biases = biases
                    .into_iter()
                    .filter(|(_, there, _)| *there)
                    .map(move |(matrix, _, length)| ExpertTensor {
                        name: separate_bias_name(config.family, layer, expert, matrix),
                        shape: vec![length],
                        kind: Bias,
                    });
                weights.into_iter().chain(biases)
            })
            .collect(),
        ExpertLayout::StackedRows => vec![
            stacked("input_linear.weight", &[experts, 2 * intermediate, hidden], Weights),
            stacked("output_linear.weight", &[experts, hidden, intermediate], Weights),
        ],
        ExpertLayout::StackedColumns => vec![
            stacked("gate_up_proj", &[experts, hidden, 2 * intermediate], Weights),
            stacked("down_proj", &[experts, intermediate, hidden], Weights),
        ],
        ExpertLayout::StackedInterleaved => vec![
            stacked("gate_up_proj", &[experts, hidden, 2 * intermediate], Weights),
            stacked("gate_up_proj_bias", &[experts, 2 * intermediate], Bias),
            stacked("down_proj", &[experts, intermediate, hidden], Weights),
            stacked("down_proj_bias", &[experts, hidden], Bias),
        ],
        ExpertLayout::Mxfp4 => {
            let groups = |cols: usize| cols / MXFP4_GROUP;
            let (up_rows, half) = (2 * intermediate, MXFP4_GROUP / 2);
            vec![
                stacked("gate_up_proj_blocks", &[experts, up_rows, groups(hidden), half], Packed),
                stacked("gate_up_proj_scales", &[experts, up_rows, groups(hidden)], Packed),
                stacked("gate_up_proj_bias", &[experts, up_rows], Bias),
                stacked(
                    "down_proj_blocks",
                    &[experts, hidden, groups(intermediate), half],
                    Packed,
                ),
                stacked("down_proj_scales", &[experts, hidden, groups(intermediate)], Packed),
                stacked("down_proj_bias", &[experts, hidden], Bias),
            ]
        }
    }
}
