//! Seeded values for tests.

use std::ops::Range;

use moerun_types::{NumberFormat, QUANTIZED_BLOCK};
use ndarray::Array2;

use crate::{Activations, PackedMatrix, lines::LANES, panels::scale_place};

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

/// `weights` packed.
pub(crate) fn pack_array(format: NumberFormat, weights: &Array2<f32>) -> PackedMatrix {
    PackedMatrix::pack(format, weights.nrows(), weights.ncols(), |index, row| {
        row.iter_mut()
            .zip(weights.row(index))
            .for_each(|(out, &value)| *out = value);
    })
    .expect("weights that the format can hold")
}

/// `weights` as `format` holds them.
pub(crate) fn rounded_weights(format: NumberFormat, weights: &Array2<f32>) -> Array2<f32> {
    unpack(&pack_array(format, weights))
}

/// `rows` as they meet weights of `format`.
pub(crate) fn rounded_rows(format: NumberFormat, rows: &Array2<f32>) -> Array2<f32> {
    Activations::round(format.activations(), rows.view()).to_f32()
}

fn unpack(packed: &PackedMatrix) -> Array2<f32> {
    let mut weights = Array2::zeros((packed.rows(), packed.cols()));
    for (index, mut row) in weights.rows_mut().into_iter().enumerate() {
        packed.unpack_row(index, row.as_slice_mut().expect("row-major"));
    }
    weights
}

/// The definition of a product, `[tokens, rows]`, over the columns `cols` of the weights, which all of `x` meets: one
/// chain of fused multiply-adds from 0.0, by column, or by block of exact integer products.
pub(crate) fn product_by_definition(packed: &PackedMatrix, cols: Range<usize>, x: &Activations) -> Array2<f32> {
    let (format, weights, values) = (packed.format(), unpack(packed), x.to_f32());
    assert_eq!(cols.len(), x.cols());
    Array2::from_shape_fn((x.rows(), packed.rows()), |(token, row)| {
        let Activations::Int8 { scales, .. } = x else {
            let pairs = cols.clone().zip(values.row(token));
            let chain = pairs.fold(0.0_f32, |sum, (col, &x)| weights[[row, col]].mul_add(x, sum));
            // A pair without a second column is filled up with zeroes.
            let is_filled_up = format == NumberFormat::Bf16 && cols.len() % 2 == 1;
            return if is_filled_up {
                0.0_f32.mul_add(0.0, chain)
            } else {
                chain
            };
        };
        let blocks = x.cols().div_ceil(QUANTIZED_BLOCK);
        (0..blocks).fold(0.0, |sum, block| {
            let place = scale_place(format, cols.start / QUANTIZED_BLOCK + block, row % LANES);
            let bits = packed.panel(row / LANES)[place.line][place.word] >> place.shift & place.mask;
            // The scale in units of which the weights are integers.
            let w_scale = match format {
                NumberFormat::Mxfp4 => 0.5 * f32::from_bits(bits << 23),
                _ => half::f16::from_bits(bits as u16).to_f32(),
            };
            let x_scale = scales[token * blocks + block];
            let integer = |value: f32, scale: f32| if scale == 0.0 { 0.0 } else { (value / scale).round() };
            let integers: f32 = (block * QUANTIZED_BLOCK..x.cols().min((block + 1) * QUANTIZED_BLOCK))
                .map(|col| {
                    let weight = weights[[row, cols.start + col]];
                    integer(weight, w_scale) * integer(values[[token, col]], x_scale)
                })
                .sum();
            integers.mul_add(w_scale * x_scale, sum)
        })
    })
}
