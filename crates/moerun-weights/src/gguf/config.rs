//! GGUF metadata → the text of a `config.json`, so that the config of a GGUF file passes the same parser and the same
//! checks as any other.
//!
//! Only architectures whose meaning has been compared with the converter and the graphs of llama.cpp are read. A key
//! of the architecture that is not known here may change the result, so it is refused rather than passed over.

use serde_json::{Map, Value, json};

use super::{GgufFile, GgufMetadata};
use crate::WeightsError;

/// Keys that say nothing about the result, or that follow from the tensors.
const SILENT: [&str; 2] = ["vocab_size", "rope.scaling.finetuned"];

/// Keys of every architecture.
const COMMON: [&str; 18] = [
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
    "expert_count",
    "expert_used_count",
    "expert_feed_forward_length",
    "expert_shared_feed_forward_length",
];

/// Keys of granite alone.
const GRANITE: [&str; 4] = ["attention.scale", "embedding_scale", "residual_scale", "logit_scale"];

/// The architectures that can be read, by the names that llama.cpp gives them.
const ARCHITECTURES: [&str; 6] = ["llama", "qwen2moe", "qwen3", "qwen3moe", "olmoe", "granitemoe"];

/// What the metadata and the presence of tensors say, as the text of a `config.json`.
///
/// # Errors
/// An architecture, a key or a value that is not known here is named.
pub(crate) fn config_json(file: &GgufFile) -> Result<String, WeightsError> {
    let metadata = &file.metadata;
    let architecture = metadata
        .text("general.architecture")?
        .ok_or_else(|| metadata.refuse("general.architecture", ARCHITECTURES.join(", "), "nothing"))?;
    if !ARCHITECTURES.contains(&architecture) {
        return Err(metadata.refuse(
            "general.architecture",
            format!("one of {}", ARCHITECTURES.join(", ")),
            format!("{architecture:?}"),
        ));
    }
    if let Some(parts) = metadata.unsigned("split.count")?.filter(|parts| *parts > 1) {
        return Err(metadata.refuse("split.count", "one file (merge the parts first)", parts));
    }
    let reader = Reader {
        file,
        metadata,
        architecture,
    };
    reader.refuse_unknown_keys()?;
    let mut fields = reader.common()?;
    reader.experts(&mut fields)?;
    reader.special_tokens(&mut fields)?;
    fields.retain(|_, value| !value.is_null());
    Ok(Value::Object(fields).to_string())
}

struct Reader<'a> {
    file: &'a GgufFile,
    metadata: &'a GgufMetadata,
    architecture: &'a str,
}

impl Reader<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    fn refuse_unknown_keys(&self) -> Result<(), WeightsError> {
        let prefix = self.key("");
        let known = |name: &str| {
            COMMON.contains(&name)
                || SILENT.contains(&name)
                || self.architecture == "granitemoe" && GRANITE.contains(&name)
        };
        match self
            .metadata
            .keys()
            .find(|key| key.strip_prefix(&prefix).is_some_and(|name| !known(name)))
        {
            Some(key) => Err(self
                .metadata
                .refuse(key, "no key that is unknown in this architecture", "it")),
            None => Ok(()),
        }
    }

    fn size(&self, name: &str) -> Result<Option<u64>, WeightsError> {
        self.metadata.unsigned(&self.key(name))
    }

    /// A size that must be there.
    fn required(&self, name: &str) -> Result<u64, WeightsError> {
        let missing = || self.metadata.refuse(&self.key(name), "a size", "nothing");
        self.size(name)?.ok_or_else(missing)
    }

    fn float(&self, name: &str) -> Result<Option<f64>, WeightsError> {
        self.metadata.float(&self.key(name))
    }

    fn has(&self, tensor: &str) -> bool {
        self.file.tensors.iter().any(|found| found.name == tensor)
    }

    fn common(&self) -> Result<Map<String, Value>, WeightsError> {
        let heads = self.required("attention.head_count")?;
        let head_dim = match self.size("attention.key_length")? {
            Some(head_dim) => head_dim,
            None => self.required("embedding_length")?.checked_div(heads).ok_or_else(|| {
                self.metadata
                    .refuse(&self.key("attention.head_count"), "at least 1", heads)
            })?,
        };
        for name in ["attention.value_length", "rope.dimension_count"] {
            if let Some(found) = self.size(name)?.filter(|found| *found != head_dim) {
                let wanted = format!("{head_dim}, the width of a head");
                return Err(self.metadata.refuse(&self.key(name), wanted, found));
            }
        }
        let epsilon = self.float("attention.layer_norm_rms_epsilon")?.ok_or_else(|| {
            self.metadata
                .refuse(&self.key("attention.layer_norm_rms_epsilon"), "a number", "nothing")
        })?;
        let embedding = self
            .file
            .tensors
            .iter()
            .find(|tensor| tensor.name == "token_embd.weight");
        let vocabulary = match (embedding, self.metadata.texts("tokenizer.ggml.tokens")?) {
            (Some(embedding), _) => embedding.shape[0],
            (None, Some(tokens)) => tokens.len(),
            (None, None) => return Err(self.metadata.refuse("token_embd.weight", "a tensor", "nothing")),
        };
        let value = json!({
            "model_type": self.model_type()?,
            "hidden_size": self.required("embedding_length")?,
            "num_hidden_layers": self.required("block_count")?,
            "max_position_embeddings": self.required("context_length")?,
            "num_attention_heads": heads,
            "num_key_value_heads": self.size("attention.head_count_kv")?.unwrap_or(heads),
            "head_dim": head_dim,
            "intermediate_size": self.size("feed_forward_length")?,
            "rms_norm_eps": epsilon,
            "rope_theta": self.float("rope.freq_base")?.unwrap_or(10_000.0),
            "rope_scaling": self.rope_scaling()?,
            "vocab_size": vocabulary,
            "hidden_act": "silu",
            "tie_word_embeddings": !self.has("output.weight"),
            "attention_bias": self.has("blk.0.attn_q.bias"),
            "qkv_bias": self.has("blk.0.attn_q.bias"),
            "mlp_bias": self.has("blk.0.ffn_gate.bias"),
            "attention_multiplier": self.float("attention.scale")?,
            "embedding_multiplier": self.float("embedding_scale")?,
            "residual_multiplier": self.float("residual_scale")?,
            "logits_scaling": self.float("logit_scale")?,
        });
        match value {
            Value::Object(fields) => Ok(fields),
            _ => Ok(Map::new()),
        }
    }

    fn model_type(&self) -> Result<&'static str, WeightsError> {
        let experts = self.size("expert_count")?.unwrap_or(0) > 0;
        Ok(match (self.architecture, experts) {
            ("llama", false) => "llama",
            ("llama", true) => "mixtral",
            ("qwen2moe", _) => "qwen2_moe",
            ("qwen3moe", _) => "qwen3_moe",
            ("qwen3", _) => "qwen3",
            ("olmoe", _) => "olmoe",
            _ => "granitemoe",
        })
    }

    fn rope_scaling(&self) -> Result<Value, WeightsError> {
        const FACTORS: &str = "rope_freqs.weight";
        let key = self.key("rope.scaling.type");
        let kind = self.metadata.text(&key)?.unwrap_or("none");
        let factors = self.file.tensors.iter().find(|tensor| tensor.name == FACTORS);
        match (kind, factors) {
            ("none", None) => Ok(Value::Null),
            ("none", Some(factors)) if self.architecture == "llama" => {
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
            ("linear", None) => Ok(json!({ "rope_type": "linear", "factor": self.float("rope.scaling.factor")? })),
            ("yarn", None) => Ok(json!({
                "rope_type": "yarn",
                "factor": self.float("rope.scaling.factor")?,
                "original_max_position_embeddings": self.size("rope.scaling.original_context_length")?,
            })),
            (other, None) => Err(self.metadata.refuse(&key, "none, linear or yarn", format!("{other:?}"))),
            (other, Some(_)) => {
                let wanted = format!("no scaling beside {FACTORS}, and {FACTORS} in architecture llama alone");
                Err(self.metadata.refuse(&key, wanted, format!("{other:?}")))
            }
        }
    }

    fn experts(&self, fields: &mut Map<String, Value>) -> Result<(), WeightsError> {
        let count = self.size("expert_count")?.unwrap_or(0);
        if count == 0 {
            return Ok(());
        }
        let layers = self.required("block_count")?.min(self.file.tensors.len() as u64);
        let dense: Vec<u64> = (0..layers)
            .filter(|layer| self.has(&format!("blk.{layer}.ffn_gate.weight")))
            .collect();
        let used = self.required("expert_used_count")?;
        let width = match self.size("expert_feed_forward_length")? {
            Some(width) => width,
            None => self.required("feed_forward_length")?,
        };
        fields.insert("num_experts".to_owned(), json!(count));
        fields.insert("num_local_experts".to_owned(), json!(count));
        fields.insert("num_experts_per_tok".to_owned(), json!(used));
        match self.architecture {
            "qwen2moe" | "qwen3moe" => {
                fields.insert("moe_intermediate_size".to_owned(), json!(width));
                fields.insert("mlp_only_layers".to_owned(), json!(dense));
                // Not in the metadata: the graphs of llama.cpp divide in the one architecture and not in the other.
                fields.insert("norm_topk_prob".to_owned(), json!(self.architecture == "qwen3moe"));
            }
            _ => {
                fields.insert("intermediate_size".to_owned(), json!(width));
            }
        }
        match (self.architecture, self.size("expert_shared_feed_forward_length")?) {
            ("qwen2moe", shared) => {
                fields.insert("shared_expert_intermediate_size".to_owned(), json!(shared));
            }
            (_, Some(1..)) => {
                let key = self.key("expert_shared_feed_forward_length");
                return Err(self
                    .metadata
                    .refuse(&key, "no shared experts in this architecture", "some"));
            }
            _ => {}
        }
        Ok(())
    }

    /// Ids of the tokenizer that begin and end sequences; the end of a turn ends one as well.
    fn special_tokens(&self, fields: &mut Map<String, Value>) -> Result<(), WeightsError> {
        let id = |name: &str| self.metadata.token_id(&format!("tokenizer.ggml.{name}_token_id"));
        let mut ends: Vec<u32> = [id("eos")?, id("eot")?, id("eom")?].into_iter().flatten().collect();
        ends.dedup();
        fields.insert("eos_token_id".to_owned(), json!(ends));
        fields.insert("bos_token_id".to_owned(), json!(id("bos")?));
        fields.insert("pad_token_id".to_owned(), json!(id("padding")?));
        Ok(())
    }
}
