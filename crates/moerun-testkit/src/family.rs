//! The decoder families, and where their golden folders are.

use std::path::PathBuf;

/// A decoder family; [`Family::model_type`] is what its `config.json` calls it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Family {
    Mixtral,
    Qwen2Moe,
    Qwen3Moe,
    Olmoe,
    GraniteMoe,
    PhiMoe,
    DeepseekV2,
    DeepseekV3,
    GptOss,
    Glm4Moe,
    Ernie45Moe,
    Llama4Text,
    Llama,
    Qwen3,
}

/// Every family, dense ones last.
pub const ALL_FAMILIES: [Family; 14] = [
    Family::Mixtral,
    Family::Qwen2Moe,
    Family::Qwen3Moe,
    Family::Olmoe,
    Family::GraniteMoe,
    Family::PhiMoe,
    Family::DeepseekV2,
    Family::DeepseekV3,
    Family::GptOss,
    Family::Glm4Moe,
    Family::Ernie45Moe,
    Family::Llama4Text,
    Family::Llama,
    Family::Qwen3,
];

impl Family {
    /// `model_type` of the config, and name of the golden folder.
    pub fn model_type(self) -> &'static str {
        match self {
            Family::Mixtral => "mixtral",
            Family::Qwen2Moe => "qwen2_moe",
            Family::Qwen3Moe => "qwen3_moe",
            Family::Olmoe => "olmoe",
            Family::GraniteMoe => "granitemoe",
            Family::PhiMoe => "phimoe",
            Family::DeepseekV2 => "deepseek_v2",
            Family::DeepseekV3 => "deepseek_v3",
            Family::GptOss => "gpt_oss",
            Family::Glm4Moe => "glm4_moe",
            Family::Ernie45Moe => "ernie4_5_moe",
            Family::Llama4Text => "llama4_text",
            Family::Llama => "llama",
            Family::Qwen3 => "qwen3",
        }
    }

    /// The class name that upstream writes into `architectures`.
    pub fn architecture(self) -> &'static str {
        match self {
            Family::Mixtral => "MixtralForCausalLM",
            Family::Qwen2Moe => "Qwen2MoeForCausalLM",
            Family::Qwen3Moe => "Qwen3MoeForCausalLM",
            Family::Olmoe => "OlmoeForCausalLM",
            Family::GraniteMoe => "GraniteMoeForCausalLM",
            Family::PhiMoe => "PhimoeForCausalLM",
            Family::DeepseekV2 => "DeepseekV2ForCausalLM",
            Family::DeepseekV3 => "DeepseekV3ForCausalLM",
            Family::GptOss => "GptOssForCausalLM",
            Family::Glm4Moe => "Glm4MoeForCausalLM",
            Family::Ernie45Moe => "Ernie4_5_MoeForCausalLM",
            Family::Llama4Text => "Llama4ForCausalLM",
            Family::Llama => "LlamaForCausalLM",
            Family::Qwen3 => "Qwen3ForCausalLM",
        }
    }

    /// The family with this `model_type`.
    pub fn from_model_type(model_type: &str) -> Option<Self> {
        ALL_FAMILIES
            .into_iter()
            .find(|family| family.model_type() == model_type)
    }

    /// Whether the family has experts.
    pub fn has_experts(self) -> bool {
        !matches!(self, Family::Llama | Family::Qwen3)
    }
}

/// The golden folder of a family.
pub fn golden_dir(family: Family) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden")).join(family.model_type())
}
