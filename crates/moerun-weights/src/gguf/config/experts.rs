//! Experts and router.

use serde_json::{Map, Value, json};

use super::{Architecture, Reader};
use crate::WeightsError;

/// What `expert_gating_func` says.
mod gating {
    pub(super) const SOFTMAX: u64 = 1;
    pub(super) const SIGMOID: u64 = 2;
}

impl Reader<'_> {
    /// Whether routers score by sigmoid: DeepSeek V3's way, where V2's is softmax.
    pub(super) fn scores_by_sigmoid(&self) -> Result<bool, WeightsError> {
        const NAME: &str = "expert_gating_func";
        match (self.size(NAME)?, self.architecture) {
            (Some(gating::SIGMOID), _) | (None, Architecture::Glm4Moe) => Ok(true),
            (Some(gating::SOFTMAX) | None, Architecture::Deepseek2) => Ok(false),
            (found, _) => {
                let wanted = "2 (sigmoid), or 1 (softmax) in architecture deepseek2";
                let found = found.map_or("nothing".to_owned(), |found| found.to_string());
                Err(self.metadata.refuse(&self.key(NAME), wanted, found))
            }
        }
    }

    pub(super) fn experts(&self, fields: &mut Map<String, Value>) -> Result<(), WeightsError> {
        let count = self.size("expert_count")?.unwrap_or(0);
        if count == 0 {
            return Ok(());
        }
        let width = match self.size("expert_feed_forward_length")? {
            Some(width) => width,
            None => self.required("feed_forward_length")?,
        };
        let mut set = |name: &str, value: Value| fields.insert(name.to_owned(), value);
        set("num_experts", json!(count));
        set("num_local_experts", json!(count));
        set("num_experts_per_tok", json!(self.required("expert_used_count")?));
        match self.architecture {
            Architecture::Qwen2Moe | Architecture::Qwen3Moe => {
                set("moe_intermediate_size", json!(width));
                set("mlp_only_layers", json!(self.dense_layers()?));
                // Not in the metadata: the graphs of llama.cpp divide in the one architecture and not in the other.
                set("norm_topk_prob", json!(self.architecture == Architecture::Qwen3Moe));
            }
            Architecture::Deepseek2 | Architecture::Glm4Moe => {
                set("moe_intermediate_size", json!(width));
                self.deepseek_router(count, &mut set)?;
            }
            Architecture::Ernie45Moe => {
                set("moe_num_experts", json!(count));
                set("moe_k", json!(self.required("expert_used_count")?));
                set("moe_intermediate_size", json!(width));
                set(
                    "moe_layer_start_index",
                    json!(self.size("leading_dense_block_count")?.unwrap_or(0)),
                );
                set("moe_layer_interval", json!(self.required("interleave_moe_layer_step")?));
                set("moe_num_shared_experts", json!(self.shared_experts_of_width(width)?));
            }
            Architecture::Llama4 => {
                set("intermediate_size", json!(width));
                set("intermediate_size_mlp", json!(self.size("feed_forward_length")?));
                set(
                    "interleave_moe_layer_step",
                    json!(self.required("interleave_moe_layer_step")?),
                );
                // As llama.cpp: of the released models only the one with 128 experts has no norms.
                set("use_qk_norm", json!(count != 128));
            }
            _ => {
                set("intermediate_size", json!(width));
            }
        }
        match (self.architecture, self.size("expert_shared_feed_forward_length")?) {
            (Architecture::Qwen2Moe, shared) => {
                set("shared_expert_intermediate_size", json!(shared));
            }
            (Architecture::Ernie45Moe, _) | (_, None | Some(0)) => {}
            (_, Some(1..)) => {
                let key = self.key("expert_shared_feed_forward_length");
                return Err(self
                    .metadata
                    .refuse(&key, "no such shared experts in this architecture", "some"));
            }
        }
        Ok(())
    }

    /// Layers without experts, where only the tensors tell.
    fn dense_layers(&self) -> Result<Vec<u64>, WeightsError> {
        let layers = self.required("block_count")?.min(self.file.tensors.len() as u64);
        Ok((0..layers)
            .filter(|layer| self.has(&format!("blk.{layer}.ffn_gate.weight")))
            .collect())
    }

    fn deepseek_router(
        &self,
        experts: u64,
        set: &mut impl FnMut(&str, Value) -> Option<Value>,
    ) -> Result<(), WeightsError> {
        const GROUPS: &str = "expert_group_count";
        let (groups, top_groups) = (self.size(GROUPS)?.unwrap_or(1), self.size("expert_group_used_count")?);
        let by_sigmoid = self.scores_by_sigmoid()?;
        if !by_sigmoid && groups > 1 {
            // DeepSeek V2 takes a group's best expert for its score; llama.cpp adds the best two, as V3 does.
            let wanted = "one group where routers score by softmax";
            return Err(self.metadata.refuse(&self.key(GROUPS), wanted, groups));
        }
        set("n_routed_experts", json!(experts));
        set("n_shared_experts", json!(self.required("expert_shared_count")?));
        set(
            "first_k_dense_replace",
            json!(self.size("leading_dense_block_count")?.unwrap_or(0)),
        );
        set(
            "routed_scaling_factor",
            json!(self.float("expert_weights_scale")?.unwrap_or(1.0)),
        );
        let normalised = self.metadata.flag(&self.key("expert_weights_norm"))?.unwrap_or(false);
        set("norm_topk_prob", json!(normalised));
        set("topk_method", json!(if by_sigmoid { "noaux_tc" } else { "greedy" }));
        set("n_group", json!(groups.max(1)));
        set("topk_group", json!(top_groups.unwrap_or(1).max(1)));
        Ok(())
    }

    /// How many experts of `width` the shared ones make, which are stored as one.
    fn shared_experts_of_width(&self, width: u64) -> Result<u64, WeightsError> {
        const NAME: &str = "expert_shared_feed_forward_length";
        let shared = self.size(NAME)?.unwrap_or(0);
        if shared.checked_rem(width).unwrap_or(1) != 0 {
            let wanted = format!("a multiple of the experts' width, {width}");
            return Err(self.metadata.refuse(&self.key(NAME), wanted, shared));
        }
        Ok(shared / width)
    }
}
