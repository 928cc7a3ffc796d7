//! The architectures that can be read, and the keys that each may have.

/// An architecture of llama.cpp whose meaning has been compared with its graphs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Architecture {
    Llama,
    Qwen2Moe,
    Qwen3,
    Qwen3Moe,
    Olmoe,
    GraniteMoe,
    GptOss,
    Deepseek2,
    Glm4Moe,
    Ernie45Moe,
    Llama4,
}

/// Names in `general.architecture`.
const NAMES: [(&str, Architecture); 11] = [
    ("llama", Architecture::Llama),
    ("qwen2moe", Architecture::Qwen2Moe),
    ("qwen3", Architecture::Qwen3),
    ("qwen3moe", Architecture::Qwen3Moe),
    ("olmoe", Architecture::Olmoe),
    ("granitemoe", Architecture::GraniteMoe),
    ("gpt-oss", Architecture::GptOss),
    ("deepseek2", Architecture::Deepseek2),
    ("glm4moe", Architecture::Glm4Moe),
    ("ernie4_5-moe", Architecture::Ernie45Moe),
    ("llama4", Architecture::Llama4),
];

/// Keys that say nothing about the result, or that follow from the tensors.
const SILENT: [&str; 2] = ["vocab_size", "rope.scaling.finetuned"];

/// Keys of every architecture.
const COMMON: [&str; 20] = [
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "expert_count",
    "expert_used_count",
    "expert_feed_forward_length",
    "expert_shared_feed_forward_length",
];

/// Keys of the architectures whose routers follow DeepSeek's.
const DEEPSEEK_ROUTER: [&str; 8] = [
    "leading_dense_block_count",
    "expert_shared_count",
    "expert_weights_scale",
    "expert_weights_norm",
    "expert_gating_func",
    "expert_group_count",
    "expert_group_used_count",
    "nextn_predict_layers",
];

impl Architecture {
    pub(super) fn named(name: &str) -> Option<Self> {
        NAMES
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, architecture)| *architecture)
    }

    /// All names, as an error says them.
    pub(super) fn names() -> String {
        NAMES.map(|(name, _)| name).join(", ")
    }

    /// Whether a key means something that is read here, or nothing.
    pub(super) fn knows(self, key: &str) -> bool {
        use Architecture::*;
        let own: &[&str] = match self {
            GraniteMoe => &["attention.scale", "embedding_scale", "residual_scale", "logit_scale"],
            GptOss => &["attention.sliding_window"],
            Deepseek2 => &[
                "attention.q_lora_rank",
                "attention.kv_lora_rank",
                "attention.key_length_mla",
                "attention.value_length_mla",
                "rope.scaling.yarn_log_multiplier",
            ],
            Ernie45Moe => &[
                "leading_dense_block_count",
                "interleave_moe_layer_step",
                "expert_shared_count",
            ],
            Llama4 => &["interleave_moe_layer_step"],
            Llama | Qwen2Moe | Qwen3 | Qwen3Moe | Olmoe | Glm4Moe => &[],
        };
        let router = matches!(self, Deepseek2 | Glm4Moe) && DEEPSEEK_ROUTER.contains(&key);
        router || [&COMMON[..], &SILENT, own].iter().any(|keys| keys.contains(&key))
    }
}
