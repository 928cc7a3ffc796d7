//! What the tests of this crate share: a seeded generator, and models of any size.

use moerun_types::{
    Activation, AttentionConfig, AttentionMask, Family, FeedForwardKind, GateConfig, GroupedAttention, LayerConfig,
    ModelConfig, MoeConfig, NormConfig, NormKind, QkNorm, Renormalize, RopeConfig, RopeScaling, RotaryLayout,
    RoutingWeightTarget, ScoreFunction, WeightQuantization,
};

/// SplitMix64.
pub(crate) struct Seeded(u64);

impl Seeded {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// From 0, below `count`.
    pub(crate) fn below(&mut self, count: usize) -> usize {
        (self.next() % count as u64) as usize
    }

    /// From `low` to `high`, both included.
    pub(crate) fn between(&mut self, low: usize, high: usize) -> usize {
        low + self.below(high - low + 1)
    }

    /// From -1 to 1.
    pub(crate) fn signed(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub(crate) fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for index in (1..items.len()).rev() {
            items.swap(index, self.below(index + 1));
        }
    }
}

/// A gate with nothing but a score function.
pub(crate) fn plain_gate(score: ScoreFunction) -> GateConfig {
    GateConfig {
        score,
        router_bias: false,
        correction_bias: false,
        groups: None,
        renormalize: Renormalize::No,
        routed_scaling_factor: 1.0,
    }
}

/// A model whose layer `i` has experts where `moe_layers[i]`.
pub(crate) fn model(moe_layers: &[bool], num_experts: usize, intermediate: usize) -> ModelConfig {
    let layer = |&moe: &bool| LayerConfig {
        mask: AttentionMask::Full,
        rotary: true,
        temperature: None,
        feed_forward: if moe {
            FeedForwardKind::Moe
        } else {
            FeedForwardKind::Dense { intermediate: 16 }
        },
    };
    ModelConfig {
        family: Family::Qwen3Moe,
        vocab_size: 16,
        hidden: 8,
        max_position_embeddings: 64,
        norm: NormConfig {
            kind: NormKind::Rms,
            epsilon: 1e-6,
        },
        attention: AttentionConfig::Grouped(GroupedAttention {
            num_heads: 1,
            num_kv_heads: 1,
            head_dim: 8,
            qkv_bias: false,
            output_bias: false,
            qk_norm: QkNorm::None,
            clip_qkv: None,
            sinks: false,
            scale: 1.0,
        }),
        rope: RopeConfig {
            theta: 1e4,
            rotary_dim: 8,
            layout: RotaryLayout::Halves,
            scaling: RopeScaling::None,
        },
        layers: moe_layers.iter().map(layer).collect(),
        moe: moe_layers.contains(&true).then(|| MoeConfig {
            num_experts,
            top_k: 2.min(num_experts),
            intermediate,
            gate: plain_gate(ScoreFunction::Softmax),
            activation: Activation::Silu,
            gate_up_bias: false,
            down_bias: false,
            weight_target: RoutingWeightTarget::Output,
            shared: None,
        }),
        activation: Activation::Silu,
        mlp_bias: false,
        tied_head: false,
        head_bias: false,
        embedding_multiplier: 1.0,
        residual_multiplier: 1.0,
        logits_scaling: 1.0,
        eos_token_ids: Vec::new(),
        bos_token_id: None,
        pad_token_id: None,
        stored_dtype: None,
        quantization: WeightQuantization::None,
    }
}
