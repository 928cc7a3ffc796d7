//! What a loaded model refuses, and that its sizes agree with what was promised before it was loaded.

use std::path::Path;

use moerun_kernels::{CpuPool, KV_PAGE_TOKENS};
use moerun_model::{KvCache, Model, ModelError};
use moerun_types::{AttentionConfig, KvFormat, LayerId, NumberFormat};
use moerun_weights::{Checkpoint, Needs};
use ndarray::Array2;

/// Layers 0 and 2 have experts, layer 1 is dense.
const MIXED_FAMILY: &str = "qwen2_moe";

fn checkpoint(family: &str) -> Checkpoint {
    let dir = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden")).join(family);
    Checkpoint::open(&dir, Needs::All).expect("a golden checkpoint opens")
}

fn model() -> Model {
    Model::load(&checkpoint(MIXED_FAMILY), NumberFormat::F32, &mut |_, _| {}).expect("a golden checkpoint loads")
}

fn refusal(layer: LayerId, rows: Array2<f32>) -> ModelError {
    model()
        .route_moe_input(&CpuPool::new(1), layer, rows)
        .expect_err("the rows are refused")
}

#[test]
fn rows_for_a_dense_layer_are_refused_and_the_moe_layers_named() {
    let hidden = checkpoint(MIXED_FAMILY).config().hidden;
    for layer in [LayerId(1), LayerId(3), LayerId(u32::MAX)] {
        let error = refusal(layer, Array2::zeros((2, hidden)));
        let ModelError::NotMoe {
            layer: found,
            moe_layers,
        } = error
        else {
            panic!("{error}")
        };
        assert_eq!((found, moe_layers), (layer, vec![LayerId(0), LayerId(2)]));
    }
}

#[test]
fn rows_of_another_width_are_refused() {
    let hidden = checkpoint(MIXED_FAMILY).config().hidden;
    let error = refusal(LayerId(0), Array2::zeros((2, hidden + 1)));
    assert!(
        matches!(error, ModelError::Width { wanted, found, .. } if wanted == hidden && found == hidden + 1),
        "{error}"
    );
}

#[test]
fn rows_that_are_not_numbers_are_refused_by_the_gate() {
    let mut rows = Array2::zeros((2, checkpoint(MIXED_FAMILY).config().hidden));
    rows[[1, 3]] = f32::NAN;
    let error = refusal(LayerId(2), rows);
    assert!(matches!(error, ModelError::Gate { layer: LayerId(2), .. }), "{error}");
}

#[test]
fn a_token_takes_what_its_format_and_its_attention_say() {
    // Two layers: two heads of 16, keys and values; in int8 a scale of 4 bytes each.
    let config = checkpoint("qwen3_moe").config().clone();
    let bytes = |format| KvCache::bytes_per_token(&config, format);
    assert_eq!(bytes(KvFormat::F32), 2 * 2 * 2 * 16 * 4);
    assert_eq!(bytes(KvFormat::Bf16), 2 * 2 * 2 * 16 * 2);
    assert_eq!(bytes(KvFormat::Int8), 2 * 2 * 2 * (16 + 4));
    // A latent is held once, with the rotary key.
    let config = checkpoint("deepseek_v3").config().clone();
    let AttentionConfig::Latent(latent) = &config.attention else {
        panic!("deepseek_v3 has latents");
    };
    let numbers = config.layers.len() * (latent.kv_lora_rank + latent.qk_rope_head_dim);
    assert_eq!(KvCache::bytes_per_token(&config, KvFormat::F32), 4 * numbers as u64);
    for format in KvFormat::ALL {
        assert_eq!(KvCache::new(&config, format, 2).layers.len(), config.layers.len());
        let page_bytes = KvCache::page_bytes(&config, format) as u64;
        assert_eq!(
            page_bytes,
            KvCache::bytes_per_token(&config, format) * KV_PAGE_TOKENS as u64
        );
    }
}
