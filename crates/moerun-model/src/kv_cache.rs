//! Keys and values of all layers, in pages; owned by the engine and passed in.

use moerun_kernels::KvPages;
use moerun_types::{AttentionConfig, ModelConfig};

/// One [`KvPages`] per layer, sharing page numbers.
#[derive(Debug)]
pub struct KvCache {
    /// One entry per layer.
    pub layers: Vec<KvPages>,
}

/// What one token keeps in one layer.
struct TokenShape {
    kv_heads: usize,
    key_dim: usize,
    value_dim: usize,
}

fn token_shape(attention: &AttentionConfig) -> TokenShape {
    match attention {
        AttentionConfig::Grouped(grouped) => TokenShape {
            kv_heads: grouped.num_kv_heads,
            key_dim: grouped.head_dim,
            value_dim: grouped.head_dim,
        },
        // All heads share one key, [latent | rotary], and one value, the latent.
        AttentionConfig::Latent(latent) => TokenShape {
            kv_heads: 1,
            key_dim: latent.kv_lora_rank + latent.qk_rope_head_dim,
            value_dim: latent.kv_lora_rank,
        },
    }
}

impl KvCache {
    /// Room for `num_pages` pages in every layer.
    pub fn new(config: &ModelConfig, num_pages: usize) -> Self {
        let TokenShape {
            kv_heads,
            key_dim,
            value_dim,
        } = token_shape(&config.attention);
        let layers = config
            .layers
            .iter()
            .map(|_| KvPages::new(num_pages, kv_heads, key_dim, value_dim))
            .collect();
        KvCache { layers }
    }

    /// Bytes that one page takes over all layers.
    pub fn page_bytes(config: &ModelConfig) -> usize {
        let TokenShape {
            kv_heads,
            key_dim,
            value_dim,
        } = token_shape(&config.attention);
        KvPages::page_bytes(kv_heads, key_dim, value_dim) * config.layers.len()
    }
}
