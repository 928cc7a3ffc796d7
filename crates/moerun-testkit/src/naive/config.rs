//! Fields of `config.json`, looked up by their upstream names when they are needed.

use std::{fs, path::Path};

use serde_json::Value;

use crate::{Family, TestkitError};

#[derive(Debug)]
pub(crate) struct Config {
    pub(crate) family: Family,
    json: Value,
}

impl Config {
    pub(crate) fn read(path: &Path) -> Result<Self, TestkitError> {
        let text = fs::read_to_string(path).map_err(TestkitError::io(path))?;
        let json: Value = serde_json::from_str(&text).map_err(|source| TestkitError::Json {
            path: path.to_path_buf(),
            source,
        })?;
        let model_type = json["model_type"].as_str().unwrap_or_default();
        let family = Family::from_model_type(model_type).ok_or_else(|| TestkitError::Unknown {
            what: "model_type",
            name: model_type.to_owned(),
        })?;
        Ok(Config { family, json })
    }

    /// A field that is there and not null.
    fn get(&self, field: &str) -> Option<&Value> {
        self.json.get(field).filter(|value| !value.is_null())
    }

    pub(crate) fn optional_size(&self, field: &str) -> Result<Option<usize>, TestkitError> {
        self.get(field)
            .map(|value| {
                value
                    .as_u64()
                    .map(|size| size as usize)
                    .ok_or_else(|| wrong(field, value, "a size"))
            })
            .transpose()
    }

    pub(crate) fn size(&self, field: &str) -> Result<usize, TestkitError> {
        self.optional_size(field)?
            .ok_or_else(|| wrong(field, &Value::Null, "a size"))
    }

    pub(crate) fn size_or(&self, field: &str, default: usize) -> Result<usize, TestkitError> {
        Ok(self.optional_size(field)?.unwrap_or(default))
    }

    pub(crate) fn optional_float(&self, field: &str) -> Result<Option<f64>, TestkitError> {
        self.get(field)
            .map(|value| value.as_f64().ok_or_else(|| wrong(field, value, "a number")))
            .transpose()
    }

    pub(crate) fn float(&self, field: &str) -> Result<f64, TestkitError> {
        self.optional_float(field)?
            .ok_or_else(|| wrong(field, &Value::Null, "a number"))
    }

    pub(crate) fn float_or(&self, field: &str, default: f64) -> Result<f64, TestkitError> {
        Ok(self.optional_float(field)?.unwrap_or(default))
    }

    pub(crate) fn flag_or(&self, field: &str, default: bool) -> Result<bool, TestkitError> {
        match self.get(field) {
            Some(value) => value.as_bool().ok_or_else(|| wrong(field, value, "true or false")),
            None => Ok(default),
        }
    }

    pub(crate) fn text_or<'a>(&'a self, field: &str, default: &'a str) -> &'a str {
        self.get(field).and_then(Value::as_str).unwrap_or(default)
    }

    /// Entry `index` of an array, if the array is there and not empty.
    pub(crate) fn entry(&self, field: &str, index: usize) -> Option<&Value> {
        self.get(field)?.as_array()?.get(index)
    }

    /// Whether an array of numbers holds `number`; `None` if there is no such array.
    fn lists(&self, field: &str, number: usize) -> Option<bool> {
        Some(
            self.get(field)?
                .as_array()?
                .iter()
                .any(|entry| entry.as_u64() == Some(number as u64)),
        )
    }

    /// A field of `rope_parameters` (transformers 5) or `rope_scaling` (the Hub's older configs).
    pub(crate) fn rope(&self, field: &str) -> Option<&Value> {
        ["rope_parameters", "rope_scaling"]
            .into_iter()
            .find_map(|object| self.get(object)?.get(field))
            .filter(|value| !value.is_null())
    }

    pub(crate) fn rope_float(&self, field: &str) -> Option<f64> {
        self.rope(field)?.as_f64()
    }

    pub(crate) fn rope_theta(&self) -> Result<f64, TestkitError> {
        match self.rope_float("rope_theta") {
            Some(theta) => Ok(theta),
            None => self.float_or("rope_theta", 10_000.0),
        }
    }

    pub(crate) fn rope_type(&self) -> &str {
        self.rope("rope_type")
            .or_else(|| self.rope("type"))
            .and_then(Value::as_str)
            .unwrap_or("default")
    }

    pub(crate) fn head_dim(&self) -> Result<usize, TestkitError> {
        let heads = self.size("num_attention_heads")?;
        self.size_or("head_dim", self.size("hidden_size")? / heads)
    }

    pub(crate) fn num_experts(&self) -> Result<usize, TestkitError> {
        for field in [
            "num_experts",
            "num_local_experts",
            "n_routed_experts",
            "moe_num_experts",
        ] {
            if let Some(count) = self.optional_size(field)? {
                return Ok(count);
            }
        }
        Err(wrong("num_experts", &Value::Null, "a size"))
    }

    pub(crate) fn top_k(&self) -> Result<usize, TestkitError> {
        self.size(if self.family == Family::Ernie45Moe {
            "moe_k"
        } else {
            "num_experts_per_tok"
        })
    }

    pub(crate) fn expert_intermediate(&self) -> Result<usize, TestkitError> {
        match self.family {
            Family::Mixtral
            | Family::PhiMoe
            | Family::Olmoe
            | Family::GraniteMoe
            | Family::GptOss
            | Family::Llama4Text => self.size("intermediate_size"),
            _ => self.size("moe_intermediate_size"),
        }
    }

    /// Width of the dense feed-forward of a layer without experts.
    pub(crate) fn dense_intermediate(&self) -> Result<usize, TestkitError> {
        self.size(if self.family == Family::Llama4Text {
            "intermediate_size_mlp"
        } else {
            "intermediate_size"
        })
    }

    pub(crate) fn is_moe_layer(&self, layer: usize) -> Result<bool, TestkitError> {
        let layers = self.size("num_hidden_layers")?;
        Ok(match self.family {
            Family::Llama | Family::Qwen3 => false,
            Family::Mixtral | Family::Olmoe | Family::GraniteMoe | Family::PhiMoe | Family::GptOss => true,
            Family::Qwen2Moe | Family::Qwen3Moe => {
                let dense = self.lists("mlp_only_layers", layer).unwrap_or(false);
                !dense && (layer + 1).is_multiple_of(self.size_or("decoder_sparse_step", 1)?)
            }
            Family::DeepseekV2 | Family::DeepseekV3 | Family::Glm4Moe => layer >= self.size("first_k_dense_replace")?,
            Family::Ernie45Moe => {
                let start = self.size_or("moe_layer_start_index", 0)?;
                // −1 stands for the last layer.
                let end = self.get("moe_layer_end_index").and_then(Value::as_i64).unwrap_or(-1);
                let end = usize::try_from(end).unwrap_or(layers - 1);
                let interval = self.size_or("moe_layer_interval", 1)?;
                (start..=end).contains(&layer) && (layer + 1).is_multiple_of(interval)
            }
            Family::Llama4Text => match self.lists("moe_layers", layer) {
                Some(listed) => listed,
                None => (layer + 1).is_multiple_of(self.size_or("interleave_moe_layer_step", 1)?),
            },
        })
    }

    /// Where a layer keeps its feed-forward or its experts.
    pub(crate) fn feed_forward_prefix(&self, layer: usize) -> String {
        let block = match self.family {
            Family::Mixtral | Family::PhiMoe | Family::GraniteMoe => "block_sparse_moe",
            Family::Llama4Text => "feed_forward",
            _ => "mlp",
        };
        format!("model.layers.{layer}.{block}")
    }
}

fn wrong(field: &str, found: &Value, wanted: &'static str) -> TestkitError {
    TestkitError::Field {
        field: field.to_owned(),
        wanted,
        found: found.to_string(),
    }
}
