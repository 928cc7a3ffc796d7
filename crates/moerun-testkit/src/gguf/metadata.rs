//! The config as the converter writes it into the metadata.

use std::f64::consts::PI;

use serde_json::Value;

use super::GgufValue;

/// llama.cpp's name for a config's family.
pub(super) fn architecture(config: &Value) -> &'static str {
    match config["model_type"].as_str() {
        Some("qwen2_moe") => "qwen2moe",
        Some("qwen3_moe") => "qwen3moe",
        Some("qwen3") => "qwen3",
        Some("olmoe") => "olmoe",
        Some("granitemoe") => "granitemoe",
        Some("gpt_oss") => "gpt-oss",
        Some("deepseek_v2" | "deepseek_v3") => "deepseek2",
        Some("glm4_moe") => "glm4moe",
        Some("ernie4_5_moe") => "ernie4_5-moe",
        Some("llama4_text") => "llama4",
        _ => "llama",
    }
}

pub(super) fn size(config: &Value, name: &str) -> Option<u32> {
    config[name].as_u64().map(|size| size as u32)
}

pub(super) fn head_dim(config: &Value) -> usize {
    let divided = || size(config, "hidden_size").unwrap_or(1) / size(config, "num_attention_heads").unwrap_or(1);
    size(config, "head_dim").unwrap_or_else(divided) as usize
}

fn rope<'a>(config: &'a Value, name: &str) -> &'a Value {
    &config["rope_parameters"][name]
}

/// All keys of the config.
pub(super) fn entries(config: &Value, architecture: &str) -> Vec<(String, GgufValue)> {
    let text = |text: &str| GgufValue::Text(text.to_owned());
    let mut entries = vec![("general.architecture".to_owned(), text(architecture))];
    let mut add = |name: &str, value: Option<GgufValue>| {
        entries.extend(value.map(|value| (format!("{architecture}.{name}"), value)));
    };
    for (name, size) in sizes(config, architecture) {
        add(name, size.map(GgufValue::U32));
    }
    for (name, number) in numbers(config, architecture) {
        add(name, number.map(|number| GgufValue::F32(number as f32)));
    }
    if matches!(architecture, "deepseek2" | "glm4moe") {
        add(
            "expert_weights_norm",
            config["norm_topk_prob"].as_bool().map(GgufValue::Flag),
        );
    }
    let scaling = rope(config, "rope_type")
        .as_str()
        .filter(|kind| matches!(*kind, "linear" | "yarn"));
    add("rope.scaling.type", scaling.map(text));
    entries
}

fn sizes(config: &Value, architecture: &str) -> Vec<(&'static str, Option<u32>)> {
    let of = |name: &str| size(config, name);
    let of_any = |names: &[&str]| names.iter().find_map(|name| size(config, name));
    let head_dim = Some(head_dim(config) as u32);
    let latent = of("kv_lora_rank").filter(|_| architecture == "deepseek2");
    let rotated = match architecture {
        "deepseek2" => of("qk_rope_head_dim"),
        "glm4moe" => {
            let factor = rope(config, "partial_rotary_factor").as_f64().unwrap_or(0.5);
            head_dim.map(|dim| (f64::from(dim) * factor) as u32)
        }
        _ => head_dim,
    };
    let both = |a: Option<u32>, b: Option<u32>| Some(a? + b?);
    let expert_width = match architecture {
        "gpt-oss" | "llama4" => of("intermediate_size"),
        _ => of("moe_intermediate_size"),
    };
    vec![
        ("context_length", of("max_position_embeddings")),
        ("embedding_length", of("hidden_size")),
        ("block_count", of("num_hidden_layers")),
        (
            "feed_forward_length",
            of_any(&["intermediate_size_mlp", "intermediate_size"]),
        ),
        ("attention.head_count", of("num_attention_heads")),
        // The absorbed form has one key for all heads.
        (
            "attention.head_count_kv",
            latent.map_or(of("num_key_value_heads"), |_| Some(1)),
        ),
        (
            "attention.key_length",
            latent.map_or(head_dim, |latent| both(Some(latent), rotated)),
        ),
        ("attention.value_length", latent.or(head_dim)),
        ("attention.q_lora_rank", of("q_lora_rank")),
        ("attention.kv_lora_rank", latent),
        (
            "attention.key_length_mla",
            both(latent.and(of("qk_nope_head_dim")), rotated),
        ),
        ("attention.value_length_mla", latent.and(of("v_head_dim"))),
        (
            "attention.sliding_window",
            of("sliding_window").filter(|_| architecture == "gpt-oss"),
        ),
        ("rope.dimension_count", rotated),
        (
            "rope.scaling.original_context_length",
            yarn(config, "original_max_position_embeddings").map(|context| context as u32),
        ),
        (
            "expert_count",
            of_any(&[
                "num_local_experts",
                "num_experts",
                "n_routed_experts",
                "moe_num_experts",
            ]),
        ),
        ("expert_used_count", of_any(&["num_experts_per_tok", "moe_k"])),
        ("expert_feed_forward_length", expert_width),
        ("expert_shared_feed_forward_length", shared_width(config, architecture)),
        (
            "expert_shared_count",
            of_any(&["n_shared_experts", "moe_num_shared_experts"]),
        ),
        ("expert_group_count", of("n_group")),
        ("expert_group_used_count", of("topk_group")),
        // 1 is softmax, 2 sigmoid.
        (
            "expert_gating_func",
            match config["model_type"].as_str() {
                Some("deepseek_v2") => Some(1),
                Some("deepseek_v3" | "glm4_moe") => Some(2),
                _ => None,
            },
        ),
        (
            "leading_dense_block_count",
            of_any(&["first_k_dense_replace", "moe_layer_start_index"]),
        ),
        (
            "interleave_moe_layer_step",
            of_any(&["moe_layer_interval", "interleave_moe_layer_step"]),
        ),
        (
            "nextn_predict_layers",
            of("num_nextn_predict_layers").filter(|_| architecture == "glm4moe"),
        ),
        ("vocab_size", of("vocab_size")),
    ]
}

/// The width of all shared experts together, where there is a key for it.
fn shared_width(config: &Value, architecture: &str) -> Option<u32> {
    match architecture {
        "ernie4_5-moe" => Some(size(config, "moe_num_shared_experts")? * size(config, "moe_intermediate_size")?),
        _ => size(config, "shared_expert_intermediate_size"),
    }
}

/// A number of yarn's alone.
fn yarn(config: &Value, name: &str) -> Option<f64> {
    rope(config, name)
        .as_f64()
        .filter(|_| rope(config, "rope_type") == "yarn")
}

fn numbers(config: &Value, architecture: &str) -> Vec<(&'static str, Option<f64>)> {
    let scaled = ["linear", "yarn"].iter().any(|kind| rope(config, "rope_type") == *kind);
    vec![
        ("attention.layer_norm_rms_epsilon", config["rms_norm_eps"].as_f64()),
        (
            "rope.freq_base",
            rope(config, "rope_theta")
                .as_f64()
                .or_else(|| config["rope_theta"].as_f64()),
        ),
        (
            "rope.scaling.factor",
            rope(config, "factor").as_f64().filter(|_| scaled),
        ),
        ("rope.scaling.yarn_beta_fast", yarn(config, "beta_fast")),
        ("rope.scaling.yarn_beta_slow", yarn(config, "beta_slow")),
        (
            "rope.scaling.yarn_log_multiplier",
            yarn(config, "mscale_all_dim")
                .filter(|_| architecture == "deepseek2")
                .map(|growth| 0.1 * growth),
        ),
        ("expert_weights_scale", config["routed_scaling_factor"].as_f64()),
        ("attention.scale", config["attention_multiplier"].as_f64()),
        ("embedding_scale", config["embedding_multiplier"].as_f64()),
        ("residual_scale", config["residual_multiplier"].as_f64()),
        ("logit_scale", config["logits_scaling"].as_f64()),
    ]
}

/// llama 3.1: what each frequency is divided by.
pub(super) fn rotary_factors(config: &Value) -> Option<Vec<f32>> {
    let number = |name: &str| rope(config, name).as_f64();
    if rope(config, "rope_type") != "llama3" {
        return None;
    }
    let (theta, factor, context) = (
        number("rope_theta")?,
        number("factor")?,
        number("original_max_position_embeddings")?,
    );
    let (low, high) = (number("low_freq_factor")?, number("high_freq_factor")?);
    let dim = head_dim(config);
    let divisor = |index: usize| {
        let wavelength = 2.0 * PI * theta.powf((2 * index) as f64 / dim as f64);
        if wavelength < context / high {
            1.0
        } else if wavelength > context / low {
            factor
        } else {
            let smooth = (context / wavelength - low) / (high - low);
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    };
    Some((0..dim / 2).map(|index| divisor(index) as f32).collect())
}
