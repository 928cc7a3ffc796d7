//! One number as the cache holds it: part of a 32-bit word, and what it is worth.

use moerun_types::KvFormat;

use crate::{
    bf16::to_bf16,
    lines::{LANES, Line},
    simd::Simd,
};

/// Numbers in a word.
pub(super) fn per_word(format: KvFormat) -> usize {
    match format {
        KvFormat::F32 => 1,
        KvFormat::Bf16 => 2,
        KvFormat::Int8 => 4,
    }
}

/// Lines of scales that a head's page ends with, a lane per token: the keys' and the values'.
pub(super) fn scale_lines(format: KvFormat) -> usize {
    match format {
        KvFormat::F32 | KvFormat::Bf16 => 0,
        KvFormat::Int8 => 2,
    }
}

/// What a code of one in int8 is worth: the largest magnitude over 127. 0 if that is no normal number; a NaN or an
/// infinity among `values` makes it NaN, so that it is not lost.
pub(super) fn int8_scale(values: &[f32]) -> f32 {
    let largest = values.iter().fold(0.0_f32, |largest, value| {
        let size = value.abs();
        if size <= largest { largest } else { size }
    });
    let finite = values.iter().all(|value| value.is_finite());
    let scale = largest / 127.0;
    if !finite {
        f32::NAN
    } else if scale < f32::MIN_POSITIVE {
        0.0
    } else {
        scale
    }
}

/// The bits of `value` in its word. Codes of int8 are rounded to nearest even and never below -127; `scale` is not used
/// by the other formats.
pub(super) fn encode(format: KvFormat, value: f32, scale: f32) -> u32 {
    match format {
        KvFormat::F32 => value.to_bits(),
        KvFormat::Bf16 => u32::from(to_bf16(value)),
        KvFormat::Int8 => {
            // Of a NaN the cast makes 0.
            let code = if scale == 0.0 {
                0
            } else {
                (value / scale).round_ties_even().clamp(-127.0, 127.0) as i8
            };
            u32::from(code.cast_unsigned())
        }
    }
}

/// Puts the bits of a number at place `index` of `word`.
pub(super) fn put(format: KvFormat, word: &mut u32, index: usize, bits: u32) {
    let (width, mask) = match format {
        KvFormat::F32 => (32, u32::MAX),
        KvFormat::Bf16 => (16, 0xffff),
        KvFormat::Int8 => (8, 0xff),
    };
    let shift = width * index;
    *word = *word & !(mask << shift) | bits << shift;
}

/// The numbers at place `index` of every word, without their scales.
#[inline(always)]
pub(super) fn decode<S: Simd>(simd: S, format: KvFormat, line: &Line, index: usize) -> S::F32s {
    match (format, index) {
        (KvFormat::F32, _) => simd.load_bits(line),
        (KvFormat::Bf16, 0) => simd.load_low_bf16(line),
        (KvFormat::Bf16, _) => simd.load_high_bf16(line),
        (KvFormat::Int8, _) => simd.load_byte(line, index),
    }
}

/// Sixteen lanes as a line of f32.
#[inline(always)]
pub(super) fn line<S: Simd>(simd: S, lanes: S::F32s) -> Line {
    let values: [f32; LANES] = simd.store(lanes);
    values.map(f32::to_bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(value: f32, scale: f32) -> f32 {
        f32::from((encode(KvFormat::Int8, value, scale) as u8).cast_signed()) * scale
    }

    #[test]
    fn int8_codes_are_nearest_even_and_reach_127_on_both_sides() {
        let scale = int8_scale(&[-254.0, 3.0, 1.0]);
        assert_eq!(scale, 2.0);
        for (value, wanted) in [(-254.0, -254.0), (3.0, 4.0), (1.0, 0.0), (254.0, 254.0), (300.0, 254.0)] {
            assert_eq!(decoded(value, scale), wanted, "{value}");
        }
    }

    #[test]
    fn a_row_of_zeroes_has_no_scale_and_what_is_not_finite_is_not_lost() {
        for zero in [[0.0, -0.0], [1e-40, -1e-39]] {
            assert_eq!(int8_scale(&zero), 0.0);
            assert_eq!(decoded(zero[1], 0.0), 0.0);
        }
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let scale = int8_scale(&[1.0, bad, 2.0]);
            assert!(decoded(bad, scale).is_nan() && decoded(1.0, scale).is_nan(), "{bad}");
        }
    }

    #[test]
    fn a_number_leaves_its_neighbours_alone() {
        for format in KvFormat::ALL {
            let mut word = 0xa5a5_a5a5;
            for index in 0..per_word(format) {
                let bits = encode(format, -1.0, 1.0);
                put(format, &mut word, index, bits);
                let width = 32 / per_word(format);
                assert_eq!(u64::from(word) >> (width * index) & ((1 << width) - 1), u64::from(bits));
            }
        }
    }
}
