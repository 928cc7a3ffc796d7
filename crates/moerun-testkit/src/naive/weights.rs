//! All tensors of a checkpoint as f64, dequantised.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    path::Path,
};

use serde_json::Value;

use crate::{Element, RawFile, TestkitError, decode, number::FP4_E2M1};

#[derive(Debug)]
struct Tensor {
    shape: Vec<usize>,
    values: Vec<f64>,
}

#[derive(Debug)]
pub(crate) struct Weights {
    tensors: HashMap<String, Tensor>,
}

/// `[rows, cols]`, row by row.
#[derive(Debug)]
pub(crate) struct Matrix {
    cols: usize,
    values: Vec<f64>,
}

impl Matrix {
    pub(crate) fn rows(&self) -> impl Iterator<Item = &[f64]> {
        self.values.chunks_exact(self.cols)
    }

    /// The matrix whose row `i` is column `i` of this one.
    pub(crate) fn transposed(&self) -> Matrix {
        let rows = self.values.len() / self.cols;
        let values = (0..self.cols).flat_map(|col| (0..rows).map(move |row| (row, col)));
        Matrix {
            cols: rows,
            values: values.map(|(row, col)| self.values[row * self.cols + col]).collect(),
        }
    }

    /// The rows whose numbers `keep` accepts.
    pub(crate) fn select_rows(&self, keep: impl Fn(usize) -> bool) -> Matrix {
        let kept = self.rows().enumerate().filter(|(row, _)| keep(*row));
        Matrix {
            cols: self.cols,
            values: kept.flat_map(|(_, row)| row.to_vec()).collect(),
        }
    }
}

impl Weights {
    pub(crate) fn read(dir: &Path) -> Result<Self, TestkitError> {
        let mut tensors = HashMap::new();
        for file in shard_files(dir)? {
            for tensor in RawFile::read(&dir.join(file))?.tensors {
                let element = Element::from_name(&tensor.dtype).ok_or_else(|| TestkitError::Unknown {
                    what: "element type",
                    name: tensor.dtype.clone(),
                })?;
                tensors.insert(
                    tensor.name,
                    Tensor {
                        shape: tensor.shape,
                        values: decode(element, &tensor.data),
                    },
                );
            }
        }
        apply_fp8_scales(&mut tensors);
        apply_mxfp4_scales(&mut tensors);
        Ok(Weights { tensors })
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<&Tensor, TestkitError> {
        let tensor = self
            .tensors
            .get(name)
            .ok_or_else(|| TestkitError::MissingTensor { name: name.to_owned() })?;
        if tensor.shape != shape {
            return Err(TestkitError::Shape {
                name: name.to_owned(),
                found: tensor.shape.clone(),
                wanted: shape.to_vec(),
            });
        }
        Ok(tensor)
    }

    pub(crate) fn vector(&self, name: &str, len: usize) -> Result<&[f64], TestkitError> {
        Ok(&self.tensor(name, &[len])?.values)
    }

    pub(crate) fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix, TestkitError> {
        Ok(Matrix {
            cols,
            values: self.tensor(name, &[rows, cols])?.values.clone(),
        })
    }

    /// Matrix `index` of a stack `[count, rows, cols]`.
    pub(crate) fn matrix_of_stack(
        &self,
        name: &str,
        index: usize,
        [count, rows, cols]: [usize; 3],
    ) -> Result<Matrix, TestkitError> {
        let stack = self.tensor(name, &[count, rows, cols])?;
        Ok(Matrix {
            cols,
            values: stack.values[index * rows * cols..][..rows * cols].to_vec(),
        })
    }

    /// Row `index` of a table `[count, len]`.
    pub(crate) fn row(&self, name: &str, index: usize, count: usize, len: usize) -> Result<&[f64], TestkitError> {
        Ok(&self.tensor(name, &[count, len])?.values[index * len..][..len])
    }
}

/// Names of the files that hold the tensors.
fn shard_files(dir: &Path) -> Result<BTreeSet<String>, TestkitError> {
    let path = dir.join("model.safetensors.index.json");
    if !path.exists() {
        return Ok(BTreeSet::from(["model.safetensors".to_owned()]));
    }
    let text = fs::read_to_string(&path).map_err(TestkitError::io(&path))?;
    let index: Value = serde_json::from_str(&text).map_err(|source| TestkitError::Json { path, source })?;
    let files = index["weight_map"].as_object().into_iter().flat_map(|map| map.values());
    Ok(files.filter_map(Value::as_str).map(str::to_owned).collect())
}

/// Multiplies each 128 × 128 block of a weight by its entry of `…weight_scale_inv`.
fn apply_fp8_scales(tensors: &mut HashMap<String, Tensor>) {
    const BLOCK: usize = 128;
    let names: Vec<String> = tensors
        .keys()
        .filter(|name| name.ends_with(".weight_scale_inv"))
        .cloned()
        .collect();
    for name in names {
        let Some(scales) = tensors.remove(&name) else { continue };
        let Some(weight) = tensors.get_mut(name.trim_end_matches("_scale_inv")) else {
            continue;
        };
        let cols = weight.shape[1];
        for (i, value) in weight.values.iter_mut().enumerate() {
            let (row, col) = (i / cols, i % cols);
            *value *= scales.values[row / BLOCK * cols.div_ceil(BLOCK) + col / BLOCK];
        }
    }
}

/// Unpacks `…_blocks` `[experts, out, in/32, 16]` and `…_scales` `[experts, out, in/32]` into `[experts, in, out]`.
///
/// A byte holds two codes, the earlier in its low half; a scale byte is an exponent of two with bias 127.
fn apply_mxfp4_scales(tensors: &mut HashMap<String, Tensor>) {
    let names: Vec<String> = tensors
        .keys()
        .filter_map(|name| name.strip_suffix("_blocks").map(str::to_owned))
        .collect();
    for name in names {
        let Some(blocks) = tensors.remove(&format!("{name}_blocks")) else {
            continue;
        };
        let Some(scales) = tensors.remove(&format!("{name}_scales")) else {
            continue;
        };
        let [experts, outs] = [blocks.shape[0], blocks.shape[1]];
        let ins = blocks.shape[2] * 32;
        let mut values = vec![0.0; experts * ins * outs];
        for expert in 0..experts {
            for out in 0..outs {
                for input in 0..ins {
                    let element = (expert * outs + out) * ins + input;
                    let byte = blocks.values[element / 2] as u8;
                    let code = if element.is_multiple_of(2) {
                        byte & 0x0f
                    } else {
                        byte >> 4
                    };
                    let scale = 2f64.powf(scales.values[element / 32] - 127.0);
                    values[(expert * ins + input) * outs + out] = FP4_E2M1[usize::from(code)] * scale;
                }
            }
        }
        tensors.insert(
            name,
            Tensor {
                shape: vec![experts, ins, outs],
                values,
            },
        );
    }
}
