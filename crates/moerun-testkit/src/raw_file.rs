//! A safetensors file as bytes: read in full, changed at will, written as told, even if what it says is a lie.

use std::{fs, path::Path};

use serde_json::{Map, Value, json};

use crate::{Element, TestkitError, encode};

/// One tensor as it stands in a file: header entry and bytes, which need not agree.
#[derive(Debug, Clone, PartialEq)]
pub struct RawTensor {
    /// Name.
    pub name: String,
    /// Element type as the header spells it.
    pub dtype: String,
    /// Shape as the header has it.
    pub shape: Vec<usize>,
    /// The elements, little-endian.
    pub data: Vec<u8>,
}

impl RawTensor {
    /// A truthful tensor of `values` in row-major order.
    pub fn new(name: impl Into<String>, element: Element, shape: &[usize], values: &[f64]) -> Self {
        RawTensor {
            name: name.into(),
            dtype: element.name().to_owned(),
            shape: shape.to_vec(),
            data: encode(element, values),
        }
    }
}

/// A whole safetensors file in memory.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RawFile {
    /// Tensors in the order of their bytes.
    pub tensors: Vec<RawTensor>,
}

impl RawFile {
    /// Reads a well-formed file.
    pub fn read(path: &Path) -> Result<Self, TestkitError> {
        let bytes = fs::read(path).map_err(TestkitError::io(path))?;
        let views = safetensors::SafeTensors::deserialize(&bytes).map_err(|source| TestkitError::Safetensors {
            path: path.to_path_buf(),
            source,
        })?;
        let mut tensors: Vec<RawTensor> = views
            .iter()
            .map(|(name, view)| RawTensor {
                name: name.to_owned(),
                dtype: view.dtype().to_string(),
                shape: view.shape().to_vec(),
                data: view.data().to_vec(),
            })
            .collect();
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(RawFile { tensors })
    }

    /// The tensor called `name`.
    pub fn tensor_mut(&mut self, name: &str) -> Result<&mut RawTensor, TestkitError> {
        self.tensors
            .iter_mut()
            .find(|tensor| tensor.name == name)
            .ok_or_else(|| TestkitError::MissingTensor { name: name.to_owned() })
    }

    /// The header that describes the tensors, their bytes laid out one after the other.
    pub fn header(&self) -> Map<String, Value> {
        let mut header = Map::new();
        header.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
        let mut start = 0;
        for tensor in &self.tensors {
            let end = start + tensor.data.len();
            header.insert(
                tensor.name.clone(),
                json!({ "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end] }),
            );
            start = end;
        }
        header
    }

    /// Writes header and data as they are, checking nothing.
    pub fn write(&self, path: &Path) -> Result<(), TestkitError> {
        self.write_with_header(path, &Value::Object(self.header()).to_string())
    }

    /// Writes the data behind a header of the caller's own.
    pub fn write_with_header(&self, path: &Path, header: &str) -> Result<(), TestkitError> {
        let mut bytes = Vec::new();
        // Readers may ask for data aligned to 8 bytes; upstream pads the header with spaces too.
        let padding = header.len().next_multiple_of(8) - header.len();
        bytes.extend_from_slice(&((header.len() + padding) as u64).to_le_bytes());
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend(std::iter::repeat_n(b' ', padding));
        for tensor in &self.tensors {
            bytes.extend_from_slice(&tensor.data);
        }
        fs::write(path, bytes).map_err(TestkitError::io(path))
    }
}
