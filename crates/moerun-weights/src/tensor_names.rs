//! Our names of the tensors outside the experts, and what each family calls them on disk.

use moerun_types::{Family, LayerId};

/// A tensor that the gateway holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TensorRole {
    /// `[vocab, hidden]`.
    Embedding,
    /// `[vocab, hidden]`; absent when tied.
    Head,
    /// `[vocab]`.
    HeadBias,
    /// `[hidden]`.
    FinalNorm,
    /// `[hidden]`.
    FinalNormBias,
    /// A tensor of a layer.
    Layer(LayerId, LayerTensor),
}

/// A tensor of one layer, outside its experts. Matrices are `[out, in]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum LayerTensor {
    AttentionNorm,
    AttentionNormBias,
    FeedForwardNorm,
    FeedForwardNormBias,
    /// Grouped attention: `[num_heads * head_dim, hidden]` and so on.
    QProj,
    KProj,
    VProj,
    OProj,
    QBias,
    KBias,
    VBias,
    OBias,
    QNorm,
    KNorm,
    /// `[num_heads]`.
    Sinks,
    /// Latent attention: `[q_lora_rank, hidden]`.
    QAProj,
    QABias,
    QANorm,
    /// `[num_heads * (nope + rope), q_lora_rank]`.
    QBProj,
    /// `[kv_lora_rank + rope, hidden]`.
    KvAProj,
    KvABias,
    KvANorm,
    /// `[num_heads * (nope + v), kv_lora_rank]`.
    KvBProj,
    /// Dense feed-forward.
    GateProj,
    UpProj,
    DownProj,
    GateBias,
    UpBias,
    DownBias,
    /// `[num_experts, hidden]`.
    Router,
    RouterBias,
    /// `[num_experts]`.
    CorrectionBias,
    SharedGateProj,
    SharedUpProj,
    SharedDownProj,
    /// `[1, hidden]`.
    SharedExpertGate,
}

/// What `family` calls a tensor outside the experts.
pub(crate) fn name(family: Family, role: TensorRole) -> String {
    match role {
        TensorRole::Embedding => "model.embed_tokens.weight".to_owned(),
        TensorRole::Head => "lm_head.weight".to_owned(),
        TensorRole::HeadBias => "lm_head.bias".to_owned(),
        TensorRole::FinalNorm => "model.norm.weight".to_owned(),
        TensorRole::FinalNormBias => "model.norm.bias".to_owned(),
        TensorRole::Layer(layer, tensor) => {
            format!(
                "model.layers.{layer}.{}{}",
                block(family, tensor),
                within_block(family, tensor)
            )
        }
    }
}

/// The module of a layer that a tensor belongs to.
fn block(family: Family, tensor: LayerTensor) -> &'static str {
    use LayerTensor::*;
    match tensor {
        AttentionNorm | AttentionNormBias | FeedForwardNorm | FeedForwardNormBias => "",
        QProj | KProj | VProj | OProj | QBias | KBias | VBias | OBias | QNorm | KNorm | Sinks | QAProj | QABias
        | QANorm | QBProj | KvAProj | KvABias | KvANorm | KvBProj => "self_attn.",
        GateProj | UpProj | DownProj | GateBias | UpBias | DownBias | Router | RouterBias | CorrectionBias
        | SharedGateProj | SharedUpProj | SharedDownProj | SharedExpertGate => feed_forward(family),
    }
}

/// The module that holds a layer's feed-forward, dense or not.
pub(crate) fn feed_forward(family: Family) -> &'static str {
    match family {
        Family::Mixtral | Family::PhiMoe | Family::GraniteMoe => "block_sparse_moe.",
        Family::Llama4Text => "feed_forward.",
        _ => "mlp.",
    }
}

fn within_block(family: Family, tensor: LayerTensor) -> &'static str {
    use LayerTensor::*;
    let several_shared = !matches!(family, Family::Qwen2Moe | Family::Llama4Text);
    match tensor {
        AttentionNorm => "input_layernorm.weight",
        AttentionNormBias => "input_layernorm.bias",
        FeedForwardNorm => "post_attention_layernorm.weight",
        FeedForwardNormBias => "post_attention_layernorm.bias",
        QProj => "q_proj.weight",
        KProj => "k_proj.weight",
        VProj => "v_proj.weight",
        OProj => "o_proj.weight",
        QBias => "q_proj.bias",
        KBias => "k_proj.bias",
        VBias => "v_proj.bias",
        OBias => "o_proj.bias",
        QNorm => "q_norm.weight",
        KNorm => "k_norm.weight",
        Sinks => "sinks",
        QAProj => "q_a_proj.weight",
        QABias => "q_a_proj.bias",
        QANorm => "q_a_layernorm.weight",
        QBProj => "q_b_proj.weight",
        KvAProj => "kv_a_proj_with_mqa.weight",
        KvABias => "kv_a_proj_with_mqa.bias",
        KvANorm => "kv_a_layernorm.weight",
        KvBProj => "kv_b_proj.weight",
        GateProj => "gate_proj.weight",
        UpProj => "up_proj.weight",
        DownProj => "down_proj.weight",
        GateBias => "gate_proj.bias",
        UpBias => "up_proj.bias",
        DownBias => "down_proj.bias",
        Router => match family {
            Family::GraniteMoe => "router.layer.weight",
            Family::GptOss | Family::Llama4Text => "router.weight",
            _ => "gate.weight",
        },
        RouterBias => "router.bias",
        CorrectionBias => match family {
            Family::Ernie45Moe => "moe_statics.e_score_correction_bias",
            _ => "gate.e_score_correction_bias",
        },
        SharedGateProj if several_shared => "shared_experts.gate_proj.weight",
        SharedUpProj if several_shared => "shared_experts.up_proj.weight",
        SharedDownProj if several_shared => "shared_experts.down_proj.weight",
        SharedGateProj => "shared_expert.gate_proj.weight",
        SharedUpProj => "shared_expert.up_proj.weight",
        SharedDownProj => "shared_expert.down_proj.weight",
        SharedExpertGate => "shared_expert_gate.weight",
    }
}
