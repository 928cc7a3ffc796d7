//! Rotary position embedding: frequencies and rotation.

use std::f64::consts::TAU;

use serde_json::Value;

use super::config::Config;
use crate::{Family, TestkitError};

/// Angles per position and pair of elements, and the factor on their cosines and sines.
pub(crate) struct Rotary {
    frequencies: Vec<f64>,
    attention_factor: f64,
    interleaved: bool,
}

impl Rotary {
    /// For a sequence of `tokens` tokens (longrope depends on it) and heads of `head_dim` elements.
    pub(crate) fn new(config: &Config, head_dim: usize, tokens: usize) -> Result<Self, TestkitError> {
        let rotary_dim = (head_dim as f64 * partial_factor(config)?) as usize;
        let theta = config.rope_theta()?;
        let plain: Vec<f64> = (0..rotary_dim / 2)
            .map(|i| theta.powf(-2.0 * i as f64 / rotary_dim as f64))
            .collect();
        let (frequencies, attention_factor) = match config.rope_type() {
            "default" => (plain, 1.0),
            "linear" => (
                plain
                    .iter()
                    .map(|frequency| frequency / required(config, "factor"))
                    .collect(),
                1.0,
            ),
            "llama3" => (plain.iter().map(|&frequency| llama3(config, frequency)).collect(), 1.0),
            "yarn" => (yarn(config, &plain, rotary_dim, theta), yarn_attention_factor(config)),
            "longrope" => longrope(config, &plain, tokens),
            other => {
                return Err(TestkitError::Unknown {
                    what: "rope type",
                    name: other.to_owned(),
                });
            }
        };
        let interleaved = matches!(
            config.family,
            Family::DeepseekV2 | Family::DeepseekV3 | Family::Ernie45Moe | Family::Llama4Text
        );
        Ok(Rotary {
            frequencies,
            attention_factor,
            interleaved,
        })
    }

    /// Rotates one head at `position` in place; elements beyond the rotary dimensions stay.
    pub(crate) fn rotate(&self, head: &mut [f64], position: usize) {
        let pairs = self.frequencies.len();
        for (pair, frequency) in self.frequencies.iter().enumerate() {
            let (first, second) = if self.interleaved {
                (2 * pair, 2 * pair + 1)
            } else {
                (pair, pair + pairs)
            };
            let (sin, cos) = (position as f64 * frequency).sin_cos();
            let (x, y) = (head[first], head[second]);
            head[first] = self.attention_factor * (x * cos - y * sin);
            head[second] = self.attention_factor * (y * cos + x * sin);
        }
    }
}

/// Share of a head that is rotated.
fn partial_factor(config: &Config) -> Result<f64, TestkitError> {
    match config.rope_float("partial_rotary_factor") {
        Some(factor) => Ok(factor),
        None => config.float_or(
            "partial_rotary_factor",
            if config.family == Family::Glm4Moe { 0.5 } else { 1.0 },
        ),
    }
}

/// A parameter without which its scaling means nothing; NaN makes every result show that it was missing.
fn required(config: &Config, field: &str) -> f64 {
    config.rope_float(field).unwrap_or(f64::NAN)
}

/// Low frequencies are divided by `factor`, high ones kept, those between blended.
fn llama3(config: &Config, frequency: f64) -> f64 {
    let factor = required(config, "factor");
    let low = required(config, "low_freq_factor");
    let high = required(config, "high_freq_factor");
    let context = required(config, "original_max_position_embeddings");
    let wavelength = TAU / frequency;
    if wavelength > context / low {
        frequency / factor
    } else if wavelength < context / high {
        frequency
    } else {
        let smooth = (context / wavelength - low) / (high - low);
        (1.0 - smooth) * frequency / factor + smooth * frequency
    }
}

/// Dimensions that turn often are kept, those that turn seldom divided by `factor`, those between blended.
fn yarn(config: &Config, plain: &[f64], rotary_dim: usize, theta: f64) -> Vec<f64> {
    let factor = required(config, "factor");
    let context = required(config, "original_max_position_embeddings");
    let dimension_with_turns = |turns: f64| rotary_dim as f64 * (context / (turns * TAU)).ln() / (2.0 * theta.ln());
    let mut low = dimension_with_turns(config.rope_float("beta_fast").unwrap_or(32.0));
    let mut high = dimension_with_turns(config.rope_float("beta_slow").unwrap_or(1.0));
    if config.rope("truncate").and_then(Value::as_bool).unwrap_or(true) {
        (low, high) = (low.floor(), high.ceil());
    }
    low = low.max(0.0);
    high = high.min(rotary_dim as f64 - 1.0);
    if low == high {
        high += 0.001;
    }
    let blend = |(i, frequency): (usize, &f64)| {
        let interpolated = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
        frequency / factor * interpolated + frequency * (1.0 - interpolated)
    };
    plain.iter().enumerate().map(blend).collect()
}

/// YaRN's `0.1 · m · ln(factor) + 1`.
pub(crate) fn yarn_mscale(factor: f64, m: f64) -> f64 {
    if factor <= 1.0 {
        1.0
    } else {
        0.1 * m * factor.ln() + 1.0
    }
}

fn yarn_attention_factor(config: &Config) -> f64 {
    if let Some(given) = config.rope_float("attention_factor") {
        return given;
    }
    let factor = required(config, "factor");
    let mscale = config.rope_float("mscale").unwrap_or(0.0);
    let mscale_all_dim = config.rope_float("mscale_all_dim").unwrap_or(0.0);
    if mscale != 0.0 && mscale_all_dim != 0.0 {
        yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
    } else {
        yarn_mscale(factor, 1.0)
    }
}

/// A divisor per frequency, from the short or the long list by the length of the sequence (phimoe).
fn longrope(config: &Config, plain: &[f64], tokens: usize) -> (Vec<f64>, f64) {
    let context = config
        .rope_float("original_max_position_embeddings")
        .or(config.optional_float("original_max_position_embeddings").ok().flatten())
        .unwrap_or(f64::NAN);
    let (list, factor) = if tokens as f64 > context {
        ("long_factor", "long_mscale")
    } else {
        ("short_factor", "short_mscale")
    };
    let divisor = |i: usize| {
        config
            .rope(list)
            .and_then(|list| list.get(i)?.as_f64())
            .unwrap_or(f64::NAN)
    };
    let frequencies = plain
        .iter()
        .enumerate()
        .map(|(i, frequency)| frequency / divisor(i))
        .collect();
    (frequencies, required(config, factor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_turn_moves_the_first_of_a_pair_to_the_second() {
        for (interleaved, wanted) in [(false, [0.0, 0.0, 1.0, 0.0]), (true, [0.0, 1.0, 0.0, 0.0])] {
            let rotary = Rotary {
                frequencies: vec![TAU / 4.0, 0.0],
                attention_factor: 1.0,
                interleaved,
            };
            let mut head = [1.0, 0.0, 0.0, 0.0];
            rotary.rotate(&mut head, 1);
            for (found, wanted) in head.iter().zip(wanted) {
                assert!((found - wanted).abs() < 1e-15, "{head:?}");
            }
        }
    }
}
