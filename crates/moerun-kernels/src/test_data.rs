//! Seeded values for tests.

use moerun_types::NumberFormat;
use ndarray::Array2;

use crate::{
    PackedMatrix,
    bf16::{from_bf16, to_bf16},
};

/// Every number format.
pub(crate) const FORMATS: [NumberFormat; 2] = [NumberFormat::F32, NumberFormat::Bf16];

/// SplitMix64: small, and the same on every machine.
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// An integer in `0..bound`.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// A number in -1..1 with all its mantissa bits in use.
    pub(crate) fn value(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// `len` numbers in -1..1.
    pub(crate) fn vec(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.value()).collect()
    }

    /// `[rows, cols]` numbers in -1..1.
    pub(crate) fn array(&mut self, rows: usize, cols: usize) -> Array2<f32> {
        Array2::from_shape_fn((rows, cols), |_| self.value())
    }
}

/// A value as `format` holds it.
pub(crate) fn rounded(format: NumberFormat, value: f32) -> f32 {
    match format {
        NumberFormat::F32 => value,
        NumberFormat::Bf16 => from_bf16(to_bf16(value)),
    }
}

/// `weights` rounded to `format`, and the same packed.
pub(crate) fn pack_array(format: NumberFormat, weights: &Array2<f32>) -> (Array2<f32>, PackedMatrix) {
    let packed = PackedMatrix::pack(format, weights.nrows(), weights.ncols(), |index, row| {
        row.iter_mut()
            .zip(weights.row(index))
            .for_each(|(out, &value)| *out = value);
    });
    (weights.mapv(|value| rounded(format, value)), packed)
}
