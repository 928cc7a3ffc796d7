//! The golden configs in both spellings, Hub configs of released models, and one lie per field.

mod refused;
mod released;

use serde_json::{Value, json};

use crate::*;

fn golden(family: &str, file: &str) -> Value {
    let path = format!("{}/../../tests/golden/{family}/{file}", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    serde_json::from_str(&text).unwrap()
}

fn parse(config: &Value) -> Result<ModelConfig, ConfigError> {
    ModelConfig::from_json(&config.to_string())
}

/// The golden config of `family` with some fields replaced; a null value removes the field.
fn changed(family: &str, changes: Value) -> Value {
    let mut config = golden(family, "config.hub.json");
    for (name, value) in changes.as_object().unwrap() {
        config[name] = value.clone();
    }
    config
}

fn parse_changed(family: &str, changes: Value) -> ModelConfig {
    parse(&changed(family, changes.clone())).unwrap_or_else(|error| panic!("{family} {changes}: {error}"))
}

fn grouped(config: &ModelConfig) -> &GroupedAttention {
    match &config.attention {
        AttentionConfig::Grouped(grouped) => grouped,
        AttentionConfig::Latent(_) => panic!("latent attention"),
    }
}

fn latent(config: &ModelConfig) -> &LatentAttention {
    match &config.attention {
        AttentionConfig::Latent(latent) => latent,
        AttentionConfig::Grouped(_) => panic!("grouped attention"),
    }
}

fn moe(config: &ModelConfig) -> &MoeConfig {
    config.moe.as_ref().unwrap()
}

#[test]
fn both_spellings_of_every_golden_config_give_one_model() {
    for family in Family::ALL {
        let name = family.model_type();
        let new = parse(&golden(name, "config.json")).unwrap();
        let old = parse(&golden(name, "config.hub.json")).unwrap();
        assert_eq!(new, old, "{name}");
        assert_eq!(new.family, family);
        assert_eq!(
            (new.vocab_size, new.hidden, new.max_position_embeddings),
            (320, 32, 256),
            "{name}"
        );
        assert_eq!(new.stored_dtype, Some(StoredDtype::F32), "{name}");
        assert_eq!(
            (new.bos_token_id, new.pad_token_id, &new.eos_token_ids[..]),
            (Some(1), Some(0), &[2][..])
        );
    }
}

#[test]
fn the_canonical_form_survives_a_round_trip() {
    for family in Family::ALL {
        let config = parse(&golden(family.model_type(), "config.json")).unwrap();
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(
            serde_json::from_str::<ModelConfig>(&text).unwrap(),
            config,
            "{family:?}"
        );
    }
}

#[test]
fn gates_of_the_golden_models_are_those_of_their_families() {
    let gate = |family: &str| moe(&parse(&golden(family, "config.json")).unwrap()).gate.clone();
    let plain = GateConfig {
        score: ScoreFunction::Softmax,
        router_bias: false,
        correction_bias: false,
        groups: None,
        renormalize: Renormalize::No,
        routed_scaling_factor: 1.0,
    };
    let summed = Renormalize::Sum { epsilon: 0.0 };
    assert_eq!(
        gate("mixtral"),
        GateConfig {
            renormalize: summed,
            ..plain
        }
    );
    assert_eq!(gate("qwen2_moe"), plain);
    assert_eq!(
        gate("qwen3_moe"),
        GateConfig {
            renormalize: summed,
            ..plain
        }
    );
    assert_eq!(gate("olmoe"), plain);
    assert_eq!(
        gate("granitemoe"),
        GateConfig {
            score: ScoreFunction::SoftmaxOfTopK,
            ..plain
        }
    );
    assert_eq!(
        gate("phimoe"),
        GateConfig {
            score: ScoreFunction::SparseMixer { jitter: 0.15 },
            ..plain
        }
    );
    let groups = |score| {
        Some(GroupLimit {
            num_groups: 4,
            top_groups: 2,
            score,
        })
    };
    assert_eq!(
        gate("deepseek_v2"),
        GateConfig {
            groups: groups(GroupScore::Max),
            routed_scaling_factor: 2.5,
            ..plain
        }
    );
    let sigmoid = GateConfig {
        score: ScoreFunction::Sigmoid,
        correction_bias: true,
        renormalize: Renormalize::Sum { epsilon: 1e-20 },
        routed_scaling_factor: 2.5,
        ..plain
    };
    assert_eq!(
        gate("deepseek_v3"),
        GateConfig {
            groups: groups(GroupScore::SumOfTopTwo),
            ..sigmoid
        }
    );
    assert_eq!(gate("glm4_moe"), sigmoid);
    assert_eq!(
        gate("gpt_oss"),
        GateConfig {
            score: ScoreFunction::SoftmaxOfTopK,
            router_bias: true,
            ..plain
        }
    );
    assert_eq!(
        gate("ernie4_5_moe"),
        GateConfig {
            correction_bias: true,
            renormalize: Renormalize::SumAtLeast { floor: 1e-12 },
            ..plain
        }
    );
    assert_eq!(
        gate("llama4_text"),
        GateConfig {
            score: ScoreFunction::Sigmoid,
            ..plain
        }
    );
}

#[test]
fn layers_of_the_golden_models_are_dense_or_moe_as_their_configs_say() {
    for (family, moe_layers) in [
        ("mixtral", vec![0, 1]),
        ("qwen2_moe", vec![0, 2]),
        ("deepseek_v2", vec![1, 2]),
        ("deepseek_v3", vec![1, 2]),
        ("glm4_moe", vec![1, 2]),
        ("ernie4_5_moe", vec![1, 2]),
        ("llama4_text", vec![1, 3]),
        ("llama", vec![]),
        ("qwen3", vec![]),
    ] {
        let config = parse(&golden(family, "config.json")).unwrap();
        let found: Vec<u32> = config.moe_layers().iter().map(|layer| layer.0).collect();
        assert_eq!(found, moe_layers, "{family}");
        assert_eq!(config.moe.is_some(), !moe_layers.is_empty(), "{family}");
    }
    let dense = |family| parse(&golden(family, "config.json")).unwrap().layers[0].feed_forward;
    assert_eq!(dense("deepseek_v3"), FeedForwardKind::Dense { intermediate: 56 });
    assert_eq!(dense("llama4_text"), FeedForwardKind::Dense { intermediate: 48 });
}

#[test]
fn shared_experts_are_one_feed_forward_of_their_summed_width() {
    let shared = |family| moe(&parse(&golden(family, "config.json")).unwrap()).shared;
    assert_eq!(
        shared("qwen2_moe"),
        Some(SharedExpertConfig {
            intermediate: 40,
            sigmoid_gate: true
        })
    );
    assert_eq!(
        shared("deepseek_v2"),
        Some(SharedExpertConfig {
            intermediate: 40,
            sigmoid_gate: false
        })
    );
    assert_eq!(
        shared("ernie4_5_moe"),
        Some(SharedExpertConfig {
            intermediate: 40,
            sigmoid_gate: false
        })
    );
    assert_eq!(
        shared("llama4_text"),
        Some(SharedExpertConfig {
            intermediate: 24,
            sigmoid_gate: false
        })
    );
    assert_eq!(shared("mixtral"), None);
    for none in [json!(null), json!(0)] {
        assert_eq!(
            moe(&parse_changed("deepseek_v3", json!({ "n_shared_experts": none }))).shared,
            None
        );
    }
}

#[test]
fn attention_of_the_golden_models_is_that_of_their_families() {
    let config = |family| parse(&golden(family, "config.json")).unwrap();
    for (family, biases, qk_norm, head_dim) in [
        ("mixtral", (false, false), QkNorm::None, 8),
        ("qwen2_moe", (true, false), QkNorm::None, 8),
        ("qwen3_moe", (false, false), QkNorm::PerHead, 16),
        ("olmoe", (false, false), QkNorm::WholeProjection, 8),
        ("phimoe", (true, true), QkNorm::None, 8),
        ("gpt_oss", (true, true), QkNorm::None, 16),
        ("glm4_moe", (true, false), QkNorm::PerHead, 16),
        ("llama4_text", (false, false), QkNorm::WeightlessAfterRotary, 8),
        ("qwen3", (false, false), QkNorm::PerHead, 16),
    ] {
        let config = config(family);
        let found = grouped(&config);
        assert_eq!((found.qkv_bias, found.output_bias), biases, "{family}");
        assert_eq!(found.qk_norm, qk_norm, "{family}");
        assert_eq!(found.head_dim, head_dim, "{family}");
        assert_eq!(found.sinks, family == "gpt_oss");
        assert_eq!(found.scale, (head_dim as f64).powf(-0.5) as f32, "{family}");
    }
    assert_eq!(grouped(&config("granitemoe")).scale, 0.2);
    let v2 = config("deepseek_v2");
    let mscale = 0.1 * 0.707 * 4f64.ln() + 1.0;
    assert!((f64::from(latent(&v2).scale) - 20f64.powf(-0.5) * mscale * mscale).abs() < 1e-7);
    assert_eq!(latent(&v2).q_lora_rank, Some(24));
}

#[test]
fn rotary_settings_of_the_golden_models_are_resolved() {
    let rope = |family| parse(&golden(family, "config.json")).unwrap().rope;
    for (family, theta, rotary_dim, layout) in [
        ("mixtral", 1e6, 8, RotaryLayout::Halves),
        ("deepseek_v2", 1e4, 8, RotaryLayout::Interleaved),
        ("deepseek_v3", 1e4, 8, RotaryLayout::Interleaved),
        ("glm4_moe", 1e6, 8, RotaryLayout::Halves),
        ("ernie4_5_moe", 5e5, 8, RotaryLayout::Interleaved),
        ("llama4_text", 5e5, 8, RotaryLayout::Interleaved),
    ] {
        let rope = rope(family);
        assert_eq!(
            (rope.theta, rope.rotary_dim, rope.layout),
            (theta, rotary_dim, layout),
            "{family}"
        );
    }
    let yarn = |truncate, attention_factor| RopeScaling::Yarn {
        factor: 4.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        truncate,
        original_max_position: 64,
        attention_factor,
    };
    assert_eq!(rope("deepseek_v2").scaling, yarn(true, 1.0));
    assert_eq!(rope("gpt_oss").scaling, yarn(false, 0.1 * 4f64.ln() + 1.0));
    let llama3 = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position: 64,
    };
    assert_eq!(rope("llama").scaling, llama3);
    let longrope = RopeScaling::LongRope {
        short_factor: vec![1.0, 1.1, 1.2, 1.3],
        long_factor: vec![1.5, 2.0, 2.5, 3.0],
        short_attention_factor: 1.2,
        long_attention_factor: 1.35,
        original_max_position: 128,
    };
    assert_eq!(rope("phimoe").scaling, longrope);
}

#[test]
fn longrope_without_mscales_takes_the_published_attention_factor() {
    let factors = json!([1.0, 1.0, 1.0, 1.0]);
    let config = parse_changed(
        "phimoe",
        json!({ "rope_scaling": {
            "type": "longrope", "short_factor": factors, "long_factor": factors,
            "original_max_position_embeddings": 128,
        }}),
    );
    let wanted = (1.0 + 2f64.ln() / 128f64.ln()).sqrt();
    match config.rope.scaling {
        RopeScaling::LongRope {
            short_attention_factor,
            long_attention_factor,
            ..
        } => {
            assert_eq!((short_attention_factor, long_attention_factor), (wanted, wanted));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn masks_follow_layer_types_or_the_rule_of_the_family() {
    let masks = |config: &ModelConfig| config.layers.iter().map(|layer| layer.mask).collect::<Vec<_>>();
    let window = AttentionMask::SlidingWindow { window: 8 };
    let chunk = AttentionMask::Chunked { size: 16 };
    let full = AttentionMask::Full;
    assert_eq!(
        masks(&parse_changed("gpt_oss", json!({ "layer_types": null }))),
        [window, full]
    );
    let swapped = json!({ "layer_types": ["full_attention", "sliding_attention"] });
    assert_eq!(masks(&parse_changed("gpt_oss", swapped)), [full, window]);
    let llama4 = parse_changed("llama4_text", json!({ "layer_types": null, "no_rope_layers": null }));
    assert_eq!(masks(&llama4), [chunk, chunk, chunk, full]);
    assert_eq!(llama4, parse(&golden("llama4_text", "config.json")).unwrap());
    let tuned = AttentionTemperature {
        scale: 0.1,
        floor_scale: 8.0,
    };
    assert_eq!(
        llama4.layers.iter().map(|layer| layer.rotary).collect::<Vec<_>>(),
        [true, true, true, false]
    );
    assert_eq!(
        (llama4.layers[0].temperature, llama4.layers[3].temperature),
        (None, Some(tuned))
    );
    assert_eq!(
        masks(&parse_changed("mixtral", json!({ "sliding_window": 8 }))),
        [window, window]
    );
    let qwen3 = |first| {
        let changes = json!({
            "layer_types": null, "use_sliding_window": true, "sliding_window": 8, "max_window_layers": first,
        });
        masks(&parse_changed("qwen3", changes))
    };
    assert_eq!(qwen3(1), [full, window]);
    assert_eq!(qwen3(28), [full, full]);
    let unused =
        json!({ "layer_types": null, "use_sliding_window": false, "sliding_window": 8, "max_window_layers": 0 });
    assert_eq!(masks(&parse_changed("qwen3", unused)), [full, full]);
}

#[test]
fn defaults_are_those_of_the_family() {
    let strip = |family: &str, names: &[&str]| {
        let mut config = golden(family, "config.hub.json");
        for name in names {
            config.as_object_mut().unwrap().remove(*name);
        }
        parse(&config).unwrap_or_else(|error| panic!("{family}: {error}"))
    };
    let common = [
        "rms_norm_eps",
        "rope_theta",
        "tie_word_embeddings",
        "num_key_value_heads",
        "torch_dtype",
    ];
    for (family, epsilon, theta) in [
        ("mixtral", 1e-5, 1e6),
        ("qwen2_moe", 1e-6, 1e4),
        ("qwen3_moe", 1e-6, 1e4),
        ("olmoe", 1e-5, 1e4),
        ("granitemoe", 1e-6, 1e4),
        ("llama", 1e-6, 1e4),
        ("glm4_moe", 1e-5, 1e4),
        ("llama4_text", 1e-5, 5e5),
        ("gpt_oss", 1e-5, 150_000.0),
    ] {
        let config = strip(family, &common);
        assert_eq!(config.norm.epsilon, epsilon, "{family}");
        assert_eq!(config.rope.theta, theta, "{family}");
        assert_eq!(grouped(&config).num_kv_heads, grouped(&config).num_heads, "{family}");
        assert!(!config.tied_head, "{family}");
        assert_eq!(config.stored_dtype, None);
    }
    assert!(strip("ernie4_5_moe", &common).tied_head);
    assert_eq!(
        moe(&strip("qwen3_moe", &["norm_topk_prob"])).gate.renormalize,
        Renormalize::No
    );
    assert_eq!(
        moe(&strip("deepseek_v3", &["norm_topk_prob"])).gate.renormalize,
        Renormalize::Sum { epsilon: 1e-20 }
    );
    let multipliers = strip(
        "granitemoe",
        &[
            "embedding_multiplier",
            "residual_multiplier",
            "logits_scaling",
            "attention_multiplier",
        ],
    );
    let found = (
        multipliers.embedding_multiplier,
        multipliers.residual_multiplier,
        multipliers.logits_scaling,
    );
    assert_eq!(found, (1.0, 1.0, 1.0));
    assert_eq!(grouped(&multipliers).scale, 1.0);
    assert_eq!(grouped(&strip("llama", &["head_dim"])).head_dim, 8);
    assert_eq!(grouped(&strip("qwen3", &["head_dim"])).head_dim, 128);
    let yarn = strip("gpt_oss", &["rope_scaling"]).rope.scaling;
    assert!(matches!(
        yarn,
        RopeScaling::Yarn {
            factor: 32.0,
            truncate: false,
            original_max_position: 4096,
            ..
        }
    ));
}

#[test]
fn a_padding_id_outside_the_vocabulary_means_none() {
    for id in [-1, 320, 100_000] {
        assert_eq!(parse_changed("llama", json!({ "pad_token_id": id })).pad_token_id, None);
    }
}

#[test]
fn unknown_fields_change_nothing() {
    let extra = json!({ "transformers.js_config": { "dtype": "q4" }, "auto_map": null, "zzz": [1, 2] });
    assert_eq!(
        parse_changed("olmoe", extra),
        parse(&golden("olmoe", "config.json")).unwrap()
    );
}
