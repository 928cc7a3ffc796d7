//! Weights as a function of (seed, tensor, element): any piece can be made by any thread in any order.

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
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes()).update(name.as_bytes());
        let [a, b, c, d, e, f, g, h, ..] = *hasher.finalize().as_bytes();
        let key = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        TensorValues {
            key,
            levels,
            element_bytes: dtype.bytes(),
        }
    }

    /// Fills `out` with the elements from `first` on, which is a multiple of [`ELEMENTS_PER_NUMBER`].
    pub(super) fn fill(&self, first: usize, out: &mut [u8]) {
        debug_assert!(first.is_multiple_of(ELEMENTS_PER_NUMBER));
        let counters = (first / ELEMENTS_PER_NUMBER) as u64..;
        for (counter, pair) in counters.zip(out.chunks_mut(ELEMENTS_PER_NUMBER * self.element_bytes)) {
            let mut number = scramble(self.key.wrapping_add(counter.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
            for element in pair.chunks_exact_mut(self.element_bytes) {
                let level = &self.levels[sum_of_bytes(number as u32)];
                element.copy_from_slice(&level[..self.element_bytes]);
                number >>= 32;
            }
        }
    }
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
