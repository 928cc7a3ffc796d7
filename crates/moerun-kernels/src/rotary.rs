//! Rotary position embedding (arXiv 2104.09864): pairs of elements turned by an angle that grows with the position.

use std::sync::OnceLock;

use crate::{Isa, isa::Kernel, simd::Simd};

/// Positions whose angles are computed together, when the first of them is asked for.
const CHUNK_POSITIONS: usize = 64;
/// Chunks whose places are made together, so that a config that claims a context of 2^31 costs what is used of it.
const GROUP_CHUNKS: usize = 1024;

/// Cosines and sines of one position range, and how they are applied.
///
/// `inverse_frequencies` is `[rotary_dim / 2]`; cos and sin are computed in f64 from `position * inverse_frequency`
/// (rounded to f32 as upstream does: the product in f32), times `attention_factor`.
#[derive(Debug, Clone)]
pub struct RotaryTable {
    inverse_frequencies: Vec<f32>,
    attention_factor: f32,
    interleaved: bool,
    max_positions: usize,
    groups: Vec<OnceLock<Group>>,
}

/// Per chunk of positions, `[CHUNK_POSITIONS, 2, rotary_dim / 2]`: cosines, then sines.
type Group = Box<[OnceLock<Vec<f32>>]>;

impl RotaryTable {
    /// A table for positions `0..max_positions`. Angles are computed, and memory taken, as positions come up.
    pub fn new(inverse_frequencies: &[f32], attention_factor: f32, interleaved: bool, max_positions: usize) -> Self {
        Self {
            inverse_frequencies: inverse_frequencies.to_vec(),
            attention_factor,
            interleaved,
            max_positions,
            groups: vec![OnceLock::new(); max_positions.div_ceil(CHUNK_POSITIONS * GROUP_CHUNKS)],
        }
    }

    /// Rotates the first `rotary_dim` elements of each head of one token in place: `heads` is `[num_heads * head_dim]`.
    ///
    /// With `interleaved`, pairs are `(2i, 2i+1)` and stay where they are; otherwise `(i, i + rotary_dim/2)`. A pair
    /// becomes `(fma(x0, cos, -(x1 * sin)), fma(x1, cos, x0 * sin))`.
    ///
    /// # Panics
    /// If `position` is not below `max_positions`, or `head_dim` is less than `rotary_dim` or does not divide the
    /// length of `heads`.
    pub fn apply(&self, heads: &mut [f32], head_dim: usize, position: usize) {
        self.apply_on(Isa::current(), heads, head_dim, position);
    }

    pub(crate) fn apply_on(&self, isa: Isa, heads: &mut [f32], head_dim: usize, position: usize) {
        let half = self.inverse_frequencies.len();
        assert!(
            position < self.max_positions,
            "position {position} of a table for {}",
            self.max_positions
        );
        if half == 0 {
            return;
        }
        assert!(
            2 * half <= head_dim,
            "{} of {head_dim} elements of a head rotated",
            2 * half
        );
        assert!(
            heads.len().is_multiple_of(head_dim),
            "{} elements in heads of {head_dim}",
            heads.len()
        );
        let chunk = position / CHUNK_POSITIONS;
        let group = self.groups[chunk / GROUP_CHUNKS].get_or_init(|| vec![OnceLock::new(); GROUP_CHUNKS].into());
        let rows = group[chunk % GROUP_CHUNKS].get_or_init(|| self.compute(chunk * CHUNK_POSITIONS));
        let row = &rows[position % CHUNK_POSITIONS * 2 * half..][..2 * half];
        let (cosines, sines) = row.split_at(half);
        isa.dispatch(Rotate {
            heads,
            head_dim,
            cosines,
            sines,
            interleaved: self.interleaved,
        });
    }

    fn compute(&self, first_position: usize) -> Vec<f32> {
        let half = self.inverse_frequencies.len();
        let mut rows = Vec::with_capacity(CHUNK_POSITIONS * 2 * half);
        for position in first_position..first_position + CHUNK_POSITIONS {
            let angles = self
                .inverse_frequencies
                .iter()
                .map(|frequency| f64::from(position as f32 * frequency));
            rows.extend(angles.clone().map(|angle| angle.cos() as f32 * self.attention_factor));
            rows.extend(angles.map(|angle| angle.sin() as f32 * self.attention_factor));
        }
        rows
    }
}

struct Rotate<'a> {
    heads: &'a mut [f32],
    head_dim: usize,
    cosines: &'a [f32],
    sines: &'a [f32],
    interleaved: bool,
}

impl Kernel for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        let half = self.cosines.len();
        for head in self.heads.chunks_exact_mut(self.head_dim) {
            let angles = self.cosines.iter().zip(self.sines);
            let rotated = &mut head[..2 * half];
            if self.interleaved {
                for (pair, (&cos, &sin)) in rotated.as_chunks_mut::<2>().0.iter_mut().zip(angles) {
                    *pair = turn(pair[0], pair[1], cos, sin);
                }
            } else {
                let (low, high) = rotated.split_at_mut(half);
                for ((low, high), (&cos, &sin)) in low.iter_mut().zip(high).zip(angles) {
                    [*low, *high] = turn(*low, *high, cos, sin);
                }
            }
        }
    }
}

#[inline(always)]
fn turn(x0: f32, x1: f32, cos: f32, sin: f32) -> [f32; 2] {
    [x0.mul_add(cos, -(x1 * sin)), x1.mul_add(cos, x0 * sin)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_data::Rng;

    #[test]
    fn pairs_turn_by_position_times_frequency_and_the_rest_stays() {
        for seed in 0..60 {
            let mut rng = Rng::new(seed);
            let half = 1 + rng.below(20);
            let head_dim = 2 * half + rng.below(5);
            let num_heads = 1 + rng.below(4);
            let frequencies: Vec<f32> = rng.vec(half).iter().map(|value| value.abs()).collect();
            let interleaved = seed % 2 == 0;
            let position = rng.below(3000);
            let table = RotaryTable::new(&frequencies, 1.25, interleaved, 3000);
            let heads = rng.vec(num_heads * head_dim);
            let mut expected = heads.clone();
            table.apply_on(Isa::Portable, &mut expected, head_dim, position);
            for (head, rotated) in heads.chunks(head_dim).zip(expected.chunks(head_dim)) {
                for (pair, frequency) in frequencies.iter().enumerate() {
                    let (i, j) = if interleaved {
                        (2 * pair, 2 * pair + 1)
                    } else {
                        (pair, pair + half)
                    };
                    let (sin, cos) = f64::from(position as f32 * frequency).sin_cos();
                    let (x0, x1) = (f64::from(head[i]), f64::from(head[j]));
                    assert!(
                        (f64::from(rotated[i]) - 1.25 * (x0 * cos - x1 * sin)).abs() < 1e-6,
                        "seed {seed}"
                    );
                    assert!(
                        (f64::from(rotated[j]) - 1.25 * (x1 * cos + x0 * sin)).abs() < 1e-6,
                        "seed {seed}"
                    );
                }
                assert_eq!(head[2 * half..], rotated[2 * half..]);
            }
            for isa in Isa::all_available() {
                let mut found = heads.clone();
                table.apply_on(isa, &mut found, head_dim, position);
                assert!(
                    found.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits()),
                    "seed {seed} {isa}"
                );
            }
        }
    }

    #[test]
    fn a_table_for_a_million_positions_computes_only_what_is_used() {
        let table = RotaryTable::new(&[1.0; 64], 1.0, false, 1 << 20);
        table.apply(&mut [1.0; 128], 128, (1 << 20) - 1);
        let groups: Vec<&Group> = table.groups.iter().filter_map(OnceLock::get).collect();
        let [group] = groups[..] else {
            panic!("{} groups", groups.len())
        };
        assert_eq!(group.iter().filter(|chunk| chunk.get().is_some()).count(), 1);
    }

    #[test]
    fn the_longest_context_that_a_config_may_claim_costs_a_megabyte_until_it_is_used() {
        let table = RotaryTable::new(&[1.0], 1.0, false, 1 << 31);
        assert!(table.groups.len() * size_of::<OnceLock<Group>>() <= 1 << 20);
        for position in [0, 65_535, 65_536, (1 << 31) - 1] {
            let mut found = [1.0, 0.0];
            table.apply(&mut found, 2, position);
            let angle = f64::from(position as f32);
            assert_eq!(found, [angle.cos() as f32, angle.sin() as f32], "{position}");
        }
    }

    #[test]
    #[should_panic(expected = "position 100 of a table for 100")]
    fn a_position_beyond_the_table_is_refused() {
        RotaryTable::new(&[1.0], 1.0, false, 100).apply(&mut [1.0; 2], 2, 100);
    }
}
