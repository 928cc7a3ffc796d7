//! One tile's scores → weights, and the running maximum and sum of each vector.

use crate::{
    KV_PAGE_TOKENS,
    exponential::{exp, exp_lanes},
    lines::LANES,
    simd::{Simd, sum_lanes},
};

/// What the scores of one page make of its values.
#[derive(Debug, Default)]
pub(super) struct PageWeights {
    /// `[key][vector]`.
    pub(super) weights: [[f32; LANES]; KV_PAGE_TOKENS],
    /// `[vector]`: the factor on what was summed before.
    pub(super) corrections: [f32; LANES],
    /// For each key the set of vectors that see it (bit = vector); none if all vectors see all keys.
    pub(super) visible: Option<[u16; KV_PAGE_TOKENS]>,
}

/// Running maximum and sum, a lane per vector.
#[derive(Debug, Clone, Copy)]
pub(super) struct Running {
    pub(super) max: [f32; LANES],
    pub(super) sum: [f32; LANES],
}

impl PageWeights {
    /// Steps 1 (scale and mask) to 3 of the definition for `T` vectors.
    ///
    /// `scores[t]`: products of vector `t` with the page's keys, lane = key; `self.visible` is set already. A vector
    /// that sees no key of the page is left alone.
    #[inline(always)]
    pub(super) fn fill<S: Simd, const T: usize>(
        &mut self,
        simd: S,
        mut scores: [S::F32s; T],
        scale: f32,
        running: &mut Running,
    ) {
        for score in &mut scores {
            *score = simd.mul(*score, simd.splat(scale));
        }
        if let Some(visible) = &self.visible {
            for (t, score) in scores.iter_mut().enumerate() {
                let mut masked = simd.store(*score);
                for (masked, visible) in masked.iter_mut().zip(visible) {
                    if visible >> t & 1 == 0 {
                        *masked = f32::NEG_INFINITY;
                    }
                }
                *score = simd.load(&masked);
            }
        }
        let before = *running;
        if T >= 8 {
            self.fill_lane_per_vector(simd, scores, running);
        } else {
            self.fill_lane_per_key(simd, scores, running);
        }
        if let Some(visible) = &self.visible {
            let sees_any = visible.iter().fold(0, |sees, visible| sees | visible);
            for t in (0..T).filter(|t| sees_any >> t & 1 == 0) {
                running.max[t] = before.max[t];
                running.sum[t] = before.sum[t];
                self.corrections[t] = 1.0;
            }
        }
    }

    /// For few vectors: maximum and sum go across lanes.
    #[inline(always)]
    fn fill_lane_per_key<S: Simd, const T: usize>(&mut self, simd: S, scores: [S::F32s; T], running: &mut Running) {
        for (t, &score) in scores.iter().enumerate() {
            // A NaN is passed over, as it is when key after key is compared.
            let highest = max_lanes(simd.store(simd.greater(score, simd.splat(f32::NEG_INFINITY))));
            let max = running.max[t];
            let new = if highest > max { highest } else { max };
            let weights = simd.store(exp_lanes(simd, simd.sub(score, simd.splat(new))));
            let correction = exp(max - new);
            running.max[t] = new;
            running.sum[t] = running.sum[t].mul_add(correction, sum_lanes(weights));
            self.corrections[t] = correction;
            for (row, weight) in self.weights.iter_mut().zip(weights) {
                row[t] = weight;
            }
        }
    }

    /// For many vectors: the scores are turned over, so that nothing goes across lanes and the weights come out in the
    /// order in which they are read.
    #[inline(always)]
    fn fill_lane_per_vector<S: Simd, const T: usize>(&mut self, simd: S, scores: [S::F32s; T], running: &mut Running) {
        let mut rows = [simd.splat(0.0); LANES];
        for (row, score) in rows.iter_mut().zip(scores) {
            *row = score;
        }
        let mut weights = simd.transpose(rows); // lane = vector
        let max = simd.load(&running.max);
        let mut new = max;
        for &score in &weights {
            new = simd.greater(score, new);
        }
        let correction = exp_lanes(simd, simd.sub(max, new));
        for (row, weight) in self.weights.iter_mut().zip(&mut weights) {
            *weight = exp_lanes(simd, simd.sub(*weight, new));
            *row = simd.store(*weight);
        }
        let mut half = KV_PAGE_TOKENS / 2;
        while half > 0 {
            for key in 0..half {
                weights[key] = simd.add(weights[key], weights[key + half]);
            }
            half /= 2;
        }
        running.max = simd.store(new);
        running.sum = simd.store(simd.mul_add(simd.load(&running.sum), correction, weights[0]));
        self.corrections = simd.store(correction);
    }
}

/// The largest of sixteen lanes that hold no NaN.
#[inline(always)]
fn max_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            let (a, b) = (lanes[lane], lanes[lane + half]);
            lanes[lane] = if a > b { a } else { b };
        }
        half /= 2;
    }
    lanes[0]
}
