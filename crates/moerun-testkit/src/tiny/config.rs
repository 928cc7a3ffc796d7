//! `config.json` of a tiny checkpoint: the golden folder's, with its sizes replaced.

use std::fs;

use serde_json::{Value, json};

use super::{Spelling, Storage, TinyCheckpoint, TinyRope};
use crate::{Family, TestkitError, golden_dir};

impl TinyCheckpoint {
    /// The config, in the spelling asked for.
    pub fn config_json(&self) -> Result<Value, TestkitError> {
        let file = match self.spelling {
            Spelling::Parameters => "config.json",
            Spelling::Hub => "config.hub.json",
        };
        let path = golden_dir(self.family).join(file);
        let text = fs::read_to_string(&path).map_err(TestkitError::io(&path))?;
        let mut config: Value = serde_json::from_str(&text).map_err(|source| TestkitError::Json {
            path: path.clone(),
            source,
        })?;
        for (field, value) in self.common_fields().into_iter().chain(self.family_fields()) {
            config[field] = value;
        }
        self.set_rope(&mut config);
        self.set_storage(&mut config);
        Ok(config)
    }

    fn common_fields(&self) -> Vec<(&'static str, Value)> {
        let dtype = match self.spelling {
            Spelling::Parameters => "dtype",
            Spelling::Hub => "torch_dtype",
        };
        vec![
            (dtype, json!(self.element.config_name())),
            ("vocab_size", json!(self.vocab)),
            ("hidden_size", json!(self.hidden)),
            ("num_hidden_layers", json!(self.layers)),
            ("num_attention_heads", json!(self.heads)),
            ("num_key_value_heads", json!(self.kv_heads)),
            ("rms_norm_eps", json!(self.epsilon)),
            ("tie_word_embeddings", json!(self.tied)),
        ]
    }

    fn family_fields(&self) -> Vec<(&'static str, Value)> {
        let experts = json!(self.experts);
        let expert_width = json!(self.expert_intermediate);
        let dense_width = json!(self.dense_intermediate);
        let top_k = json!(self.top_k);
        let head_dim = json!(self.head_dim);
        match self.family {
            Family::Mixtral => vec![
                ("head_dim", head_dim),
                ("intermediate_size", expert_width),
                ("num_local_experts", experts),
                ("num_experts_per_tok", top_k),
                ("sliding_window", json!(self.window)),
            ],
            Family::Qwen2Moe => vec![
                ("intermediate_size", dense_width),
                ("moe_intermediate_size", expert_width),
                ("shared_expert_intermediate_size", json!(self.shared_width())),
                ("num_experts", experts),
                ("num_experts_per_tok", top_k),
                ("norm_topk_prob", json!(self.renormalise)),
                ("decoder_sparse_step", json!(self.sparse_step)),
                ("mlp_only_layers", json!((0..self.dense_first).collect::<Vec<_>>())),
                ("use_sliding_window", json!(self.window.is_some())),
                ("sliding_window", json!(self.window.unwrap_or(0))),
                ("layer_types", json!(self.layer_types("sliding_attention"))),
            ],
            Family::Qwen3Moe => vec![
                ("head_dim", head_dim),
                ("intermediate_size", dense_width),
                ("moe_intermediate_size", expert_width),
                ("num_local_experts", experts),
                ("num_experts_per_tok", top_k),
                ("norm_topk_prob", json!(self.renormalise)),
                ("decoder_sparse_step", json!(self.sparse_step)),
                ("mlp_only_layers", json!((0..self.dense_first).collect::<Vec<_>>())),
                ("use_sliding_window", json!(self.window.is_some())),
                ("sliding_window", json!(self.window)),
            ],
            Family::Olmoe => vec![
                ("intermediate_size", expert_width),
                ("num_experts", experts),
                ("num_experts_per_tok", top_k),
                ("norm_topk_prob", json!(self.renormalise)),
                ("clip_qkv", json!(self.clip_qkv)),
            ],
            Family::GraniteMoe => vec![
                ("intermediate_size", expert_width),
                ("num_local_experts", experts),
                ("num_experts_per_tok", top_k),
                ("attention_multiplier", json!(0.9 / (self.head_dim as f64).sqrt())),
            ],
            Family::PhiMoe => vec![
                ("intermediate_size", expert_width),
                ("num_local_experts", experts),
                ("sliding_window", json!(self.window)),
            ],
            Family::DeepseekV2 | Family::DeepseekV3 => {
                let mut fields = vec![
                    // Upstream writes these two as well; they say nothing that the others do not.
                    ("num_key_value_heads", json!(self.heads)),
                    ("head_dim", json!(self.latent.rope)),
                    ("qk_head_dim", json!(self.latent.nope + self.latent.rope)),
                    ("q_lora_rank", json!(self.latent.q_rank)),
                    ("kv_lora_rank", json!(self.latent.kv_rank)),
                    ("qk_nope_head_dim", json!(self.latent.nope)),
                    ("qk_rope_head_dim", json!(self.latent.rope)),
                    ("v_head_dim", json!(self.latent.value)),
                    ("attention_bias", json!(self.biases)),
                    ("intermediate_size", dense_width),
                    ("moe_intermediate_size", expert_width),
                    ("n_routed_experts", experts),
                    ("num_experts_per_tok", top_k),
                    ("n_shared_experts", json!(self.shared_experts)),
                    ("n_group", json!(self.groups)),
                    ("topk_group", json!(self.top_groups)),
                    ("first_k_dense_replace", json!(self.dense_first)),
                ];
                if self.family == Family::DeepseekV2 {
                    let method = if self.groups > 1 {
                        "group_limited_greedy"
                    } else {
                        "greedy"
                    };
                    fields.push(("topk_method", json!(method)));
                } else {
                    fields.push(("norm_topk_prob", json!(self.renormalise)));
                }
                fields
            }
            Family::GptOss => vec![
                ("head_dim", head_dim),
                ("intermediate_size", expert_width),
                ("num_local_experts", experts),
                ("num_experts_per_tok", top_k),
                ("sliding_window", json!(self.window.unwrap_or(8))),
                ("layer_types", json!(self.layer_types("sliding_attention"))),
            ],
            Family::Glm4Moe => vec![
                ("head_dim", head_dim),
                ("intermediate_size", dense_width),
                ("moe_intermediate_size", expert_width),
                ("n_routed_experts", experts),
                ("num_experts_per_tok", top_k),
                ("n_shared_experts", json!(self.shared_experts)),
                ("n_group", json!(self.groups)),
                ("topk_group", json!(self.top_groups)),
                ("first_k_dense_replace", json!(self.dense_first)),
                ("norm_topk_prob", json!(self.renormalise)),
                ("use_qk_norm", json!(self.qk_norm)),
                ("attention_bias", json!(self.biases)),
            ],
            Family::Ernie45Moe => vec![
                ("intermediate_size", dense_width),
                ("moe_intermediate_size", expert_width),
                ("moe_num_experts", experts),
                ("moe_k", top_k),
                ("moe_num_shared_experts", json!(self.shared_experts)),
                ("moe_layer_start_index", json!(self.dense_first)),
                ("moe_layer_end_index", json!(self.layers - 1)),
                ("moe_layer_interval", json!(self.sparse_step)),
            ],
            Family::Llama4Text => vec![
                ("head_dim", head_dim),
                ("intermediate_size", expert_width),
                ("intermediate_size_mlp", dense_width),
                ("num_local_experts", experts),
                ("interleave_moe_layer_step", json!(self.sparse_step)),
                (
                    "moe_layers",
                    json!(
                        (0..self.layers)
                            .filter(|&layer| self.is_moe_layer(layer))
                            .collect::<Vec<_>>()
                    ),
                ),
                (
                    "no_rope_layers",
                    json!(
                        (0..self.layers)
                            .map(|layer| u8::from(self.llama4_rotates(layer)))
                            .collect::<Vec<_>>()
                    ),
                ),
                ("layer_types", json!(self.layer_types("chunked_attention"))),
                ("attention_chunk_size", json!(self.window.unwrap_or(16))),
                ("use_qk_norm", json!(self.qk_norm)),
            ],
            Family::Llama => vec![
                ("head_dim", head_dim),
                ("intermediate_size", dense_width),
                ("attention_bias", json!(self.biases)),
                ("mlp_bias", json!(self.biases)),
            ],
            Family::Qwen3 => vec![
                ("head_dim", head_dim),
                ("intermediate_size", dense_width),
                ("attention_bias", json!(self.biases)),
                ("use_sliding_window", json!(self.window.is_some())),
                ("sliding_window", json!(self.window)),
                ("layer_types", json!(self.layer_types("sliding_attention"))),
            ],
        }
    }

    /// Every third layer of llama4 goes without rotary.
    fn llama4_rotates(&self, layer: usize) -> bool {
        layer % 3 != 2
    }

    fn layer_types(&self, limited: &'static str) -> Vec<&'static str> {
        let is_limited = |layer: usize| match self.family {
            Family::Llama4Text => self.llama4_rotates(layer),
            Family::GptOss => layer.is_multiple_of(2),
            _ => self.window.is_some() && layer.is_multiple_of(2),
        };
        (0..self.layers)
            .map(|layer| if is_limited(layer) { limited } else { "full_attention" })
            .collect()
    }

    /// Width of all shared experts together.
    pub(crate) fn shared_width(&self) -> usize {
        match self.family {
            Family::Qwen2Moe => self.shared_experts * self.expert_intermediate + 1,
            Family::Llama4Text => self.expert_intermediate,
            _ => self.shared_experts * self.expert_intermediate,
        }
    }

    fn set_rope(&self, config: &mut Value) {
        let mut rope = match (self.family, self.rope) {
            (Family::PhiMoe, _) => {
                let factors = |first: f64| {
                    (0..self.head_dim / 2)
                        .map(|i| first + 0.1 * i as f64)
                        .collect::<Vec<_>>()
                };
                json!({
                    "rope_type": "longrope", "short_factor": factors(1.0), "long_factor": factors(1.5),
                    "short_mscale": 1.2, "long_mscale": 1.35, "original_max_position_embeddings": 128,
                })
            }
            (Family::GptOss, _) => json!({
                "rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": false,
                "original_max_position_embeddings": 64,
            }),
            (_, TinyRope::Default) => json!({ "rope_type": "default" }),
            (_, TinyRope::Linear) => json!({ "rope_type": "linear", "factor": 2.5 }),
            (_, TinyRope::Llama3) => json!({
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }),
            (_, TinyRope::Yarn) => json!({
                "rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
                "original_max_position_embeddings": 64,
            }),
        };
        if matches!(self.family, Family::DeepseekV2 | Family::DeepseekV3) && self.rope == TinyRope::Yarn {
            rope["mscale"] = json!(0.8);
            rope["mscale_all_dim"] = json!(0.6);
        }
        match self.spelling {
            Spelling::Parameters => {
                rope["rope_theta"] = config["rope_parameters"]["rope_theta"].clone();
                if self.family == Family::Glm4Moe {
                    rope["partial_rotary_factor"] = json!(0.5);
                }
                config["rope_parameters"] = rope;
            }
            Spelling::Hub => {
                config["rope_scaling"] = if rope["rope_type"] == "default" {
                    Value::Null
                } else {
                    rope
                };
            }
        }
    }

    fn set_storage(&self, config: &mut Value) {
        match self.storage {
            Storage::Plain => {}
            Storage::Fp8Block => {
                config["quantization_config"] = json!({
                    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                    "weight_block_size": [128, 128],
                });
            }
            Storage::Mxfp4 => {
                config["quantization_config"] = json!({
                    "quant_method": "mxfp4",
                    "modules_to_not_convert": [
                        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
                    ],
                });
            }
        }
    }
}
