//! Grouped-query attention with a full score matrix.

use serde_json::Value;

use super::{
    Rows,
    config::Config,
    maths::{dot, linear, rms_norm, softmax},
    rotary::Rotary,
    weights::Weights,
};
use crate::{Family, TestkitError};

/// `[tokens, hidden]` in and out.
pub(crate) fn attention(config: &Config, weights: &Weights, layer: usize, input: &Rows) -> Result<Rows, TestkitError> {
    let hidden = config.size("hidden_size")?;
    let heads = config.size("num_attention_heads")?;
    let kv_heads = config.size_or("num_key_value_heads", heads)?;
    let head_dim = config.head_dim()?;

    let queries = project(config, weights, layer, "q", heads * head_dim, input)?;
    let keys = project(config, weights, layer, "k", kv_heads * head_dim, input)?;
    let values = project(config, weights, layer, "v", kv_heads * head_dim, input)?;
    let queries = prepare_heads(config, weights, layer, "q", split(&queries, head_dim))?;
    let keys = prepare_heads(config, weights, layer, "k", split(&keys, head_dim))?;
    let values = split(&values, head_dim);

    let prefix = format!("model.layers.{layer}.self_attn");
    let sinks = match config.family {
        Family::GptOss => Some(weights.vector(&format!("{prefix}.sinks"), heads)?),
        _ => None,
    };
    let scale = match config.family {
        Family::GraniteMoe => config.float("attention_multiplier")?,
        _ => 1.0 / (head_dim as f64).sqrt(),
    };
    let mut attended: Rows = Vec::new();
    for (token, query_heads) in queries.iter().enumerate() {
        let mut visible = Vec::new();
        for key in 0..=token {
            if sees(config, layer, token, key)? {
                visible.push(key);
            }
        }
        let mut row = Vec::new();
        for (head, query) in query_heads.iter().enumerate() {
            let kv_head = head / (heads / kv_heads);
            let mut scores: Vec<f64> = visible
                .iter()
                .map(|&key| scale * dot(query, &keys[key][kv_head]))
                .collect();
            scores.extend(sinks.map(|sinks| sinks[head]));
            let probabilities = softmax(&scores); // a sink's share comes last and meets no value
            let mut output = vec![0.0; head_dim];
            for (&key, share) in visible.iter().zip(&probabilities) {
                output
                    .iter_mut()
                    .zip(&values[key][kv_head])
                    .for_each(|(sum, value)| *sum += share * value);
            }
            row.extend(output);
        }
        attended.push(row);
    }

    let output = weights.matrix(&format!("{prefix}.o_proj.weight"), hidden, heads * head_dim)?;
    let bias = match has_output_bias(config)? {
        true => Some(weights.vector(&format!("{prefix}.o_proj.bias"), hidden)?),
        false => None,
    };
    Ok(attended.iter().map(|row| linear(&output, bias, row)).collect())
}

/// Query, key or value projection of all heads, with what is done before the split into heads.
fn project(
    config: &Config,
    weights: &Weights,
    layer: usize,
    which: &str,
    width: usize,
    input: &Rows,
) -> Result<Rows, TestkitError> {
    let prefix = format!("model.layers.{layer}.self_attn.{which}_proj");
    let weight = weights.matrix(&format!("{prefix}.weight"), width, config.size("hidden_size")?)?;
    let bias = match has_qkv_bias(config)? {
        true => Some(weights.vector(&format!("{prefix}.bias"), width)?),
        false => None,
    };
    let mut rows: Rows = input.iter().map(|row| linear(&weight, bias, row)).collect();
    if config.family == Family::Olmoe {
        if which != "v" {
            let norm = weights.vector(&format!("model.layers.{layer}.self_attn.{which}_norm.weight"), width)?;
            let epsilon = config.float("rms_norm_eps")?;
            rows = rows.iter().map(|row| rms_norm(row, Some(norm), epsilon)).collect();
        }
        if let Some(limit) = config.optional_float("clip_qkv")? {
            rows.iter_mut()
                .flatten()
                .for_each(|value| *value = value.clamp(-limit, limit));
        }
    }
    Ok(rows)
}

/// `[tokens, heads, head_dim]`.
fn split(rows: &Rows, head_dim: usize) -> Vec<Rows> {
    rows.iter()
        .map(|row| row.chunks_exact(head_dim).map(<[f64]>::to_vec).collect())
        .collect()
}

/// What is done to query (`"q"`) and key (`"k"`) heads: norm, rotary, norm again, temperature.
fn prepare_heads(
    config: &Config,
    weights: &Weights,
    layer: usize,
    which: &str,
    mut tokens: Vec<Rows>,
) -> Result<Vec<Rows>, TestkitError> {
    let head_dim = config.head_dim()?;
    let epsilon = config.float("rms_norm_eps")?;
    let rotary = Rotary::new(config, head_dim, tokens.len())?;
    let per_head_norm = match config.family {
        Family::Qwen3 | Family::Qwen3Moe => true,
        Family::Glm4Moe => config.flag_or("use_qk_norm", false)?,
        _ => false,
    };
    let norm_after = config.family == Family::Llama4Text && config.flag_or("use_qk_norm", true)?;
    for (position, heads) in tokens.iter_mut().enumerate() {
        for head in heads {
            if per_head_norm {
                let name = format!("model.layers.{layer}.self_attn.{which}_norm.weight");
                *head = rms_norm(head, Some(weights.vector(&name, head_dim)?), epsilon);
            }
            if uses_rotary(config, layer)? {
                rotary.rotate(head, position);
                if norm_after {
                    *head = rms_norm(head, None, epsilon);
                }
            } else if which == "q" && config.flag_or("attn_temperature_tuning", true)? {
                let temperature = temperature(config, position)?;
                head.iter_mut().for_each(|value| *value *= temperature);
            }
        }
    }
    Ok(tokens)
}

fn has_qkv_bias(config: &Config) -> Result<bool, TestkitError> {
    match config.family {
        Family::Qwen2Moe => config.flag_or("qkv_bias", true),
        Family::Ernie45Moe => config.flag_or("use_bias", false),
        Family::GptOss => config.flag_or("attention_bias", true),
        Family::Mixtral => Ok(false),
        _ => config.flag_or("attention_bias", false),
    }
}

fn has_output_bias(config: &Config) -> Result<bool, TestkitError> {
    match config.family {
        Family::Qwen2Moe | Family::Glm4Moe => Ok(false),
        _ => has_qkv_bias(config),
    }
}

/// All layers rotate, but for those of llama4 that its config marks with 0.
fn uses_rotary(config: &Config, layer: usize) -> Result<bool, TestkitError> {
    if config.family != Family::Llama4Text {
        return Ok(true);
    }
    match config.entry("no_rope_layers", layer).and_then(Value::as_u64) {
        Some(mark) => Ok(mark != 0),
        None => Ok(!(layer + 1).is_multiple_of(config.size_or("no_rope_layer_interval", 4)?)),
    }
}

/// llama4's factor on queries without rotary.
fn temperature(config: &Config, position: usize) -> Result<f64, TestkitError> {
    let steps = ((position + 1) as f64 / config.float_or("floor_scale", 8192.0)?).floor();
    Ok(1.0 + config.float_or("attn_scale", 0.1)? * (1.0 + steps).ln())
}

/// Whether the query at position `query` sees the key at `key ≤ query`.
fn sees(config: &Config, layer: usize, query: usize, key: usize) -> Result<bool, TestkitError> {
    let listed = config.entry("layer_types", layer).and_then(Value::as_str);
    let window = match config.family {
        Family::Llama4Text => {
            let chunk = config.size_or("attention_chunk_size", 8192)?;
            return Ok(!uses_rotary(config, layer)? || query / chunk == key / chunk);
        }
        Family::Mixtral | Family::PhiMoe => config.optional_size("sliding_window")?,
        Family::GptOss => {
            let sliding = listed.map_or(layer.is_multiple_of(2), |listed| listed == "sliding_attention");
            if sliding {
                config.optional_size("sliding_window")?
            } else {
                None
            }
        }
        Family::Qwen2Moe | Family::Qwen3Moe | Family::Qwen3 if config.flag_or("use_sliding_window", false)? => {
            let sliding = match (listed, config.family) {
                (Some(listed), _) => listed == "sliding_attention",
                (None, Family::Qwen3Moe) => true,
                (None, _) => layer >= config.size_or("max_window_layers", 28)?,
            };
            if sliding {
                config.optional_size("sliding_window")?
            } else {
                None
            }
        }
        _ => None,
    };
    Ok(window.is_none_or(|window| query - key < window))
}
