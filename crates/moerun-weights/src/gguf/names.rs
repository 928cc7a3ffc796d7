//! What llama.cpp calls tensors, and how it stores those that it does not store as they were trained.

use std::ops::Range;

use moerun_types::{AttentionConfig, ExpertId, Family, LayerId, ModelConfig};

use super::{GgufFile, GgufTensor};
use crate::{
    Dtype, LayerTensor, TensorRole,
    expert_tensors::{GGUF_DOWN, GGUF_GATE, GGUF_UP, separate_name},
    tensor_names,
};

/// A tensor under the name that the config's family gives it.
pub(crate) struct NamedTensor {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Range<usize>,
    /// Width of a head whose rows alternate between its two halves.
    pub(crate) paired_head: Option<usize>,
}

impl GgufTensor {
    /// The values of an f32 vector.
    pub(super) fn floats(&self, file: &[u8]) -> Option<Vec<f32>> {
        let bytes = (self.dtype == Dtype::F32).then(|| &file[self.bytes.clone()])?;
        let value = |bytes: &[u8]| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        Some(bytes.chunks_exact(4).map(value).collect())
    }
}

/// All tensors of a file under our names; a stack of experts becomes one tensor per expert. A tensor that is not known
/// keeps its own name, so that the check against the config names it.
pub(crate) fn named_tensors(file: &GgufFile, config: &ModelConfig) -> Vec<NamedTensor> {
    let mut named = Vec::with_capacity(file.tensors.len());
    for tensor in &file.tensors {
        match role(&tensor.name) {
            _ if tensor.name == "rope_freqs.weight" => {} // part of the config
            Some(Role::Experts(layer, matrix)) => match split(tensor, config, layer, matrix) {
                Some(experts) => named.extend(experts),
                None => named.push(dense(tensor, tensor.name.clone(), None)),
            },
            Some(Role::Dense(role)) => {
                let name = tensor_names::name(config.family, role);
                named.push(dense(tensor, name, paired_head(config, role)));
            }
            None => named.push(dense(tensor, tensor.name.clone(), None)),
        }
    }
    named
}

enum Role {
    Dense(TensorRole),
    Experts(LayerId, &'static str),
}

fn role(name: &str) -> Option<Role> {
    use LayerTensor::*;
    let global = |role| Some(Role::Dense(role));
    match name {
        "token_embd.weight" => return global(TensorRole::Embedding),
        "output.weight" => return global(TensorRole::Head),
        "output_norm.weight" => return global(TensorRole::FinalNorm),
        _ => {}
    }
    let (layer, tensor) = name.strip_prefix("blk.")?.split_once('.')?;
    let number: u32 = layer.parse().ok()?;
    // "007" and "+7" are other names.
    if number.to_string() != layer {
        return None;
    }
    let layer = LayerId(number);
    let tensor = match tensor {
        "ffn_gate_exps.weight" => return Some(Role::Experts(layer, GGUF_GATE)),
        "ffn_up_exps.weight" => return Some(Role::Experts(layer, GGUF_UP)),
        "ffn_down_exps.weight" => return Some(Role::Experts(layer, GGUF_DOWN)),
        "attn_norm.weight" => AttentionNorm,
        "attn_q.weight" => QProj,
        "attn_k.weight" => KProj,
        "attn_v.weight" => VProj,
        "attn_output.weight" => OProj,
        "attn_q.bias" => QBias,
        "attn_k.bias" => KBias,
        "attn_v.bias" => VBias,
        "attn_output.bias" => OBias,
        "attn_q_norm.weight" => QNorm,
        "attn_k_norm.weight" => KNorm,
        "ffn_norm.weight" => FeedForwardNorm,
        "ffn_gate.weight" => GateProj,
        "ffn_up.weight" => UpProj,
        "ffn_down.weight" => DownProj,
        "ffn_gate.bias" => GateBias,
        "ffn_up.bias" => UpBias,
        "ffn_down.bias" => DownBias,
        "ffn_gate_inp.weight" => Router,
        "ffn_gate_shexp.weight" => SharedGateProj,
        "ffn_up_shexp.weight" => SharedUpProj,
        "ffn_down_shexp.weight" => SharedDownProj,
        "ffn_gate_inp_shexp.weight" => SharedExpertGate,
        _ => return None,
    };
    Some(Role::Dense(TensorRole::Layer(layer, tensor)))
}

fn dense(tensor: &GgufTensor, name: String, paired_head: Option<usize>) -> NamedTensor {
    let mut shape = tensor.shape.clone();
    if name.ends_with("shared_expert_gate.weight") && shape.len() == 1 {
        shape.insert(0, 1);
    }
    NamedTensor {
        name,
        dtype: tensor.dtype,
        shape,
        bytes: tensor.bytes.clone(),
        paired_head,
    }
}

/// Where llama.cpp rotates neighbours and the family rotates halves, its converter has interleaved the rows of each
/// head's queries and keys.
fn paired_head(config: &ModelConfig, role: TensorRole) -> Option<usize> {
    use LayerTensor::{KBias, KProj, QBias, QProj};
    let rotated = matches!(role, TensorRole::Layer(_, QProj | KProj | QBias | KBias));
    let interleaved = matches!(config.family, Family::Llama | Family::Mixtral | Family::GraniteMoe);
    match &config.attention {
        AttentionConfig::Grouped(attention) if rotated && interleaved => Some(attention.head_dim),
        _ => None,
    }
}

/// A stack `[experts, out, in]` as one matrix per expert; `None` if it is no stack of that many experts.
fn split(tensor: &GgufTensor, config: &ModelConfig, layer: LayerId, matrix: &'static str) -> Option<Vec<NamedTensor>> {
    let moe = config.moe.as_ref()?;
    let &[experts, rows, cols] = &tensor.shape[..] else {
        return None;
    };
    if experts != moe.num_experts {
        return None;
    }
    let (start, size) = (tensor.bytes.start, tensor.bytes.len() / experts);
    let expert = |index: usize| NamedTensor {
        name: separate_name(config.family, layer, ExpertId(index as u16), matrix),
        dtype: tensor.dtype,
        shape: vec![rows, cols],
        bytes: start + index * size..start + (index + 1) * size,
        paired_head: None,
    };
    Some((0..experts).map(expert).collect())
}
