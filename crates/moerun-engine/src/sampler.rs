//! How a row of logits becomes the next token: a pure function of logits, parameters, tokens seen and position.
//!
//! Order, as in transformers: repetition penalty, temperature, top-k, top-p, min-p, draw. (Others put min-p before
//! top-p; the golden continuations come from transformers, and min-p compares with the best token alone, so only
//! top-p's share of the mass depends on the order.) Equal logits are ranked by id, lower first, so every cut is exact.

use std::cell::RefCell;
use std::cmp::Ordering;
use std::collections::HashSet;

use rand::rngs::ChaCha8Rng;
use rand::{Rng, SeedableRng};

use crate::{EngineError, LogprobEntry, SamplingParams};

/// A token and its logit, after penalty.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Candidate {
    id: u32,
    logit: f32,
}

impl Candidate {
    /// Best first: higher logit, then lower id. Logits are never NaN here.
    fn rank(&self, other: &Self) -> Ordering {
        other
            .logit
            .partial_cmp(&self.logit)
            .unwrap_or(Ordering::Equal)
            .then(self.id.cmp(&other.id))
    }
}

/// Chooses the token at `position` of a sequence.
///
/// - `logits`: `[vocab]`; NaN and +∞ are errors, −∞ is a token that cannot be
/// - `seen`: distinct tokens of prompt and output, for the repetition penalty
/// - `position`: index of the new token in the sequence; with the seed, all that the random number depends on
pub(crate) fn sample(
    logits: &[f32],
    params: &SamplingParams,
    seen: &HashSet<u32>,
    position: usize,
) -> Result<u32, EngineError> {
    check(logits, position)?;
    MEMORY.with_borrow_mut(|Memory { penalised, candidates }| {
        let logits = penalise(logits, seen, params.repetition_penalty, penalised);
        let best = argmax(logits);
        if params.temperature == 0.0 {
            return Ok(best.id);
        }
        let weights = Weights {
            best: best.logit,
            temperature: f64::from(params.temperature),
        };
        candidates.clear();
        candidates.extend((0..).zip(logits).map(|(id, &logit)| Candidate { id, logit }));
        keep_top_k(candidates, params.top_k);
        keep_top_p(candidates, params.top_p, weights);
        keep_min_p(candidates, params.min_p, weights);
        // By id, so that neither sums nor the draw depend on how the cuts above order their survivors.
        candidates.sort_unstable_by_key(|candidate| candidate.id);
        Ok(draw(candidates, weights, uniform(params.seed, position)))
    })
}

/// What a thread works with on one row of logits, used again by the next.
#[derive(Default)]
struct Memory {
    penalised: Vec<f32>,
    candidates: Vec<Candidate>,
}

thread_local! {
    static MEMORY: RefCell<Memory> = RefCell::default();
}

/// Log-probability of `chosen`, then of the `top` likeliest tokens in descending order, from the model's own
/// distribution. `logits` are `[vocab]` and were accepted by [`sample`].
pub(crate) fn logprobs(logits: &[f32], chosen: u32, top: usize) -> Vec<LogprobEntry> {
    let best = argmax(logits);
    let sum: f64 = logits
        .iter()
        .map(|&logit| (f64::from(logit) - f64::from(best.logit)).exp())
        .sum();
    let log_sum = sum.ln();
    let entry = |id: u32| LogprobEntry {
        id,
        logprob: (f64::from(logits[id as usize]) - f64::from(best.logit) - log_sum) as f32,
    };
    let mut likeliest = Vec::new();
    if top > 0 {
        likeliest = (0..)
            .zip(logits.iter())
            .map(|(id, &logit)| Candidate { id, logit })
            .collect();
        keep_best(&mut likeliest, top);
        likeliest.sort_unstable_by(Candidate::rank);
    }
    std::iter::once(chosen)
        .chain(likeliest.iter().map(|candidate| candidate.id))
        .map(entry)
        .collect()
}

/// Unnormalised probabilities: `exp((logit - best) / temperature)`, so the best has 1 and nothing overflows.
#[derive(Debug, Clone, Copy)]
struct Weights {
    best: f32,
    temperature: f64,
}

impl Weights {
    fn of(self, candidate: &Candidate) -> f64 {
        ((f64::from(candidate.logit) - f64::from(self.best)) / self.temperature).exp()
    }
}

fn check(logits: &[f32], position: usize) -> Result<(), EngineError> {
    let refused = |logit: f32| logit.is_nan() || logit == f32::INFINITY;
    if let Some(id) = logits.iter().position(|&logit| refused(logit)) {
        let found = logits[id];
        return Err(EngineError::Model(format!(
            "logit of token {id} for position {position} is {found}"
        )));
    }
    if logits.iter().all(|&logit| logit == f32::NEG_INFINITY) {
        return Err(EngineError::Model(format!(
            "no token is possible at position {position}: every logit is -inf"
        )));
    }
    Ok(())
}

/// Divides positive and multiplies negative logits of tokens that were seen, each once.
fn penalise<'a>(logits: &'a [f32], seen: &HashSet<u32>, penalty: f32, penalised: &'a mut Vec<f32>) -> &'a [f32] {
    if penalty == 1.0 {
        return logits;
    }
    penalised.clear();
    penalised.extend_from_slice(logits);
    for &id in seen {
        if let Some(logit) = penalised.get_mut(id as usize) {
            let changed = if *logit < 0.0 {
                *logit * penalty
            } else {
                *logit / penalty
            };
            // An extreme penalty must not make a token certain, nor a possible one impossible.
            *logit = if logit.is_finite() {
                changed.clamp(f32::MIN, f32::MAX)
            } else {
                *logit
            };
        }
    }
    penalised
}

fn argmax(logits: &[f32]) -> Candidate {
    let mut best = Candidate {
        id: 0,
        logit: f32::NEG_INFINITY,
    };
    for (id, &logit) in (0..).zip(logits) {
        if logit > best.logit {
            best = Candidate { id, logit };
        }
    }
    best
}

/// Keeps the `count` best, in no order; linear in the number of candidates.
fn keep_best(candidates: &mut Vec<Candidate>, count: usize) {
    if count < candidates.len() {
        candidates.select_nth_unstable_by(count, Candidate::rank);
        candidates.truncate(count);
    }
}

fn keep_top_k(candidates: &mut Vec<Candidate>, top_k: u32) {
    if top_k > 0 {
        keep_best(candidates, top_k as usize);
    }
}

/// Keeps the fewest best candidates whose share of the mass reaches `top_p`.
fn keep_top_p(candidates: &mut Vec<Candidate>, top_p: f32, weights: Weights) {
    if top_p >= 1.0 {
        return;
    }
    candidates.sort_unstable_by_key(|candidate| candidate.id);
    let wanted = f64::from(top_p) * candidates.iter().map(|candidate| weights.of(candidate)).sum::<f64>();
    // The nucleus is small as a rule: order the best few, and more of them only if they do not hold the mass.
    let mut ordered = 64;
    loop {
        let count = ordered.min(candidates.len());
        if count < candidates.len() {
            candidates.select_nth_unstable_by(count, Candidate::rank);
        }
        candidates[..count].sort_unstable_by(Candidate::rank);
        let mut mass = 0.0;
        let reached = candidates[..count].iter().position(|candidate| {
            mass += weights.of(candidate);
            mass >= wanted
        });
        match reached {
            Some(last) => return candidates.truncate(last + 1),
            None if count == candidates.len() => return, // rounding: the whole mass is a hair less than itself
            None => ordered *= 8,
        }
    }
}

/// Keeps candidates at least `min_p` times as likely as the best.
fn keep_min_p(candidates: &mut Vec<Candidate>, min_p: f32, weights: Weights) {
    if min_p > 0.0 {
        // The best token's weight is exactly 1, so it always stays.
        candidates.retain(|candidate| weights.of(candidate) >= f64::from(min_p));
    }
}

/// The candidate in whose share of the mass `uniform`, in `[0, 1)`, falls.
fn draw(candidates: &[Candidate], weights: Weights, uniform: f64) -> u32 {
    let total: f64 = candidates.iter().map(|candidate| weights.of(candidate)).sum();
    let target = uniform * total;
    let mut mass = 0.0;
    let mut last_possible = candidates[0].id;
    for candidate in candidates {
        let weight = weights.of(candidate);
        if weight > 0.0 {
            last_possible = candidate.id;
            mass += weight;
            if target < mass {
                return candidate.id;
            }
        }
    }
    last_possible // rounding: target reached the total
}

/// A number in `[0, 1)` that depends on `(seed, position)` alone: each position is a ChaCha stream of its own.
fn uniform(seed: u64, position: usize) -> f64 {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(position as u64);
    (rng.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests;
