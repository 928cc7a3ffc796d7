//! phimoe's gate at inference (SparseMixer-v2, arXiv 2409.12136).

/// Chooses `top_k` experts one after another: each is the best of those not chosen yet, and its weight is its softmax
/// over those of them whose score is not more than `2 * jitter` (relative) below its own.
///
/// The weights are not normalised together: two of them may sum to almost 2.
pub(super) fn sparse_mixer(scores: &[f32], jitter: f32, top_k: usize, chosen: &mut Vec<usize>, weights: &mut Vec<f32>) {
    chosen.clear();
    weights.clear();
    for _ in 0..top_k {
        let Some(best) = best_left(scores, chosen) else { return };
        let best_score = scores[best];
        let mut sum = 0.0;
        for (expert, &score) in scores.iter().enumerate() {
            // Two zeros compare as NaN, which is not greater: such an expert is as good as the best.
            let masked = (best_score - score) / score.abs().max(best_score) > 2.0 * jitter;
            if !masked && !chosen.contains(&expert) {
                sum += (score - best_score).exp();
            }
        }
        chosen.push(best);
        weights.push(1.0 / sum);
    }
}

/// The first of the largest scores outside `chosen`.
fn best_left(scores: &[f32], chosen: &[usize]) -> Option<usize> {
    let mut best: Option<usize> = None;
    for (expert, &score) in scores.iter().enumerate() {
        if !chosen.contains(&expert) && best.is_none_or(|best| score > scores[best]) {
            best = Some(expert);
        }
    }
    best
}
