//! Weights as a function of (seed, tensor, element): any piece can be made by any thread in any order.

use moerun_types::NumberFormat;

use super::element::Element;

/// Standard deviation of weights, as most models are initialised with.
const DEVIATION: f64 = 0.02;
/// A value is the sum of this many random bytes, shifted and scaled: bell-shaped, within 3.5 deviations.
const BYTES_PER_VALUE: usize = 4;
const LEVELS: usize = BYTES_PER_VALUE * 255 + 1;
/// Elements that one 64-bit random number makes; a piece begins at a multiple of it.
pub(super) const ELEMENTS_PER_NUMBER: usize = 8 / BYTES_PER_VALUE;

/// Makes the elements of one tensor.
pub(super) struct TensorValues {
    key: u64,
    /// The element for every sum of bytes, little-endian, its length that of one element.
    levels: Vec<[u8; 4]>,
    element_bytes: usize,
}

impl TensorValues {
    /// Norm weights vary around 1, everything else around 0.
    pub(super) fn new(seed: u64, name: &str, dtype: Element) -> Self {
        let mean = if name.ends_with("norm.weight") { 1.0 } else { 0.0 };
        let centre = (LEVELS - 1) as f64 / 2.0;
        let deviation_of_byte = ((256.0f64 * 256.0 - 1.0) / 12.0).sqrt();
        let deviation_of_sum = (BYTES_PER_VALUE as f64).sqrt() * deviation_of_byte;
        let levels = (0..LEVELS)
            .map(|sum| {
                let value = (mean + DEVIATION * (sum as f64 - centre) / deviation_of_sum) as f32;
                match dtype {
                    Element::F32 => value.to_le_bytes(),
                    Element::Bf16 => {
                        let [low, high] = half::bf16::from_f32(value).to_le_bytes();
                        [low, high, 0, 0]
                    }
                }
            })
            .collect();
        TensorValues {
            key: key(seed, name),
            levels,
            element_bytes: dtype.bytes(),
        }
    }

    /// Fills `out` with the elements from `first` on, which is a multiple of [`ELEMENTS_PER_NUMBER`].
    pub(super) fn fill(&self, first: usize, out: &mut [u8]) {
        debug_assert!(first.is_multiple_of(ELEMENTS_PER_NUMBER));
        let counters = (first / ELEMENTS_PER_NUMBER) as u64..;
        for (counter, pair) in counters.zip(out.chunks_mut(ELEMENTS_PER_NUMBER * self.element_bytes)) {
            let mut number = numbered(self.key, counter);
            for element in pair.chunks_exact_mut(self.element_bytes) {
                let level = &self.levels[sum_of_bytes(number as u32)];
                element.copy_from_slice(&level[..self.element_bytes]);
                number >>= 32;
            }
        }
    }
}

/// BLAKE3 of a seed and a name.
pub(super) fn hash_of(seed: u64, name: &str) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes()).update(name.as_bytes());
    hasher.finalize()
}

/// Where the numbers of a tensor begin.
fn key(seed: u64, name: &str) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *hash_of(seed, name).as_bytes();
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

/// Number `counter` of the sequence that begins at `key`.
fn numbered(key: u64, counter: u64) -> u64 {
    scramble(key.wrapping_add(counter.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

/// Draws codes and scales of a quantised tensor, for [`moerun_kernels::PackedMatrix::draw`]: bell-shaped around 0 with
/// the deviation of plain weights. A random byte picks an 8-bit code, half of one a 4-bit code; scales vary by a tenth.
pub(super) fn drawn_codes(
    seed: u64,
    name: &str,
    format: NumberFormat,
) -> (impl FnMut(&mut [u8]) + use<>, impl FnMut() -> u16 + use<>) {
    let key = key(seed, name);
    let mut counter = 0;
    let mut next = move || {
        counter += 1;
        numbered(key, counter)
    };
    let bits = if format == NumberFormat::Int8 { 8 } else { 4 };
    let values: Vec<f64> = (0..1 << bits).map(|code| value_of(format, code)).collect();
    // The code at the middle of each of 256 or 16 equally likely ranges of the distribution.
    let step = unit_step(format);
    let picked: Vec<u8> = quantiles(1 << bits)
        .map(|deviations| {
            let distance = |code: &usize| (values[*code] * step - deviations).abs();
            let nearest = (0..values.len()).min_by(|a, b| distance(a).total_cmp(&distance(b)));
            nearest.unwrap_or_default() as u8
        })
        .collect();
    let drawn: f64 = picked.iter().map(|&code| values[usize::from(code)].powi(2)).sum();
    let scale = DEVIATION / (drawn / picked.len() as f64).sqrt();
    let bytes: Vec<u8> = match bits {
        8 => picked,
        _ => (0..256)
            .map(|byte| picked[byte & 15] | picked[byte >> 4] << 4)
            .collect(),
    };
    let codes = move |out: &mut [u8]| {
        for out in out.chunks_mut(8) {
            for (out, random) in out.iter_mut().zip(next().to_le_bytes()) {
                *out = bytes[usize::from(random)];
            }
        }
    };
    let mut position = 0_u64;
    let scales: Vec<u16> = (0..16)
        .map(|index| match format {
            NumberFormat::Mxfp4 => (127.0 + scale.log2().round()) as u16,
            _ => half::f16::from_f64(scale * (0.95 + 0.1 * f64::from(index) / 15.0)).to_bits(),
        })
        .collect();
    let scale = move || {
        position += 1;
        scales[(numbered(!key, position) & 15) as usize]
    };
    (codes, scale)
}

/// What a stored code stands for, in multiples of the scale.
fn value_of(format: NumberFormat, code: usize) -> f64 {
    match format {
        NumberFormat::Int8 => code as f64 - 128.0,
        NumberFormat::Int4 => code as f64 - 8.0,
        _ => f64::from(crate::elements::E2M1[code]),
    }
}

/// Standard deviations that one step of the codes takes, so that the largest drawn ones are about 3.3.
fn unit_step(format: NumberFormat) -> f64 {
    match format {
        NumberFormat::Int8 => 3.3 / 127.0,
        NumberFormat::Int4 => 3.3 / 8.0,
        _ => 3.3 / 6.0,
    }
}

/// The middles of `count` equally likely ranges of a normal distribution, ascending, in standard deviations.
fn quantiles(count: usize) -> impl Iterator<Item = f64> {
    // Bisection of an approximation (Bowling et al. 2009) that is within 0.0002 of the normal distribution.
    let probability = |x: f64| 1.0 / (1.0 + (-1.5976 * x - 0.070_565_992 * x.powi(3)).exp());
    (0..count).map(move |index| {
        let wanted = (index as f64 + 0.5) / count as f64;
        let (mut low, mut high) = (-8.0, 8.0);
        for _ in 0..60 {
            let middle = (low + high) / 2.0;
            if probability(middle) < wanted {
                low = middle;
            } else {
                high = middle;
            }
        }
        low
    })
}

/// The finaliser of splitmix64: consecutive counters become independent-looking numbers.
fn scramble(mut x: u64) -> u64 {
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

fn sum_of_bytes(x: u32) -> usize {
    let pairs = (x & 0x00ff_00ff) + (x >> 8 & 0x00ff_00ff);
    ((pairs & 0xffff) + (pairs >> 16)) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(seed: u64, name: &str, count: usize) -> Vec<f64> {
        let mut bytes = vec![0; 4 * count];
        TensorValues::new(seed, name, Element::F32).fill(0, &mut bytes);
        bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|&chunk| f64::from(f32::from_le_bytes(chunk)))
            .collect()
    }

    fn mean_and_deviation(values: &[f64]) -> (f64, f64) {
        let count = values.len() as f64;
        let mean = values.iter().sum::<f64>() / count;
        (
            mean,
            (values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / count).sqrt(),
        )
    }

    #[test]
    fn weights_have_the_deviation_of_an_initialised_model() {
        let (mean, deviation) = mean_and_deviation(&values(7, "model.layers.0.mlp.up_proj.weight", 100_000));
        assert!(mean.abs() < 3e-4, "{mean}");
        assert!((deviation - DEVIATION).abs() < 3e-4, "{deviation}");
    }

    #[test]
    fn norm_weights_vary_around_one() {
        let (mean, deviation) = mean_and_deviation(&values(7, "model.layers.0.self_attn.q_norm.weight", 10_000));
        assert!((mean - 1.0).abs() < 1e-3, "{mean}");
        assert!(deviation > 0.015, "{deviation}");
    }

    #[test]
    fn pieces_join_to_the_whole() {
        for dtype in [Element::F32, Element::Bf16] {
            let tensor = TensorValues::new(1, "x", dtype);
            let mut whole = vec![0; 101 * dtype.bytes()];
            tensor.fill(0, &mut whole);
            let mut joined = vec![0; whole.len()];
            let (head, tail) = joined.split_at_mut(60 * dtype.bytes());
            tensor.fill(60, tail);
            tensor.fill(0, head);
            assert_eq!(whole, joined);
        }
    }

    #[test]
    fn seeds_and_tensors_differ() {
        let first = values(1, "a", 50);
        assert_ne!(first, values(2, "a", 50));
        assert_ne!(first, values(1, "b", 50));
        // Neighbours in a tensor must not be copies of one another either.
        assert_ne!(first[..10], first[2..12]);
    }
}
