//! The golden checkpoints and what an independent implementation computed from them.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// Folder of a golden checkpoint.
pub fn golden_dir(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(family)
}

/// Decoder families with experts.
pub fn moe_families() -> [&'static str; 12] {
    [
        "mixtral",
        "qwen2_moe",
        "qwen3_moe",
        "olmoe",
        "granitemoe",
        "phimoe",
        "deepseek_v2",
        "deepseek_v3",
        "gpt_oss",
        "glm4_moe",
        "ernie4_5_moe",
        "llama4_text",
    ]
}

/// Dense decoder families.
pub fn dense_families() -> [&'static str; 2] {
    ["llama", "qwen3"]
}

/// All decoder families.
pub fn decoder_families() -> Vec<&'static str> {
    moe_families().into_iter().chain(dense_families()).collect()
}

/// Tensors of a safetensors file as f32 (integers converted), with their shapes.
pub fn read_tensors(path: &Path) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let tensors = SafeTensors::deserialize(&bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    tensors
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let data = view.data();
            let values = match view.dtype() {
                Dtype::F32 => data
                    .as_chunks::<4>()
                    .0
                    .iter()
                    .map(|&chunk| f32::from_le_bytes(chunk))
                    .collect(),
                Dtype::I64 => data
                    .as_chunks::<8>()
                    .0
                    .iter()
                    .map(|&chunk| i64::from_le_bytes(chunk) as f32)
                    .collect(),
                Dtype::U8 => data.iter().map(|&byte| f32::from(byte)).collect(),
                other => panic!("{name}: {other:?} is not expected here"),
            };
            (name, (view.shape().to_vec(), values))
        })
        .collect()
}

/// `golden.json` and `golden.safetensors` of a family.
#[derive(Debug)]
pub struct Golden {
    /// Folder name.
    pub family: String,
    /// Folder.
    pub dir: PathBuf,
    /// `golden.json`.
    pub json: Value,
    /// `golden.safetensors`, by name.
    pub tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl Golden {
    /// Reads a family's golden files.
    pub fn read(family: &str) -> Golden {
        let dir = golden_dir(family);
        let text = std::fs::read_to_string(dir.join("golden.json")).expect("golden.json is in the repository");
        Golden {
            family: family.to_owned(),
            json: serde_json::from_str(&text).expect("golden.json is JSON"),
            tensors: read_tensors(&dir.join("golden.safetensors")),
            dir,
        }
    }

    /// Prompt ids without padding.
    pub fn prompts(&self) -> Vec<Vec<u32>> {
        id_lists(&self.json["prompts"])
    }

    /// Greedy continuations, 24 tokens each, end-of-sequence ignored.
    pub fn greedy(&self) -> Vec<Vec<u32>> {
        id_lists(&self.json["greedy"])
    }

    /// Whether each position of the padded batch holds a token, `[batch * sequence]`.
    pub fn valid(&self) -> Vec<bool> {
        self.tensors["attention_mask"]
            .1
            .iter()
            .map(|&mask| mask == 1.0)
            .collect()
    }
}

fn id_lists(value: &Value) -> Vec<Vec<u32>> {
    let list = |value: &Value| value.as_array().expect("a list").clone();
    list(value)
        .iter()
        .map(|ids| {
            list(ids)
                .iter()
                .map(|id| u32::try_from(id.as_u64().expect("an id")).expect("an id"))
                .collect()
        })
        .collect()
}

/// Asserts `|a - b| <= tolerance + tolerance * |b|` for every element of `[rows, width]` whose row is valid.
#[track_caller]
pub fn assert_close(what: &str, found: &[f32], wanted: &[f32], valid: &[bool], tolerance: f32) {
    assert_eq!(found.len(), wanted.len(), "{what}: number of elements");
    let width = wanted.len() / valid.len();
    for (index, (&a, &b)) in found.iter().zip(wanted).enumerate() {
        if valid[index / width] {
            assert!(
                (a - b).abs() <= tolerance + tolerance * b.abs(),
                "{what}[{index}]: {a} is not close to {b}"
            );
        }
    }
}
