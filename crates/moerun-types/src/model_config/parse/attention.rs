//! Heads, projections and masks.

use serde_json::Value;

use super::{ConfigError, Fields, HEAD_DIM, HEADS, LOW_RANK, POSITIONS, fields::shorten};
use crate::{AttentionConfig, AttentionMask, AttentionTemperature, Family, GroupedAttention, LatentAttention, QkNorm};

/// Heads and projections. `scale` does not yet contain what the rotary scaling adds to latent attention.
pub(super) fn parse(fields: Fields<'_>, family: Family, hidden: usize) -> Result<AttentionConfig, ConfigError> {
    match family {
        Family::DeepseekV2 | Family::DeepseekV3 => latent(fields, family).map(AttentionConfig::Latent),
        _ => grouped(fields, family, hidden).map(AttentionConfig::Grouped),
    }
}

fn grouped(fields: Fields<'_>, family: Family, hidden: usize) -> Result<GroupedAttention, ConfigError> {
    let num_heads = fields.size("num_attention_heads", HEADS)?;
    let num_kv_heads = fields.size_or("num_key_value_heads", HEADS, num_heads)?;
    if !num_heads.is_multiple_of(num_kv_heads) {
        let wanted = format!("a divisor of num_attention_heads, {num_heads}");
        return Err(fields.invalid("num_key_value_heads", wanted, num_kv_heads));
    }
    let head_dim = head_dim(fields, family, hidden, num_heads)?;
    let (qkv_bias, output_bias) = biases(fields, family)?;
    let scale = match family {
        Family::GraniteMoe => fields.f32_or("attention_multiplier", 1e-9..=1e9, 1.0)?,
        _ => (head_dim as f64).powf(-0.5) as f32,
    };
    Ok(GroupedAttention {
        num_heads,
        num_kv_heads,
        head_dim,
        qkv_bias,
        output_bias,
        qk_norm: qk_norm(fields, family)?,
        clip_qkv: match family {
            Family::Olmoe => fields.number("clip_qkv", 1e-9..=1e30)?.map(|clip| clip as f32),
            _ => None,
        },
        sinks: family == Family::GptOss,
        scale,
    })
}

fn head_dim(fields: Fields<'_>, family: Family, hidden: usize, num_heads: usize) -> Result<usize, ConfigError> {
    if let Some(head_dim) = fields.optional_size("head_dim", HEAD_DIM)? {
        return Ok(head_dim);
    }
    match family {
        Family::Qwen3 | Family::Llama4Text => Ok(128),
        Family::GptOss => Ok(64),
        _ if hidden.is_multiple_of(num_heads) => Ok(hidden / num_heads),
        _ => Err(fields.invalid(
            "num_attention_heads",
            format!("a divisor of hidden_size, {hidden}"),
            num_heads,
        )),
    }
}

/// Whether queries, keys and values have biases, and whether the output projection has one.
fn biases(fields: Fields<'_>, family: Family) -> Result<(bool, bool), ConfigError> {
    Ok(match family {
        Family::Mixtral => (false, false),
        Family::Qwen2Moe => (fields.flag_or("qkv_bias", true)?, false),
        Family::Glm4Moe => (fields.flag_or("attention_bias", false)?, false),
        Family::Ernie45Moe if fields.flag_or("use_bias", false)? => {
            return Err(fields.unsupported("use_bias", "false", true));
        }
        Family::Ernie45Moe => (false, false),
        _ => {
            let everywhere = fields.flag_or("attention_bias", family == Family::GptOss)?;
            (everywhere, everywhere)
        }
    })
}

fn qk_norm(fields: Fields<'_>, family: Family) -> Result<QkNorm, ConfigError> {
    Ok(match family {
        Family::Qwen3 | Family::Qwen3Moe => QkNorm::PerHead,
        Family::Glm4Moe if fields.flag_or("use_qk_norm", false)? => QkNorm::PerHead,
        Family::Olmoe => QkNorm::WholeProjection,
        Family::Llama4Text if fields.flag_or("use_qk_norm", true)? => QkNorm::WeightlessAfterRotary,
        _ => QkNorm::None,
    })
}

fn latent(fields: Fields<'_>, family: Family) -> Result<LatentAttention, ConfigError> {
    let num_heads = fields.size("num_attention_heads", HEADS)?;
    let num_kv_heads = fields.size_or("num_key_value_heads", HEADS, num_heads)?;
    if num_kv_heads != num_heads {
        let wanted = format!("num_attention_heads, {num_heads}: latent attention has no groups");
        return Err(fields.unsupported("num_key_value_heads", wanted, num_kv_heads));
    }
    let q_lora_rank = match fields.optional_size("q_lora_rank", LOW_RANK)? {
        None if !fields.mentions("q_lora_rank") => Some(1536),
        given => given,
    };
    let qk_nope_head_dim = fields.size_or("qk_nope_head_dim", HEAD_DIM, 128)?;
    let qk_rope_head_dim = fields.size_or("qk_rope_head_dim", HEAD_DIM, 64)?;
    if family == Family::DeepseekV2 && fields.flag_or("mlp_bias", false)? {
        return Err(fields.unsupported("mlp_bias", "false in this family", true));
    }
    Ok(LatentAttention {
        num_heads,
        q_lora_rank,
        kv_lora_rank: fields.size_or("kv_lora_rank", LOW_RANK, 512)?,
        qk_nope_head_dim,
        qk_rope_head_dim,
        v_head_dim: fields.size_or("v_head_dim", HEAD_DIM, 128)?,
        bias: fields.flag_or("attention_bias", false)?,
        scale: ((qk_nope_head_dim + qk_rope_head_dim) as f64).powf(-0.5) as f32,
    })
}

/// One mask per layer.
pub(super) fn masks(
    fields: Fields<'_>,
    family: Family,
    num_layers: usize,
    rotary: &[bool],
) -> Result<Vec<AttentionMask>, ConfigError> {
    let derived = derived_masks(fields, family, num_layers, rotary);
    let Some(names) = fields.list("layer_types")? else {
        return derived;
    };
    if names.len() != num_layers {
        return Err(fields.invalid(
            "layer_types",
            format!("{num_layers} entries"),
            format!("{} entries", names.len()),
        ));
    }
    let named = names
        .iter()
        .map(|name| named_mask(fields, name))
        .collect::<Result<Vec<_>, _>>()?;
    let obeys = matches!(
        family,
        Family::Qwen2Moe | Family::Qwen3 | Family::GptOss | Family::Llama4Text
    );
    // The other families' upstream code does not read `layer_types`: what it does instead must say the same.
    if !obeys && named != derived? {
        return Err(fields.unsupported(
            "layer_types",
            "what the other fields say in this family",
            "something else",
        ));
    }
    Ok(named)
}

fn named_mask(fields: Fields<'_>, name: &Value) -> Result<AttentionMask, ConfigError> {
    match name.as_str() {
        Some("full_attention") => Ok(AttentionMask::Full),
        Some("sliding_attention") => window(fields),
        Some("chunked_attention") => chunk(fields),
        _ => {
            let wanted = "each one of full_attention, sliding_attention, chunked_attention";
            Err(fields.unsupported("layer_types", wanted, shorten(name)))
        }
    }
}

fn window(fields: Fields<'_>) -> Result<AttentionMask, ConfigError> {
    Ok(AttentionMask::SlidingWindow {
        window: fields.size("sliding_window", POSITIONS)?,
    })
}

fn chunk(fields: Fields<'_>) -> Result<AttentionMask, ConfigError> {
    Ok(AttentionMask::Chunked {
        size: fields.size_or("attention_chunk_size", POSITIONS, 8192)?,
    })
}

/// The masks that upstream takes when there is no `layer_types`.
fn derived_masks(
    fields: Fields<'_>,
    family: Family,
    num_layers: usize,
    rotary: &[bool],
) -> Result<Vec<AttentionMask>, ConfigError> {
    let windowed_if = |sliding: &dyn Fn(usize) -> bool| {
        (0..num_layers)
            .map(|layer| {
                if sliding(layer) {
                    window(fields)
                } else {
                    Ok(AttentionMask::Full)
                }
            })
            .collect()
    };
    match family {
        Family::Mixtral | Family::PhiMoe => windowed_if(&|_| fields.get("sliding_window").is_some()),
        Family::GptOss => windowed_if(&|layer| layer % 2 == 0),
        Family::Qwen2Moe if fields.flag_or("use_sliding_window", false)? => {
            // Upstream versions disagree on which layers have the window, so only an explicit list is safe.
            Err(fields.unsupported("use_sliding_window", "layer_types beside it in this family", true))
        }
        Family::Qwen3Moe if fields.flag_or("use_sliding_window", false)? => {
            match fields.size_or("max_window_layers", 0..=usize::MAX, 0)? {
                0 => windowed_if(&|_| fields.get("sliding_window").is_some()),
                layers => {
                    // Older upstream versions keep the first layers full, newer ones window all of them.
                    Err(fields.unsupported("max_window_layers", "0 beside use_sliding_window", layers))
                }
            }
        }
        Family::Qwen3 if fields.flag_or("use_sliding_window", false)? => {
            let first = fields.size_or("max_window_layers", 0..=usize::MAX, 28)?;
            windowed_if(&|layer| layer >= first && fields.get("sliding_window").is_some())
        }
        Family::Llama4Text => rotary
            .iter()
            .map(|&r| if r { chunk(fields) } else { Ok(AttentionMask::Full) })
            .collect(),
        _ => windowed_if(&|_| false),
    }
}

/// Which layers rotate queries and keys: all, but for llama4's every fourth.
pub(super) fn rotary_layers(fields: Fields<'_>, family: Family, num_layers: usize) -> Result<Vec<bool>, ConfigError> {
    if family != Family::Llama4Text {
        return Ok(vec![true; num_layers]);
    }
    match fields.sizes("no_rope_layers", 0..=1)? {
        Some(flags) if flags.len() == num_layers => Ok(flags.into_iter().map(|flag| flag == 1).collect()),
        Some(flags) if !flags.is_empty() => {
            let found = format!("{} entries", flags.len());
            Err(fields.invalid("no_rope_layers", format!("{num_layers} entries"), found))
        }
        _ => {
            let interval = fields.size_or("no_rope_layer_interval", 1..=usize::MAX, 4)?;
            Ok((1..=num_layers)
                .map(|number| !number.is_multiple_of(interval))
                .collect())
        }
    }
}

/// llama4's factor on the queries of layers without rotary.
pub(super) fn temperature(fields: Fields<'_>, family: Family) -> Result<Option<AttentionTemperature>, ConfigError> {
    if family != Family::Llama4Text {
        return Ok(None);
    }
    // Some configs hold a number here, which upstream reads as true.
    let tuned = match fields.get("attn_temperature_tuning") {
        Some(Value::Number(number)) => number.as_f64() != Some(0.0),
        _ => fields.flag_or("attn_temperature_tuning", true)?,
    };
    if !tuned {
        return Ok(None);
    }
    Ok(Some(AttentionTemperature {
        scale: fields.f32_or("attn_scale", 0.0..=1e6, 0.1)?,
        floor_scale: fields.f32_or("floor_scale", 1.0..=1e9, 8192.0)?,
    }))
}
