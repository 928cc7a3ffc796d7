//! Rounding a block of 32 values to codes and a scale.

use half::f16;
use moerun_types::QUANTIZED_BLOCK;

/// Values of the 4-bit floats of [`moerun_types::NumberFormat::Mxfp4`], doubled so that they are integers.
pub(crate) const MXFP4_DOUBLED: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// `1.5 * 2^23`: adding and subtracting it leaves the nearest integer, ties to even.
const ROUND: f32 = 12_582_912.0;

/// Rounds `values` as activations: the scale is max|x| / 127, 0 if that is below the smallest normal number; codes are
/// the nearest multiples, ties to even. If a value is not finite the scale is NaN, so that what is computed from it is
/// NaN too.
#[inline(always)]
pub(crate) fn quantize_activations(values: &[f32; QUANTIZED_BLOCK], codes: &mut [i8; QUANTIZED_BLOCK]) -> f32 {
    let mut largest = 0_i32;
    for value in values {
        // Magnitudes compare like their bits, and those of what is not finite are above all others.
        largest = largest.max((value.to_bits() & 0x7fff_ffff).cast_signed());
    }
    let scale = f32::from_bits(largest.cast_unsigned()) / 127.0;
    let is_finite = largest < f32::INFINITY.to_bits().cast_signed();
    let has_codes = is_finite && scale >= f32::MIN_POSITIVE;
    let inverse = if has_codes { 1.0 / scale } else { 0.0 };
    for (code, value) in codes.iter_mut().zip(values) {
        let value = if has_codes { value * inverse } else { 0.0 };
        let nearest = (value + ROUND).to_bits().wrapping_sub(ROUND.to_bits()).cast_signed();
        *code = nearest.clamp(-127, 127) as i8;
    }
    match (is_finite, has_codes) {
        (false, _) => f32::NAN,
        (true, false) => 0.0,
        (true, true) => scale,
    }
}

/// Why a block of weights has no codes.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum BlockError {
    /// A value is infinite or not a number.
    #[error("a weight is {0}: wanted a finite number")]
    NotFinite(f32),
    /// The scale is beyond the largest f16 (or power of two).
    #[error("a weight is {0}: too large for the block's scale")]
    TooLarge(f32),
    /// A stored scale, given by its bits, is infinite or not a number.
    #[error("the stored scale {0:#06x} is not a finite number")]
    Scale(u16),
}

/// Codes of a block of weights, as [`crate::QuantizedRow`] holds them, and its scale.
type Block = ([u8; QUANTIZED_BLOCK], u16);

/// Signed 8-bit codes with the f16 scale nearest to max|w| / 127. A block whose scale is below the smallest f16 is
/// zero.
pub(crate) fn quantize_int8(weights: &[f32; QUANTIZED_BLOCK]) -> Result<Block, BlockError> {
    let largest = largest(weights)?;
    let scale = f16_scale(largest.abs() / 127.0, largest)?;
    let codes = weights.map(|weight| {
        let code = nearest_code(weight, scale, -127.0, 127.0);
        (code as i8).cast_unsigned()
    });
    Ok((codes, scale.to_bits()))
}

/// 4-bit codes, 8 more than their value, with the f16 scale nearest to that which makes the weight of the largest
/// magnitude -8 (as `Q4_0` of GGUF).
pub(crate) fn quantize_int4(weights: &[f32; QUANTIZED_BLOCK]) -> Result<Block, BlockError> {
    let largest = largest(weights)?;
    let scale = f16_scale(largest / -8.0, largest)?;
    let codes = weights.map(|weight| (nearest_code(weight, scale, -8.0, 7.0) + 8.0) as u8);
    Ok((codes, scale.to_bits()))
}

/// 4-bit floats with a power of two: that of the largest magnitude less the largest exponent of a code (2), as the OCP
/// specification proposes. The nearest value is taken, of two the one with the even code.
pub(crate) fn quantize_mxfp4(weights: &[f32; QUANTIZED_BLOCK]) -> Result<Block, BlockError> {
    let largest = largest(weights)?;
    let exponent = (largest.to_bits() >> 23 & 0xff) as i32 - 2;
    if exponent < 1 {
        return Ok(([0; QUANTIZED_BLOCK], 0));
    }
    let scale = f32::from_bits((exponent as u32) << 23);
    let codes = weights.map(|weight| {
        let doubled = (weight / scale).abs() * 2.0;
        let distance = |code: u8| (doubled - f32::from(MXFP4_DOUBLED[usize::from(code)])).abs();
        let magnitude = (0..8)
            .min_by(|&a, &b| distance(a).total_cmp(&distance(b)).then((a % 2).cmp(&(b % 2))))
            .expect("eight codes");
        magnitude | if weight < 0.0 { 8 } else { 0 }
    });
    Ok((codes, exponent as u16))
}

/// The weight of the largest magnitude, the first of several.
fn largest(weights: &[f32; QUANTIZED_BLOCK]) -> Result<f32, BlockError> {
    let mut largest = 0.0_f32;
    for &weight in weights {
        if !weight.is_finite() {
            return Err(BlockError::NotFinite(weight));
        }
        if weight.abs() > largest.abs() {
            largest = weight;
        }
    }
    Ok(largest)
}

fn f16_scale(scale: f32, largest: f32) -> Result<f16, BlockError> {
    let rounded = f16::from_f32(scale);
    if rounded.is_finite() {
        Ok(rounded)
    } else {
        Err(BlockError::TooLarge(largest))
    }
}

/// The multiple of `scale` nearest to `weight`, ties to even.
fn nearest_code(weight: f32, scale: f16, lowest: f32, highest: f32) -> f32 {
    let scale = scale.to_f32();
    if scale == 0.0 {
        return 0.0;
    }
    // The scale is within a half of what makes the largest weight the largest code, so the quotient is small.
    (weight / scale + ROUND - ROUND).clamp(lowest, highest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_data::Rng;

    fn block(rng: &mut Rng, scale: f32) -> [f32; QUANTIZED_BLOCK] {
        std::array::from_fn(|_| rng.value() * scale)
    }

    #[test]
    fn activations_are_the_nearest_multiples_of_a_127th_of_the_largest() {
        let mut rng = Rng::new(1);
        for round in 0..2000 {
            let values = block(&mut rng, 2.0_f32.powi(round % 60 - 30));
            let mut codes = [99; QUANTIZED_BLOCK];
            let scale = quantize_activations(&values, &mut codes);
            let largest = values.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
            assert_eq!(scale, largest / 127.0);
            for (&code, &value) in codes.iter().zip(&values) {
                assert!(
                    (f32::from(code) * scale - value).abs() <= scale * 0.500_01,
                    "{value} {scale} {code}"
                );
            }
            assert!(codes.iter().any(|code| code.abs() == 127));
        }
    }

    #[test]
    fn ties_go_to_the_even_code() {
        let mut values = [0.0; QUANTIZED_BLOCK];
        (values[0], values[1], values[2], values[3]) = (127.0, 2.5, -3.5, 0.5);
        let mut codes = [0; QUANTIZED_BLOCK];
        assert_eq!(quantize_activations(&values, &mut codes), 1.0);
        assert_eq!(codes[..4], [127, 2, -4, 0]);
    }

    #[test]
    fn zero_and_tiny_blocks_have_scale_zero_and_what_is_not_finite_has_no_scale() {
        let mut codes = [1; QUANTIZED_BLOCK];
        for tiny in [0.0, 1e-44, 1e-37] {
            assert_eq!(quantize_activations(&[tiny; QUANTIZED_BLOCK], &mut codes), 0.0);
            assert_eq!(codes, [0; QUANTIZED_BLOCK]);
        }
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = [1.0; QUANTIZED_BLOCK];
            values[17] = bad;
            assert!(quantize_activations(&values, &mut codes).is_nan());
            assert_eq!(codes, [0; QUANTIZED_BLOCK]);
        }
    }

    #[test]
    fn weights_come_back_within_half_a_step() {
        let mut rng = Rng::new(2);
        for round in 0..500 {
            let weights = block(&mut rng, 2.0_f32.powi(round % 20 - 10));
            let largest = weights
                .iter()
                .fold(0.0_f32, |largest, weight| largest.max(weight.abs()));
            let (codes, scale) = quantize_int8(&weights).expect("finite");
            let scale = f16::from_bits(scale).to_f32();
            for (&code, &weight) in codes.iter().zip(&weights) {
                let back = f32::from(code.cast_signed()) * scale;
                assert!(
                    (back - weight).abs() <= 0.51 * largest / 127.0 + scale * 0.1,
                    "{weight} {back}"
                );
            }
            let (codes, scale) = quantize_int4(&weights).expect("finite");
            let scale = f16::from_bits(scale).to_f32();
            for (&code, &weight) in codes.iter().zip(&weights) {
                let back = (f32::from(code) - 8.0) * scale;
                // The largest of the other sign may be a whole step away: there is no code 8.
                assert!(
                    code < 16 && (back - weight).abs() <= 1.01 * scale.abs(),
                    "{weight} {back}"
                );
            }
            let (codes, exponent) = quantize_mxfp4(&weights).expect("finite");
            let scale = 2.0_f32.powi(i32::from(exponent) - 127);
            for (&code, &weight) in codes.iter().zip(&weights) {
                let back = f32::from(MXFP4_DOUBLED[usize::from(code)]) * 0.5 * scale;
                // Steps are 2 at the top; 7.99 becomes 6.
                assert!(
                    (back - weight).abs() <= 2.0 * scale && back.abs() <= 6.0 * scale,
                    "{weight} {back}"
                );
            }
        }
    }

    #[test]
    fn what_has_no_scale_is_refused_and_what_is_too_small_is_zero() {
        let with = |value: f32| {
            let mut weights = [0.5; QUANTIZED_BLOCK];
            weights[3] = value;
            weights
        };
        for quantize in [quantize_int8, quantize_int4, quantize_mxfp4] {
            assert_eq!(
                quantize(&with(f32::INFINITY)),
                Err(BlockError::NotFinite(f32::INFINITY))
            );
            assert!(matches!(quantize(&with(f32::NAN)), Err(BlockError::NotFinite(_))));
            assert!(quantize(&[0.0; QUANTIZED_BLOCK]).is_ok());
        }
        assert_eq!(quantize_int8(&with(9e6)), Err(BlockError::TooLarge(9e6)));
        assert_eq!(quantize_int4(&with(-9e6)), Err(BlockError::TooLarge(-9e6)));
        assert_eq!(quantize_int8(&[1e-9; QUANTIZED_BLOCK]), Ok(([0; QUANTIZED_BLOCK], 0)));
        assert_eq!(
            quantize_int4(&[1e-9; QUANTIZED_BLOCK]),
            Ok(([8; QUANTIZED_BLOCK], 0x8000))
        );
    }
}
