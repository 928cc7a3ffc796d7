//! Configs as their publishers wrote them.

use serde_json::json;

use super::{latent, moe, parse};
use crate::*;

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
