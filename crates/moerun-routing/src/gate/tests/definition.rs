//! The gates as their definitions say them, in f64 and by sorting.

use moerun_types::{GateConfig, GroupLimit, GroupScore, Renormalize, ScoreFunction};
use ndarray::Array2;

use crate::gate::{Routing, select_experts};
use crate::testing::{Seeded, plain_gate};

/// One random gate and logits for it; `grid` makes scores that tie exactly.
#[derive(Clone)]
pub(super) struct GateCase {
    pub(super) gate: GateConfig,
    pub(super) top_k: usize,
    pub(super) correction_bias: Option<Vec<f32>>,
    pub(super) router_logits: Array2<f32>,
}

impl GateCase {
    pub(super) fn from_seed(seed: u64, grid: bool) -> Self {
        let mut random = Seeded::new(seed);
        let group_size = random.between(1, 6);
        let num_groups = random.between(1, 6);
        let num_experts = group_size * num_groups;
        let mut gate = plain_gate(match random.below(4) {
            0 => ScoreFunction::Softmax,
            1 => ScoreFunction::SoftmaxOfTopK,
            2 => ScoreFunction::Sigmoid,
            _ => ScoreFunction::SparseMixer {
                jitter: 0.01 + 0.2 * random.signed().abs(),
            },
        });
        let scored = matches!(gate.score, ScoreFunction::Softmax | ScoreFunction::Sigmoid);
        gate.correction_bias = scored && random.chance(50);
        let mut selectable = num_experts;
        if scored && random.chance(50) {
            let top_groups = random.between(1, num_groups);
            // "Elsewhere 0" is a limit only for scores above 0: families with a correction bias use the other.
            let score = if gate.correction_bias {
                GroupScore::SumOfTopTwo
            } else {
                GroupScore::Max
            };
            gate.groups = Some(GroupLimit {
                num_groups,
                top_groups,
                score,
            });
            selectable = top_groups * group_size;
        }
        gate.renormalize = match random.below(3) {
            0 => Renormalize::No,
            1 => Renormalize::Sum { epsilon: 1e-20 },
            _ => Renormalize::SumAtLeast { floor: 0.3 },
        };
        gate.routed_scaling_factor = [1.0, 2.5][random.below(2)];
        let top_k = match random.below(4) {
            0 => 1,
            1 => selectable,
            _ => random.between(1, selectable),
        };
        let value = |random: &mut Seeded| match grid {
            true => random.between(0, 4) as f32 - 2.0,
            false => 3.0 * random.signed(),
        };
        let correction_bias = gate.correction_bias.then(|| {
            (0..num_experts)
                .map(|_| if grid { 0.25 } else { value(&mut random) })
                .collect()
        });
        let tokens = random.between(1, 5);
        let router_logits = Array2::from_shape_simple_fn((tokens, num_experts), || value(&mut random));
        Self {
            gate,
            top_k,
            correction_bias,
            router_logits,
        }
    }

    pub(super) fn run(&self) -> Routing {
        select_experts(
            self.router_logits.view(),
            &self.gate,
            self.top_k,
            self.correction_bias.as_deref(),
        )
        .unwrap()
    }
}

/// The gate as its definition says it, in f64 and by sorting: `(experts, weights)`, best first.
pub(super) fn by_definition(case: &GateCase, token: usize) -> (Vec<usize>, Vec<f64>) {
    let logits: Vec<f64> = case
        .router_logits
        .row(token)
        .iter()
        .map(|&logit| f64::from(logit))
        .collect();
    let num_experts = logits.len();
    let exp_sum = |of: &mut dyn Iterator<Item = usize>| of.map(|expert| logits[expert].exp()).sum::<f64>();
    let mut scores = match case.gate.score {
        ScoreFunction::Softmax => {
            let sum = exp_sum(&mut (0..num_experts));
            logits.iter().map(|logit| logit.exp() / sum).collect()
        }
        ScoreFunction::Sigmoid => logits.iter().map(|logit| 1.0 / (1.0 + (-logit).exp())).collect(),
        ScoreFunction::SoftmaxOfTopK | ScoreFunction::SparseMixer { .. } => logits.clone(),
    };
    let mut choice: Vec<f64> = scores.clone();
    if let Some(bias) = &case.correction_bias {
        choice
            .iter_mut()
            .zip(bias)
            .for_each(|(choice, &bias)| *choice += f64::from(bias));
    }
    if let Some(limit) = case.gate.groups {
        let size = num_experts / limit.num_groups;
        let group_choice: Vec<f64> = choice
            .chunks(size)
            .map(|group| {
                let sorted = ranking(group).into_iter().map(|expert| group[expert]);
                sorted.take(if limit.score == GroupScore::Max { 1 } else { 2 }).sum()
            })
            .collect();
        for &group in &ranking(&group_choice)[limit.top_groups..] {
            for expert in group * size..(group + 1) * size {
                (choice[expert], scores[expert]) = match limit.score {
                    GroupScore::Max => (0.0, 0.0),
                    GroupScore::SumOfTopTwo => (f64::NEG_INFINITY, scores[expert]),
                };
            }
        }
    }
    let chosen = ranking(&choice)[..case.top_k].to_vec();
    let mut weights: Vec<f64> = match case.gate.score {
        ScoreFunction::Softmax | ScoreFunction::Sigmoid => chosen.iter().map(|&expert| scores[expert]).collect(),
        ScoreFunction::SoftmaxOfTopK => {
            let sum = exp_sum(&mut chosen.iter().copied());
            chosen.iter().map(|&expert| logits[expert].exp() / sum).collect()
        }
        ScoreFunction::SparseMixer { jitter } => (0..case.top_k)
            .map(|place| {
                let best = logits[chosen[place]];
                let near = |score: f64| (best - score) <= 2.0 * f64::from(jitter) * score.abs().max(best);
                let left = (0..num_experts).filter(|expert| !chosen[..place].contains(expert));
                best.exp() / exp_sum(&mut left.filter(|&expert| near(logits[expert])))
            })
            .collect(),
    };
    let sum: f64 = weights.iter().sum();
    let divisor = match case.gate.renormalize {
        Renormalize::No => 1.0,
        Renormalize::Sum { epsilon } => sum + f64::from(epsilon),
        Renormalize::SumAtLeast { floor } => sum.max(f64::from(floor)),
    };
    weights
        .iter_mut()
        .for_each(|weight| *weight *= f64::from(case.gate.routed_scaling_factor) / divisor);
    (chosen, weights)
}

/// Indices, largest value first, equal values in ascending index.
fn ranking(values: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].partial_cmp(&values[a]).unwrap().then(a.cmp(&b)));
    order
}
