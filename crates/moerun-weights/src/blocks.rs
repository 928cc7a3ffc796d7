//! Block formats of GGUF: values that share scales, dequantised with the single-precision operations of ggml's
//! reference (`ggml-quants.c`, `dequantize_row_*`), so that every value has the same bits; but MXFP4's negative zero
//! keeps its sign here, as elsewhere in this crate.

use crate::elements::{E2M1, Element, F16, e8m0};

/// How a block of values is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BlockType {
    /// 32 signed bytes times an f16 scale.
    Q8_0,
    /// 32 codes of 4 bits less 8, times an f16 scale.
    Q4_0,
    /// 256 codes of 4 bits in eight groups with scales and minima of 6 bits.
    Q4K,
    /// As `Q4K` with codes of 5 bits.
    Q5K,
    /// 256 codes of 6 bits less 32 in sixteen groups with scales of 8 bits.
    Q6K,
    /// 32 e2m1 codes times a power of two.
    Mxfp4,
}

/// Values of the longest block.
pub(crate) const MAX_BLOCK: usize = 256;

impl BlockType {
    /// All of them.
    pub const ALL: [BlockType; 6] = [
        BlockType::Q8_0,
        BlockType::Q4_0,
        BlockType::Q4K,
        BlockType::Q5K,
        BlockType::Q6K,
        BlockType::Mxfp4,
    ];

    /// Its name in llama.cpp.
    pub fn name(self) -> &'static str {
        match self {
            BlockType::Q8_0 => "Q8_0",
            BlockType::Q4_0 => "Q4_0",
            BlockType::Q4K => "Q4_K",
            BlockType::Q5K => "Q5_K",
            BlockType::Q6K => "Q6_K",
            BlockType::Mxfp4 => "MXFP4",
        }
    }

    /// Values of a block.
    pub fn elements(self) -> usize {
        match self {
            BlockType::Q8_0 | BlockType::Q4_0 | BlockType::Mxfp4 => 32,
            BlockType::Q4K | BlockType::Q5K | BlockType::Q6K => MAX_BLOCK,
        }
    }

    /// Bytes of a block.
    pub fn bytes(self) -> usize {
        match self {
            BlockType::Q8_0 => 2 + 32,
            BlockType::Q4_0 => 2 + 16,
            BlockType::Q4K => 2 * 2 + 12 + 128,
            BlockType::Q5K => 2 * 2 + 12 + 32 + 128,
            BlockType::Q6K => 128 + 64 + 16 + 2,
            BlockType::Mxfp4 => 1 + 16,
        }
    }

    /// Writes the values of one block into `out`, `[elements]`.
    pub(crate) fn read(self, block: &[u8], out: &mut [f32]) {
        debug_assert_eq!((block.len(), out.len()), (self.bytes(), self.elements()));
        match self {
            BlockType::Q8_0 => q8_0(block, out),
            BlockType::Q4_0 => q4_0(block, out),
            BlockType::Q4K => q4_k(block, out),
            BlockType::Q5K => q5_k(block, out),
            BlockType::Q6K => q6_k(block, out),
            BlockType::Mxfp4 => mxfp4(block, out),
        }
    }
}

fn q8_0(block: &[u8], out: &mut [f32]) {
    let (scale, codes) = block.split_at(2);
    let scale = F16::read(scale);
    for (out, &code) in out.iter_mut().zip(codes) {
        *out = f32::from(code as i8) * scale;
    }
}

/// The lower halves of all bytes come first, then the upper ones.
fn halves(codes: &[u8], out: &mut [f32], value: impl Fn(u8) -> f32) {
    let (lower, upper) = out.split_at_mut(codes.len());
    for ((lower, upper), &code) in lower.iter_mut().zip(upper).zip(codes) {
        *lower = value(code & 15);
        *upper = value(code >> 4);
    }
}

fn q4_0(block: &[u8], out: &mut [f32]) {
    let (scale, codes) = block.split_at(2);
    let scale = F16::read(scale);
    halves(codes, out, |code| (f32::from(code) - 8.0) * scale);
}

fn mxfp4(block: &[u8], out: &mut [f32]) {
    let scale = e8m0(block[0]);
    halves(&block[1..], out, |code| E2M1[usize::from(code)] * scale);
}

/// Scale and minimum of group `group` of eight, from twelve bytes: the first four groups have the lower six bits of
/// a byte each, the others four bits, and the two bits that the former leave.
fn scale_and_minimum(packed: &[u8], group: usize) -> (f32, f32) {
    let (scale, minimum) = if group < 4 {
        (packed[group] & 63, packed[group + 4] & 63)
    } else {
        (
            packed[group + 4] & 15 | packed[group - 4] >> 6 << 4,
            packed[group + 4] >> 4 | packed[group] >> 6 << 4,
        )
    };
    (f32::from(scale), f32::from(minimum))
}

fn q4_k(block: &[u8], out: &mut [f32]) {
    let (scale, minimum) = (F16::read(&block[..2]), F16::read(&block[2..4]));
    let (packed, codes) = (&block[4..16], &block[16..]);
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let (s, m) = scale_and_minimum(packed, group);
        let (s, m) = (scale * s, minimum * m);
        for (out, &code) in out.iter_mut().zip(&codes[group / 2 * 32..]) {
            *out = s * f32::from(code >> (group % 2 * 4) & 15) - m;
        }
    }
}

fn q5_k(block: &[u8], out: &mut [f32]) {
    let (scale, minimum) = (F16::read(&block[..2]), F16::read(&block[2..4]));
    let (packed, fifth_bits, codes) = (&block[4..16], &block[16..48], &block[48..]);
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let (s, m) = scale_and_minimum(packed, group);
        let (s, m) = (scale * s, minimum * m);
        for ((out, &code), &bits) in out.iter_mut().zip(&codes[group / 2 * 32..]).zip(fifth_bits) {
            let code = code >> (group % 2 * 4) & 15 | (bits >> group & 1) << 4;
            *out = s * f32::from(code) - m;
        }
    }
}

fn q6_k(block: &[u8], out: &mut [f32]) {
    let (lower_bits, upper_bits, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let scale = F16::read(&block[208..]);
    for (index, out) in out.iter_mut().enumerate() {
        let (half, quarter, within) = (index / 128, index % 128 / 32, index % 32);
        let lower = lower_bits[half * 64 + quarter % 2 * 32 + within] >> (quarter / 2 * 4) & 15;
        let upper = upper_bits[half * 32 + within] >> (quarter * 2) & 3;
        let code = f32::from(lower | upper << 4) - 32.0;
        *out = scale * f32::from(scales[index / 16] as i8) * code;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TYPES: [BlockType; 6] = [
        BlockType::Q8_0,
        BlockType::Q4_0,
        BlockType::Q4K,
        BlockType::Q5K,
        BlockType::Q6K,
        BlockType::Mxfp4,
    ];

    fn bytes(hex: &str) -> Vec<u8> {
        (0..hex.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
            .collect()
    }

    #[test]
    fn blocks_have_the_values_of_the_reference_package() {
        let mut compared = 0;
        for line in include_str!("blocks/vectors.txt")
            .lines()
            .filter(|line| !line.starts_with('#'))
        {
            let fields: Vec<&str> = line.split(' ').collect();
            let block = TYPES.into_iter().find(|block| block.name() == fields[0]).unwrap();
            let stored = bytes(fields[1]);
            let mut found = vec![0.0; block.elements()];
            block.read(&stored, &mut found);
            let wanted = bytes(fields[2]);
            assert_eq!((stored.len(), wanted.len()), (block.bytes(), 4 * found.len()));
            for (index, (found, wanted)) in found.iter().zip(wanted.chunks_exact(4)).enumerate() {
                let wanted = f32::from_le_bytes(wanted.try_into().unwrap());
                // The package has no negative zero, since its codes are integers.
                assert_eq!(
                    (found + 0.0).to_bits(),
                    (wanted + 0.0).to_bits(),
                    "{} {index}",
                    fields[0]
                );
            }
            compared += 1;
        }
        assert_eq!(compared, 2 * TYPES.len());
    }
}
