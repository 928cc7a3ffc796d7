//! One expert's weights in our orientation, whatever the layout on disk (per expert, stacked, interleaved, 4-bit).

use moerun_types::{ExpertId, LayerId, ModelConfig, MoeConfig};

use crate::{
    Dtype, MatrixSource,
    expected::scale_name,
    expert_tensors::{ExpertLayout, separate_bias_name, separate_name, stacked_name},
    gguf::Arrangement,
    store::{StoredTensor, TensorStore},
    tensor::Strides,
};

/// One expert of one layer, ready to be read row by row.
#[derive(Debug, Clone)]
pub struct ExpertSource<'a> {
    /// `[intermediate, hidden]`.
    pub gate_proj: MatrixSource<'a>,
    /// `[intermediate, hidden]`.
    pub up_proj: MatrixSource<'a>,
    /// `[hidden, intermediate]`.
    pub down_proj: MatrixSource<'a>,
    /// `[intermediate]`.
    pub gate_bias: Option<Vec<f32>>,
    /// `[intermediate]`.
    pub up_bias: Option<Vec<f32>>,
    /// `[hidden]`.
    pub down_bias: Option<Vec<f32>>,
}

/// One expert's tensors as they are stored; biases are `[1, n]`.
pub(crate) struct ExpertParts<'a> {
    pub(crate) gate: MatrixSource<'a>,
    pub(crate) up: MatrixSource<'a>,
    pub(crate) down: MatrixSource<'a>,
    pub(crate) gate_bias: Option<MatrixSource<'a>>,
    pub(crate) up_bias: Option<MatrixSource<'a>>,
    pub(crate) down_bias: Option<MatrixSource<'a>>,
}

impl<'a> From<ExpertParts<'a>> for ExpertSource<'a> {
    fn from(parts: ExpertParts<'a>) -> Self {
        let values = |bias: Option<MatrixSource<'a>>| bias.map(|bias| read_vector(&bias));
        ExpertSource {
            gate_proj: parts.gate,
            up_proj: parts.up,
            down_proj: parts.down,
            gate_bias: values(parts.gate_bias),
            up_bias: values(parts.up_bias),
            down_bias: values(parts.down_bias),
        }
    }
}

/// The one row of a vector.
pub(crate) fn read_vector(source: &MatrixSource<'_>) -> Vec<f32> {
    let mut values = vec![0.0; source.cols()];
    source.read_row(0, &mut values);
    values
}

/// A tensor and its bytes; it was checked against the config when the checkpoint was opened.
#[derive(Clone, Copy)]
struct Tensor<'a> {
    dtype: Dtype,
    bytes: &'a [u8],
}

impl<'a> Tensor<'a> {
    fn get(store: &'a TensorStore, name: &str) -> Option<Self> {
        store.get(name).map(|stored| Tensor {
            dtype: known_dtype(stored),
            bytes: store.bytes(stored),
        })
    }

    /// One expert's share of a stack.
    fn of_expert(self, expert: usize, num_experts: usize) -> Self {
        let size = self.bytes.len() / num_experts;
        Tensor {
            dtype: self.dtype,
            bytes: &self.bytes[expert * size..(expert + 1) * size],
        }
    }

    /// All of it, row after row.
    fn rows(self, shape: [usize; 2]) -> MatrixSource<'a> {
        match self.dtype {
            Dtype::Block(block) => MatrixSource::blocks(block, self.bytes, shape),
            dtype => MatrixSource::row_major(dtype, self.bytes, shape),
        }
    }

    fn matrix(self, shape: [usize; 2], first: usize, row: usize, col: usize) -> MatrixSource<'a> {
        MatrixSource::plain(self.dtype, self.bytes, shape, Strides { first, row, col })
    }
}

/// Type of a tensor whose type was checked.
pub(crate) fn known_dtype(stored: &StoredTensor) -> Dtype {
    stored
        .element
        .dtype
        .expect("tensors of other types are refused when the checkpoint is opened")
}

/// A whole matrix of its own as it was trained; fp8 ones with the scales beside them.
pub(crate) fn whole_matrix<'a>(
    store: &'a TensorStore,
    name: &str,
    shape: [usize; 2],
    fp8_block: Option<[usize; 2]>,
) -> Option<MatrixSource<'a>> {
    let tensor = Tensor::get(store, name)?;
    if let (Dtype::F8E4M3, Some(block)) = (tensor.dtype, fp8_block) {
        let scales = Tensor::get(store, &scale_name(name))?;
        let scales = (scales.dtype, scales.bytes);
        return Some(MatrixSource::fp8(tensor.bytes, scales, shape, block));
    }
    let stored = store.get(name)?;
    Some(match &stored.arrangement {
        Arrangement::AsTrained => tensor.rows(shape),
        // A vector is put in order by its reader.
        Arrangement::PairedHead(_) if shape[0] == 1 => tensor.rows(shape),
        Arrangement::PairedHead(head) => tensor.rows(shape).with_paired_head(*head),
        Arrangement::KeysAndValues { heads, values } => {
            let [rows, latent] = shape;
            let (dtype, bytes) = (values.0, store.beside(stored, values.1.clone()));
            let value_rows = dtype.elements(bytes.len()) / latent;
            let key_width = (rows - value_rows) / heads;
            MatrixSource::keys_and_values(
                tensor.rows([heads * latent, key_width]),
                Tensor { dtype, bytes }.rows([value_rows, latent]),
                *heads,
            )
        }
    })
}

/// Finds one expert's tensors; `None` if one of them is not there, or the model has no such expert.
pub(crate) fn find<'a>(
    store: &'a TensorStore,
    config: &ModelConfig,
    moe: &MoeConfig,
    layer: LayerId,
    expert: ExpertId,
) -> Option<ExpertParts<'a>> {
    let index = usize::from(expert.0);
    if index >= moe.num_experts {
        return None;
    }
    let (hidden, width) = (config.hidden, moe.intermediate);
    let stacked = |tensor: &str| {
        let stack = Tensor::get(store, &stacked_name(config.family, layer, tensor))?;
        Some(stack.of_expert(index, moe.num_experts))
    };
    let interleaved_biases = || {
        let gate_up = stacked("gate_up_proj_bias")?;
        let half = |first| Some(gate_up.matrix([1, width], first, 2 * width, 2));
        Some((
            half(0),
            half(1),
            Some(stacked("down_proj_bias")?.matrix([1, hidden], 0, hidden, 1)),
        ))
    };
    let layout = store.expert_layout(config);
    let (gate, up, down) = match layout {
        ExpertLayout::Separate { gate, up, down } => {
            let block = crate::checkpoint::fp8_block(config);
            let matrix = |matrix, shape| {
                whole_matrix(
                    store,
                    &separate_name(config.family, layer, expert, matrix),
                    shape,
                    block,
                )
            };
            (
                matrix(gate, [width, hidden])?,
                matrix(up, [width, hidden])?,
                matrix(down, [hidden, width])?,
            )
        }
        ExpertLayout::StackedRows => {
            let gate_up = stacked("input_linear.weight")?;
            let half = |first| gate_up.matrix([width, hidden], first * hidden, hidden, 1);
            (
                half(0),
                half(width),
                stacked("output_linear.weight")?.matrix([hidden, width], 0, width, 1),
            )
        }
        ExpertLayout::StackedColumns => {
            let gate_up = stacked("gate_up_proj")?;
            let half = |first| gate_up.matrix([width, hidden], first, 1, 2 * width);
            (
                half(0),
                half(width),
                stacked("down_proj")?.matrix([hidden, width], 0, 1, hidden),
            )
        }
        ExpertLayout::StackedInterleaved => {
            let gate_up = stacked("gate_up_proj")?;
            let half = |first| gate_up.matrix([width, hidden], first, 2, 2 * width);
            (
                half(0),
                half(1),
                stacked("down_proj")?.matrix([hidden, width], 0, 1, hidden),
            )
        }
        ExpertLayout::Mxfp4 => {
            let (codes, exponents) = (stacked("gate_up_proj_blocks")?, stacked("gate_up_proj_scales")?);
            let half = |first| MatrixSource::mxfp4(codes.bytes, exponents.bytes, [width, hidden], first, 2);
            let (down, scales) = (stacked("down_proj_blocks")?, stacked("down_proj_scales")?);
            (
                half(0),
                half(1),
                MatrixSource::mxfp4(down.bytes, scales.bytes, [hidden, width], 0, 1),
            )
        }
    };
    let (gate_bias, up_bias, down_bias) = match layout {
        ExpertLayout::Separate { gate, up, down } => {
            let bias = |there: bool, matrix, length| {
                let name = || separate_bias_name(config.family, layer, expert, matrix);
                Some(match there {
                    true => Some(whole_matrix(store, &name(), [1, length], None)?),
                    false => None,
                })
            };
            (
                bias(moe.gate_up_bias, gate, width)?,
                bias(moe.gate_up_bias, up, width)?,
                bias(moe.down_bias, down, hidden)?,
            )
        }
        ExpertLayout::StackedInterleaved | ExpertLayout::Mxfp4 => interleaved_biases()?,
        _ => (None, None, None),
    };
    Some(ExpertParts {
        gate,
        up,
        down,
        gate_bias,
        up_bias,
        down_bias,
    })
}
