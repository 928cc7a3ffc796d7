//! Random damage: whatever is on disk, opening it ends with a checkpoint or an error, never a panic.

use std::fs;

use moerun_types::{Family, ModelConfig, NumberFormat};
use moerun_weights::{MemoryNeed, Needs, ParameterCounts, expected_tensors};
use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};
use serde_json::{Value, json};

use crate::directories::{copy_of, golden, open};

#[test]
fn damaged_weights_never_panic() {
    let original = fs::read(golden(Family::GptOss).join("model.safetensors")).unwrap();
    let header_end = 8 + u64::from_le_bytes(original[..8].try_into().unwrap()) as usize;
    let dir = copy_of(Family::GptOss);
    let path = dir.path().join("model.safetensors");
    let mut refused = 0;
    for seed in 0..300 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut damaged = original.clone();
        for _ in 0..rng.random_range(1..4) {
            damaged[rng.random_range(0..header_end)] = rng.random();
        }
        if rng.random_range(0..4) == 0 {
            damaged.truncate(rng.random_range(0..damaged.len()));
        }
        fs::write(&path, &damaged).unwrap();
        for needs in [Needs::All, Needs::GatewayOnly, Needs::ExpertsOnly] {
            refused += usize::from(moerun_weights::Checkpoint::open(dir.path(), needs).is_err());
        }
    }
    assert!(refused > 600, "only {refused} of 900 were refused");
    fs::write(&path, &original).unwrap();
    open(dir.path()).unwrap();
}

#[test]
fn odd_values_in_any_field_of_a_config_never_panic_or_overflow() {
    let odd = [
        json!(null),
        json!(-1),
        json!(0),
        json!(1),
        json!(3),
        json!(65_536),
        json!(u64::MAX),
        json!(-9.5),
        json!(1e300),
        json!("x"),
        json!(true),
        json!([]),
        json!([1, 0, -1]),
        json!({}),
        json!({ "rope_type": "yarn" }),
    ];
    for family in Family::ALL {
        for spelling in ["config.json", "config.hub.json"] {
            let text = fs::read_to_string(golden(family).join(spelling)).unwrap();
            let config: Value = serde_json::from_str(&text).unwrap();
            for field in config.as_object().unwrap().keys() {
                for value in &odd {
                    let mut changed = config.clone();
                    changed[field] = value.clone();
                    let Ok(parsed) = ModelConfig::from_json(&changed.to_string()) else {
                        continue;
                    };
                    let (need, counts) = (MemoryNeed::of(&parsed, NumberFormat::F32), ParameterCounts::of(&parsed));
                    assert!(
                        need.gateway_bytes > 0 && counts.total >= counts.active,
                        "{family:?} {field} {value}"
                    );
                    assert!(!expected_tensors(&parsed).is_empty());
                }
            }
        }
    }
}
