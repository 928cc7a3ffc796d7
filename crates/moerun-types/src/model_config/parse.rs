//! `config.json` → [`ModelConfig`].
//!
//! Both spellings that checkpoints carry are read: that of transformers 5 (`rope_parameters`, `dtype`, `layer_types`)
//! and that of most checkpoints on the Hub (`rope_theta`, `rope_scaling`, `torch_dtype`). A field that is absent or
//! null takes the default that transformers gives it in that family, but for the sizes that every released checkpoint
//! states (width, layers, heads, vocabulary, positions, experts and how many a token takes): those are required. Fields
//! that are not read are ignored, but for those that would change the result: they are refused.

mod attention;
mod error;
mod fields;
mod moe;
mod quantization;
mod rope;
#[cfg(test)]
mod tests;

use std::ops::RangeInclusive;

use serde_json::Value;

pub use error::ConfigError;
use fields::{Fields, shorten};

use super::{
    Activation, AttentionConfig, Family, FeedForwardKind, LayerConfig, ModelConfig, NormConfig, NormKind, StoredDtype,
};

// Bounds of single sizes: far above any model, far below what could overflow when they are multiplied.
const LAYERS: RangeInclusive<usize> = 1..=4096;
const WIDTH: RangeInclusive<usize> = 1..=1 << 22;
const VOCABULARY: RangeInclusive<usize> = 1..=1 << 24;
const HEADS: RangeInclusive<usize> = 1..=1 << 14;
const HEAD_DIM: RangeInclusive<usize> = 1..=1 << 14;
const LOW_RANK: RangeInclusive<usize> = 1..=1 << 18;
const EXPERTS: RangeInclusive<usize> = 1..=1 << 14;
/// Of one expert: its combine blocks are counted in 16 bits, and may be as short as 8.
const EXPERT_WIDTH: RangeInclusive<usize> = 1..=1 << 18;
const POSITIONS: RangeInclusive<usize> = 1..=1 << 31;

/// Most parameters of a model: at 4 bytes each, every sum of bytes stays below 2^53.
const MAX_PARAMETERS: u128 = 1 << 50;
/// Most experts of all layers together, more than twice those of the largest released model: they are listed one by one.
const MAX_EXPERTS: usize = 1 << 16;

impl Family {
    /// Every family, in the order of the documentation.
    pub const ALL: [Family; 14] = [
        Family::Mixtral,
        Family::Qwen2Moe,
        Family::Qwen3Moe,
        Family::Olmoe,
        Family::GraniteMoe,
        Family::PhiMoe,
        Family::DeepseekV2,
        Family::DeepseekV3,
        Family::GptOss,
        Family::Glm4Moe,
        Family::Ernie45Moe,
        Family::Llama4Text,
        Family::Llama,
        Family::Qwen3,
    ];

    /// Its `model_type` in `config.json`.
    pub fn model_type(self) -> &'static str {
        match self {
            Family::Mixtral => "mixtral",
            Family::Qwen2Moe => "qwen2_moe",
            Family::Qwen3Moe => "qwen3_moe",
            Family::Olmoe => "olmoe",
            Family::GraniteMoe => "granitemoe",
            Family::PhiMoe => "phimoe",
            Family::DeepseekV2 => "deepseek_v2",
            Family::DeepseekV3 => "deepseek_v3",
            Family::GptOss => "gpt_oss",
            Family::Glm4Moe => "glm4_moe",
            Family::Ernie45Moe => "ernie4_5_moe",
            Family::Llama4Text => "llama4_text",
            Family::Llama => "llama",
            Family::Qwen3 => "qwen3",
        }
    }
}

impl ModelConfig {
    /// Parses and checks the text of a `config.json`, in either spelling that checkpoints carry.
    ///
    /// # Errors
    /// Every size is range-checked; a field that is missing, out of range, contradicts another or asks for something
    /// that cannot be computed here is named with what was wanted and what was found.
    pub fn from_json(text: &str) -> Result<Self, ConfigError> {
        let value: Value = serde_json::from_str(text)?;
        let Value::Object(map) = &value else {
            return Err(ConfigError::NotAnObject { found: shorten(&value) });
        };
        let fields = Fields::new(map);
        let family = family(fields)?;
        let config = parse_family(fields, family)?;
        check_total_size(fields, &config)?;
        check_total_experts(fields, &config)?;
        Ok(config)
    }
}

fn family(fields: Fields<'_>) -> Result<Family, ConfigError> {
    let supported = || Family::ALL.map(Family::model_type).join(", ");
    let found = fields
        .text("model_type")?
        .ok_or_else(|| fields.missing("model_type", supported()))?;
    if fields.object("text_config")?.is_some() {
        return Err(ConfigError::Multimodal {
            model_type: found.to_owned(),
            supported: supported(),
        });
    }
    let family = Family::ALL
        .into_iter()
        .find(|family| family.model_type() == found)
        .ok_or_else(|| ConfigError::UnsupportedModelType {
            found: found.to_owned(),
            supported: supported(),
        })?;
    refuse_other_heads(fields)?;
    Ok(family)
}

/// The same `model_type` also names classifiers, whose checkpoints hold another head.
fn refuse_other_heads(fields: Fields<'_>) -> Result<(), ConfigError> {
    for value in fields.list("architectures")?.unwrap_or_default() {
        let Some(name) = value.as_str() else {
            return Err(fields.invalid("architectures", "a list of strings", shorten(value)));
        };
        if ["Classification", "QuestionAnswering"]
            .iter()
            .any(|task| name.ends_with(task))
        {
            return Err(fields.unsupported("architectures", "a model with a language-model head", name));
        }
    }
    Ok(())
}

fn parse_family(fields: Fields<'_>, family: Family) -> Result<ModelConfig, ConfigError> {
    let hidden = fields.size("hidden_size", WIDTH)?;
    let vocab_size = fields.size("vocab_size", VOCABULARY)?;
    let layers = layers(fields, family)?;
    let mut attention = attention::parse(fields, family, hidden)?;
    let rope = rope::parse(fields, family, rotated_width(&attention))?;
    if let AttentionConfig::Latent(latent) = &mut attention {
        latent.scale = (f64::from(latent.scale) * rope.latent_scale) as f32;
    }
    let has_experts = layers.iter().any(|layer| layer.feed_forward == FeedForwardKind::Moe);
    let moe = if has_experts {
        Some(moe::parse(fields, family)?)
    } else {
        None
    };
    let granite = |name, default| match family {
        Family::GraniteMoe => fields.f32_or(name, 1e-9..=1e9, default),
        _ => Ok(1.0),
    };
    Ok(ModelConfig {
        family,
        vocab_size,
        hidden,
        max_position_embeddings: fields.size("max_position_embeddings", POSITIONS)?,
        norm: norm(fields, family)?,
        attention,
        rope: rope.config,
        layers,
        activation: activation(fields)?,
        mlp_bias: family == Family::Llama && fields.flag_or("mlp_bias", false)?,
        tied_head: fields.flag_or("tie_word_embeddings", family == Family::Ernie45Moe)?,
        head_bias: family == Family::PhiMoe && fields.flag_or("lm_head_bias", false)?,
        embedding_multiplier: granite("embedding_multiplier", 1.0)?,
        residual_multiplier: granite("residual_multiplier", 1.0)?,
        logits_scaling: granite("logits_scaling", 1.0)?,
        eos_token_ids: eos_token_ids(fields, vocab_size)?,
        bos_token_id: fields
            .optional_size("bos_token_id", 0..=vocab_size - 1)?
            .map(|id| id as u32),
        pad_token_id: pad_token_id(fields, vocab_size)?,
        stored_dtype: stored_dtype(fields)?,
        quantization: quantization::parse(fields, family, moe.as_ref(), hidden)?,
        moe,
    })
}

fn layers(fields: Fields<'_>, family: Family) -> Result<Vec<LayerConfig>, ConfigError> {
    let num_layers = fields.size("num_hidden_layers", LAYERS)?;
    let rotary = attention::rotary_layers(fields, family, num_layers)?;
    let masks = attention::masks(fields, family, num_layers, &rotary)?;
    let feed_forwards = moe::feed_forwards(fields, family, num_layers)?;
    let temperature = attention::temperature(fields, family)?;
    Ok(rotary
        .into_iter()
        .zip(masks)
        .zip(feed_forwards)
        .map(|((rotary, mask), feed_forward)| LayerConfig {
            mask,
            rotary,
            temperature: if rotary { None } else { temperature },
            feed_forward,
        })
        .collect())
}

fn rotated_width(attention: &AttentionConfig) -> usize {
    match attention {
        AttentionConfig::Grouped(grouped) => grouped.head_dim,
        AttentionConfig::Latent(latent) => latent.qk_rope_head_dim,
    }
}

fn norm(fields: Fields<'_>, family: Family) -> Result<NormConfig, ConfigError> {
    let kind = if family == Family::PhiMoe {
        NormKind::LayerNorm
    } else {
        NormKind::Rms
    };
    let default = match family {
        Family::Mixtral
        | Family::Olmoe
        | Family::PhiMoe
        | Family::GptOss
        | Family::Glm4Moe
        | Family::Ernie45Moe
        | Family::Llama4Text => 1e-5,
        _ => 1e-6,
    };
    Ok(NormConfig {
        kind,
        epsilon: fields.f32_or("rms_norm_eps", 1e-30..=1.0, default)?,
    })
}

fn activation(fields: Fields<'_>) -> Result<Activation, ConfigError> {
    match fields.text("hidden_act")?.unwrap_or("silu") {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu" => Ok(Activation::Gelu),
        "gelu_pytorch_tanh" | "gelu_new" => Ok(Activation::GeluTanh),
        "relu" => Ok(Activation::Relu),
        other => {
            let wanted = "one of silu, swish, gelu, gelu_pytorch_tanh, gelu_new, relu";
            Err(fields.unsupported("hidden_act", wanted, format!("{other:?}")))
        }
    }
}

fn eos_token_ids(fields: Fields<'_>, vocab_size: usize) -> Result<Vec<u32>, ConfigError> {
    let ids = 0..=vocab_size - 1;
    let found = match fields.get("eos_token_id") {
        Some(Value::Array(_)) => fields.sizes("eos_token_id", ids)?.unwrap_or_default(),
        _ => fields.optional_size("eos_token_id", ids)?.into_iter().collect(),
    };
    Ok(found.into_iter().map(|id| id as u32).collect())
}

/// An id outside the vocabulary (−1 in some configs) says that there is no padding token.
fn pad_token_id(fields: Fields<'_>, vocab_size: usize) -> Result<Option<u32>, ConfigError> {
    match fields.get("pad_token_id") {
        None => Ok(None),
        Some(value) => match value.as_i64() {
            Some(id) => Ok(u32::try_from(id).ok().filter(|&id| (id as usize) < vocab_size)),
            None => Err(fields.invalid("pad_token_id", "an integer", shorten(value))),
        },
    }
}

fn stored_dtype(fields: Fields<'_>) -> Result<Option<StoredDtype>, ConfigError> {
    let (name, text) = match (fields.text("dtype")?, fields.text("torch_dtype")?) {
        (Some(new), Some(old)) if new != old => {
            return Err(fields.invalid("torch_dtype", format!("{new:?} as in dtype"), old));
        }
        (Some(new), _) => ("dtype", new),
        (None, Some(old)) => ("torch_dtype", old),
        (None, None) => return Ok(None),
    };
    match text.strip_prefix("torch.").unwrap_or(text) {
        "float32" => Ok(Some(StoredDtype::F32)),
        "float16" => Ok(Some(StoredDtype::F16)),
        "bfloat16" => Ok(Some(StoredDtype::Bf16)),
        other => Err(fields.unsupported(name, "one of float32, float16, bfloat16", format!("{other:?}"))),
    }
}

/// Every single size is in its range here; their products are what this bounds.
fn check_total_size(fields: Fields<'_>, config: &ModelConfig) -> Result<(), ConfigError> {
    let wide = |size: usize| size as u128;
    let hidden = wide(config.hidden);
    let attention = match &config.attention {
        AttentionConfig::Grouped(grouped) => {
            2 * hidden * wide(grouped.num_heads + grouped.num_kv_heads) * wide(grouped.head_dim)
        }
        AttentionConfig::Latent(latent) => {
            let rank = wide(latent.kv_lora_rank + latent.q_lora_rank.unwrap_or(0) + latent.qk_rope_head_dim);
            let heads =
                wide(latent.num_heads) * wide(latent.qk_nope_head_dim + latent.qk_rope_head_dim + latent.v_head_dim);
            (hidden + heads) * rank + 2 * hidden * heads
        }
    };
    let feed_forwards = config
        .layers
        .iter()
        .map(|layer| match (&layer.feed_forward, &config.moe) {
            (FeedForwardKind::Dense { intermediate }, _) => 3 * hidden * wide(*intermediate),
            (FeedForwardKind::Moe, Some(moe)) => {
                let shared = moe.shared.map_or(0, |shared| shared.intermediate);
                3 * hidden * (wide(moe.num_experts) * (wide(moe.intermediate) + 1) + wide(shared))
            }
            (FeedForwardKind::Moe, None) => 0,
        });
    let total =
        attention * wide(config.layers.len()) + feed_forwards.sum::<u128>() + 2 * hidden * wide(config.vocab_size);
    if total > MAX_PARAMETERS {
        let wanted = format!("sizes that multiply to at most {MAX_PARAMETERS} parameters");
        return Err(fields.invalid("num_hidden_layers", wanted, format!("about {total} parameters")));
    }
    Ok(())
}

fn check_total_experts(fields: Fields<'_>, config: &ModelConfig) -> Result<(), ConfigError> {
    let per_layer = config.moe.as_ref().map_or(0, |moe| moe.num_experts);
    let total = per_layer * config.moe_layers().len();
    if total > MAX_EXPERTS {
        let wanted = format!("layers of at most {MAX_EXPERTS} experts in all");
        return Err(fields.invalid("num_hidden_layers", wanted, format!("{total} experts")));
    }
    Ok(())
}
