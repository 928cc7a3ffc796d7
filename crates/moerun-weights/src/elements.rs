//! Stored elements as f32: little-endian, at any alignment.

use std::sync::LazyLock;

/// An element type of a plain tensor.
pub(crate) trait Element {
    /// Bytes of one element.
    const BYTES: usize;

    /// The element at the start of `bytes`.
    fn read(bytes: &[u8]) -> f32;
}

/// IEEE single precision.
pub(crate) struct F32;
/// IEEE half precision.
pub(crate) struct F16;
/// bfloat16.
pub(crate) struct Bf16;

impl Element for F32 {
    const BYTES: usize = 4;

    fn read(bytes: &[u8]) -> f32 {
        f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    }
}

impl Element for F16 {
    const BYTES: usize = 2;

    fn read(bytes: &[u8]) -> f32 {
        half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
    }
}

impl Element for Bf16 {
    const BYTES: usize = 2;

    fn read(bytes: &[u8]) -> f32 {
        f32::from_bits(u32::from(u16::from_le_bytes([bytes[0], bytes[1]])) << 16)
    }
}

/// Values of all fp8 codes with 4 exponent bits (bias 7) and 3 mantissa bits; there are no infinities, and 0x7f and
/// 0xff are NaN.
pub(crate) static E4M3: LazyLock<[f32; 256]> = LazyLock::new(|| std::array::from_fn(|code| e4m3(code as u8)));

fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-9),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// Values of the 4-bit codes of MXFP4: a sign, two exponent bits and one mantissa bit.
pub(crate) const E2M1: [f32; 16] = [
    0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0,
];

/// The scale that an exponent byte of MXFP4 stands for: 2^(byte − 127), NaN for 255.
pub(crate) fn e8m0(exponent: u8) -> f32 {
    match exponent {
        0 => f32::from_bits(1 << 22), // 2^-127 is denormal
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(exponent) << 23),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fp8_codes_have_the_values_of_the_format() {
        for (code, value) in [
            (0x00, 0.0),
            (0x01, 2f32.powi(-9)),
            (0x07, 7.0 * 2f32.powi(-9)),
            (0x08, 2f32.powi(-6)),
            (0x38, 1.0),
            (0x39, 1.125),
            (0x40, 2.0),
            (0x7e, 448.0),
            (0xb8, -1.0),
            (0xfe, -448.0),
        ] {
            assert_eq!(E4M3[code], value, "code {code:#x}");
        }
        assert_eq!(E4M3[0x80].to_bits(), (-0f32).to_bits());
        assert_eq!(
            (0..256).filter(|&code| E4M3[code].is_nan()).collect::<Vec<_>>(),
            [0x7f, 0xff]
        );
        assert!((0..0x7e).all(|code| E4M3[code] < E4M3[code + 1]));
    }

    #[test]
    fn exponent_bytes_are_powers_of_two() {
        for exponent in 1..255 {
            assert_eq!(
                f64::from(e8m0(exponent)),
                2f64.powi(i32::from(exponent) - 127),
                "{exponent}"
            );
        }
        assert_eq!(f64::from(e8m0(0)), 2f64.powi(-127));
        assert!(e8m0(255).is_nan());
    }
}
