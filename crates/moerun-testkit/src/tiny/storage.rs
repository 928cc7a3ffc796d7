//! From values to stored tensors: fp8 blocks, 4-bit blocks, shards with an index.

use std::{fs, path::Path};

use serde_json::{Map, Value, json};

use crate::{Element, RawFile, RawTensor, TestkitError, number::FP4_E2M1};

/// f8_e4m3 codes, and an f32 scale per 128 × 128 block in `…_scale_inv`.
pub(crate) fn fp8_block(name: &str, shape: &[usize], values: &[f64]) -> Vec<RawTensor> {
    const BLOCK: usize = 128;
    let (rows, cols) = (shape[0], shape[1]);
    let blocks = [rows.div_ceil(BLOCK), cols.div_ceil(BLOCK)];
    let block_of = |i: usize| (i / cols / BLOCK) * blocks[1] + i % cols / BLOCK;
    let mut largest = vec![0f64; blocks[0] * blocks[1]];
    for (i, value) in values.iter().enumerate() {
        largest[block_of(i)] = largest[block_of(i)].max(value.abs());
    }
    let scales: Vec<f64> = largest
        .iter()
        .map(|&largest| if largest == 0.0 { 1.0 } else { largest / 448.0 })
        .collect();
    let codes: Vec<f64> = values
        .iter()
        .enumerate()
        .map(|(i, value)| value / scales[block_of(i)])
        .collect();
    vec![
        RawTensor::new(name, Element::F8E4M3, shape, &codes),
        RawTensor::new(format!("{name}_scale_inv"), Element::F32, &blocks, &scales),
    ]
}

/// `[experts, in, out]` values as `…_blocks` `[experts, out, in/32, 16]` and `…_scales` `[experts, out, in/32]`.
pub(crate) fn mxfp4(name: &str, shape: &[usize], values: &[f64]) -> Vec<RawTensor> {
    const BLOCK: usize = 32;
    let [experts, inputs, outs] = [shape[0], shape[1], shape[2]];
    let mut codes = Vec::new();
    let mut scales = Vec::new();
    for expert in 0..experts {
        for out in 0..outs {
            for first in (0..inputs).step_by(BLOCK) {
                let block: Vec<f64> = (first..first + BLOCK)
                    .map(|input| values[(expert * inputs + input) * outs + out])
                    .collect();
                let largest = block.iter().fold(0f64, |largest, value| largest.max(value.abs()));
                let exponent = if largest == 0.0 {
                    0.0
                } else {
                    (largest / 6.0).log2().ceil()
                };
                scales.push(exponent + 127.0);
                let nibbles: Vec<u8> = block.iter().map(|value| fp4_code(value / exponent.exp2())).collect();
                codes.extend(
                    nibbles
                        .as_chunks::<2>()
                        .0
                        .iter()
                        .map(|[low, high]| f64::from(low | high << 4)),
                );
            }
        }
    }
    vec![
        RawTensor::new(
            format!("{name}_blocks"),
            Element::U8,
            &[experts, outs, inputs / BLOCK, BLOCK / 2],
            &codes,
        ),
        RawTensor::new(
            format!("{name}_scales"),
            Element::U8,
            &[experts, outs, inputs / BLOCK],
            &scales,
        ),
    ]
}

/// The code whose value is nearest.
fn fp4_code(value: f64) -> u8 {
    let distance = |code: u8| (FP4_E2M1[usize::from(code)] - value).abs();
    (0..16)
        .min_by(|&a, &b| distance(a).total_cmp(&distance(b)))
        .unwrap_or(0)
}

/// Writes one `model.safetensors`, or `shards` files and their index.
pub(crate) fn write_shards(dir: &Path, tensors: Vec<RawTensor>, shards: usize) -> Result<(), TestkitError> {
    // A directory may be written again; files of another number of shards must not stay behind.
    for entry in fs::read_dir(dir).map_err(TestkitError::io(dir))? {
        let path = entry.map_err(TestkitError::io(dir))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.starts_with("model") && name.contains(".safetensors") {
            fs::remove_file(&path).map_err(TestkitError::io(&path))?;
        }
    }
    if shards <= 1 {
        return RawFile { tensors }.write(&dir.join("model.safetensors"));
    }
    let mut weight_map = Map::new();
    let total_size: usize = tensors.iter().map(|tensor| tensor.data.len()).sum();
    for (i, tensors) in tensors.chunks(tensors.len().div_ceil(shards)).enumerate() {
        let file = format!("model-{:05}-of-{shards:05}.safetensors", i + 1);
        weight_map.extend(tensors.iter().map(|tensor| (tensor.name.clone(), json!(file))));
        RawFile {
            tensors: tensors.to_vec(),
        }
        .write(&dir.join(&file))?;
    }
    let index: Value = json!({ "metadata": { "total_size": total_size }, "weight_map": weight_map });
    let path = dir.join("model.safetensors.index.json");
    fs::write(&path, format!("{index:#}\n")).map_err(TestkitError::io(&path))
}
