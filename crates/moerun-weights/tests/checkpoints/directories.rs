//! Golden checkpoints, copied where a test may change them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use moerun_types::Family;
use moerun_weights::{Checkpoint, Needs, WeightsError};

pub(crate) fn golden(family: Family) -> PathBuf {
    PathBuf::from(format!(
        "{}/../../tests/golden/{}",
        env!("CARGO_MANIFEST_DIR"),
        family.model_type()
    ))
}

/// A copy of a golden checkpoint without its tokenizer and golden values.
pub(crate) fn copy_of(family: Family) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "generation_config.json", "model.safetensors"] {
        fs::copy(golden(family).join(name), dir.path().join(name)).unwrap();
    }
    dir
}

/// Changes some fields of `config.json`.
pub(crate) fn change_config(dir: &Path, changes: serde_json::Value) {
    let path = dir.join("config.json");
    let mut config: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    for (name, value) in changes.as_object().unwrap() {
        config[name] = value.clone();
    }
    fs::write(path, config.to_string()).unwrap();
}

pub(crate) fn open(dir: &Path) -> Result<Checkpoint, WeightsError> {
    Checkpoint::open(dir, Needs::All)
}

/// That opening fails with a message that holds all of `words`.
#[track_caller]
pub(crate) fn assert_refused(dir: &Path, needs: Needs, words: &[&str]) {
    let message = match Checkpoint::open(dir, needs) {
        Ok(_) => panic!("accepted, wanted an error naming {words:?}"),
        Err(error) => error.to_string(),
    };
    for word in words {
        assert!(message.contains(word), "{message:?} does not name {word:?}");
    }
}
