//! Stored elements ↔ f64, one plain function per direction.

use half::{bf16, f16};

/// Element types of checkpoint tensors, with the names that safetensors gives them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Element {
    F32,
    F16,
    Bf16,
    /// 8-bit float, 4 exponent and 3 mantissa bits, no infinities.
    F8E4M3,
    U8,
}

impl Element {
    /// Name in a safetensors header.
    pub fn name(self) -> &'static str {
        match self {
            Element::F32 => "F32",
            Element::F16 => "F16",
            Element::Bf16 => "BF16",
            Element::F8E4M3 => "F8_E4M3",
            Element::U8 => "U8",
        }
    }

    /// Name in a config's `dtype` / `torch_dtype`, where it may stand there.
    pub fn config_name(self) -> Option<&'static str> {
        match self {
            Element::F32 => Some("float32"),
            Element::F16 => Some("float16"),
            Element::Bf16 => Some("bfloat16"),
            Element::F8E4M3 | Element::U8 => None,
        }
    }

    /// The element type with this name in a safetensors header.
    pub fn from_name(name: &str) -> Option<Self> {
        [Element::F32, Element::F16, Element::Bf16, Element::F8E4M3, Element::U8]
            .into_iter()
            .find(|element| element.name() == name)
    }

    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Element::F32 => 4,
            Element::F16 | Element::Bf16 => 2,
            Element::F8E4M3 | Element::U8 => 1,
        }
    }
}

/// Reads little-endian elements as f64; bytes that do not fill an element are ignored.
pub fn decode(element: Element, bytes: &[u8]) -> Vec<f64> {
    match element {
        Element::F32 => bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|&chunk| f64::from(f32::from_le_bytes(chunk)))
            .collect(),
        Element::F16 => bytes
            .as_chunks::<2>()
            .0
            .iter()
            .map(|&chunk| f16::from_le_bytes(chunk).to_f64())
            .collect(),
        Element::Bf16 => bytes
            .as_chunks::<2>()
            .0
            .iter()
            .map(|&chunk| bf16::from_le_bytes(chunk).to_f64())
            .collect(),
        Element::F8E4M3 => bytes.iter().map(|&byte| f8_e4m3_to_f64(byte)).collect(),
        Element::U8 => bytes.iter().map(|&byte| f64::from(byte)).collect(),
    }
}

/// Writes values as little-endian elements, rounded to the nearest.
pub fn encode(element: Element, values: &[f64]) -> Vec<u8> {
    match element {
        Element::F32 => values.iter().flat_map(|&value| (value as f32).to_le_bytes()).collect(),
        Element::F16 => values
            .iter()
            .flat_map(|&value| f16::from_f64(value).to_le_bytes())
            .collect(),
        Element::Bf16 => values
            .iter()
            .flat_map(|&value| bf16::from_f64(value).to_le_bytes())
            .collect(),
        Element::F8E4M3 => values.iter().map(|&value| f64_to_f8_e4m3(value)).collect(),
        Element::U8 => values.iter().map(|&value| value as u8).collect(),
    }
}

/// Sign, 4 exponent bits with bias 7, 3 mantissa bits; `s.1111.111` is not a number, and there are no infinities.
fn f8_e4m3_to_f64(byte: u8) -> f64 {
    let sign = if byte & 0x80 == 0 { 1.0 } else { -1.0 };
    let exponent = i32::from(byte >> 3 & 0x0f);
    let mantissa = f64::from(byte & 0x07);
    if byte & 0x7f == 0x7f {
        f64::NAN
    } else if exponent == 0 {
        sign * mantissa / 8.0 * 2f64.powi(-6)
    } else {
        sign * (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7)
    }
}

/// The code whose value is nearest, found by trying them all.
fn f64_to_f8_e4m3(value: f64) -> u8 {
    let distance = |code: u8| (f8_e4m3_to_f64(code) - value).abs();
    (0..=u8::MAX)
        .filter(|code| code & 0x7f != 0x7f)
        .min_by(|&a, &b| distance(a).total_cmp(&distance(b)))
        .unwrap_or(0)
}

/// The sixteen values of a 4-bit float with 2 exponent bits and 1 mantissa bit, by code.
pub(crate) const FP4_E2M1: [f64; 16] = [
    0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finite_f8_code_survives_a_round_trip_of_its_value() {
        for code in 0..=u8::MAX {
            let value = f8_e4m3_to_f64(code);
            if !value.is_nan() {
                assert_eq!(f8_e4m3_to_f64(f64_to_f8_e4m3(value)), value, "code {code:#04x}");
            }
        }
    }

    #[test]
    fn f8_codes_have_the_published_values() {
        assert_eq!(f8_e4m3_to_f64(0x7e), 448.0);
        assert_eq!(f8_e4m3_to_f64(0x38), 1.0);
        assert_eq!(f8_e4m3_to_f64(0x01), 2f64.powi(-9));
        assert_eq!(f8_e4m3_to_f64(0xb8), -1.0);
        assert!(f8_e4m3_to_f64(0xff).is_nan());
    }

    #[test]
    fn representable_values_survive_every_float_type() {
        let values = [0.0, 1.0, -1.5, 0.25, -416.0, 2f64.powi(-6)];
        for element in [Element::F32, Element::F16, Element::Bf16, Element::F8E4M3] {
            assert_eq!(decode(element, &encode(element, &values)), values, "{element:?}");
        }
    }
}
