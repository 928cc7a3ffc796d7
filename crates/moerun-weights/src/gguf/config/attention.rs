//! Heads and what of them is rotated.

use serde_json::{Map, Value, json};

use super::{Architecture, Reader};
use crate::WeightsError;

impl Reader<'_> {
    pub(super) fn grouped_attention(&self, heads: u64) -> Result<Map<String, Value>, WeightsError> {
        let head_dim = match self.size("attention.key_length")? {
            Some(head_dim) => head_dim,
            None => self.required("embedding_length")?.checked_div(heads).ok_or_else(|| {
                self.metadata
                    .refuse(&self.key("attention.head_count"), "at least 1", heads)
            })?,
        };
        self.require("attention.value_length", head_dim, "the width of a head")?;
        let mut fields = Map::new();
        let mut set = |name: &str, value: Value| fields.insert(name.to_owned(), value);
        set("head_dim", json!(head_dim));
        set(
            "num_key_value_heads",
            json!(self.size("attention.head_count_kv")?.unwrap_or(heads)),
        );
        match self.architecture {
            Architecture::Glm4Moe => {
                let rotated = self.size("rope.dimension_count")?.unwrap_or(head_dim);
                set("partial_rotary_factor", json!(rotated as f64 / head_dim as f64));
                set("use_qk_norm", json!(self.has("blk.0.attn_q_norm.weight")));
            }
            _ => self.require("rope.dimension_count", head_dim, "the width of a head")?,
        }
        if self.architecture == Architecture::GptOss {
            set("sliding_window", json!(self.required("attention.sliding_window")?));
        }
        if self.architecture == Architecture::Llama4 {
            // Not in the file: llama.cpp and the released models have these.
            set("attention_chunk_size", json!(8192));
            set("no_rope_layer_interval", json!(4));
            set("attn_temperature_tuning", json!(true));
            set("attn_scale", json!(0.1));
            set("floor_scale", json!(8192));
        }
        Ok(fields)
    }

    /// llama.cpp describes the absorbed form, one key of the latent's width for all heads, and beside it the heads that
    /// were trained.
    pub(super) fn latent_attention(&self, heads: u64) -> Result<Map<String, Value>, WeightsError> {
        const WIDTH: &str = "attention.key_length_mla";
        let (latent, rotated) = (
            self.required("attention.kv_lora_rank")?,
            self.required("rope.dimension_count")?,
        );
        let width = self.required(WIDTH)?;
        let plain = width.checked_sub(rotated).filter(|plain| *plain > 0).ok_or_else(|| {
            let wanted = format!("more than the {rotated} that are rotated");
            self.metadata.refuse(&self.key(WIDTH), wanted, width)
        })?;
        self.require(
            "attention.head_count_kv",
            1,
            "as latent attention has one key for all heads",
        )?;
        self.require(
            "attention.key_length",
            latent.saturating_add(rotated),
            "the latent and the rotated part",
        )?;
        self.require("attention.value_length", latent, "the latent")?;
        let mut fields = Map::new();
        let mut set = |name: &str, value: Value| fields.insert(name.to_owned(), value);
        set("num_key_value_heads", json!(heads));
        // Null says that queries have no latent of their own.
        set("q_lora_rank", json!(self.size("attention.q_lora_rank")?));
        set("kv_lora_rank", json!(latent));
        set("qk_nope_head_dim", json!(plain));
        set("qk_rope_head_dim", json!(rotated));
        set("v_head_dim", json!(self.required("attention.value_length_mla")?));
        Ok(fields)
    }

    /// A size that, if it is there, can only be this.
    fn require(&self, name: &str, wanted: u64, what: &str) -> Result<(), WeightsError> {
        match self.size(name)?.filter(|found| *found != wanted) {
            Some(found) => Err(self
                .metadata
                .refuse(&self.key(name), format!("{wanted}, {what}"), found)),
            None => Ok(()),
        }
    }
}
