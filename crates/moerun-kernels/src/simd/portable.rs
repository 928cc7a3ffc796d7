//! The definition of every operation, on arrays.

use super::{Simd, nearest};
use crate::{
    exponential::power_factors,
    isa::{Kernel, run_portable},
    lines::{LANES, Line},
};

/// No instruction beyond the target's baseline.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Portable;

impl Simd for Portable {
    type F32s = [f32; LANES];
    type Bf16Pairs = Line;
    type I8Quads = Line;
    type U8Quads = Line;
    type I32s = [i32; LANES];
    type I64s = [i64; LANES];
    const TILE_ROWS: &'static [usize] = &[4, 2, 1];
    const BLOCK_TILE_ROWS: &'static [usize] = &[4, 2, 1];
    const I8_BIAS: i32 = 0;
    const WIDE: bool = false;

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        run_portable(kernel)
    }

    #[inline(always)]
    fn splat(self, value: f32) -> [f32; LANES] {
        [value; LANES]
    }

    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> [f32; LANES] {
        *values
    }

    #[inline(always)]
    fn load_bits(self, line: &Line) -> [f32; LANES] {
        line.map(f32::from_bits)
    }

    #[inline(always)]
    fn store(self, lanes: [f32; LANES]) -> [f32; LANES] {
        lanes
    }

    #[inline(always)]
    fn add(self, a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|lane| a[lane] + b[lane])
    }

    #[inline(always)]
    fn mul(self, a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|lane| a[lane] * b[lane])
    }

    #[inline(always)]
    fn mul_add(self, a: [f32; LANES], b: [f32; LANES], c: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|lane| a[lane].mul_add(b[lane], c[lane]))
    }

    #[inline(always)]
    fn load_bf16_pairs(self, line: &Line) -> Line {
        *line
    }

    #[inline(always)]
    fn dot_bf16(self, weights: Line, x: u32, sum: [f32; LANES]) -> [f32; LANES] {
        let (x_high, x_low) = (f32::from_bits(x & 0xffff_0000), f32::from_bits(x << 16));
        std::array::from_fn(|lane| {
            let high = x_high.mul_add(f32::from_bits(weights[lane] & 0xffff_0000), sum[lane]);
            x_low.mul_add(f32::from_bits(weights[lane] << 16), high)
        })
    }

    #[inline(always)]
    fn zero_i64(self) -> [i64; LANES] {
        [0; LANES]
    }

    #[inline(always)]
    fn add_rounded(self, sums: [i64; LANES], values: [f32; LANES]) -> [i64; LANES] {
        let mut sums = sums;
        for (sum, value) in sums.iter_mut().zip(self.store(values)) {
            *sum = sum.wrapping_add(nearest(value));
        }
        sums
    }

    #[inline(always)]
    fn add_to(self, sums: [i64; LANES], out: &mut [i64; LANES]) {
        out.iter_mut()
            .zip(sums)
            .for_each(|(out, sum)| *out = out.wrapping_add(sum));
    }

    #[inline(always)]
    fn larger_magnitude(self, a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        // Magnitudes compare like their bits, and a NaN's are above all others.
        std::array::from_fn(|lane| f32::from_bits(a[lane].to_bits().max(b[lane].abs().to_bits())))
    }

    #[inline(always)]
    fn all_below(self, values: [f32; LANES], limit: [f32; LANES]) -> bool {
        let mut all = true;
        for (value, limit) in self.store(values).into_iter().zip(self.store(limit)) {
            all &= value.abs() < limit;
        }
        all
    }

    #[inline(always)]
    fn splat_i32(self, value: i32) -> [i32; LANES] {
        [value; LANES]
    }

    #[inline(always)]
    fn to_f32(self, lanes: [i32; LANES]) -> [f32; LANES] {
        lanes.map(|lane| lane as f32)
    }

    #[inline(always)]
    fn load_i8_quads(self, line: &Line) -> Line {
        line.map(|word| word ^ 0x8080_8080)
    }

    #[inline(always)]
    fn dot_i8(self, weights: Line, x: u32, sum: [i32; LANES]) -> [i32; LANES] {
        let byte = |word: u32, index: u32| i32::from((word >> (8 * index)) as u8 as i8);
        std::array::from_fn(|lane| (0..4).fold(sum[lane], |sum, i| sum + byte(weights[lane], i) * byte(x, i)))
    }

    #[inline(always)]
    fn load_low_nibbles(self, line: &Line) -> Line {
        line.map(|word| word & 0x0f0f_0f0f)
    }

    #[inline(always)]
    fn load_high_nibbles(self, line: &Line) -> Line {
        line.map(|word| (word >> 4) & 0x0f0f_0f0f)
    }

    #[inline(always)]
    fn look_up(self, table: &[u8; 16], codes: Line) -> Line {
        codes.map(|word| u32::from_le_bytes(word.to_le_bytes().map(|code| table[usize::from(code & 15)])))
    }

    #[inline(always)]
    fn dot_u8(self, weights: Line, x: u32, sum: [i32; LANES]) -> [i32; LANES] {
        self.dot_i8(weights, x, sum)
    }

    #[inline(always)]
    fn load_f16(self, line: &Line, half: usize) -> [f32; LANES] {
        std::array::from_fn(|lane| {
            half::f16::from_bits((line[8 * half + lane / 2] >> (16 * (lane % 2))) as u16).to_f32()
        })
    }

    #[inline(always)]
    fn load_e8m0(self, line: &Line, quarter: usize) -> [f32; LANES] {
        std::array::from_fn(|lane| f32::from_bits((line[4 * quarter + lane / 4] >> (8 * (lane % 4)) & 0xff) << 23))
    }

    #[inline(always)]
    fn load_low_bf16(self, line: &Line) -> [f32; LANES] {
        line.map(|word| f32::from_bits(word << 16))
    }

    #[inline(always)]
    fn load_high_bf16(self, line: &Line) -> [f32; LANES] {
        line.map(|word| f32::from_bits(word & 0xffff_0000))
    }

    #[inline(always)]
    fn sub(self, a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|lane| a[lane] - b[lane])
    }

    #[inline(always)]
    fn div(self, a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|lane| a[lane] / b[lane])
    }

    #[inline(always)]
    fn greater(self, a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        self.if_greater(a, b, a, b)
    }

    #[inline(always)]
    fn if_greater(self, a: [f32; LANES], b: [f32; LANES], then: [f32; LANES], otherwise: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|lane| if a[lane] > b[lane] { then[lane] } else { otherwise[lane] })
    }

    #[inline(always)]
    fn power_factors(self, shifted: [f32; LANES]) -> [[f32; LANES]; 2] {
        [0, 1].map(|factor| shifted.map(|shifted| power_factors(shifted)[factor]))
    }

    #[inline(always)]
    fn transpose(self, rows: [[f32; LANES]; LANES]) -> [[f32; LANES]; LANES] {
        std::array::from_fn(|lane| rows.map(|row| row[lane]))
    }

    #[inline(always)]
    fn load_byte(self, line: &Line, index: usize) -> [f32; LANES] {
        line.map(|word| f32::from((word >> (8 * index)) as i8))
    }
}
