//! Safetensors files written by hand, so that they may also be wrong.

use std::{collections::BTreeMap, fs, path::Path};

use serde_json::json;

/// A tensor with its type as the header names it.
#[derive(Debug, Clone)]
pub(crate) struct RawTensor {
    pub(crate) dtype: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) data: Vec<u8>,
}

/// Tensors by name.
pub(crate) type RawTensors = BTreeMap<String, RawTensor>;

impl RawTensor {
    pub(crate) fn f32(shape: &[usize], values: &[f32]) -> Self {
        let data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        RawTensor {
            dtype: "F32".to_owned(),
            shape: shape.to_vec(),
            data,
        }
    }

    pub(crate) fn bytes(dtype: &str, shape: &[usize], data: Vec<u8>) -> Self {
        RawTensor {
            dtype: dtype.to_owned(),
            shape: shape.to_vec(),
            data,
        }
    }

    /// Values of an F32 tensor.
    pub(crate) fn values(&self) -> Vec<f32> {
        assert_eq!(self.dtype, "F32");
        self.data
            .chunks_exact(4)
            .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
            .collect()
    }
}

/// Reads a file with the safetensors crate.
pub(crate) fn read(path: &Path) -> RawTensors {
    let file = fs::read(path).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
    tensors
        .iter()
        .map(|(name, view)| {
            let tensor = RawTensor::bytes(&view.dtype().to_string(), view.shape(), view.data().to_vec());
            (name.to_owned(), tensor)
        })
        .collect()
}

/// Writes a file; `padding` spaces after the header decide how the data is aligned.
pub(crate) fn write_padded(path: &Path, tensors: &RawTensors, padding: usize) {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, tensor) in tensors {
        let start = data.len();
        data.extend_from_slice(&tensor.data);
        let offsets = [start, data.len()];
        header.insert(
            name.clone(),
            json!({ "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets }),
        );
    }
    let header = serde_json::Value::Object(header).to_string() + &" ".repeat(padding);
    write_raw(path, &header, &data);
}

pub(crate) fn write(path: &Path, tensors: &RawTensors) {
    write_padded(path, tensors, 0);
}

pub(crate) fn write_raw(path: &Path, header: &str, data: &[u8]) {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(data);
    fs::write(path, file).unwrap();
}

/// Replaces `model.safetensors` by shards, `choose(name)` being the number of a tensor's shard.
pub(crate) fn shard(dir: &Path, choose: impl Fn(&str) -> usize) {
    let single = dir.join("model.safetensors");
    let (mut shards, mut weight_map) = (BTreeMap::<usize, RawTensors>::new(), serde_json::Map::new());
    for (name, tensor) in read(&single) {
        let number = choose(&name);
        weight_map.insert(name.clone(), shard_name(number).into());
        shards.entry(number).or_default().insert(name, tensor);
    }
    for (number, tensors) in &shards {
        write(&dir.join(shard_name(*number)), tensors);
    }
    write_index(dir, weight_map);
    fs::remove_file(single).unwrap();
}

pub(crate) fn shard_name(number: usize) -> String {
    format!("model-{number:05}.safetensors")
}

pub(crate) fn write_index(dir: &Path, weight_map: serde_json::Map<String, serde_json::Value>) {
    let index = json!({ "metadata": { "total_size": 0 }, "weight_map": weight_map });
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}
