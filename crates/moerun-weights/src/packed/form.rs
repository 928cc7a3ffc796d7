//! How a tensor is packed: the matrices and vectors that it becomes, in which formats.

use std::ops::Range;

use moerun_kernels::PackedMatrix;
use moerun_types::{AttentionConfig, ModelConfig, MoeConfig, NumberFormat};

use crate::{LayerTensor, TensorRole};

/// Everything in a packed file begins on a border of this many bytes.
pub(crate) const ALIGNMENT: u64 = 64;

/// One thing in memory, and in a packed tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// Panels of a matrix `[rows, cols]`.
    Matrix {
        format: NumberFormat,
        rows: usize,
        cols: usize,
    },
    /// f32 values.
    Vector { len: usize },
}

impl Part {
    /// Bytes in memory.
    pub(crate) fn memory_bytes(self) -> u64 {
        match self {
            Part::Matrix { format, rows, cols } => PackedMatrix::packed_bytes(format, rows, cols),
            Part::Vector { len } => (len as u64).saturating_mul(4),
        }
    }

    /// Bytes in a packed tensor, up to the next border.
    pub(crate) fn file_bytes(self) -> u64 {
        let bytes = self.memory_bytes();
        bytes.checked_next_multiple_of(ALIGNMENT).unwrap_or(u64::MAX)
    }
}

/// What a tensor outside the experts becomes in a model whose experts are in `format`: one part, or of the up projection
/// of latent attention two per head, the key half transposed and the value half as it is.
///
/// What decides between experts stays f32, embedding and head are in [`NumberFormat::for_vocabulary`], other matrices in
/// [`NumberFormat::for_dense`].
pub(crate) fn dense_parts(config: &ModelConfig, role: TensorRole, shape: &[usize], format: NumberFormat) -> Vec<Part> {
    use LayerTensor::{CorrectionBias, KvBProj, Router, SharedExpertGate};
    let matrix = |format, rows, cols| Part::Matrix { format, rows, cols };
    match (role, shape, &config.attention) {
        (TensorRole::Layer(_, Router | SharedExpertGate), &[rows, cols], _) => {
            vec![matrix(NumberFormat::F32, rows, cols)]
        }
        (TensorRole::Embedding | TensorRole::Head, &[rows, cols], _) => {
            vec![matrix(format.for_vocabulary(), rows, cols)]
        }
        (TensorRole::Layer(_, KvBProj), _, AttentionConfig::Latent(latent)) => {
            let (format, rank) = (format.for_dense(), latent.kv_lora_rank);
            let head = [
                matrix(format, rank, latent.qk_nope_head_dim),
                matrix(format, latent.v_head_dim, rank),
            ];
            head.repeat(latent.num_heads)
        }
        (TensorRole::Layer(_, CorrectionBias), ..) => vec![Part::Vector {
            len: shape.iter().product(),
        }],
        (_, &[rows, cols], _) => vec![matrix(format.for_dense(), rows, cols)],
        _ => vec![Part::Vector {
            len: shape.iter().product(),
        }],
    }
}

/// What the columns `held` of the intermediate dimension of one expert become: gate, up, down, and where there are any
/// the biases of gate, up and down. The last is owed by the holder of column 0.
pub(crate) fn expert_parts(
    config: &ModelConfig,
    moe: &MoeConfig,
    format: NumberFormat,
    held: Range<usize>,
) -> Vec<Part> {
    let (hidden, width) = (config.hidden, held.len());
    let up = Part::Matrix {
        format,
        rows: width,
        cols: hidden,
    };
    let down = Part::Matrix {
        format,
        rows: hidden,
        cols: width,
    };
    let mut parts = vec![up, up, down];
    if moe.gate_up_bias {
        parts.extend([Part::Vector { len: width }; 2]);
    }
    if moe.down_bias && held.start == 0 {
        parts.push(Part::Vector { len: hidden });
    }
    parts
}

/// Where the parts of an expert lie in its tensor.
#[derive(Debug)]
pub(crate) struct ExpertForm {
    pub(crate) gate: Range<usize>,
    pub(crate) up: Range<usize>,
    pub(crate) down: Range<usize>,
    pub(crate) gate_bias: Option<Range<usize>>,
    pub(crate) up_bias: Option<Range<usize>>,
    pub(crate) down_bias: Option<Range<usize>>,
}

impl ExpertForm {
    /// Of a whole expert, at `start` of its mapping.
    pub(crate) fn at(start: usize, config: &ModelConfig, moe: &MoeConfig, format: NumberFormat) -> Self {
        let mut places = places(start, &expert_parts(config, moe, format, 0..moe.intermediate));
        let mut next = move || places.next().expect("as many as were listed");
        let (gate, up, down) = (next(), next(), next());
        let (gate_bias, up_bias) = if moe.gate_up_bias {
            (Some(next()), Some(next()))
        } else {
            (None, None)
        };
        ExpertForm {
            gate,
            up,
            down,
            gate_bias,
            up_bias,
            down_bias: moe.down_bias.then(&mut next),
        }
    }
}

/// Where each part lies, the first at `start`. The tensor was checked to be as long as all of them.
pub(crate) fn places(start: usize, parts: &[Part]) -> impl Iterator<Item = Range<usize>> + use<> {
    let sizes: Vec<(usize, usize)> = parts
        .iter()
        .map(|part| (part.memory_bytes() as usize, part.file_bytes() as usize))
        .collect();
    sizes.into_iter().scan(start, |next, (memory, file)| {
        let place = *next..*next + memory;
        *next += file;
        Some(place)
    })
}
