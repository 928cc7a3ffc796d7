//! The tensors outside the experts that a config asks for, with their shapes.

use moerun_types::{
    AttentionConfig, Family, FeedForwardKind, GroupedAttention, LatentAttention, LayerConfig, LayerId, ModelConfig,
    MoeConfig, NormKind, QkNorm,
};

use crate::{LayerTensor, TensorRole};

/// Roles and shapes (as on disk) of all tensors outside the experts, layer by layer.
pub(crate) fn dense_tensors(config: &ModelConfig) -> Vec<(TensorRole, Vec<usize>)> {
    let (vocab, hidden) = (config.vocab_size, config.hidden);
    let mut tensors = vec![(TensorRole::Embedding, vec![vocab, hidden])];
    for (id, layer) in (0..).map(LayerId).zip(&config.layers) {
        let in_layer = layer_tensors(config, layer);
        tensors.extend(
            in_layer
                .into_iter()
                .map(|(tensor, shape)| (TensorRole::Layer(id, tensor), shape)),
        );
    }
    tensors.push((TensorRole::FinalNorm, vec![hidden]));
    if config.norm.kind == NormKind::LayerNorm {
        tensors.push((TensorRole::FinalNormBias, vec![hidden]));
    }
    if !config.tied_head {
        tensors.push((TensorRole::Head, vec![vocab, hidden]));
    }
    if config.head_bias {
        tensors.push((TensorRole::HeadBias, vec![vocab]));
    }
    tensors
}

/// Tensors of one layer, collected one by one.
#[derive(Default)]
struct Tensors(Vec<(LayerTensor, Vec<usize>)>);

impl Tensors {
    fn matrix(&mut self, tensor: LayerTensor, rows: usize, cols: usize) {
        self.0.push((tensor, vec![rows, cols]));
    }

    fn vector(&mut self, tensor: LayerTensor, length: usize) {
        self.0.push((tensor, vec![length]));
    }

    fn vector_if(&mut self, wanted: bool, tensor: LayerTensor, length: usize) {
        if wanted {
            self.vector(tensor, length);
        }
    }
}

fn layer_tensors(config: &ModelConfig, layer: &LayerConfig) -> Vec<(LayerTensor, Vec<usize>)> {
    let hidden = config.hidden;
    let norm_bias = config.norm.kind == NormKind::LayerNorm;
    let mut tensors = Tensors::default();
    tensors.vector(LayerTensor::AttentionNorm, hidden);
    tensors.vector_if(norm_bias, LayerTensor::AttentionNormBias, hidden);
    match &config.attention {
        AttentionConfig::Grouped(grouped) => grouped_attention(&mut tensors, grouped, hidden),
        AttentionConfig::Latent(latent) => latent_attention(&mut tensors, latent, hidden),
    }
    tensors.vector(LayerTensor::FeedForwardNorm, hidden);
    tensors.vector_if(norm_bias, LayerTensor::FeedForwardNormBias, hidden);
    match (layer.feed_forward, &config.moe) {
        (FeedForwardKind::Dense { intermediate }, _) => dense(&mut tensors, config, intermediate),
        (FeedForwardKind::Moe, Some(moe)) => gate_and_shared(&mut tensors, config, moe),
        (FeedForwardKind::Moe, None) => {}
    }
    tensors.0
}

fn grouped_attention(tensors: &mut Tensors, attention: &GroupedAttention, hidden: usize) {
    use LayerTensor::*;
    let head_dim = attention.head_dim;
    let (query, kv) = (attention.num_heads * head_dim, attention.num_kv_heads * head_dim);
    tensors.matrix(QProj, query, hidden);
    tensors.matrix(KProj, kv, hidden);
    tensors.matrix(VProj, kv, hidden);
    tensors.matrix(OProj, hidden, query);
    tensors.vector_if(attention.qkv_bias, QBias, query);
    tensors.vector_if(attention.qkv_bias, KBias, kv);
    tensors.vector_if(attention.qkv_bias, VBias, kv);
    tensors.vector_if(attention.output_bias, OBias, hidden);
    let norm = match attention.qk_norm {
        QkNorm::None | QkNorm::WeightlessAfterRotary => None,
        QkNorm::PerHead => Some((head_dim, head_dim)),
        QkNorm::WholeProjection => Some((query, kv)),
    };
    if let Some((query_norm, key_norm)) = norm {
        tensors.vector(QNorm, query_norm);
        tensors.vector(KNorm, key_norm);
    }
    tensors.vector_if(attention.sinks, Sinks, attention.num_heads);
}

fn latent_attention(tensors: &mut Tensors, attention: &LatentAttention, hidden: usize) {
    use LayerTensor::*;
    let heads = attention.num_heads;
    let query = heads * (attention.qk_nope_head_dim + attention.qk_rope_head_dim);
    match attention.q_lora_rank {
        Some(rank) => {
            tensors.matrix(QAProj, rank, hidden);
            tensors.vector_if(attention.bias, QABias, rank);
            tensors.vector(QANorm, rank);
            tensors.matrix(QBProj, query, rank);
        }
        None => tensors.matrix(QProj, query, hidden),
    }
    let latent = attention.kv_lora_rank;
    let latent_and_rotary = latent + attention.qk_rope_head_dim;
    tensors.matrix(KvAProj, latent_and_rotary, hidden);
    tensors.vector_if(attention.bias, KvABias, latent_and_rotary);
    tensors.vector(KvANorm, latent);
    tensors.matrix(
        KvBProj,
        heads * (attention.qk_nope_head_dim + attention.v_head_dim),
        latent,
    );
    tensors.matrix(OProj, hidden, heads * attention.v_head_dim);
    tensors.vector_if(attention.bias, OBias, hidden);
}

fn dense(tensors: &mut Tensors, config: &ModelConfig, intermediate: usize) {
    use LayerTensor::*;
    tensors.matrix(GateProj, intermediate, config.hidden);
    tensors.matrix(UpProj, intermediate, config.hidden);
    tensors.matrix(DownProj, config.hidden, intermediate);
    tensors.vector_if(config.mlp_bias, GateBias, intermediate);
    tensors.vector_if(config.mlp_bias, UpBias, intermediate);
    tensors.vector_if(config.mlp_bias, DownBias, config.hidden);
}

fn gate_and_shared(tensors: &mut Tensors, config: &ModelConfig, moe: &MoeConfig) {
    use LayerTensor::*;
    let hidden = config.hidden;
    tensors.matrix(Router, moe.num_experts, hidden);
    tensors.vector_if(moe.gate.router_bias, RouterBias, moe.num_experts);
    if moe.gate.correction_bias {
        match config.family {
            Family::Ernie45Moe => tensors.matrix(CorrectionBias, 1, moe.num_experts),
            _ => tensors.vector(CorrectionBias, moe.num_experts),
        }
    }
    if let Some(shared) = moe.shared {
        tensors.matrix(SharedGateProj, shared.intermediate, hidden);
        tensors.matrix(SharedUpProj, shared.intermediate, hidden);
        tensors.matrix(SharedDownProj, hidden, shared.intermediate);
        if shared.sigmoid_gate {
            tensors.matrix(SharedExpertGate, 1, hidden);
        }
    }
}
