//! Rotary position embedding: the inverse frequencies of every scaling, in f32 as upstream computes them.

use std::f64::consts::PI;

use moerun_kernels::RotaryTable;
use moerun_types::{RopeConfig, RopeScaling, RotaryLayout};

/// The model's rotary tables.
#[derive(Debug)]
pub(crate) struct RotaryEmbedding {
    table: RotaryTable,
    /// longrope: the table of sequences longer than this many tokens.
    long: Option<(usize, RotaryTable)>,
}

impl RotaryEmbedding {
    /// Tables for positions `0..max_positions`.
    pub(crate) fn new(config: &RopeConfig, max_positions: usize) -> Self {
        let interleaved = config.layout == RotaryLayout::Interleaved;
        let table = |frequencies: &[f32], attention_factor: f64| {
            RotaryTable::new(frequencies, attention_factor as f32, interleaved, max_positions)
        };
        match &config.scaling {
            RopeScaling::None | RopeScaling::Linear { .. } | RopeScaling::Llama3 { .. } => RotaryEmbedding {
                table: table(&inverse_frequencies(config), 1.0),
                long: None,
            },
            RopeScaling::Yarn { attention_factor, .. } => RotaryEmbedding {
                table: table(&inverse_frequencies(config), *attention_factor),
                long: None,
            },
            RopeScaling::LongRope {
                long_factor,
                short_attention_factor,
                long_attention_factor,
                original_max_position,
                ..
            } => RotaryEmbedding {
                table: table(&inverse_frequencies(config), *short_attention_factor),
                long: Some((
                    *original_max_position,
                    table(&divided_frequencies(config, long_factor), *long_attention_factor),
                )),
            },
        }
    }

    /// The table for a sequence whose cache was begun at `rope_length` tokens.
    pub(crate) fn table(&self, rope_length: usize) -> &RotaryTable {
        match &self.long {
            Some((short_up_to, long)) if rope_length > *short_up_to => long,
            _ => &self.table,
        }
    }
}

/// `[rotary_dim / 2]`; for longrope those of short sequences.
fn inverse_frequencies(config: &RopeConfig) -> Vec<f32> {
    let inverse = || powers(config).into_iter().map(|power| 1.0 / power);
    match &config.scaling {
        RopeScaling::None => inverse().collect(),
        RopeScaling::Linear { factor } => inverse().map(|frequency| frequency / *factor as f32).collect(),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position,
        } => {
            let ramp = Llama3Ramp {
                factor: *factor,
                low_freq_factor: *low_freq_factor,
                high_freq_factor: *high_freq_factor,
                context: *original_max_position as f64,
            };
            inverse().map(|frequency| ramp.apply(frequency)).collect()
        }
        RopeScaling::Yarn {
            factor,
            beta_fast,
            beta_slow,
            truncate,
            original_max_position,
            ..
        } => {
            let dimension = |rotations: f64| correction_dimension(config, *original_max_position as f64, rotations);
            let (low, high) = (dimension(*beta_fast), dimension(*beta_slow));
            let (low, high) = if *truncate {
                (low.floor(), high.ceil())
            } else {
                (low, high)
            };
            let (low, high) = (low.max(0.0), high.min((config.rotary_dim - 1) as f64));
            yarn_frequencies(config, *factor, low, high)
        }
        RopeScaling::LongRope { short_factor, .. } => divided_frequencies(config, short_factor),
    }
}

/// `theta ^ (2i / rotary_dim)`, `[rotary_dim / 2]`: the exponent in f32, the power rounded to f32.
fn powers(config: &RopeConfig) -> Vec<f32> {
    let theta = f64::from(config.theta as f32);
    (0..config.rotary_dim / 2)
        .map(|index| (2 * index) as f32 / config.rotary_dim as f32)
        .map(|exponent| theta.powf(f64::from(exponent)) as f32)
        .collect()
}

fn divided_frequencies(config: &RopeConfig, factors: &[f64]) -> Vec<f32> {
    powers(config)
        .into_iter()
        .zip(factors)
        .map(|(power, factor)| 1.0 / (*factor as f32 * power))
        .collect()
}

/// llama 3.1: long wavelengths are stretched, short ones kept, those between interpolated.
struct Llama3Ramp {
    factor: f64,
    low_freq_factor: f64,
    high_freq_factor: f64,
    context: f64,
}

impl Llama3Ramp {
    fn apply(&self, frequency: f32) -> f32 {
        let factor = self.factor as f32;
        let wavelength = (2.0 * PI) as f32 / frequency;
        if wavelength > (self.context / self.low_freq_factor) as f32 {
            return frequency / factor;
        }
        if wavelength < (self.context / self.high_freq_factor) as f32 {
            return frequency;
        }
        let span = (self.high_freq_factor - self.low_freq_factor) as f32;
        let smooth = (self.context as f32 / wavelength - self.low_freq_factor as f32) / span;
        (1.0 - smooth) * frequency / factor + smooth * frequency
    }
}

/// The dimension whose frequency makes `rotations` turns over the pre-training context.
fn correction_dimension(config: &RopeConfig, context: f64, rotations: f64) -> f64 {
    config.rotary_dim as f64 * (context / (rotations * 2.0 * PI)).ln() / (2.0 * config.theta.ln())
}

/// YaRN: dimensions below `low` keep their frequency, those above `high` are divided by `factor`, a ramp between.
fn yarn_frequencies(config: &RopeConfig, factor: f64, low: f64, high: f64) -> Vec<f32> {
    // Upstream keeps the ramp from dividing by zero in the same way.
    let high = if low == high { high + 0.001 } else { high };
    powers(config)
        .into_iter()
        .enumerate()
        .map(|(index, power)| {
            let ramp = ((index as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
            let kept = 1.0 - ramp;
            1.0 / (factor as f32 * power) * (1.0 - kept) + 1.0 / power * kept
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(scaling: RopeScaling) -> RopeConfig {
        RopeConfig {
            theta: 10000.0,
            rotary_dim: 8,
            layout: RotaryLayout::Halves,
            scaling,
        }
    }

    fn close(found: &[f32], wanted: &[f32]) {
        assert_eq!(found.len(), wanted.len());
        for (found, wanted) in found.iter().zip(wanted) {
            assert!(
                (found - wanted).abs() <= 1e-6 * wanted.abs(),
                "wanted {wanted}, found {found}"
            );
        }
    }

    #[test]
    fn plain_frequencies_are_powers_of_theta() {
        close(
            &inverse_frequencies(&config(RopeScaling::None)),
            &[1.0, 0.1, 0.01, 0.001],
        );
    }

    #[test]
    fn linear_scaling_divides_every_frequency() {
        close(
            &inverse_frequencies(&config(RopeScaling::Linear { factor: 4.0 })),
            &[0.25, 0.025, 0.0025, 0.00025],
        );
    }

    #[test]
    fn llama3_keeps_short_waves_divides_long_ones_and_ramps_between() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position: 128,
        };
        // Wavelengths 6.3, 62.8, 628, 6283; kept below 32, divided above 128.
        let smooth = (128.0 / (2.0 * PI / 0.1) - 1.0) / 3.0;
        let middle = (1.0 - smooth) * 0.1 / 8.0 + smooth * 0.1;
        close(
            &inverse_frequencies(&config(scaling)),
            &[1.0, middle as f32, 0.01 / 8.0, 0.001 / 8.0],
        );
    }

    #[test]
    fn yarn_without_truncation_ramps_over_fractions_of_a_dimension() {
        let yarn = |truncate| RopeScaling::Yarn {
            factor: 4.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate,
            original_max_position: 64,
            attention_factor: 1.0,
        };
        // Correction dimensions: 8 ln(64 / (2π·32)) / (2 ln 10000) < 0 and 8 ln(64 / 2π) / (2 ln 10000) = 1.008.
        let high = 8.0 * (64.0 / (2.0 * PI)).ln() / (2.0 * 10000f64.ln());
        let second = 0.1 * (1.0 / high) / 4.0 + 0.1 * (1.0 - 1.0 / high);
        close(
            &inverse_frequencies(&config(yarn(false))),
            &[1.0, second as f32, 0.0025, 0.00025],
        );
        close(
            &inverse_frequencies(&config(yarn(true))),
            &[1.0, 0.1 * 0.5 / 4.0 + 0.1 * 0.5, 0.0025, 0.00025],
        );
    }

    #[test]
    fn longrope_changes_its_divisors_above_the_original_context() {
        let rope = config(RopeScaling::LongRope {
            short_factor: vec![1.0, 1.0, 2.0, 2.0],
            long_factor: vec![4.0; 4],
            short_attention_factor: 1.0,
            long_attention_factor: 2.0,
            original_max_position: 16,
        });
        close(&inverse_frequencies(&rope), &[1.0, 0.1, 0.005, 0.0005]);
        let embedding = RotaryEmbedding::new(&rope, 32);
        let mut at_limit = [1.0f32, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        let mut above = at_limit;
        embedding.table(16).apply(&mut at_limit, 8, 1);
        embedding.table(17).apply(&mut above, 8, 1);
        close(&[at_limit[0], above[0]], &[1f32.cos(), 2.0 * 0.25f32.cos()]);
    }
}
