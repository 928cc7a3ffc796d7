//! The shape of a model: what every crate knows of a transformer, independent of which project trained it.

mod parse;

use serde::{Deserialize, Serialize};

pub use parse::ConfigError;

use crate::LayerId;

/// Which upstream model family a checkpoint belongs to.
///
/// It decides how `config.json` is read and what the tensors are called on disk; how a layer computes is decided by
/// the fields of [`ModelConfig`] alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum Family {
    Mixtral,
    Qwen2Moe,
    Qwen3Moe,
    Olmoe,
    #[serde(rename = "granitemoe")]
    GraniteMoe,
    #[serde(rename = "phimoe")]
    PhiMoe,
    DeepseekV2,
    DeepseekV3,
    GptOss,
    Glm4Moe,
    #[serde(rename = "ernie4_5_moe")]
    Ernie45Moe,
    #[serde(rename = "llama4_text")]
    Llama4Text,
    Llama,
    Qwen3,
}

/// A decoder-only transformer, as parsed and checked from `config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// Upstream family.
    pub family: Family,
    /// Rows of the embedding and of the head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Longest sequence the checkpoint says it supports.
    pub max_position_embeddings: usize,
    /// The normalisation used before attention, before the feed-forward and at the end.
    pub norm: NormConfig,
    /// Heads and projections, the same in every layer.
    pub attention: AttentionConfig,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// What differs from layer to layer, one entry per layer.
    pub layers: Vec<LayerConfig>,
    /// Gate and experts; `None` for a dense model. The same in every MoE layer.
    pub moe: Option<MoeConfig>,
    /// Activation of dense feed-forwards and shared experts: `down(act(gate x) * up x)`.
    pub activation: Activation,
    /// Whether the projections of dense feed-forwards carry biases (llama `mlp_bias`).
    pub mlp_bias: bool,
    /// Whether the head is the embedding matrix.
    pub tied_head: bool,
    /// Whether the head adds a bias (phimoe).
    pub head_bias: bool,
    /// Embeddings are multiplied by this (granite).
    pub embedding_multiplier: f32,
    /// Both branch outputs are multiplied by this before the residual add (granite).
    pub residual_multiplier: f32,
    /// Logits are divided by this (granite).
    pub logits_scaling: f32,
    /// Ids that end a sequence, from `config.json`; `generation_config.json` may name others.
    pub eos_token_ids: Vec<u32>,
    /// Id that starts a sequence, if the config names one.
    pub bos_token_id: Option<u32>,
    /// Id of padding, if the config names one.
    pub pad_token_id: Option<u32>,
    /// Number format the checkpoint says it was saved in (`dtype` or `torch_dtype`), if any.
    pub stored_dtype: Option<StoredDtype>,
    /// How weights are quantised on disk.
    pub quantization: WeightQuantization,
}

/// `dtype` / `torch_dtype` of a config.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum StoredDtype {
    F32,
    F16,
    Bf16,
}

/// Quantisation of the tensors on disk; they are dequantised when read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum WeightQuantization {
    /// Plain f32, f16 or bf16 tensors.
    None,
    /// deepseek_v3: f8_e4m3 weights with a `weight_scale_inv` per block of `[rows, cols]`.
    Fp8Block {
        /// Rows (output features) that share a scale.
        rows: usize,
        /// Columns (input features) that share a scale.
        cols: usize,
    },
    /// gpt_oss: 4-bit e2m1 codes in blocks of 32 with an e8m0 exponent each, experts only.
    Mxfp4,
}

/// Normalisation of a row of `hidden` values.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct NormConfig {
    /// RMS norm or layer norm.
    pub kind: NormKind,
    /// Added to the mean square or variance.
    pub epsilon: f32,
}

/// Kind of normalisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum NormKind {
    /// `x / sqrt(mean(x^2) + eps) * weight`.
    Rms,
    /// `(x - mean) / sqrt(var + eps) * weight + bias`.
    LayerNorm,
}

/// Heads and projections of attention.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum AttentionConfig {
    /// Multi-head, grouped-query or multi-query attention.
    Grouped(GroupedAttention),
    /// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).
    Latent(LatentAttention),
}

/// Grouped-query attention: `num_heads` query heads share `num_kv_heads` key and value heads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GroupedAttention {
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of a head; independent of `hidden`.
    pub head_dim: usize,
    /// Biases on the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias on the output projection.
    pub output_bias: bool,
    /// Normalisation of queries and keys.
    pub qk_norm: QkNorm,
    /// Clamp of q, k and v to ± this value, after the norm and before rotary (olmoe).
    pub clip_qkv: Option<f32>,
    /// A learned logit per head that joins the softmax denominator (gpt_oss).
    pub sinks: bool,
    /// Factor on `q·k`.
    pub scale: f32,
}

/// Where and how queries and keys are RMS-normalised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum QkNorm {
    /// Not at all.
    None,
    /// Over each head's `head_dim`, with weights, before rotary (qwen3, glm4).
    PerHead,
    /// Over the whole projection, all heads at once, with weights, before the split into heads (olmoe).
    WholeProjection,
    /// Over each head, without weights, after rotary and only in layers that use rotary (llama4).
    WeightlessAfterRotary,
}

/// Multi-head latent attention: keys and values come from one latent vector per token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LatentAttention {
    /// Query heads.
    pub num_heads: usize,
    /// Width of the query's latent; `None` = a plain query projection.
    pub q_lora_rank: Option<usize>,
    /// Width of the key/value latent.
    pub kv_lora_rank: usize,
    /// Width of a head's part without rotary.
    pub qk_nope_head_dim: usize,
    /// Width of the rotary part, whose key is shared by all heads.
    pub qk_rope_head_dim: usize,
    /// Width of a head's value.
    pub v_head_dim: usize,
    /// Biases on `q_a`, `kv_a` and output projections.
    pub bias: bool,
    /// Factor on `q·k`, yarn's `mscale_all_dim` included.
    pub scale: f32,
}

/// Rotary position embedding (arXiv 2104.09864) and its extensions to longer contexts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// Leading dimensions of a head that are rotated (all of them unless `partial_rotary_factor` says less).
    pub rotary_dim: usize,
    /// Which two elements form a pair.
    pub layout: RotaryLayout,
    /// Extension of the context.
    pub scaling: RopeScaling,
}

/// Which two elements of a head form a rotated pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RotaryLayout {
    /// `(x[i], x[i + rotary_dim/2])`.
    Halves,
    /// `(x[2i], x[2i + 1])`.
    Interleaved,
}

/// How frequencies are changed for contexts longer than those of pre-training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum RopeScaling {
    /// Unchanged.
    None,
    /// All frequencies divided by `factor`.
    Linear {
        /// Divisor.
        factor: f64,
    },
    /// llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original_max_position / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context of pre-training.
        original_max_position: usize,
    },
    /// YaRN (arXiv 2309.00071).
    Yarn {
        /// Extension of the context.
        factor: f64,
        /// Rotations above which a dimension is extrapolated.
        beta_fast: f64,
        /// Rotations below which a dimension is interpolated.
        beta_slow: f64,
        /// Whether the correction range is rounded to whole dimensions (upstream's default; gpt_oss: false).
        truncate: bool,
        /// Context of pre-training.
        original_max_position: usize,
        /// Factor on cos and sin, resolved from `attention_factor`, `mscale` and `mscale_all_dim`.
        attention_factor: f64,
    },
    /// LongRoPE (arXiv 2402.13753): a factor per frequency, one set for short and one for long sequences.
    LongRope {
        /// Divisors up to `original_max_position`, `[rotary_dim / 2]`.
        short_factor: Vec<f64>,
        /// Divisors above it, `[rotary_dim / 2]`.
        long_factor: Vec<f64>,
        /// Factor on cos and sin with the short divisors.
        short_attention_factor: f64,
        /// Factor on cos and sin with the long divisors.
        long_attention_factor: f64,
        /// Length up to which the short set applies. Which set applies is decided by the length of the sequence.
        original_max_position: usize,
    },
}

/// What differs from layer to layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerConfig {
    /// Which keys a query sees.
    pub mask: AttentionMask,
    /// Whether queries and keys are rotated.
    pub rotary: bool,
    /// Position-dependent factor on the query (llama4 layers without rotary).
    pub temperature: Option<AttentionTemperature>,
    /// Dense feed-forward or experts.
    pub feed_forward: FeedForwardKind,
}

/// Which earlier keys a query at position `p` sees; it always sees itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum AttentionMask {
    /// All positions `0..=p`.
    Full,
    /// The last `window` positions, itself included.
    SlidingWindow {
        /// Number of visible positions.
        window: usize,
    },
    /// The positions of its own chunk: `key / size == p / size`.
    Chunked {
        /// Length of a chunk.
        size: usize,
    },
}

/// llama4's attention temperature: `q *= 1 + scale * ln(1 + floor((position + 1) / floor_scale))`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AttentionTemperature {
    /// `attn_scale`.
    pub scale: f32,
    /// `floor_scale`.
    pub floor_scale: f32,
}

/// What follows attention in a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FeedForwardKind {
    /// One feed-forward, on the gateway.
    Dense {
        /// Its width.
        intermediate: usize,
    },
    /// Gate and experts as in [`ModelConfig::moe`].
    Moe,
}

/// Activation of a gated feed-forward, applied to the gate projection (and, for gpt_oss, to both).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// Exact (erf) gelu.
    Gelu,
    /// The tanh approximation of gelu.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// gpt_oss: gate clamped to ≤ limit, up to ±limit, then `(up + 1) * gate * sigmoid(alpha * gate)`.
    ClampedSwiglu {
        /// Factor inside the sigmoid.
        alpha: f32,
        /// Clamp.
        limit: f32,
    },
}

/// Gate and experts of a MoE layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MoeConfig {
    /// Experts per layer.
    pub num_experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Width of an expert.
    pub intermediate: usize,
    /// How router logits become experts and weights.
    pub gate: GateConfig,
    /// Activation of the experts.
    pub activation: Activation,
    /// Biases on the experts' gate and up projections.
    pub gate_up_bias: bool,
    /// Bias on the experts' down projection.
    pub down_bias: bool,
    /// What the routing weight multiplies.
    pub weight_target: RoutingWeightTarget,
    /// Experts that every token takes; on the gateway.
    pub shared: Option<SharedExpertConfig>,
}

/// What the routing weight multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RoutingWeightTarget {
    /// The expert's output.
    Output,
    /// The expert's input (llama4): gate and up products are multiplied before the activation.
    Input,
}

/// Experts that every token takes: one feed-forward of their summed width.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedExpertConfig {
    /// Width of the one feed-forward.
    pub intermediate: usize,
    /// Whether its output is multiplied by `sigmoid(shared_expert_gate · x)` (qwen2_moe).
    pub sigmoid_gate: bool,
}

/// How router logits `[tokens, num_experts]` become `top_k` experts and weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GateConfig {
    /// Score of an expert.
    pub score: ScoreFunction,
    /// The router's linear layer has a bias (gpt_oss).
    pub router_bias: bool,
    /// A learned bias added to the scores for the choice only, never to the weights.
    pub correction_bias: bool,
    /// Only the best groups of experts may be chosen from.
    pub groups: Option<GroupLimit>,
    /// Whether the chosen weights are divided by their sum.
    pub renormalize: Renormalize,
    /// Factor on the final weights.
    pub routed_scaling_factor: f32,
}

/// Score of an expert.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum ScoreFunction {
    /// Softmax over all experts, then top-k.
    Softmax,
    /// Top-k of the logits, then softmax over the k chosen (granite, gpt_oss).
    SoftmaxOfTopK,
    /// Sigmoid of each logit, then top-k.
    Sigmoid,
    /// phimoe's two-step masked softmax; top_k is 2.
    SparseMixer {
        /// `router_jitter_noise`: experts further than `2 * jitter` (relative) from the best are masked.
        jitter: f32,
    },
}

/// Group-limited choice: experts are split into `num_groups` consecutive groups, the best `top_groups` stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupLimit {
    /// Number of groups; divides `num_experts`.
    pub num_groups: usize,
    /// Groups that stay.
    pub top_groups: usize,
    /// Score of a group.
    pub score: GroupScore,
}

/// Score of a group of experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum GroupScore {
    /// Its largest score (deepseek_v2); scores outside the chosen groups become 0.
    Max,
    /// The sum of its two largest (deepseek_v3, glm4); scores outside the chosen groups become −∞.
    SumOfTopTwo,
}

/// Whether the chosen weights are divided by their sum.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Renormalize {
    /// Left as they are.
    No,
    /// `w / (sum + epsilon)`.
    Sum {
        /// Added to the sum.
        epsilon: f32,
    },
    /// `w / max(sum, floor)` (ernie `moe_norm_min`).
    SumAtLeast {
        /// Smallest divisor.
        floor: f32,
    },
}

impl ModelConfig {
    /// Layers that have experts, ascending: the `j`-th entry is the layer of the `j`-th MoE block.
    pub fn moe_layers(&self) -> Vec<LayerId> {
        (0..)
            .map(LayerId)
            .zip(&self.layers)
            .filter(|(_, layer)| layer.feed_forward == FeedForwardKind::Moe)
            .map(|(id, _)| id)
            .collect()
    }
}
