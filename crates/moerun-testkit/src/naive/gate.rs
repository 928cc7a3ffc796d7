//! Router logits → experts and weights, family by family, as tests/golden/README.md tells it.

use super::{
    Rows,
    config::Config,
    maths::{argmax, linear, sigmoid, softmax},
    weights::Weights,
};
use crate::{Family, TestkitError};

/// One token's experts, ascending, and the weight of each.
#[derive(Debug, Clone)]
pub(crate) struct Choice {
    pub(crate) ids: Vec<usize>,
    pub(crate) weights: Vec<f64>,
    /// Smallest distance between what was taken and what was left.
    pub(crate) margin: f64,
}

/// `[tokens, hidden]` → `[tokens, num_experts]`.
pub(crate) fn router_logits(
    config: &Config,
    weights: &Weights,
    layer: usize,
    input: &Rows,
) -> Result<Rows, TestkitError> {
    let experts = config.num_experts()?;
    let prefix = config.feed_forward_prefix(layer);
    let name = match config.family {
        Family::GraniteMoe => "router.layer",
        Family::GptOss | Family::Llama4Text => "router",
        _ => "gate",
    };
    let weight = weights.matrix(&format!("{prefix}.{name}.weight"), experts, config.size("hidden_size")?)?;
    let bias = match config.family {
        Family::GptOss => Some(weights.vector(&format!("{prefix}.router.bias"), experts)?),
        _ => None,
    };
    Ok(input.iter().map(|row| linear(&weight, bias, row)).collect())
}

/// One token's choice from its router logits.
pub(crate) fn choose(config: &Config, weights: &Weights, layer: usize, logits: &[f64]) -> Result<Choice, TestkitError> {
    let k = config.top_k()?;
    let prefix = config.feed_forward_prefix(layer);
    let experts = logits.len();
    Ok(match config.family {
        Family::Mixtral => {
            let scores = softmax(logits);
            let taken = best(&scores, k);
            let sum = sum_at(&scores, &taken.ids);
            taken.with_weights(|id| scores[id] / sum)
        }
        Family::Qwen2Moe | Family::Qwen3Moe | Family::Olmoe => {
            let scores = softmax(logits);
            let taken = best(&scores, k);
            let renormalise = config.flag_or("norm_topk_prob", false)?;
            let divisor = if renormalise { sum_at(&scores, &taken.ids) } else { 1.0 };
            taken.with_weights(|id| scores[id] / divisor)
        }
        Family::GraniteMoe | Family::GptOss => {
            let taken = best(logits, k);
            let kept: Vec<f64> = (0..experts)
                .map(|id| {
                    if taken.ids.contains(&id) {
                        logits[id]
                    } else {
                        f64::NEG_INFINITY
                    }
                })
                .collect();
            let shares = softmax(&kept);
            taken.with_weights(|id| shares[id])
        }
        Family::PhiMoe => sparse_mixer(logits, config.float("router_jitter_noise")?),
        Family::DeepseekV2 => {
            let scores = softmax(logits);
            let taken = match config.text_or("topk_method", "greedy") {
                "group_limited_greedy" => {
                    let (kept, margin) = keep_groups(config, &scores, 1, 0.0)?;
                    best(&kept, k).at_most(margin)
                }
                "greedy" => best(&scores, k),
                other => {
                    return Err(TestkitError::Unknown {
                        what: "topk_method",
                        name: other.to_owned(),
                    });
                }
            };
            let scaling = config.float_or("routed_scaling_factor", 1.0)?;
            taken.with_weights(|id| scores[id] * scaling)
        }
        Family::DeepseekV3 | Family::Glm4Moe => {
            let scores: Vec<f64> = logits.iter().map(|&logit| sigmoid(logit)).collect();
            let bias = weights.vector(&format!("{prefix}.gate.e_score_correction_bias"), experts)?;
            let corrected: Vec<f64> = scores.iter().zip(bias).map(|(score, bias)| score + bias).collect();
            let (kept, margin) = keep_groups(config, &corrected, 2, f64::NEG_INFINITY)?;
            let taken = best(&kept, k).at_most(margin);
            let renormalise = config.flag_or("norm_topk_prob", true)?;
            let divisor = if renormalise {
                sum_at(&scores, &taken.ids) + 1e-20
            } else {
                1.0
            };
            let scaling = config.float_or("routed_scaling_factor", 1.0)?;
            taken.with_weights(|id| scores[id] / divisor * scaling)
        }
        Family::Ernie45Moe => {
            let scores = softmax(logits);
            let bias = weights.row(&format!("{prefix}.moe_statics.e_score_correction_bias"), 0, 1, experts)?;
            let corrected: Vec<f64> = scores.iter().zip(bias).map(|(score, bias)| score + bias).collect();
            let taken = best(&corrected, k);
            let divisor = sum_at(&scores, &taken.ids).max(config.float_or("moe_norm_min", 1e-12)?);
            taken.with_weights(|id| scores[id] / divisor)
        }
        Family::Llama4Text => best(logits, k).with_weights(|id| sigmoid(logits[id])),
        Family::Llama | Family::Qwen3 => {
            return Err(TestkitError::Unknown {
                what: "gate of a dense family",
                name: prefix,
            });
        }
    })
}

struct Taken {
    ids: Vec<usize>,
    margin: f64,
}

impl Taken {
    fn at_most(self, margin: f64) -> Self {
        Taken {
            margin: self.margin.min(margin),
            ..self
        }
    }

    fn with_weights(self, weight: impl Fn(usize) -> f64) -> Choice {
        let weights = self.ids.iter().map(|&id| weight(id)).collect();
        Choice {
            ids: self.ids,
            weights,
            margin: self.margin,
        }
    }
}

/// The `k` largest scores, lower index first among equals; returned ascending by index.
fn best(scores: &[f64], k: usize) -> Taken {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    let margin = match order.get(k) {
        Some(&left) => scores[order[k - 1]] - scores[left],
        None => f64::INFINITY,
    };
    let mut ids = order[..k].to_vec();
    ids.sort_unstable();
    Taken { ids, margin }
}

fn sum_at(scores: &[f64], ids: &[usize]) -> f64 {
    ids.iter().map(|&id| scores[id]).sum()
}

/// Scores with everything outside the best `topk_group` groups set to `outside`, and by how much those groups won.
/// A group scores the sum of its `of_best` largest.
fn keep_groups(config: &Config, scores: &[f64], of_best: usize, outside: f64) -> Result<(Vec<f64>, f64), TestkitError> {
    let groups = config.size_or("n_group", 1)?;
    let group_size = scores.len() / groups;
    let group_score = |group: &[f64]| sum_at(group, &best(group, of_best.min(group.len())).ids);
    let group_scores: Vec<f64> = scores.chunks_exact(group_size).map(group_score).collect();
    let taken = best(&group_scores, config.size_or("topk_group", groups)?);
    let keep = |(id, &score): (usize, &f64)| {
        if taken.ids.contains(&(id / group_size)) {
            score
        } else {
            outside
        }
    };
    Ok((scores.iter().enumerate().map(keep).collect(), taken.margin))
}

/// phimoe: the best, and the best of the rest, each with a softmax over those close enough to it.
fn sparse_mixer(scores: &[f64], jitter: f64) -> Choice {
    let distance = |from: f64, score: f64| (from - score) / score.abs().max(from);
    let weigh = |winner: usize, candidates: &[f64]| {
        let close: Vec<f64> = (0..scores.len())
            .map(|id| match distance(scores[winner], scores[id]) > 2.0 * jitter {
                true => f64::NEG_INFINITY,
                false => candidates[id],
            })
            .collect();
        softmax(&close)[winner]
    };
    // Crossing the mask's border changes a weight as abruptly as another winner would.
    let border = |winner: usize| {
        let distances = scores.iter().map(|&score| distance(scores[winner], score));
        distances
            .map(|distance| (distance - 2.0 * jitter).abs())
            .fold(f64::INFINITY, f64::min)
    };
    let first = argmax(scores);
    let first_weight = weigh(first, scores);
    let mut rest = scores.to_vec();
    rest[first] = f64::NEG_INFINITY;
    let second = argmax(&rest);
    let second_weight = weigh(second, &rest);

    let margin = best(scores, 1)
        .margin
        .min(best(scores, 2).margin)
        .min(border(first))
        .min(border(second));
    let mut pairs = [(first, first_weight), (second, second_weight)];
    pairs.sort_by_key(|pair| pair.0);
    Choice {
        ids: pairs.map(|pair| pair.0).to_vec(),
        weights: pairs.map(|pair| pair.1).to_vec(),
        margin,
    }
}
