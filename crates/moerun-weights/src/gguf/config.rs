//! GGUF metadata → the text of a `config.json`, so that the config of a GGUF file passes the same parser and the same
//! checks as any other.
//!
//! Only architectures whose meaning has been compared with the converter and the graphs of llama.cpp are read. A key
//! of the architecture that is not known here may change the result, so it is refused rather than passed over.

mod architecture;
mod attention;
mod experts;
mod rope;

use architecture::Architecture;
use serde_json::{Map, Value, json};

use super::{GgufFile, GgufMetadata};
use crate::WeightsError;

/// What the metadata and the presence of tensors say, as the text of a `config.json`.
///
/// # Errors
/// An architecture, a key or a value that is not known here is named.
pub(crate) fn config_json(file: &GgufFile) -> Result<String, WeightsError> {
    let metadata = &file.metadata;
    const NAME: &str = "general.architecture";
    let name = metadata
        .text(NAME)?
        .ok_or_else(|| metadata.refuse(NAME, Architecture::names(), "nothing"))?;
    let architecture = Architecture::named(name)
        .ok_or_else(|| metadata.refuse(NAME, format!("one of {}", Architecture::names()), format!("{name:?}")))?;
    if let Some(parts) = metadata.unsigned("split.count")?.filter(|parts| *parts > 1) {
        return Err(metadata.refuse("split.count", "one file (merge the parts first)", parts));
    }
    let reader = Reader {
        file,
        metadata,
        name,
        architecture,
    };
    reader.refuse_unknown_keys()?;
    let mut fields = reader.common()?;
    reader.experts(&mut fields)?;
    reader.special_tokens(&mut fields)?;
    // A rank of null is a statement: queries have no latent of their own.
    fields.retain(|name, value| !value.is_null() || name == "q_lora_rank");
    Ok(Value::Object(fields).to_string())
}

struct Reader<'a> {
    file: &'a GgufFile,
    metadata: &'a GgufMetadata,
    /// Of the architecture, which begins its keys.
    name: &'a str,
    architecture: Architecture,
}

impl Reader<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.name)
    }

    fn refuse_unknown_keys(&self) -> Result<(), WeightsError> {
        let prefix = self.key("");
        match self.metadata.keys().find(|key| {
            key.strip_prefix(&prefix)
                .is_some_and(|name| !self.architecture.knows(name))
        }) {
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
        let attention = match self.architecture {
            Architecture::Deepseek2 => self.latent_attention(heads)?,
            _ => self.grouped_attention(heads)?,
        };
        let epsilon = self.float("attention.layer_norm_rms_epsilon")?.ok_or_else(|| {
            self.metadata
                .refuse(&self.key("attention.layer_norm_rms_epsilon"), "a number", "nothing")
        })?;
        let embedding = self
            .file
            .tensors
            .iter()
            .find(|tensor| tensor.name == "token_embd.weight");
        const TOKENS: &str = "tokenizer.ggml.tokens";
        let vocabulary = match (embedding, self.metadata.texts(TOKENS)?) {
            (Some(embedding), Some(tokens)) if embedding.shape[0] != tokens.len() => {
                let wanted = format!("{} tokens, one per row of token_embd.weight", embedding.shape[0]);
                return Err(self.metadata.refuse(TOKENS, wanted, tokens.len()));
            }
            (Some(embedding), _) => embedding.shape[0],
            (None, Some(tokens)) => tokens.len(),
            (None, None) => return Err(self.metadata.refuse("token_embd.weight", "a tensor", "nothing")),
        };
        let value = json!({
            "model_type": self.model_type()?,
            "hidden_size": self.required("embedding_length")?,
            "num_hidden_layers": self.layers()?,
            "max_position_embeddings": self.required("context_length")?,
            "num_attention_heads": heads,
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
        let mut fields = attention;
        if let Value::Object(others) = value {
            fields.extend(others);
        }
        Ok(fields)
    }

    /// Layers of the model, without those that predict further tokens.
    fn layers(&self) -> Result<u64, WeightsError> {
        const FURTHER: &str = "nextn_predict_layers";
        let (layers, further) = (self.required("block_count")?, self.size(FURTHER)?.unwrap_or(0));
        layers.checked_sub(further).filter(|layers| *layers > 0).ok_or_else(|| {
            let wanted = format!("fewer than the {layers} layers there are");
            self.metadata.refuse(&self.key(FURTHER), wanted, further)
        })
    }

    fn model_type(&self) -> Result<&'static str, WeightsError> {
        let experts = self.size("expert_count")?.unwrap_or(0) > 0;
        Ok(match self.architecture {
            Architecture::Llama if experts => "mixtral",
            Architecture::Llama => "llama",
            Architecture::Qwen2Moe => "qwen2_moe",
            Architecture::Qwen3Moe => "qwen3_moe",
            Architecture::Qwen3 => "qwen3",
            Architecture::Olmoe => "olmoe",
            Architecture::GraniteMoe => "granitemoe",
            Architecture::GptOss => "gpt_oss",
            Architecture::Deepseek2 if self.scores_by_sigmoid()? => "deepseek_v3",
            Architecture::Deepseek2 => "deepseek_v2",
            Architecture::Glm4Moe => "glm4_moe",
            Architecture::Ernie45Moe => "ernie4_5_moe",
            Architecture::Llama4 => "llama4_text",
        })
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
