//! Parts of a config in words.

use moerun_types::{
    AttentionConfig, AttentionMask, FeedForwardKind, GroupLimit, GroupScore, ModelConfig, MoeConfig, Renormalize,
    RoutingWeightTarget, ScoreFunction,
};

/// `1 layer`, `2 layers`.
pub(super) fn counted(number: usize, thing: &str) -> String {
    format!("{number} {thing}{}", if number == 1 { "" } else { "s" })
}

/// A number of parameters, to three or four digits.
pub(super) fn count(number: u64) -> String {
    let scaled = number as f64;
    match number {
        0..10_000 => number.to_string(),
        10_000..1_000_000 => format!("{:.1} thousand", scaled / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} million", scaled / 1e6),
        _ => format!("{:.2} billion", scaled / 1e9),
    }
}

/// How router logits become experts and weights, step by step.
pub(super) fn gate(moe: &MoeConfig) -> String {
    let (gate, top_k) = (&moe.gate, moe.top_k);
    let mut steps = Vec::new();
    if gate.router_bias {
        steps.push("logits with a bias".to_owned());
    }
    match gate.score {
        ScoreFunction::Softmax => steps.push("softmax over all experts".to_owned()),
        ScoreFunction::Sigmoid => steps.push("sigmoid of each logit".to_owned()),
        ScoreFunction::SoftmaxOfTopK | ScoreFunction::SparseMixer { .. } => {}
    }
    if gate.correction_bias {
        steps.push("a correction bias for the choice only".to_owned());
    }
    if let Some(groups) = gate.groups {
        steps.push(best_groups(groups));
    }
    steps.push(match gate.score {
        ScoreFunction::SparseMixer { jitter } => {
            format!(
                "sparsemixer top {top_k}, near ties within {:.3} of the best sharing the weight",
                2.0 * jitter
            )
        }
        _ => format!("top {top_k}"),
    });
    if gate.score == ScoreFunction::SoftmaxOfTopK {
        steps.push("softmax over the chosen".to_owned());
    }
    match gate.renormalize {
        Renormalize::No => {}
        Renormalize::Sum { .. } => steps.push("weights divided by their sum".to_owned()),
        Renormalize::SumAtLeast { floor } => {
            steps.push(format!("weights divided by their sum or by {floor:e}, the larger"))
        }
    }
    if gate.routed_scaling_factor != 1.0 {
        steps.push(format!("weights times {}", gate.routed_scaling_factor));
    }
    if moe.weight_target == RoutingWeightTarget::Input {
        steps.push("the weight multiplies the expert's input".to_owned());
    }
    steps.join(", then ")
}

fn best_groups(groups: GroupLimit) -> String {
    let by = match groups.score {
        GroupScore::Max => "largest score",
        GroupScore::SumOfTopTwo => "sum of their two largest scores",
    };
    format!(
        "the best {} of {} groups by the {by}",
        groups.top_groups, groups.num_groups
    )
}

/// Heads and what they see; which layers differ.
pub(super) fn attention(config: &ModelConfig) -> String {
    let mut text = match &config.attention {
        AttentionConfig::Grouped(grouped) => format!(
            "{} heads over {} key/value heads of {}",
            grouped.num_heads, grouped.num_kv_heads, grouped.head_dim
        ),
        AttentionConfig::Latent(latent) => format!(
            "{} heads over a latent of {} + {}",
            latent.num_heads, latent.kv_lora_rank, latent.qk_rope_head_dim
        ),
    };
    let layers =
        |holds: fn(&moerun_types::LayerConfig) -> bool| config.layers.iter().filter(|layer| holds(layer)).count();
    let windowed = layers(|layer| matches!(layer.mask, AttentionMask::SlidingWindow { .. }));
    let chunked = layers(|layer| matches!(layer.mask, AttentionMask::Chunked { .. }));
    let dense = layers(|layer| layer.feed_forward != FeedForwardKind::Moe);
    for (number, what) in [(windowed, "with a sliding window"), (chunked, "in chunks")] {
        if number > 0 {
            text.push_str(&format!("; {} {what}", counted(number, "layer")));
        }
    }
    if dense > 0 && config.moe.is_some() {
        text.push_str(&format!("; {}", counted(dense, "dense layer")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn golden(family: &str) -> ModelConfig {
        let path = format!("{}/../../tests/golden/{family}/config.json", env!("CARGO_MANIFEST_DIR"));
        ModelConfig::from_json(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    #[test]
    fn gates_are_told_as_steps() {
        for (family, wanted) in [
            (
                "mixtral",
                "softmax over all experts, then top 2, then weights divided by their sum",
            ),
            ("granitemoe", "top 2, then softmax over the chosen"),
            (
                "gpt_oss",
                "logits with a bias, then top 2, then softmax over the chosen",
            ),
            (
                "llama4_text",
                "sigmoid of each logit, then top 1, then the weight multiplies the expert's input",
            ),
            (
                "phimoe",
                "sparsemixer top 2, near ties within 0.300 of the best sharing the weight",
            ),
            (
                "deepseek_v3",
                "sigmoid of each logit, then a correction bias for the choice only, then the best 2 of 4 groups by the \
                 sum of their two largest scores, then top 3, then weights divided by their sum, then weights times 2.5",
            ),
        ] {
            let config = golden(family);
            assert_eq!(gate(config.moe.as_ref().expect(family)), wanted, "{family}");
        }
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!(count(0), "0");
        assert_eq!(count(74_212), "74.2 thousand");
        assert_eq!(count(5_900_000), "5.9 million");
        assert_eq!(count(30_532_000_000), "30.53 billion");
        assert_eq!(
            (counted(1, "layer"), counted(2, "layer")),
            ("1 layer".to_owned(), "2 layers".to_owned())
        );
    }
}
