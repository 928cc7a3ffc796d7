//! What llama.cpp calls tensors, and how it stores those that it does not store as they were trained.

use std::ops::Range;

use moerun_types::{AttentionConfig, ExpertId, Family, LayerId, ModelConfig};

use super::{GgufFile, GgufTensor};
use crate::{
    Dtype, LayerTensor, TensorRole,
    expert_tensors::{GGUF_DOWN, GGUF_GATE, GGUF_UP, separate_bias_name, separate_name},
    tensor_names,
};

/// A tensor under the name that the config's family gives it.
pub(crate) struct NamedTensor {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Range<usize>,
    pub(crate) arrangement: Arrangement,
}

/// How a tensor is stored that is not stored as it was trained.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Arrangement {
    AsTrained,
    /// The rows of each head of this width alternate between its two halves.
    PairedHead(usize),
    /// `kv_b_proj` in two tensors.
    KeysAndValues {
        heads: usize,
        /// Of the values `[heads, v, latent]`; the tensor itself holds the keys, `[heads, latent, nope]`.
        values: (Dtype, Range<usize>),
    },
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
        let unknown = || dense(tensor, tensor.name.clone(), Arrangement::AsTrained);
        match role(&tensor.name, config.family) {
            _ if tensor.name == "rope_freqs.weight" => {} // part of the config
            Some(role) if role.layer().is_some_and(|layer| layer >= config.layers.len()) => {
                // Layers after the last predict further tokens; the config was told how many there are.
                if !predicts_further_tokens(config.family) {
                    named.push(unknown());
                }
            }
            Some(Role::Experts(layer, matrix, part)) => match split(tensor, config, layer, matrix, part) {
                Some(experts) => named.extend(experts),
                None => named.push(unknown()),
            },
            Some(Role::Keys(layer)) => named.push(keys_and_values(file, tensor, config, layer).unwrap_or_else(unknown)),
            Some(Role::Values(layer)) => {
                // Goes with the keys.
                if tensor_of(file, layer, KEYS).is_none() {
                    named.push(unknown());
                }
            }
            Some(Role::Dense(role)) => {
                let name = tensor_names::name(config.family, role);
                named.push(dense(tensor, name, paired_head(config, role)));
            }
            Some(Role::FurtherTokens(_)) | None => named.push(unknown()),
        }
    }
    named
}

enum Role {
    Dense(TensorRole),
    Experts(LayerId, &'static str, Part),
    /// The two halves of `kv_b_proj`.
    Keys(LayerId),
    Values(LayerId),
    /// A tensor that only layers after the last have.
    FurtherTokens(LayerId),
}

#[derive(Clone, Copy)]
enum Part {
    Weights,
    Bias,
}

const KEYS: &str = "attn_k_b.weight";
const VALUES: &str = "attn_v_b.weight";

impl Role {
    fn layer(&self) -> Option<usize> {
        match self {
            Role::Dense(TensorRole::Layer(layer, _))
            | Role::Experts(layer, ..)
            | Role::Keys(layer)
            | Role::Values(layer)
            | Role::FurtherTokens(layer) => Some(layer.0 as usize),
            Role::Dense(_) => None,
        }
    }
}

/// Families whose files may hold such layers (`nextn_predict_layers`).
pub(super) fn predicts_further_tokens(family: Family) -> bool {
    matches!(family, Family::DeepseekV2 | Family::DeepseekV3 | Family::Glm4Moe)
}

fn role(name: &str, family: Family) -> Option<Role> {
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
    let post_norm = matches!(family, Family::GptOss | Family::Glm4Moe);
    let tensor = match tensor {
        "ffn_gate_exps.weight" => return Some(Role::Experts(layer, GGUF_GATE, Part::Weights)),
        "ffn_up_exps.weight" => return Some(Role::Experts(layer, GGUF_UP, Part::Weights)),
        "ffn_down_exps.weight" => return Some(Role::Experts(layer, GGUF_DOWN, Part::Weights)),
        "ffn_gate_exps.bias" => return Some(Role::Experts(layer, GGUF_GATE, Part::Bias)),
        "ffn_up_exps.bias" => return Some(Role::Experts(layer, GGUF_UP, Part::Bias)),
        "ffn_down_exps.bias" => return Some(Role::Experts(layer, GGUF_DOWN, Part::Bias)),
        KEYS => return Some(Role::Keys(layer)),
        VALUES => return Some(Role::Values(layer)),
        _ if tensor.starts_with("nextn.") => return Some(Role::FurtherTokens(layer)),
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
        "ffn_norm.weight" if !post_norm => FeedForwardNorm,
        "post_attention_norm.weight" if post_norm => FeedForwardNorm,
        "attn_sinks.weight" => Sinks,
        "attn_q_a.weight" => QAProj,
        "attn_q_a_norm.weight" => QANorm,
        "attn_q_b.weight" => QBProj,
        "attn_kv_a_mqa.weight" => KvAProj,
        "attn_kv_a_norm.weight" => KvANorm,
        "ffn_gate.weight" => GateProj,
        "ffn_up.weight" => UpProj,
        "ffn_down.weight" => DownProj,
        "ffn_gate.bias" => GateBias,
        "ffn_up.bias" => UpBias,
        "ffn_down.bias" => DownBias,
        "ffn_gate_inp.weight" => Router,
        "ffn_gate_inp.bias" => RouterBias,
        "exp_probs_b.bias" => CorrectionBias,
        "ffn_gate_shexp.weight" => SharedGateProj,
        "ffn_up_shexp.weight" => SharedUpProj,
        "ffn_down_shexp.weight" => SharedDownProj,
        "ffn_gate_inp_shexp.weight" => SharedExpertGate,
        _ => return None,
    };
    Some(Role::Dense(TensorRole::Layer(layer, tensor)))
}

fn dense(tensor: &GgufTensor, name: String, arrangement: Arrangement) -> NamedTensor {
    let mut shape = tensor.shape.clone();
    // Vectors here that are matrices of one row in the family's own files.
    let one_row = ["shared_expert_gate.weight", "moe_statics.e_score_correction_bias"];
    if shape.len() == 1 && one_row.iter().any(|end| name.ends_with(end)) {
        shape.insert(0, 1);
    }
    NamedTensor {
        name,
        dtype: tensor.dtype,
        shape,
        bytes: tensor.bytes.clone(),
        arrangement,
    }
}

/// Where llama.cpp rotates neighbours and the family rotates halves, its converter has interleaved the rows of each
/// head's queries and keys.
fn paired_head(config: &ModelConfig, role: TensorRole) -> Arrangement {
    use LayerTensor::{KBias, KProj, QBias, QProj};
    let rotated = matches!(role, TensorRole::Layer(_, QProj | KProj | QBias | KBias));
    let interleaved = matches!(config.family, Family::Llama | Family::Mixtral | Family::GraniteMoe);
    match &config.attention {
        AttentionConfig::Grouped(attention) if rotated && interleaved => Arrangement::PairedHead(attention.head_dim),
        _ => Arrangement::AsTrained,
    }
}

fn tensor_of<'a>(file: &'a GgufFile, layer: LayerId, name: &str) -> Option<&'a GgufTensor> {
    let name = format!("blk.{layer}.{name}");
    file.tensors.iter().find(|tensor| tensor.name == name)
}

/// `kv_b_proj` `[heads * (nope + v), latent]` from its keys `[heads, latent, nope]` and the values beside them,
/// `[heads, v, latent]`; `None` if they are not that.
fn keys_and_values(file: &GgufFile, keys: &GgufTensor, config: &ModelConfig, layer: LayerId) -> Option<NamedTensor> {
    let AttentionConfig::Latent(attention) = &config.attention else {
        return None;
    };
    let values = tensor_of(file, layer, VALUES)?;
    let (heads, latent) = (attention.num_heads, attention.kv_lora_rank);
    let fits = keys.shape == [heads, latent, attention.qk_nope_head_dim]
        && values.shape == [heads, attention.v_head_dim, latent];
    fits.then(|| NamedTensor {
        name: tensor_names::name(config.family, TensorRole::Layer(layer, LayerTensor::KvBProj)),
        dtype: keys.dtype,
        shape: vec![heads * (attention.qk_nope_head_dim + attention.v_head_dim), latent],
        bytes: keys.bytes.clone(),
        arrangement: Arrangement::KeysAndValues {
            heads,
            values: (values.dtype, values.bytes.clone()),
        },
    })
}

/// A stack `[experts, out, in]` as one matrix per expert, or one `[experts, out]` as one bias per expert; `None` if it
/// is no stack of that many experts.
fn split(
    tensor: &GgufTensor,
    config: &ModelConfig,
    layer: LayerId,
    matrix: &'static str,
    part: Part,
) -> Option<Vec<NamedTensor>> {
    let moe = config.moe.as_ref()?;
    let (&experts, shape) = tensor.shape.split_first()?;
    let rank = match part {
        Part::Weights => 2,
        Part::Bias => 1,
    };
    if experts != moe.num_experts || shape.len() != rank {
        return None;
    }
    let (start, size) = (tensor.bytes.start, tensor.bytes.len() / experts);
    let expert = |index: usize| {
        let expert = ExpertId(index as u16);
        NamedTensor {
            name: match part {
                Part::Weights => separate_name(config.family, layer, expert, matrix),
                Part::Bias => separate_bias_name(config.family, layer, expert, matrix),
            },
            dtype: tensor.dtype,
            shape: shape.to_vec(),
            bytes: start + index * size..start + (index + 1) * size,
            arrangement: Arrangement::AsTrained,
        }
    };
    Some((0..experts).map(expert).collect())
}
