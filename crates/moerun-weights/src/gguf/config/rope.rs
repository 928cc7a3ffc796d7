//! Rotary scaling. What has not been compared with llama.cpp is refused.

use serde_json::{Value, json};

use super::{Architecture, Reader};
use crate::WeightsError;

/// Divisors of the frequencies, in a tensor instead of keys (llama 3.1).
const FACTORS: &str = "rope_freqs.weight";

impl Reader<'_> {
    /// `rope_scaling`.
    pub(super) fn rope_scaling(&self) -> Result<Value, WeightsError> {
        let key = self.key("rope.scaling.type");
        let factor = self.float("rope.scaling.factor")?;
        // As llama.cpp: a factor without a type is linear.
        let default = if factor.is_some() { "linear" } else { "none" };
        let kind = self.metadata.text(&key)?.unwrap_or(default);
        let factors = self.file.tensors.iter().find(|tensor| tensor.name == FACTORS);
        match (kind, factors, self.architecture) {
            ("none", None, _) => Ok(json!({ "rope_type": "default" })),
            ("none", Some(factors), Architecture::Llama | Architecture::Llama4) => {
                let factors = factors
                    .floats(&self.file.map)
                    .ok_or_else(|| WeightsError::wrong_type(FACTORS, "F32", factors.dtype))?;
                // A divisor per frequency at any length is longrope with two equal sets and no factor on cos and sin.
                Ok(json!({
                    "rope_type": "longrope",
                    "short_factor": factors,
                    "long_factor": factors,
                    "attention_factor": 1.0,
                    "original_max_position_embeddings": self.required("context_length")?,
                }))
            }
            ("linear", None, Architecture::Llama | Architecture::Qwen3 | Architecture::Qwen3Moe) => {
                Ok(json!({ "rope_type": "linear", "factor": factor }))
            }
            (
                "yarn",
                None,
                Architecture::Llama
                | Architecture::Qwen2Moe
                | Architecture::Qwen3
                | Architecture::Qwen3Moe
                | Architecture::GptOss
                | Architecture::Deepseek2,
            ) => self.yarn(factor),
            (other, None, _) => {
                let wanted = "none, or linear or yarn in the architectures where they are known";
                Err(self.metadata.refuse(&key, wanted, format!("{other:?}")))
            }
            (other, Some(_), _) => {
                let wanted =
                    format!("no scaling beside {FACTORS}, and {FACTORS} in architectures llama and llama4 alone");
                Err(self.metadata.refuse(&key, wanted, format!("{other:?}")))
            }
        }
    }

    fn yarn(&self, factor: Option<f64>) -> Result<Value, WeightsError> {
        let key = self.key("rope.scaling.factor");
        let factor = factor.ok_or_else(|| self.metadata.refuse(&key, "a number, as the type is yarn", "nothing"))?;
        // llama.cpp takes these for granted, whatever the file says.
        for (name, wanted) in [
            ("rope.scaling.yarn_beta_fast", 32.0),
            ("rope.scaling.yarn_beta_slow", 1.0),
        ] {
            if let Some(found) = self.float(name)?.filter(|found| *found != wanted) {
                return Err(self.metadata.refuse(&self.key(name), format!("{wanted:.1}"), found));
            }
        }
        let mut scaling = json!({
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": self.size("rope.scaling.original_context_length")?,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        });
        match self.architecture {
            // The model's own code keeps the ends of the ramp as they are; llama.cpp rounds them.
            Architecture::GptOss => scaling["truncate"] = json!(false),
            Architecture::Deepseek2 => {
                let growth = self.attention_growth()?;
                scaling["mscale"] = json!(growth);
                scaling["mscale_all_dim"] = json!(growth);
            }
            _ => {}
        }
        Ok(scaling)
    }

    /// DeepSeek's `mscale_all_dim`, of which the file holds a tenth; `mscale` is taken for equal.
    fn attention_growth(&self) -> Result<f32, WeightsError> {
        const NAME: &str = "rope.scaling.yarn_log_multiplier";
        let wanted = || {
            self.metadata
                .refuse(&self.key(NAME), "a positive number, as the type is yarn", "nothing")
        };
        let tenth = self.float(NAME)?.filter(|tenth| *tenth > 0.0).ok_or_else(wanted)?;
        Ok(tenth as f32 / 0.1)
    }
}
