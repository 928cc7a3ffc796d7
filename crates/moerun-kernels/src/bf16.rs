//! Rounding to bfloat16, the upper half of an f32, and back.

/// Rounds to the nearest bfloat16, ties to even; a NaN stays a NaN, made quiet.
#[inline(always)]
pub(crate) fn to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet_nan = (bits >> 16) | 0x40;
    (if value.is_nan() { quiet_nan } else { rounded }) as u16
}

/// The value of a bfloat16.
#[inline(always)]
pub(crate) fn from_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_agrees_with_an_independent_one_on_bits_of_all_kinds() {
        for index in 0..=u32::MAX / 641 {
            let value = f32::from_bits(index * 641);
            let (ours, theirs) = (to_bf16(value), half::bf16::from_f32(value));
            assert_eq!(ours, theirs.to_bits(), "{value} ({:#x})", value.to_bits());
        }
        for tie in [0x3f80_8000_u32, 0x3f81_8000, 0x7f7f_ffff, 0xff80_0000, 0x7f80_0001] {
            let value = f32::from_bits(tie);
            assert_eq!(to_bf16(value), half::bf16::from_f32(value).to_bits(), "{tie:#x}");
        }
    }
}
