//! What the real config parser says to lies and to drawn configs.
#![allow(clippy::unwrap_used)] // clippy's exception for tests does not reach the helpers of an integration test

use std::fs;

use moerun_testkit::{ALL_FAMILIES, Family, Lie, Stage, Storage, TinyCheckpoint, lies};
use moerun_types::ModelConfig;

/// What the config parser says to `config.json` under a lie, if it says anything.
fn config_error(lie: &Lie) -> Option<String> {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let dir = folder.path().join("model");
    lie.write(&dir).expect("a lie that can be told");
    let text = fs::read_to_string(dir.join("config.json")).ok()?;
    ModelConfig::from_json(&text).err().map(|error| error.to_string())
}

#[test]
fn the_config_parser_refuses_only_lies_and_says_why() {
    let mut silent = Vec::new();
    for lie in lies() {
        match config_error(&lie) {
            Some(error) if lie.stage != Stage::Weights || !lie.missing_words(&error).is_empty() => {
                silent.push(format!("{lie:?}: {error}"));
            }
            _ => {}
        }
    }
    assert!(silent.is_empty(), "{silent:#?}");
}

#[test]
fn every_drawn_config_parses_to_the_sizes_that_were_drawn() {
    for family in ALL_FAMILIES {
        for seed in 0..60 {
            let mut tiny = TinyCheckpoint::from_seed(family, seed);
            match family {
                Family::DeepseekV3 if seed % 3 == 0 => tiny.storage = Storage::Fp8Block,
                Family::GptOss if seed % 3 == 0 => {
                    (tiny.storage, tiny.hidden, tiny.expert_intermediate) = (Storage::Mxfp4, 64, 32);
                }
                _ => {}
            }
            let text = tiny.config_json().unwrap().to_string();
            let config = ModelConfig::from_json(&text).unwrap_or_else(|error| panic!("{tiny:?}: {error}"));
            assert_eq!(
                (config.hidden, config.layers.len()),
                (tiny.hidden, tiny.layers),
                "{tiny:?}"
            );
            let moe_layers: Vec<usize> = config.moe_layers().iter().map(|layer| layer.0 as usize).collect();
            let wanted: Vec<usize> = (0..tiny.layers).filter(|&layer| tiny.is_moe_layer(layer)).collect();
            assert_eq!(moe_layers, wanted, "{tiny:?}");
            assert_eq!(
                config.moe.map(|moe| moe.top_k),
                family.has_experts().then_some(tiny.top_k),
                "{tiny:?}"
            );
        }
    }
}
