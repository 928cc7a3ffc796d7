//! Which layers have experts, and the gate and experts they have.

use std::collections::BTreeSet;

use super::{ConfigError, EXPERT_WIDTH, EXPERTS, Fields, WIDTH, activation, fields::shorten};
use crate::{
    Activation, Family, FeedForwardKind, GateConfig, GroupLimit, GroupScore, MoeConfig, Renormalize,
    RoutingWeightTarget, ScoreFunction, SharedExpertConfig,
};

/// What follows attention in each layer.
pub(super) fn feed_forwards(
    fields: Fields<'_>,
    family: Family,
    num_layers: usize,
) -> Result<Vec<FeedForwardKind>, ConfigError> {
    let is_moe = moe_layers(fields, family, num_layers)?;
    let name = if family == Family::Llama4Text {
        "intermediate_size_mlp"
    } else {
        "intermediate_size"
    };
    is_moe
        .into_iter()
        .map(|moe| match moe {
            true => Ok(FeedForwardKind::Moe),
            false => fields
                .size(name, WIDTH)
                .map(|intermediate| FeedForwardKind::Dense { intermediate }),
        })
        .collect()
}

fn moe_layers(fields: Fields<'_>, family: Family, num_layers: usize) -> Result<Vec<bool>, ConfigError> {
    let layers = 0..num_layers;
    let indices = 0..=num_layers - 1;
    Ok(match family {
        Family::Llama | Family::Qwen3 => vec![false; num_layers],
        Family::Mixtral | Family::Olmoe | Family::GraniteMoe | Family::PhiMoe | Family::GptOss => {
            vec![true; num_layers]
        }
        Family::Qwen2Moe | Family::Qwen3Moe => {
            let step = fields.size_or("decoder_sparse_step", 1..=usize::MAX, 1)?;
            let dense: BTreeSet<usize> = fields
                .sizes("mlp_only_layers", indices)?
                .into_iter()
                .flatten()
                .collect();
            layers
                .map(|layer| !dense.contains(&layer) && (layer + 1).is_multiple_of(step))
                .collect()
        }
        Family::DeepseekV2 | Family::DeepseekV3 | Family::Glm4Moe => {
            require_every_layer(fields)?;
            let default = match family {
                Family::DeepseekV2 => 0,
                Family::DeepseekV3 => 3,
                _ => 1,
            };
            let first = fields.size_or("first_k_dense_replace", 0..=num_layers, default.min(num_layers))?;
            layers.map(|layer| layer >= first).collect()
        }
        Family::Ernie45Moe => {
            let first = fields.size_or("moe_layer_start_index", 0..=num_layers, 1)?;
            let last = match fields.get("moe_layer_end_index") {
                Some(value) if value.as_i64() == Some(-1) => num_layers - 1,
                _ => fields.size_or("moe_layer_end_index", indices, num_layers - 1)?,
            };
            let interval = fields.size_or("moe_layer_interval", 1..=usize::MAX, 1)?;
            layers
                .map(|layer| (first..=last).contains(&layer) && (layer + 1).is_multiple_of(interval))
                .collect()
        }
        Family::Llama4Text => match fields.sizes("moe_layers", indices)? {
            Some(listed) => layers.map(|layer| listed.contains(&layer)).collect(),
            None => {
                let step = fields.size_or("interleave_moe_layer_step", 1..=usize::MAX, 1)?;
                layers.map(|layer| (layer + 1).is_multiple_of(step)).collect()
            }
        },
    })
}

/// DeepSeek's own code can skip layers by `moe_layer_freq`; no released checkpoint does.
fn require_every_layer(fields: Fields<'_>) -> Result<(), ConfigError> {
    match fields.get("moe_layer_freq") {
        Some(value) if value.as_u64() != Some(1) => Err(fields.unsupported("moe_layer_freq", "1", shorten(value))),
        _ => Ok(()),
    }
}

/// Gate and experts of the families that have them.
pub(super) fn parse(fields: Fields<'_>, family: Family) -> Result<MoeConfig, ConfigError> {
    let num_experts = fields.size_of_any(names_of_num_experts(family), EXPERTS)?;
    let top_k_names: &[&str] = match family {
        Family::Ernie45Moe => &["moe_k", "num_experts_per_tok"],
        Family::GptOss => &["num_experts_per_tok", "experts_per_token"],
        _ => &["num_experts_per_tok"],
    };
    let top_k = fields.size_of_any(top_k_names, EXPERTS)?;
    if top_k > num_experts {
        let wanted = format!("at most the {num_experts} experts there are");
        return Err(fields.invalid(top_k_names[0], wanted, top_k));
    }
    let intermediate = fields.size(name_of_intermediate(family), EXPERT_WIDTH)?;
    let gpt_oss = family == Family::GptOss;
    Ok(MoeConfig {
        num_experts,
        top_k,
        intermediate,
        gate: gate(fields, family, num_experts, top_k)?,
        activation: if gpt_oss {
            clamped_swiglu(fields)?
        } else {
            activation(fields)?
        },
        gate_up_bias: gpt_oss,
        down_bias: gpt_oss,
        weight_target: match family {
            Family::Llama4Text => RoutingWeightTarget::Input,
            _ => RoutingWeightTarget::Output,
        },
        shared: shared_experts(fields, family, intermediate)?,
    })
}

fn names_of_num_experts(family: Family) -> &'static [&'static str] {
    match family {
        Family::DeepseekV2 | Family::DeepseekV3 | Family::Glm4Moe => {
            &["n_routed_experts", "num_local_experts", "num_experts"]
        }
        Family::Ernie45Moe => &["moe_num_experts", "num_local_experts", "num_experts"],
        Family::Qwen2Moe | Family::Olmoe => &["num_experts", "num_local_experts"],
        _ => &["num_local_experts", "num_experts"],
    }
}

fn name_of_intermediate(family: Family) -> &'static str {
    match family {
        Family::Qwen2Moe
        | Family::Qwen3Moe
        | Family::DeepseekV2
        | Family::DeepseekV3
        | Family::Glm4Moe
        | Family::Ernie45Moe => "moe_intermediate_size",
        _ => "intermediate_size",
    }
}

fn clamped_swiglu(fields: Fields<'_>) -> Result<Activation, ConfigError> {
    Ok(Activation::ClampedSwiglu {
        alpha: fields.f32_or("swiglu_alpha", 1e-6..=1e6, 1.702)?,
        limit: fields.f32_or("swiglu_limit", 1e-6..=1e30, 7.0)?,
    })
}

fn gate(fields: Fields<'_>, family: Family, num_experts: usize, top_k: usize) -> Result<GateConfig, ConfigError> {
    let deepseek_v3_router = matches!(family, Family::DeepseekV3 | Family::Glm4Moe);
    Ok(GateConfig {
        score: score(fields, family, top_k)?,
        router_bias: family == Family::GptOss,
        correction_bias: deepseek_v3_router || family == Family::Ernie45Moe,
        groups: groups(fields, family, num_experts, top_k)?,
        renormalize: renormalize(fields, family)?,
        routed_scaling_factor: match family {
            Family::DeepseekV2 | Family::Glm4Moe => fields.f32_or("routed_scaling_factor", 1e-6..=1e6, 1.0)?,
            Family::DeepseekV3 => fields.f32_or("routed_scaling_factor", 1e-6..=1e6, 2.5)?,
            _ => 1.0,
        },
    })
}

fn score(fields: Fields<'_>, family: Family, top_k: usize) -> Result<ScoreFunction, ConfigError> {
    let (score, upstream_name) = match family {
        Family::GraniteMoe | Family::GptOss => (ScoreFunction::SoftmaxOfTopK, None),
        Family::PhiMoe if top_k != 2 => {
            return Err(fields.unsupported("num_experts_per_tok", "2, as sparsemixer picks two", top_k));
        }
        Family::PhiMoe => {
            let jitter = fields.f32_or("router_jitter_noise", 0.0..=1e6, 0.01)?;
            (ScoreFunction::SparseMixer { jitter }, None)
        }
        Family::DeepseekV3 | Family::Glm4Moe => (ScoreFunction::Sigmoid, Some("sigmoid")),
        Family::Llama4Text => (ScoreFunction::Sigmoid, None),
        Family::DeepseekV2 => (ScoreFunction::Softmax, Some("softmax")),
        _ => (ScoreFunction::Softmax, None),
    };
    match (upstream_name, fields.text("scoring_func")?) {
        (Some(wanted), Some(found)) if wanted != found => Err(fields.unsupported("scoring_func", wanted, found)),
        _ => Ok(score),
    }
}

fn renormalize(fields: Fields<'_>, family: Family) -> Result<Renormalize, ConfigError> {
    let sum_if = |wanted: bool, epsilon| {
        if wanted {
            Renormalize::Sum { epsilon }
        } else {
            Renormalize::No
        }
    };
    Ok(match family {
        Family::Mixtral => Renormalize::Sum { epsilon: 0.0 },
        Family::Qwen2Moe | Family::Qwen3Moe | Family::Olmoe => sum_if(fields.flag_or("norm_topk_prob", false)?, 0.0),
        Family::DeepseekV3 | Family::Glm4Moe => sum_if(fields.flag_or("norm_topk_prob", true)?, 1e-20),
        // Upstream versions disagree on what a true value does; every released checkpoint has false.
        Family::DeepseekV2 if fields.flag_or("norm_topk_prob", false)? => {
            return Err(fields.unsupported("norm_topk_prob", "false in this family", true));
        }
        Family::Ernie45Moe => Renormalize::SumAtLeast {
            floor: fields.f32_or("moe_norm_min", 1e-30..=1.0, 1e-12)?,
        },
        _ => Renormalize::No,
    })
}

fn groups(
    fields: Fields<'_>,
    family: Family,
    num_experts: usize,
    top_k: usize,
) -> Result<Option<GroupLimit>, ConfigError> {
    let (score, (default_groups, default_top)) = match (family, fields.text("topk_method")?) {
        (Family::DeepseekV2, None | Some("greedy")) => return Ok(None),
        (Family::DeepseekV2, Some("group_limited_greedy")) => (GroupScore::Max, (None, None)),
        (Family::DeepseekV3, None | Some("noaux_tc")) => (GroupScore::SumOfTopTwo, (Some(8), Some(4))),
        (Family::Glm4Moe, None | Some("noaux_tc")) => (GroupScore::SumOfTopTwo, (Some(1), Some(1))),
        (Family::DeepseekV2, Some(other)) => {
            return Err(fields.unsupported("topk_method", "greedy or group_limited_greedy", other));
        }
        (Family::DeepseekV3 | Family::Glm4Moe, Some(other)) => {
            return Err(fields.unsupported("topk_method", "noaux_tc", other));
        }
        _ => return Ok(None),
    };
    let required = |name: &'static str, default: Option<usize>| {
        fields
            .optional_size(name, EXPERTS)?
            .or(default)
            .ok_or_else(|| fields.missing(name, "an integer, as topk_method limits groups"))
    };
    let num_groups = required("n_group", default_groups)?;
    let top_groups = required("topk_group", default_top)?;
    if !num_experts.is_multiple_of(num_groups) {
        return Err(fields.invalid("n_group", format!("a divisor of the {num_experts} experts"), num_groups));
    }
    if top_groups > num_groups {
        return Err(fields.invalid("topk_group", format!("at most n_group, {num_groups}"), top_groups));
    }
    let group = num_experts / num_groups;
    if top_k > top_groups * group {
        let wanted = format!("at most the {} experts of {top_groups} groups", top_groups * group);
        return Err(fields.invalid("num_experts_per_tok", wanted, top_k));
    }
    if num_groups == 1 {
        return Ok(None);
    }
    if score == GroupScore::SumOfTopTwo && group < 2 {
        let wanted = format!("at most {}, as a group's score is the sum of two", num_experts / 2);
        return Err(fields.invalid("n_group", wanted, num_groups));
    }
    Ok(Some(GroupLimit {
        num_groups,
        top_groups,
        score,
    }))
}

fn shared_experts(
    fields: Fields<'_>,
    family: Family,
    intermediate: usize,
) -> Result<Option<SharedExpertConfig>, ConfigError> {
    let (name, default) = match family {
        Family::Qwen2Moe => {
            let intermediate = fields.size("shared_expert_intermediate_size", WIDTH)?;
            return Ok(Some(SharedExpertConfig {
                intermediate,
                sigmoid_gate: true,
            }));
        }
        Family::Llama4Text => {
            return Ok(Some(SharedExpertConfig {
                intermediate,
                sigmoid_gate: false,
            }));
        }
        Family::DeepseekV2 => ("n_shared_experts", 2),
        Family::DeepseekV3 | Family::Glm4Moe => ("n_shared_experts", 1),
        Family::Ernie45Moe => ("moe_num_shared_experts", 2),
        _ => return Ok(None),
    };
    // Unlike a missing field, null and 0 say that there are none.
    let count = match fields.optional_size(name, 0..=*EXPERTS.end())? {
        None if !fields.mentions(name) => default,
        given => given.unwrap_or(0),
    };
    let width = count * intermediate;
    if width > *WIDTH.end() {
        return Err(fields.invalid(name, format!("a summed width of at most {}", WIDTH.end()), width));
    }
    Ok((count > 0).then_some(SharedExpertConfig {
        intermediate: width,
        sigmoid_gate: false,
    }))
}
