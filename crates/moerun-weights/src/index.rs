//! Which files hold the weights: one, or the shards of an index.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
};

use serde::{Deserialize, Deserializer, de::DeserializeSeed};

use crate::{
    WeightsError,
    directory::{Directory, Found},
    entries::{AtMost, Entries},
    header::MAX_TENSORS,
};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// The same two of packed checkpoints, so that no other program takes their tensors for weights.
pub(crate) const PACKED_SINGLE: &str = "packed.safetensors";
pub(crate) const PACKED_INDEX: &str = "packed.safetensors.index.json";
/// The index of a checkpoint of [`MAX_TENSORS`] tensors has about half of this.
const MAX_INDEX_BYTES: u64 = 64 << 20;

/// Files that hold the weights, and which tensors the index says are in each.
#[derive(Debug)]
pub(crate) enum Layout {
    /// One file without index.
    Single(&'static str),
    /// Shards by file name, each with the tensors in it.
    Sharded(Shards),
}

/// What an index says.
#[derive(Debug)]
pub(crate) struct Shards {
    /// Tensors of each file, in the order of the index.
    pub(crate) tensors_by_shard: BTreeMap<String, Vec<String>>,
    /// File of each tensor.
    pub(crate) shard_by_tensor: HashMap<String, String>,
}

/// Finds the weights of a directory: `model.safetensors` if it is there, else the shards of the index.
pub(crate) fn find(directory: &Directory) -> Result<Layout, WeightsError> {
    if let Some(layout) = find_named(directory, SINGLE, INDEX)? {
        return Ok(layout);
    }
    Err(match directory.find_pickle() {
        Some(path) => WeightsError::Pickle { path },
        None => WeightsError::NoWeights {
            dir: directory.path().to_owned(),
        },
    })
}

/// Finds packed weights, if the directory has any.
pub(crate) fn find_packed(directory: &Directory) -> Result<Option<Layout>, WeightsError> {
    find_named(directory, PACKED_SINGLE, PACKED_INDEX)
}

fn find_named(
    directory: &Directory,
    single: &'static str,
    index: &'static str,
) -> Result<Option<Layout>, WeightsError> {
    if let Found::File(_) = directory.find(single)? {
        return Ok(Some(Layout::Single(single)));
    }
    match directory.read_text(index, MAX_INDEX_BYTES)? {
        Some(text) => parse(&text, directory.path().join(index)).map(|shards| Some(Layout::Sharded(shards))),
        None => Ok(None),
    }
}

#[derive(Deserialize)]
struct Index {
    #[serde(deserialize_with = "weight_map")]
    weight_map: Entries<String>,
}

fn weight_map<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Entries<String>, D::Error> {
    AtMost::new(MAX_TENSORS).deserialize(deserializer)
}

fn parse(text: &str, path: PathBuf) -> Result<Shards, WeightsError> {
    let index: Index = serde_json::from_str(text).map_err(|error| WeightsError::Index {
        path: path.clone(),
        reason: error.to_string(),
    })?;
    let mut shards = Shards {
        tensors_by_shard: BTreeMap::new(),
        shard_by_tensor: HashMap::new(),
    };
    for (tensor, shard) in index.weight_map.0 {
        if !is_plain(&shard) {
            return Err(WeightsError::ShardName { name: shard });
        }
        if let Some(first) = shards.shard_by_tensor.insert(tensor.clone(), shard.clone()) {
            return Err(WeightsError::Duplicate {
                tensor,
                first,
                second: shard,
            });
        }
        shards.tensors_by_shard.entry(shard).or_default().push(tensor);
    }
    if shards.tensors_by_shard.is_empty() {
        return Err(WeightsError::Index {
            path,
            reason: "weight_map: wanted tensors, found none".to_owned(),
        });
    }
    Ok(shards)
}

/// A file name that cannot lead out of the directory on any system, and that is not taken for a pickle.
fn is_plain(name: &str) -> bool {
    let safe = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+' | '=');
    name.len() <= 255
        && name.ends_with(".safetensors")
        && !name.starts_with('.')
        && !name.contains("..")
        && name.chars().all(safe)
}
