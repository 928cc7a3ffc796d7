//! The sparse gate: router logits → the `top_k` experts of each token and their weights.

mod error;
mod sparse_mixer;
#[cfg(test)]
mod tests;

use moerun_types::{ExpertId, GateConfig, GroupLimit, GroupScore, Renormalize, ScoreFunction};
use ndarray::ArrayView2;

pub use error::GateError;
use sparse_mixer::sparse_mixer;

/// The experts of each token and the weights of their outputs, both `[tokens, top_k]`, row-major, best expert first.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Routing {
    /// Experts per token.
    pub top_k: usize,
    /// `[tokens, top_k]`.
    pub expert_ids: Vec<ExpertId>,
    /// `[tokens, top_k]`: the final weights, renormalised and scaled.
    pub routing_weights: Vec<f32>,
}

impl Routing {
    /// Number of tokens routed.
    pub fn tokens(&self) -> usize {
        self.expert_ids.len().checked_div(self.top_k).unwrap_or(0)
    }
}

/// Picks each token's `top_k` experts; equal scores go to the lower expert id (and equal groups to the lower group).
///
/// - `router_logits`: `[tokens, num_experts]`, finite, before softmax, sigmoid or correction bias
/// - `correction_bias`: `[num_experts]`, for the choice only; given exactly when `gate.correction_bias` says so
///
/// A token's result is a function of its own logits: which other tokens are in the batch cannot change a bit. Sums run
/// in f32, over all experts in ascending id, over the chosen ones from best to last.
///
/// Errors: a logit or bias that is not finite, widths that do not match, a `top_k` or groups that the number of experts
/// does not allow.
pub fn select_experts(
    router_logits: ArrayView2<'_, f32>,
    gate: &GateConfig,
    top_k: usize,
    correction_bias: Option<&[f32]>,
) -> Result<Routing, GateError> {
    let mut routing = Routing::default();
    let memory = &mut GateMemory::default();
    select_experts_into(router_logits, gate, top_k, correction_bias, memory, &mut routing)?;
    Ok(routing)
}

/// [`select_experts`] into `routing`, whatever that was before, with memory of earlier calls: a call like one before
/// asks for none. After an error `routing` is meaningless.
pub fn select_experts_into(
    router_logits: ArrayView2<'_, f32>,
    gate: &GateConfig,
    top_k: usize,
    correction_bias: Option<&[f32]>,
    memory: &mut GateMemory,
    routing: &mut Routing,
) -> Result<(), GateError> {
    let num_experts = router_logits.ncols();
    check_correction_bias(gate, num_experts, correction_bias)?;
    check_choice(gate, num_experts, top_k)?;

    routing.top_k = top_k;
    routing.expert_ids.clear();
    routing.routing_weights.clear();
    for (row, logits) in router_logits.outer_iter().enumerate() {
        memory.logits.clear();
        memory.logits.extend(logits.iter());
        if let Some(expert) = memory.logits.iter().position(|logit| !logit.is_finite()) {
            return Err(GateError::NonFinite {
                row,
                expert,
                value: memory.logits[expert],
            });
        }
        memory.select(gate, top_k, correction_bias);
        // `check_choice` refused widths that a u16 cannot number.
        let chosen = memory.chosen.iter().map(|&expert| ExpertId(expert as u16));
        routing.expert_ids.extend(chosen);
        routing.routing_weights.extend_from_slice(&memory.weights);
    }
    Ok(())
}

fn check_correction_bias(
    gate: &GateConfig,
    num_experts: usize,
    correction_bias: Option<&[f32]>,
) -> Result<(), GateError> {
    if gate.correction_bias != correction_bias.is_some() {
        return Err(GateError::CorrectionBias {
            wanted: gate.correction_bias,
        });
    }
    let Some(bias) = correction_bias else { return Ok(()) };
    if bias.len() != num_experts {
        return Err(GateError::Width {
            wanted: bias.len(),
            found: num_experts,
        });
    }
    match bias.iter().position(|value| !value.is_finite()) {
        Some(expert) => Err(GateError::NonFiniteBias {
            expert,
            value: bias[expert],
        }),
        None => Ok(()),
    }
}

/// Whether `top_k` of `num_experts` can be chosen at all, groups considered.
fn check_choice(gate: &GateConfig, num_experts: usize, top_k: usize) -> Result<(), GateError> {
    const MAX_EXPERTS: usize = 1 << 16;
    if num_experts > MAX_EXPERTS {
        return Err(GateError::Width {
            wanted: MAX_EXPERTS,
            found: num_experts,
        });
    }
    let selectable = match gate.groups {
        None => num_experts,
        Some(GroupLimit {
            num_groups, top_groups, ..
        }) => {
            let divides = num_groups > 0 && num_experts.is_multiple_of(num_groups);
            if !divides || top_groups == 0 || top_groups > num_groups {
                return Err(GateError::Groups {
                    num_experts,
                    num_groups,
                    top_groups,
                });
            }
            num_experts / num_groups * top_groups
        }
    };
    if top_k == 0 || top_k > selectable {
        return Err(GateError::TopK { top_k, selectable });
    }
    Ok(())
}

/// What the gate works with on one token, used again by the next.
#[derive(Debug, Clone, Default)]
pub struct GateMemory {
    /// `[num_experts]`, set before `select`.
    logits: Vec<f32>,
    /// `[num_experts]`: what the weights are read from.
    scores: Vec<f32>,
    /// `[num_experts]`: what the choice is made by.
    choice: Vec<f32>,
    /// `[num_groups]`.
    group_scores: Vec<f32>,
    best_groups: Vec<usize>,
    /// `[top_k]`, best first.
    chosen: Vec<usize>,
    /// `[top_k]`, final.
    weights: Vec<f32>,
}

impl GateMemory {
    /// Fills `chosen` and `weights` from the logits.
    fn select(&mut self, gate: &GateConfig, top_k: usize, correction_bias: Option<&[f32]>) {
        if let ScoreFunction::SparseMixer { jitter } = gate.score {
            sparse_mixer(&self.logits, jitter, top_k, &mut self.chosen, &mut self.weights);
        } else {
            self.score(gate, correction_bias);
            if let Some(limit) = gate.groups {
                self.limit_groups(limit);
            }
            take_best(&self.choice, top_k, &mut self.chosen);
            self.weights.clear();
            self.weights
                .extend(self.chosen.iter().map(|&expert| self.scores[expert]));
            if gate.score == ScoreFunction::SoftmaxOfTopK {
                softmax(&mut self.weights);
            }
        }
        renormalize(&mut self.weights, gate.renormalize);
        for weight in &mut self.weights {
            *weight *= gate.routed_scaling_factor;
        }
    }

    /// Fills `scores` and `choice` from the logits.
    fn score(&mut self, gate: &GateConfig, correction_bias: Option<&[f32]>) {
        self.scores.clear();
        self.scores.extend_from_slice(&self.logits);
        match gate.score {
            ScoreFunction::Softmax => softmax(&mut self.scores),
            ScoreFunction::Sigmoid => self.scores.iter_mut().for_each(|score| *score = sigmoid(*score)),
            ScoreFunction::SoftmaxOfTopK | ScoreFunction::SparseMixer { .. } => {}
        }
        self.choice.clear();
        match correction_bias {
            Some(bias) => self
                .choice
                .extend(self.scores.iter().zip(bias).map(|(score, bias)| score + bias)),
            // A sigmoid saturates at 1.0 from a logit of about 17: the logits still tell those experts apart.
            None if gate.score == ScoreFunction::Sigmoid && gate.groups.is_none() => {
                self.choice.extend_from_slice(&self.logits);
            }
            None => self.choice.extend_from_slice(&self.scores),
        }
    }

    /// Takes the experts outside the best groups out of the choice.
    fn limit_groups(&mut self, limit: GroupLimit) {
        let group_size = self.choice.len() / limit.num_groups;
        self.group_scores.clear();
        self.group_scores.extend(
            self.choice
                .chunks_exact(group_size)
                .map(|group| group_score(group, limit.score)),
        );
        take_best(&self.group_scores, limit.top_groups, &mut self.best_groups);
        for group in (0..limit.num_groups).filter(|group| !self.best_groups.contains(group)) {
            let experts = group * group_size..(group + 1) * group_size;
            match limit.score {
                // An expert of the best groups whose score underflowed to 0 ties with these: whichever is taken, its
                // weight is 0.
                GroupScore::Max => {
                    self.choice[experts.clone()].fill(0.0);
                    self.scores[experts].fill(0.0);
                }
                GroupScore::SumOfTopTwo => self.choice[experts].fill(f32::NEG_INFINITY),
            }
        }
    }
}

fn group_score(group: &[f32], score: GroupScore) -> f32 {
    let (mut best, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for &value in group {
        if value > best {
            (best, second) = (value, best);
        } else if value > second {
            second = value;
        }
    }
    match score {
        GroupScore::SumOfTopTwo if group.len() > 1 => best + second,
        GroupScore::SumOfTopTwo | GroupScore::Max => best,
    }
}

/// Indices of the `count` largest scores, largest first; an equal score stays behind the lower index.
fn take_best(scores: &[f32], count: usize, best: &mut Vec<usize>) {
    best.clear();
    for (index, &score) in scores.iter().enumerate() {
        let place = best.partition_point(|&other| scores[other] >= score);
        if place < count {
            best.truncate(count - 1);
            best.insert(place, index);
        }
    }
}

/// In place, in ascending order; finite input gives a sum of at least 1 and so finite output.
fn softmax(values: &mut [f32]) {
    let max = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for value in values.iter_mut() {
        *value = (*value - max).exp();
        sum += *value;
    }
    for value in values {
        *value /= sum;
    }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

fn renormalize(weights: &mut [f32], how: Renormalize) {
    let sum: f32 = weights.iter().sum();
    let divisor = match how {
        Renormalize::No => return,
        Renormalize::Sum { epsilon } => sum + epsilon,
        Renormalize::SumAtLeast { floor } => sum.max(floor),
    };
    // Sigmoids may all underflow to 0: they stay 0 rather than become NaN.
    if divisor > 0.0 {
        weights.iter_mut().for_each(|weight| *weight /= divisor);
    }
}
