//! GGUF files as llama.cpp's converter writes them, made from a checkpoint directory.
//!
//! The converter stacks the experts of a layer, interleaves the query and key rows of architectures that it rotates
//! by neighbours, and writes the tokenizer into the metadata (llama.cpp, `convert_hf_to_gguf.py`).

mod convert;
mod metadata;
mod rows;
mod tokenizer;

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum GgufValue {
    U32(u32),
    F32(f32),
    Flag(bool),
    Text(String),
    Texts(Vec<String>),
    Ints(Vec<i32>),
    Floats(Vec<f32>),
}

/// A tensor; dimensions as in the file, the innermost first.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub struct GgufRawTensor {
    pub name: String,
    /// Number of its `ggml_type`.
    pub type_code: u32,
    pub dims: Vec<u64>,
    pub data: Vec<u8>,
}

/// A GGUF file in memory.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RawGguf {
    /// Metadata in the order of the file.
    pub metadata: Vec<(String, GgufValue)>,
    /// Tensors in the order of the file and of their data.
    pub tensors: Vec<GgufRawTensor>,
}

const ALIGNMENT: usize = 32;

impl RawGguf {
    /// The file of version 3.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(3u32.to_le_bytes());
        file.extend((self.tensors.len() as u64).to_le_bytes());
        file.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            put_text(&mut file, key);
            put_value(&mut file, value);
        }
        let mut offset = 0usize;
        for tensor in &self.tensors {
            put_text(&mut file, &tensor.name);
            file.extend((tensor.dims.len() as u32).to_le_bytes());
            for dim in &tensor.dims {
                file.extend(dim.to_le_bytes());
            }
            file.extend(tensor.type_code.to_le_bytes());
            file.extend((offset as u64).to_le_bytes());
            offset += tensor.data.len().next_multiple_of(ALIGNMENT);
        }
        pad(&mut file);
        for tensor in &self.tensors {
            file.extend(&tensor.data);
            pad(&mut file);
        }
        file
    }
}

fn pad(file: &mut Vec<u8>) {
    file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
}

fn put_text(file: &mut Vec<u8>, text: &str) {
    file.extend((text.len() as u64).to_le_bytes());
    file.extend(text.as_bytes());
}

fn put_value(file: &mut Vec<u8>, value: &GgufValue) {
    let kind = |file: &mut Vec<u8>, kind: u32| file.extend(kind.to_le_bytes());
    let list = |file: &mut Vec<u8>, of: u32, length: usize| {
        kind(file, 9);
        kind(file, of);
        file.extend((length as u64).to_le_bytes());
    };
    match value {
        GgufValue::U32(number) => {
            kind(file, 4);
            file.extend(number.to_le_bytes());
        }
        GgufValue::F32(number) => {
            kind(file, 6);
            file.extend(number.to_le_bytes());
        }
        GgufValue::Flag(flag) => {
            kind(file, 7);
            file.push(u8::from(*flag));
        }
        GgufValue::Text(text) => {
            kind(file, 8);
            put_text(file, text);
        }
        GgufValue::Texts(texts) => {
            list(file, 8, texts.len());
            texts.iter().for_each(|text| put_text(file, text));
        }
        GgufValue::Ints(numbers) => {
            list(file, 5, numbers.len());
            numbers.iter().for_each(|number| file.extend(number.to_le_bytes()));
        }
        GgufValue::Floats(numbers) => {
            list(file, 6, numbers.len());
            numbers.iter().for_each(|number| file.extend(number.to_le_bytes()));
        }
    }
}
