//! Rotary embedding: `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (most Hub checkpoints).

use serde_json::Value;

use super::{ConfigError, Fields, POSITIONS, fields::shorten};
use crate::{Family, RopeConfig, RopeScaling, RotaryLayout};

/// Smallest and largest positive number that any rotary parameter may take.
const POSITIVE: std::ops::RangeInclusive<f64> = 1e-6..=1e12;

/// Extension factors: 1 is none.
const FACTOR: std::ops::RangeInclusive<f64> = 1.0..=1e6;

/// Rotary settings, and what they do to the softmax scale of latent attention.
pub(super) struct ParsedRope {
    pub(super) config: RopeConfig,
    /// Square of yarn's `mscale_all_dim` term: DeepSeek multiplies the softmax scale by it. 1 where there is none.
    pub(super) latent_scale: f64,
}

/// Reads the rotary settings; `width` is the part of a head that could be rotated.
pub(super) fn parse(fields: Fields<'_>, family: Family, width: usize) -> Result<ParsedRope, ConfigError> {
    let nested = rope_object(fields)?;
    let rotary_dim = rotary_dim(fields, nested, family, width)?;
    let theta = theta(fields, nested, family)?;
    let (scaling, latent_scale) = match nested {
        Some(rope) => scaling(fields, rope, family, rotary_dim)?,
        None if family == Family::GptOss => (GPT_OSS_DEFAULT, 1.0),
        None => (RopeScaling::None, 1.0),
    };
    let config = RopeConfig {
        theta,
        rotary_dim,
        layout: layout(fields, family)?,
        scaling,
    };
    Ok(ParsedRope { config, latent_scale })
}

/// What transformers takes for a gpt_oss config without rotary parameters.
const GPT_OSS_DEFAULT: RopeScaling = RopeScaling::Yarn {
    factor: 32.0,
    beta_fast: 32.0,
    beta_slow: 1.0,
    truncate: false,
    original_max_position: 4096,
    attention_factor: 0.1 * 3.465_735_902_799_726_5 + 1.0, // 0.1 · ln 32 + 1
};

/// The one object that holds the parameters, in either spelling.
fn rope_object<'a>(fields: Fields<'a>) -> Result<Option<Fields<'a>>, ConfigError> {
    let (new, old) = (fields.object("rope_parameters")?, fields.object("rope_scaling")?);
    if new.is_some() && old.is_some() {
        return Err(fields.invalid("rope_scaling", "null beside rope_parameters", "both"));
    }
    let rope = new.or(old);
    if let Some(rope) = rope
        && let Some(name) = rope
            .names()
            .find(|name| matches!(rope.get(name), Some(Value::Object(_))))
    {
        return Err(rope.unsupported(
            name,
            "one set of rotary parameters for all layers",
            "an object per kind of layer",
        ));
    }
    Ok(rope)
}

fn layout(fields: Fields<'_>, family: Family) -> Result<RotaryLayout, ConfigError> {
    Ok(match family {
        Family::DeepseekV3 if !fields.flag_or("rope_interleave", true)? => RotaryLayout::Halves,
        Family::DeepseekV2 | Family::DeepseekV3 | Family::Ernie45Moe | Family::Llama4Text => RotaryLayout::Interleaved,
        _ => RotaryLayout::Halves,
    })
}

fn theta(fields: Fields<'_>, nested: Option<Fields<'_>>, family: Family) -> Result<f64, ConfigError> {
    const THETA: std::ops::RangeInclusive<f64> = 1.000_001..=1e15;
    let default = match family {
        Family::Mixtral | Family::PhiMoe => 1e6,
        Family::GptOss => 150_000.0,
        Family::Llama4Text | Family::Ernie45Moe => 500_000.0,
        _ => 10_000.0,
    };
    agreeing(fields, nested, "rope_theta", THETA).map(|theta| theta.unwrap_or(default))
}

/// A number that may stand in the nested object or at the top; if in both, they must agree.
fn agreeing(
    fields: Fields<'_>,
    nested: Option<Fields<'_>>,
    name: &'static str,
    range: std::ops::RangeInclusive<f64>,
) -> Result<Option<f64>, ConfigError> {
    let outer = fields.number(name, range.clone())?;
    let inner = nested.map(|rope| rope.number(name, range)).transpose()?.flatten();
    match (inner, outer) {
        (Some(inner), Some(outer)) if inner != outer => {
            Err(fields.invalid(name, format!("{inner} as in the rotary parameters"), outer))
        }
        (inner, outer) => Ok(inner.or(outer)),
    }
}

fn rotary_dim(
    fields: Fields<'_>,
    nested: Option<Fields<'_>>,
    family: Family,
    width: usize,
) -> Result<usize, ConfigError> {
    const NAME: &str = "partial_rotary_factor";
    let default = if family == Family::Glm4Moe { 0.5 } else { 1.0 };
    let factor = agreeing(fields, nested, NAME, 1e-6..=1.0)?.unwrap_or(default);
    if factor != 1.0 && family != Family::Glm4Moe {
        return Err(fields.unsupported(NAME, "1.0 in this family", factor));
    }
    let rotary_dim = (width as f64 * factor) as usize;
    if rotary_dim < 2 || !rotary_dim.is_multiple_of(2) {
        let found = format!("{rotary_dim} of {width}");
        return Err(fields.invalid("head_dim", "an even number of rotated dimensions", found));
    }
    Ok(rotary_dim)
}

fn scaling(
    fields: Fields<'_>,
    rope: Fields<'_>,
    family: Family,
    rotary_dim: usize,
) -> Result<(RopeScaling, f64), ConfigError> {
    let kind = kind(rope)?;
    let scaling = match kind {
        "default" => return Ok((RopeScaling::None, 1.0)),
        "linear" => RopeScaling::Linear { factor: factor(rope)? },
        "llama3" => llama3(fields, rope)?,
        "yarn" => yarn(fields, rope)?,
        "longrope" => longrope(fields, rope, family, rotary_dim)?,
        other => {
            return Err(rope.unsupported("rope_type", "one of default, linear, llama3, yarn, longrope", other));
        }
    };
    let all_dims = rope.number("mscale_all_dim", 0.0..=1e3)?.unwrap_or(0.0);
    let latent_scale = match rope.number("factor", FACTOR)? {
        Some(factor) if all_dims != 0.0 => yarn_mscale(factor, all_dims).powi(2),
        _ => 1.0,
    };
    Ok((scaling, latent_scale))
}

/// `rope_type`, called `type` in older configs.
fn kind(rope: Fields<'_>) -> Result<&str, ConfigError> {
    match (rope.text("rope_type")?, rope.text("type")?) {
        (Some(new), Some(old)) if new != old => Err(rope.invalid("type", format!("{new:?} as in rope_type"), old)),
        (Some(kind), _) | (None, Some(kind)) => Ok(kind),
        (None, None) => match rope
            .names()
            .find(|name| !matches!(*name, "rope_theta" | "partial_rotary_factor"))
        {
            None => Ok("default"),
            Some(_) => Err(rope.missing("rope_type", "the kind of scaling that the other parameters belong to")),
        },
    }
}

fn factor(rope: Fields<'_>) -> Result<f64, ConfigError> {
    rope.number("factor", FACTOR)?
        .ok_or_else(|| rope.missing("factor", "a number of at least 1"))
}

/// Context of pre-training: in the rotary parameters, at the top, or the whole context.
fn original_max_position(fields: Fields<'_>, rope: Fields<'_>) -> Result<usize, ConfigError> {
    const NAME: &str = "original_max_position_embeddings";
    match (
        rope.optional_size(NAME, POSITIONS)?,
        fields.optional_size(NAME, POSITIONS)?,
    ) {
        (Some(inner), Some(outer)) if inner != outer => {
            Err(fields.invalid(NAME, format!("{inner} as in the rotary parameters"), outer))
        }
        (Some(original), _) | (None, Some(original)) => Ok(original),
        (None, None) => fields.size("max_position_embeddings", POSITIONS),
    }
}

fn llama3(fields: Fields<'_>, rope: Fields<'_>) -> Result<RopeScaling, ConfigError> {
    let number = |name| {
        rope.number(name, POSITIVE)?
            .ok_or_else(|| rope.missing(name, "a positive number"))
    };
    let low_freq_factor = number("low_freq_factor")?;
    let high_freq_factor = number("high_freq_factor")?;
    if high_freq_factor < low_freq_factor {
        let wanted = format!("at least low_freq_factor, {low_freq_factor}");
        return Err(rope.invalid("high_freq_factor", wanted, high_freq_factor));
    }
    let original_max_position = original_max_position(fields, rope)?;
    Ok(RopeScaling::Llama3 {
        factor: factor(rope)?,
        low_freq_factor,
        high_freq_factor,
        original_max_position,
    })
}

/// DeepSeek's and YaRN's growth of the attention logits with the context: `0.1 · mscale · ln(factor) + 1`.
fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 {
        1.0
    } else {
        0.1 * mscale * factor.ln() + 1.0
    }
}

/// A number, or `default` where it is absent or 0 (upstream: `get(name) or default`).
fn nonzero_or(rope: Fields<'_>, name: &str, default: f64) -> Result<f64, ConfigError> {
    Ok(rope
        .number(name, 0.0..=1e6)?
        .filter(|number| *number != 0.0)
        .unwrap_or(default))
}

fn yarn(fields: Fields<'_>, rope: Fields<'_>) -> Result<RopeScaling, ConfigError> {
    let original_max_position = original_max_position(fields, rope)?;
    let factor = extension(fields, rope, original_max_position)?;
    let attention_factor = match rope.number("attention_factor", POSITIVE)? {
        Some(explicit) => explicit,
        None => match (
            nonzero_or(rope, "mscale", 0.0)?,
            nonzero_or(rope, "mscale_all_dim", 0.0)?,
        ) {
            (mscale, all_dims) if mscale != 0.0 && all_dims != 0.0 => {
                yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dims)
            }
            _ => yarn_mscale(factor, 1.0),
        },
    };
    let beta_fast = nonzero_or(rope, "beta_fast", 32.0)?;
    let beta_slow = nonzero_or(rope, "beta_slow", 1.0)?;
    if beta_fast < beta_slow {
        return Err(rope.invalid("beta_fast", format!("at least beta_slow, {beta_slow}"), beta_fast));
    }
    let truncate = rope.flag_or("truncate", true)?;
    Ok(RopeScaling::Yarn {
        factor,
        beta_fast,
        beta_slow,
        truncate,
        original_max_position,
        attention_factor,
    })
}

/// `factor`, or the ratio of the contexts where it is not given.
fn extension(fields: Fields<'_>, rope: Fields<'_>, original_max_position: usize) -> Result<f64, ConfigError> {
    match rope.number("factor", FACTOR)? {
        Some(factor) => Ok(factor),
        None => {
            let extended = fields.size("max_position_embeddings", POSITIONS)?;
            Ok(extended as f64 / original_max_position as f64)
        }
    }
}

fn longrope(
    fields: Fields<'_>,
    rope: Fields<'_>,
    family: Family,
    rotary_dim: usize,
) -> Result<RopeScaling, ConfigError> {
    let divisors = |name: &'static str| {
        let divisors = rope.positive_numbers(name)?;
        if divisors.len() == rotary_dim / 2 {
            return Ok(divisors);
        }
        Err(rope.invalid(
            name,
            format!("{} numbers", rotary_dim / 2),
            format!("{} numbers", divisors.len()),
        ))
    };
    let original_max_position = original_max_position(fields, rope)?;
    let (short_attention_factor, long_attention_factor) = match family {
        Family::PhiMoe => phimoe_mscales(rope)?,
        _ => None,
    }
    .map_or_else(
        || longrope_attention_factor(fields, rope, original_max_position).map(|both| (both, both)),
        Ok,
    )?;
    Ok(RopeScaling::LongRope {
        short_factor: divisors("short_factor")?,
        long_factor: divisors("long_factor")?,
        short_attention_factor,
        long_attention_factor,
        original_max_position,
    })
}

/// `short_mscale` and `long_mscale`, which come together or not at all.
fn phimoe_mscales(rope: Fields<'_>) -> Result<Option<(f64, f64)>, ConfigError> {
    match (
        rope.number("short_mscale", POSITIVE)?,
        rope.number("long_mscale", POSITIVE)?,
    ) {
        (Some(short), Some(long)) => Ok(Some((short, long))),
        (None, None) => Ok(None),
        (Some(_), None) => Err(rope.missing("long_mscale", "a number, as there is a short_mscale")),
        (None, Some(_)) => Err(rope.missing("short_mscale", "a number, as there is a long_mscale")),
    }
}

/// `attention_factor`, or `sqrt(1 + ln(factor) / ln(original))` (arXiv 2402.13753).
fn longrope_attention_factor(
    fields: Fields<'_>,
    rope: Fields<'_>,
    original_max_position: usize,
) -> Result<f64, ConfigError> {
    if let Some(explicit) = rope.number("attention_factor", POSITIVE)? {
        return Ok(explicit);
    }
    let factor = extension(fields, rope, original_max_position)?;
    if factor <= 1.0 {
        return Ok(1.0);
    }
    if original_max_position < 2 {
        let name = "original_max_position_embeddings";
        return Err(rope.invalid(
            name,
            "at least 2, as its logarithm divides",
            shorten(&original_max_position.into()),
        ));
    }
    Ok((1.0 + factor.ln() / (original_max_position as f64).ln()).sqrt())
}
