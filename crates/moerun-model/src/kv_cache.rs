//! Keys and values of all layers, in pages; owned by the engine and passed in.

use moerun_kernels::{KV_PAGE_TOKENS, KvPages, KvShape, KvValues};
use moerun_types::{AttentionConfig, KvFormat, ModelConfig};

/// One [`KvPages`] per layer, sharing page numbers.
#[derive(Debug)]
pub struct KvCache {
    /// One entry per layer.
    pub layers: Vec<KvPages>,
}

/// What one token keeps in one layer.
fn token_shape(attention: &AttentionConfig) -> KvShape {
    match attention {
        AttentionConfig::Grouped(grouped) => KvShape {
            kv_heads: grouped.num_kv_heads,
            key_dim: grouped.head_dim,
            value_dim: grouped.head_dim,
            values: KvValues::Own,
        },
        // All heads share one key, [latent | rotary], and one value, the latent.
        AttentionConfig::Latent(latent) => KvShape {
            kv_heads: 1,
            key_dim: latent.kv_lora_rank + latent.qk_rope_head_dim,
            value_dim: latent.kv_lora_rank,
            values: KvValues::StartOfKey,
        },
    }
}

impl KvCache {
    /// Room for `num_pages` pages in every layer, held in `format`.
    pub fn new(config: &ModelConfig, format: KvFormat, num_pages: usize) -> Self {
        let shape = token_shape(&config.attention);
        let layers = config
            .layers
            .iter()
            .map(|_| KvPages::new(format, num_pages, shape))
            .collect();
        KvCache { layers }
    }

    /// Bytes that one page takes over all layers.
    pub fn page_bytes(config: &ModelConfig, format: KvFormat) -> usize {
        KvPages::page_bytes(format, token_shape(&config.attention)) * config.layers.len()
    }

    /// Bytes of one token in all layers, scales included: a page holds a whole number of them.
    pub fn bytes_per_token(config: &ModelConfig, format: KvFormat) -> u64 {
        (Self::page_bytes(config, format) / KV_PAGE_TOKENS) as u64
    }
}
