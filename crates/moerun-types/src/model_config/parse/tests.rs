//! The golden configs in both spellings, Hub configs of released models, and one lie per field.

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
fn a_released_qwen3_moe_config_is_read() {
    let config = json!({
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false, "bos_token_id": 151643,
        "decoder_sparse_step": 1, "eos_token_id": [151645, 151643], "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
        "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": true,
        "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000.0,
        "sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "use_sliding_window": false, "vocab_size": 151936,
    });
    let config = parse(&config).unwrap();
    let experts = moe(&config);
    assert_eq!(
        (experts.num_experts, experts.top_k, experts.intermediate),
        (128, 8, 768)
    );
    assert_eq!(config.eos_token_ids, [151645, 151643]);
    assert_eq!(config.stored_dtype, Some(StoredDtype::Bf16));
    assert!(config.layers.iter().all(|layer| layer.mask == AttentionMask::Full));
}

#[test]
fn released_deepseek_configs_are_read() {
    let lite = json!({
        "attention_bias": false, "aux_loss_alpha": 0.001, "bos_token_id": 100000, "eos_token_id": 100001,
        "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 10944,
        "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v2",
        "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64,
        "n_shared_experts": 2, "norm_topk_prob": false, "num_attention_heads": 16, "num_experts_per_tok": 6,
        "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": null, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
        "rope_scaling": { "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096, "type": "yarn" },
        "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": true,
        "tie_word_embeddings": false, "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16",
        "v_head_dim": 128, "vocab_size": 102400,
    });
    let config = parse(&lite).unwrap();
    assert_eq!(latent(&config).q_lora_rank, None);
    assert_eq!(moe(&config).gate.groups, None);

    let v3 = json!({
        "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
        "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
        "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
        "norm_topk_prob": true, "routed_scaling_factor": 2.5, "first_k_dense_replace": 3, "moe_layer_freq": 1,
        "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 129280,
        "max_position_embeddings": 163840, "num_nextn_predict_layers": 1, "torch_dtype": "bfloat16",
        "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu",
        "quantization_config": { "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
            "weight_block_size": [128, 128] },
        "rope_scaling": { "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096, "type": "yarn" },
        "rope_theta": 10000,
    });
    let config = parse(&v3).unwrap();
    assert_eq!(
        config.quantization,
        WeightQuantization::Fp8Block { rows: 128, cols: 128 }
    );
    assert_eq!(config.moe_layers().len(), 58);
    let groups = GroupLimit {
        num_groups: 8,
        top_groups: 4,
        score: GroupScore::SumOfTopTwo,
    };
    assert_eq!(moe(&config).gate.groups, Some(groups));
}

#[test]
fn a_released_gpt_oss_config_is_read() {
    let config = json!({
        "architectures": ["GptOssForCausalLM"], "attention_bias": true, "eos_token_id": 200002,
        "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880,
        "initial_context_length": 4096, "intermediate_size": 2880, "max_position_embeddings": 131072,
        "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24,
        "num_key_value_heads": 8, "num_local_experts": 32, "pad_token_id": 199999,
        "quantization_config": { "modules_to_not_convert": ["lm_head"], "quant_method": "mxfp4" },
        "rms_norm_eps": 1e-05,
        "rope_scaling": { "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
            "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": false },
        "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": false,
        "vocab_size": 201088,
    });
    let config = parse(&config).unwrap();
    assert_eq!(config.quantization, WeightQuantization::Mxfp4);
    assert_eq!(
        moe(&config).activation,
        Activation::ClampedSwiglu {
            alpha: 1.702,
            limit: 7.0
        }
    );
    assert_eq!(config.layers[0].mask, AttentionMask::SlidingWindow { window: 128 });
    assert_eq!(config.layers[1].mask, AttentionMask::Full);
}

#[test]
fn every_bad_field_is_named_with_what_it_holds() {
    let yarn = |name: &str, value: Value| {
        let mut scaling = golden("deepseek_v3", "config.hub.json")["rope_scaling"].clone();
        scaling[name] = value;
        json!({ "rope_scaling": scaling })
    };
    // family, change, the field that the message names, what it says was found
    let lies: &[(&str, Value, &str, &str)] = &[
        ("mixtral", json!({ "model_type": "bert" }), "model_type", "bert"),
        ("mixtral", json!({ "model_type": null }), "model_type", "missing"),
        ("mixtral", json!({ "hidden_size": 0 }), "hidden_size", "0"),
        ("mixtral", json!({ "hidden_size": -32 }), "hidden_size", "-32"),
        ("mixtral", json!({ "hidden_size": "32" }), "hidden_size", "\"32\""),
        ("mixtral", json!({ "hidden_size": 32.5 }), "hidden_size", "32.5"),
        ("mixtral", json!({ "hidden_size": null }), "hidden_size", "missing"),
        (
            "mixtral",
            json!({ "hidden_size": 1u64 << 63 }),
            "hidden_size",
            "9223372036854775808",
        ),
        ("mixtral", json!({ "vocab_size": 0 }), "vocab_size", "0"),
        ("mixtral", json!({ "num_hidden_layers": 0 }), "num_hidden_layers", "0"),
        (
            "mixtral",
            json!({ "num_hidden_layers": 4_000_000_000u64 }),
            "num_hidden_layers",
            "4000000000",
        ),
        (
            "mixtral",
            json!({ "num_attention_heads": 0 }),
            "num_attention_heads",
            "0",
        ),
        (
            "mixtral",
            json!({ "num_attention_heads": 5, "num_key_value_heads": 5 }),
            "num_attention_heads",
            "5",
        ),
        (
            "mixtral",
            json!({ "num_key_value_heads": 3 }),
            "num_key_value_heads",
            "3",
        ),
        ("mixtral", json!({ "head_dim": 7 }), "head_dim", "7"),
        ("mixtral", json!({ "intermediate_size": 0 }), "intermediate_size", "0"),
        (
            "mixtral",
            json!({ "max_position_embeddings": 0 }),
            "max_position_embeddings",
            "0",
        ),
        ("mixtral", json!({ "num_local_experts": 0 }), "num_local_experts", "0"),
        (
            "mixtral",
            json!({ "num_experts_per_tok": 9 }),
            "num_experts_per_tok",
            "9",
        ),
        (
            "mixtral",
            json!({ "num_experts_per_tok": 0 }),
            "num_experts_per_tok",
            "0",
        ),
        ("mixtral", json!({ "rms_norm_eps": 0 }), "rms_norm_eps", "0"),
        ("mixtral", json!({ "rms_norm_eps": -1e-5 }), "rms_norm_eps", "-"),
        ("mixtral", json!({ "rope_theta": 0 }), "rope_theta", "0"),
        ("mixtral", json!({ "sliding_window": 0 }), "sliding_window", "0"),
        ("mixtral", json!({ "hidden_act": "mish" }), "hidden_act", "mish"),
        ("mixtral", json!({ "torch_dtype": "int8" }), "torch_dtype", "int8"),
        ("mixtral", json!({ "eos_token_id": 320 }), "eos_token_id", "320"),
        ("mixtral", json!({ "eos_token_id": [2, -1] }), "eos_token_id", "-1"),
        ("mixtral", json!({ "bos_token_id": 1000 }), "bos_token_id", "1000"),
        (
            "mixtral",
            json!({ "tie_word_embeddings": "no" }),
            "tie_word_embeddings",
            "no",
        ),
        (
            "mixtral",
            json!({ "partial_rotary_factor": 0.5 }),
            "partial_rotary_factor",
            "0.5",
        ),
        (
            "mixtral",
            json!({ "layer_types": ["full_attention"] }),
            "layer_types",
            "1 entries",
        ),
        (
            "mixtral",
            json!({ "layer_types": ["full_attention", "linear_attention"] }),
            "layer_types",
            "linear",
        ),
        (
            "mixtral",
            json!({ "rope_scaling": { "type": "dynamic", "factor": 2.0 } }),
            "rope_type",
            "dynamic",
        ),
        (
            "mixtral",
            json!({ "rope_scaling": { "factor": 2.0 } }),
            "rope_type",
            "missing",
        ),
        (
            "mixtral",
            json!({ "rope_scaling": { "type": "linear", "factor": 0.5 } }),
            "rope_scaling.factor",
            "0.5",
        ),
        ("mixtral", json!({ "rope_scaling": [1] }), "rope_scaling", "[1]"),
        (
            "mixtral",
            json!({ "rope_parameters": { "full_attention": { "rope_theta": 1.0 } } }),
            "full_attention",
            "object",
        ),
        (
            "mixtral",
            json!({ "architectures": ["MixtralForSequenceClassification"] }),
            "architectures",
            "SequenceCl",
        ),
        (
            "mixtral",
            json!({ "quantization_config": { "quant_method": "gptq" } }),
            "quant_method",
            "gptq",
        ),
        (
            "mixtral",
            json!({ "quantization_config": { "quant_method": "mxfp4" } }),
            "quant_method",
            "mxfp4",
        ),
        (
            "mixtral",
            json!({ "quantization_config": { "bits": 4 } }),
            "quant_method",
            "missing",
        ),
        (
            "mixtral",
            json!({ "compression_config": { "format": "x" } }),
            "compression_config",
            "object",
        ),
        ("mixtral", json!({ "num_experts": 4 }), "num_experts", "4"),
        ("mixtral", json!({ "text_config": {} }), "text_config", "mixtral"),
        (
            "qwen2_moe",
            json!({ "decoder_sparse_step": 0 }),
            "decoder_sparse_step",
            "0",
        ),
        ("qwen2_moe", json!({ "mlp_only_layers": [3] }), "mlp_only_layers", "3"),
        (
            "qwen2_moe",
            json!({ "shared_expert_intermediate_size": 0 }),
            "shared_expert_intermediate_size",
            "0",
        ),
        (
            "qwen2_moe",
            json!({ "use_sliding_window": true, "layer_types": null }),
            "use_sliding_window",
            "true",
        ),
        (
            "qwen3_moe",
            json!({ "moe_intermediate_size": 1u64 << 40 }),
            "moe_intermediate_size",
            "1099511627776",
        ),
        (
            "qwen3_moe",
            json!({ "num_local_experts": 100_000 }),
            "num_local_experts",
            "100000",
        ),
        ("qwen3_moe", json!({ "mlp_only_layers": 1 }), "mlp_only_layers", "1"),
        ("olmoe", json!({ "clip_qkv": -8.0 }), "clip_qkv", "-8"),
        ("granitemoe", json!({ "logits_scaling": 0.0 }), "logits_scaling", "0"),
        (
            "phimoe",
            json!({ "num_experts_per_tok": 3 }),
            "num_experts_per_tok",
            "3",
        ),
        (
            "phimoe",
            json!({ "router_jitter_noise": -0.1 }),
            "router_jitter_noise",
            "-0.1",
        ),
        (
            "phimoe",
            json!({ "original_max_position_embeddings": 64 }),
            "original_max_position_embeddings",
            "64",
        ),
        ("phimoe", json!({ "head_dim": 16 }), "short_factor", "4 numbers"),
        (
            "deepseek_v2",
            json!({ "topk_method": "random" }),
            "topk_method",
            "random",
        ),
        ("deepseek_v2", json!({ "n_group": 3 }), "n_group", "3"),
        ("deepseek_v2", json!({ "n_group": null }), "n_group", "missing"),
        ("deepseek_v2", json!({ "topk_group": 5 }), "topk_group", "5"),
        (
            "deepseek_v2",
            json!({ "norm_topk_prob": true }),
            "norm_topk_prob",
            "true",
        ),
        (
            "deepseek_v2",
            json!({ "scoring_func": "sigmoid" }),
            "scoring_func",
            "sigmoid",
        ),
        ("deepseek_v2", json!({ "qk_rope_head_dim": 0 }), "qk_rope_head_dim", "0"),
        ("deepseek_v2", json!({ "qk_rope_head_dim": 7 }), "even number", "7"),
        ("deepseek_v2", json!({ "kv_lora_rank": 0 }), "kv_lora_rank", "0"),
        (
            "deepseek_v2",
            json!({ "num_key_value_heads": 2 }),
            "num_key_value_heads",
            "2",
        ),
        (
            "deepseek_v2",
            json!({ "first_k_dense_replace": 4 }),
            "first_k_dense_replace",
            "4",
        ),
        ("deepseek_v3", json!({ "n_group": 8, "topk_group": 4 }), "n_group", "8"),
        ("deepseek_v3", json!({ "topk_group": 1 }), "num_experts_per_tok", "3"),
        ("deepseek_v3", json!({ "moe_layer_freq": 2 }), "moe_layer_freq", "2"),
        (
            "deepseek_v3",
            json!({ "topk_method": "greedy" }),
            "topk_method",
            "greedy",
        ),
        ("deepseek_v3", yarn("beta_fast", json!(0.5)), "beta_fast", "0.5"),
        (
            "deepseek_v3",
            yarn("factor", json!("4")),
            "rope_scaling.factor",
            "\"4\"",
        ),
        (
            "deepseek_v3",
            yarn("original_max_position_embeddings", json!(0)),
            "original_max_position_embeddings",
            "0",
        ),
        ("deepseek_v3", yarn("rope_type", json!("linear")), "type", "yarn"),
        (
            "deepseek_v3",
            json!({ "quantization_config": { "quant_method": "fp8", "weight_block_size": null } }),
            "weight_block_size",
            "missing",
        ),
        (
            "deepseek_v3",
            json!({ "quantization_config": { "quant_method": "fp8", "weight_block_size": [0, 128] } }),
            "weight_block_size",
            "0",
        ),
        (
            "gpt_oss",
            json!({ "sliding_window": null }),
            "sliding_window",
            "missing",
        ),
        ("gpt_oss", json!({ "swiglu_limit": -1.0 }), "swiglu_limit", "-1"),
        (
            "gpt_oss",
            json!({ "quantization_config": { "quant_method": "mxfp4" }, "intermediate_size": 48 }),
            "intermediate_size",
            "48",
        ),
        (
            "glm4_moe",
            json!({ "partial_rotary_factor": 0.0 }),
            "partial_rotary_factor",
            "0",
        ),
        (
            "glm4_moe",
            json!({ "partial_rotary_factor": 0.2 }),
            "head_dim",
            "3 of 16",
        ),
        ("ernie4_5_moe", json!({ "use_bias": true }), "use_bias", "true"),
        (
            "ernie4_5_moe",
            json!({ "moe_layer_end_index": 3 }),
            "moe_layer_end_index",
            "3",
        ),
        ("ernie4_5_moe", json!({ "moe_norm_min": 0 }), "moe_norm_min", "0"),
        (
            "llama4_text",
            json!({ "no_rope_layers": [1, 1] }),
            "no_rope_layers",
            "2 entries",
        ),
        (
            "llama4_text",
            json!({ "attention_chunk_size": 0 }),
            "attention_chunk_size",
            "0",
        ),
        ("llama4_text", json!({ "moe_layers": [4] }), "moe_layers", "4"),
        ("llama", json!({ "mlp_bias": 1 }), "mlp_bias", "1"),
    ];
    for (family, changes, field, found) in lies {
        let message = match parse(&changed(family, changes.clone())) {
            Ok(_) => panic!("{family} {changes} was accepted"),
            Err(error) => error.to_string(),
        };
        assert!(
            message.contains(field) && message.contains(found),
            "{family} {changes}: {message}"
        );
    }
}

#[test]
fn sizes_whose_product_is_absurd_are_refused() {
    let changes = json!({
        "hidden_size": 1 << 22, "num_attention_heads": 1 << 14, "num_key_value_heads": 1 << 14, "head_dim": 1 << 14,
        "num_hidden_layers": 4096,
    });
    let message = parse(&changed("llama", changes)).unwrap_err().to_string();
    assert!(message.contains("parameters"), "{message}");
    let changes = json!({ "num_local_experts": 1 << 14, "num_hidden_layers": 4096 });
    let message = parse(&changed("mixtral", changes)).unwrap_err().to_string();
    assert!(message.contains("67108864 experts"), "{message}");
}

#[test]
fn text_that_is_no_json_object_is_refused() {
    for text in [
        "",
        "{",
        "[]",
        "3",
        "{\"rms_norm_eps\": NaN}",
        "{\"rms_norm_eps\": 1e999}",
        "\u{feff}{}",
    ] {
        assert!(ModelConfig::from_json(text).is_err(), "{text:?}");
    }
    let deep = "[".repeat(100_000);
    assert!(matches!(ModelConfig::from_json(&deep), Err(ConfigError::Json(_))));
}

#[test]
fn an_unknown_family_is_told_which_are_known() {
    for name in [
        "bert",
        "t5",
        "switch_transformers",
        "nllb-moe",
        "nomic_bert",
        "Mixtral",
        "",
    ] {
        let message = ModelConfig::from_json(&json!({ "model_type": name }).to_string())
            .unwrap_err()
            .to_string();
        assert!(message.contains(&format!("{name:?}")), "{message}");
        assert!(
            message.contains("mixtral, qwen2_moe") && message.contains("qwen3"),
            "{message}"
        );
    }
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
