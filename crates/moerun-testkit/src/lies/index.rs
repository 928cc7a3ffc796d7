//! Sharded checkpoints whose index is wrong.

use std::{fs, path::Path};

use serde_json::{Value, json};

use super::{Lie, Stage};
use crate::{Family, RawFile, TestkitError, edit_json};

const INDEX: &str = "model.safetensors.index.json";
const SHARD: &str = "model-00001-of-00001.safetensors";
const TENSOR: &str = "model.norm.weight";

const fn lie(name: &'static str, words: &'static [&'static str], apply: fn(&Path) -> Result<(), TestkitError>) -> Lie {
    Lie {
        name,
        family: Family::Qwen3Moe,
        stage: Stage::Weights,
        words,
        apply,
    }
}

pub(super) const LIES: &[Lie] = &[
    lie(
        "the index names an absent shard",
        &["model-00007-of-00009.safetensors"],
        |dir| map_tensor(dir, "model-00007-of-00009.safetensors"),
    ),
    lie("the index leaves the directory", &["../outside.safetensors"], |dir| {
        shard(dir)?;
        let outside = dir.join("../outside.safetensors");
        fs::copy(dir.join(SHARD), &outside).map_err(TestkitError::io(&outside))?;
        edit_json(dir, INDEX, |index| {
            index["weight_map"][TENSOR] = json!("../outside.safetensors")
        })
    }),
    lie("the index names an absolute path", &["/etc/passwd"], |dir| {
        map_tensor(dir, "/etc/passwd")
    }),
    lie(
        "the index names a subdirectory's parent",
        &["a/../../b.safetensors"],
        |dir| map_tensor(dir, "a/../../b.safetensors"),
    ),
    lie("the index names an empty file name", &["index", "\"\""], |dir| {
        map_tensor(dir, "")
    }),
    lie("the index names a pickle", &["pytorch_model.bin"], |dir| {
        map_tensor(dir, "pytorch_model.bin")
    }),
    lie("the index is not JSON", &[INDEX], |dir| {
        shard(dir)?;
        fs::write(dir.join(INDEX), "{\"weight_map\": {").map_err(TestkitError::io(dir))
    }),
    lie("the index has no weight map", &[INDEX, "weight_map"], |dir| {
        shard(dir)?;
        edit_json(dir, INDEX, |index| *index = json!({ "metadata": {} }))
    }),
    lie("the index maps a tensor to a number", &[INDEX], |dir| {
        shard(dir)?;
        edit_json(dir, INDEX, |index| index["weight_map"][TENSOR] = json!(1))
    }),
    lie(
        "the index promises a tensor that its shard lacks",
        &["model.promised.weight"],
        |dir| {
            shard(dir)?;
            edit_json(dir, INDEX, |index| {
                index["weight_map"]["model.promised.weight"] = json!(SHARD)
            })
        },
    ),
    lie("two shards hold one tensor", &[TENSOR], |dir| {
        shard(dir)?;
        let mut second = RawFile::read(&dir.join(SHARD))?;
        second
            .tensors
            .retain(|tensor| tensor.name == TENSOR || tensor.name == "lm_head.weight");
        second.write(&dir.join("model-00002-of-00002.safetensors"))?;
        let mut first = RawFile::read(&dir.join(SHARD))?;
        first.tensors.retain(|tensor| tensor.name != "lm_head.weight");
        first.write(&dir.join(SHARD))?;
        edit_json(dir, INDEX, |index| {
            index["weight_map"]["lm_head.weight"] = json!("model-00002-of-00002.safetensors");
        })
    }),
];

/// Turns the single file into one shard with an index.
fn shard(dir: &Path) -> Result<(), TestkitError> {
    fs::rename(dir.join("model.safetensors"), dir.join(SHARD)).map_err(TestkitError::io(dir))?;
    let tensors = RawFile::read(&dir.join(SHARD))?.tensors;
    let weight_map: serde_json::Map<String, Value> = tensors
        .iter()
        .map(|tensor| (tensor.name.clone(), json!(SHARD)))
        .collect();
    let index = json!({ "metadata": { "total_size": 0 }, "weight_map": weight_map });
    fs::write(dir.join(INDEX), index.to_string()).map_err(TestkitError::io(dir))
}

/// An index that is right but for the file of one tensor.
fn map_tensor(dir: &Path, file: &str) -> Result<(), TestkitError> {
    shard(dir)?;
    edit_json(dir, INDEX, |index| index["weight_map"][TENSOR] = json!(file))
}
