//! Configs that are refused, and what the errors say.

use serde_json::{Value, json};

use super::{changed, golden, parse};
use crate::*;

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
