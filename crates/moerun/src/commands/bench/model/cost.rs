//! What a token costs: bytes and operations, by the config and the number format.

use moerun_model::KvCache;
use moerun_types::{KvFormat, ModelConfig, NumberFormat};
use moerun_weights::{MemoryNeed, ParameterCounts};

use super::Decode;

/// What a token costs by the config and the number format, from the tensors that it passes.
pub(super) struct Cost {
    /// Weights outside the experts that every step reads: all but an embedding that is only looked up.
    pub(super) dense_bytes: u64,
    pub(super) expert_bytes: u64,
    pub(super) kv_bytes_per_token: u64,
    /// Multiplications and additions of one prompt token, without attention's scores and without the head.
    pub(super) prompt_ops: u64,
    /// … of the head, for the one row whose logits are wanted.
    pub(super) head_ops: u64,
}

impl Cost {
    pub(super) fn of(config: &ModelConfig, format: NumberFormat, kv_format: KvFormat) -> Self {
        let need = MemoryNeed::of(config, format);
        let active = ParameterCounts::of(config).active;
        let head = (config.vocab_size * config.hidden) as u64;
        let (looked_up_bytes, outside) = if config.tied_head {
            (0, head)
        } else {
            (need.embedding_bytes, 2 * head)
        };
        Cost {
            dense_bytes: need.gateway_bytes - looked_up_bytes,
            expert_bytes: need.expert_bytes,
            kv_bytes_per_token: KvCache::bytes_per_token(config, kv_format),
            prompt_ops: 2 * (active - outside),
            head_ops: 2 * head,
        }
    }

    /// Bytes read for one token of a batch.
    pub(super) fn decode_bytes(&self, decode: &Decode) -> f64 {
        let weights = self.dense_bytes as f64 + decode.experts_per_step * self.expert_bytes as f64;
        weights / decode.batch as f64 + self.kv_bytes_per_token as f64 * decode.mean_context
    }
}

#[cfg(test)]
mod tests {
    use moerun_weights::Shape;

    use super::{super::super::spread::Spread, *};

    fn config(shape: &str) -> ModelConfig {
        ModelConfig::from_json(Shape::by_name(shape).expect("a shape of ours").config_json).expect("a good config")
    }

    fn decode(batch: usize, experts_per_step: f64) -> Decode {
        Decode {
            batch,
            tokens_per_second: Spread::of(&[1.0]),
            runs: Vec::new(),
            experts_per_step,
            mean_context: 0.0,
            preemptions: 0,
        }
    }

    #[test]
    fn bytes_of_a_token_are_those_of_the_tensors_it_passes() {
        // Granite: attention 3 MiB of bf16 pairs, head tied to the embedding.
        let granite = Cost::of(&config("granite-3.1-1b-a400m"), NumberFormat::Bf16, KvFormat::F32);
        let attention = 2 * (1024 * 1024 * 2 + 2 * 512 * 1024);
        let norms_and_router = 4 * (2 * 1024 + 32 * 1024);
        let head = 2 * 49168 * 1024; // rows padded to whole panels
        let dense = 24 * (attention + norms_and_router) + head + 4 * 1024;
        assert_eq!(granite.dense_bytes, dense);
        let experts = 24.0 * 8.0;
        let expert = 3.0 * 2.0 * 512.0 * 1024.0;
        assert_eq!(
            granite.decode_bytes(&decode(1, experts)),
            dense as f64 + experts * expert
        );
        // A batch shares what it reads.
        assert_eq!(
            granite.decode_bytes(&decode(4, experts)),
            (dense as f64 + experts * expert) / 4.0
        );

        // OLMoE: of an embedding of its own one row is looked up, which is nothing.
        let olmoe = Cost::of(&config("olmoe-1b-7b"), NumberFormat::Bf16, KvFormat::F32);
        let all = MemoryNeed::of(&config("olmoe-1b-7b"), NumberFormat::Bf16).gateway_bytes;
        assert_eq!(all - olmoe.dense_bytes, 2 * 50304 * 2048);
    }

    #[test]
    fn operations_of_a_prompt_leave_out_what_is_looked_up() {
        let granite = Cost::of(&config("granite-3.1-1b-a400m"), NumberFormat::Bf16, KvFormat::F32);
        let per_layer = 1024 * 1024 * 2 + 2 * 512 * 1024 + 32 * 1024 + 2 * 1024 + 8 * 3 * 512 * 1024;
        assert_eq!(granite.prompt_ops, 2 * (24 * per_layer + 1024));
        assert_eq!(granite.head_ops, 2 * 49155 * 1024);
    }
}
