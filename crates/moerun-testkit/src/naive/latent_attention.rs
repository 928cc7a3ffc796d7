//! Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), expanded into ordinary heads.

use super::{
    Rows,
    config::Config,
    maths::{dot, linear, rms_norm, softmax},
    rotary::{Rotary, yarn_mscale},
    weights::Weights,
};
use crate::TestkitError;

/// Epsilon of the norms of the latents, which upstream does not take from the config.
const LATENT_NORM_EPSILON: f64 = 1e-6;

/// `[tokens, hidden]` in and out.
pub(crate) fn attention(config: &Config, weights: &Weights, layer: usize, input: &Rows) -> Result<Rows, TestkitError> {
    let hidden = config.size("hidden_size")?;
    let heads = config.size("num_attention_heads")?;
    let nope = config.size("qk_nope_head_dim")?;
    let rope = config.size("qk_rope_head_dim")?;
    let value_dim = config.size("v_head_dim")?;
    let latent_dim = config.size("kv_lora_rank")?;
    let prefix = format!("model.layers.{layer}.self_attn");
    let rotary = Rotary::new(config, rope, input.len())?;

    let queries = queries(config, weights, &prefix, heads * (nope + rope), input)?;
    let down = weights.matrix(
        &format!("{prefix}.kv_a_proj_with_mqa.weight"),
        latent_dim + rope,
        hidden,
    )?;
    let down_bias = optional_bias(
        config,
        weights,
        &format!("{prefix}.kv_a_proj_with_mqa.bias"),
        latent_dim + rope,
    )?;
    let latent_norm = weights.vector(&format!("{prefix}.kv_a_layernorm.weight"), latent_dim)?;
    let up = weights.matrix(
        &format!("{prefix}.kv_b_proj.weight"),
        heads * (nope + value_dim),
        latent_dim,
    )?;

    let mut query_heads = Vec::new(); // [tokens, heads, nope + rope]
    let mut key_heads = Vec::new(); // [tokens, heads, nope + rope]
    let mut value_heads = Vec::new(); // [tokens, heads, value_dim]
    for (position, row) in input.iter().enumerate() {
        let mut query: Rows = queries[position]
            .chunks_exact(nope + rope)
            .map(<[f64]>::to_vec)
            .collect();
        query
            .iter_mut()
            .for_each(|head| rotary.rotate(&mut head[nope..], position));
        query_heads.push(query);

        let mut compressed = linear(&down, down_bias, row);
        let mut rotary_key = compressed.split_off(latent_dim);
        rotary.rotate(&mut rotary_key, position);
        let latent = rms_norm(&compressed, Some(latent_norm), LATENT_NORM_EPSILON);
        let expanded = linear(&up, None, &latent);
        let parts = expanded.chunks_exact(nope + value_dim);
        key_heads.push(
            parts
                .clone()
                .map(|part| [&part[..nope], &rotary_key].concat())
                .collect::<Rows>(),
        );
        value_heads.push(parts.map(|part| part[nope..].to_vec()).collect::<Rows>());
    }

    let scale = scale(config, nope + rope);
    let mut attended: Rows = Vec::new();
    for (token, queries) in query_heads.iter().enumerate() {
        let mut row = Vec::new();
        for (head, query) in queries.iter().enumerate() {
            let scores: Vec<f64> = (0..=token)
                .map(|key| scale * dot(query, &key_heads[key][head]))
                .collect();
            let probabilities = softmax(&scores);
            let mut output = vec![0.0; value_dim];
            for (values, share) in value_heads.iter().zip(&probabilities) {
                output
                    .iter_mut()
                    .zip(&values[head])
                    .for_each(|(sum, value)| *sum += share * value);
            }
            row.extend(output);
        }
        attended.push(row);
    }

    let output = weights.matrix(&format!("{prefix}.o_proj.weight"), hidden, heads * value_dim)?;
    let output_bias = optional_bias(config, weights, &format!("{prefix}.o_proj.bias"), hidden)?;
    Ok(attended.iter().map(|row| linear(&output, output_bias, row)).collect())
}

/// Through a latent of their own, or straight where `q_lora_rank` is null.
fn queries(config: &Config, weights: &Weights, prefix: &str, width: usize, input: &Rows) -> Result<Rows, TestkitError> {
    let hidden = config.size("hidden_size")?;
    let Some(rank) = config.optional_size("q_lora_rank")? else {
        let weight = weights.matrix(&format!("{prefix}.q_proj.weight"), width, hidden)?;
        return Ok(input.iter().map(|row| linear(&weight, None, row)).collect());
    };
    let down = weights.matrix(&format!("{prefix}.q_a_proj.weight"), rank, hidden)?;
    let bias = optional_bias(config, weights, &format!("{prefix}.q_a_proj.bias"), rank)?;
    let norm = weights.vector(&format!("{prefix}.q_a_layernorm.weight"), rank)?;
    let up = weights.matrix(&format!("{prefix}.q_b_proj.weight"), width, rank)?;
    let query = |row: &Vec<f64>| {
        let latent = rms_norm(&linear(&down, bias, row), Some(norm), LATENT_NORM_EPSILON);
        linear(&up, None, &latent)
    };
    Ok(input.iter().map(query).collect())
}

fn optional_bias<'a>(
    config: &Config,
    weights: &'a Weights,
    name: &str,
    len: usize,
) -> Result<Option<&'a [f64]>, TestkitError> {
    Ok(match config.flag_or("attention_bias", false)? {
        true => Some(weights.vector(name, len)?),
        false => None,
    })
}

/// `1 / sqrt(d)`, and with yarn times the square of its `mscale_all_dim` factor.
fn scale(config: &Config, head_dim: usize) -> f64 {
    let mscale = match (
        config.rope_type(),
        config.rope_float("factor"),
        config.rope_float("mscale_all_dim"),
    ) {
        ("yarn", Some(factor), Some(m)) if m != 0.0 => yarn_mscale(factor, m),
        _ => 1.0,
    };
    mscale * mscale / (head_dim as f64).sqrt()
}
