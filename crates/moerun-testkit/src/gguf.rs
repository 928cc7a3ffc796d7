//! GGUF files as llama.cpp's converter writes them, made from a checkpoint directory.
//!
//! The converter stacks the experts of a layer, interleaves the query and key rows of architectures that it rotates
//! by neighbours, and writes the tokenizer into the metadata (llama.cpp, `convert_hf_to_gguf.py`).

use std::{collections::BTreeMap, fs, path::Path};

use serde_json::Value;

use crate::{RawFile, RawTensor, TestkitError};

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

    /// What the converter makes of a checkpoint directory with one weight file of f32, f16 or bf16; each tensor keeps its type.
    ///
    /// # Errors
    /// If a file is missing, or the family is none of llama, mixtral, qwen2_moe, qwen3, qwen3_moe, olmoe, granitemoe.
    pub fn from_checkpoint(dir: &Path) -> Result<Self, TestkitError> {
        let config = read_json(&dir.join("config.json"))?;
        let weights = RawFile::read(&dir.join("model.safetensors"))?;
        let architecture = architecture(&config);
        let mut gguf = RawGguf {
            metadata: metadata(&config, architecture),
            tensors: Vec::new(),
        };
        gguf.metadata
            .extend(tokenizer(&read_json(&dir.join("tokenizer.json"))?, &config));
        let mut stacks: BTreeMap<String, Vec<(usize, &RawTensor)>> = BTreeMap::new();
        for tensor in &weights.tensors {
            let Some((layer, rest)) = tensor
                .name
                .strip_prefix("model.layers.")
                .and_then(|rest| rest.split_once('.'))
            else {
                let name = match tensor.name.as_str() {
                    "model.embed_tokens.weight" => "token_embd.weight",
                    "model.norm.weight" => "output_norm.weight",
                    "lm_head.weight" => "output.weight",
                    other => other,
                };
                gguf.push(
                    name.to_owned(),
                    &tensor.dtype,
                    tensor.shape.clone(),
                    tensor.data.clone(),
                );
                continue;
            };
            if let Some((expert, matrix)) = rest
                .split_once("experts.")
                .and_then(|(_, rest)| rest.split_once('.'))
                .and_then(|(expert, matrix)| Some((expert.parse().ok()?, matrix)))
            {
                let stack = match matrix {
                    "w1.weight" | "gate_proj.weight" => "ffn_gate_exps",
                    "w3.weight" | "up_proj.weight" => "ffn_up_exps",
                    _ => "ffn_down_exps",
                };
                stacks
                    .entry(format!("blk.{layer}.{stack}.weight"))
                    .or_default()
                    .push((expert, tensor));
            } else if rest.ends_with("input_linear.weight") {
                let [experts, both, cols] = tensor.shape[..] else {
                    continue;
                };
                let half = tensor.data.len() / experts / 2;
                for (first, name) in [(0, "ffn_gate_exps"), (1, "ffn_up_exps")] {
                    let data = tensor.data.chunks_exact(half).skip(first).step_by(2).flatten().copied();
                    let shape = vec![experts, both / 2, cols];
                    gguf.push(
                        format!("blk.{layer}.{name}.weight"),
                        &tensor.dtype,
                        shape,
                        data.collect(),
                    );
                }
            } else {
                gguf.push_dense(layer, rest, tensor, &config, architecture);
            }
        }
        for (name, mut experts) in stacks {
            experts.sort_by_key(|(expert, _)| *expert);
            let shape = [vec![experts.len()], experts[0].1.shape.clone()].concat();
            let data = experts.iter().flat_map(|(_, tensor)| &tensor.data).copied().collect();
            gguf.push(name, &experts[0].1.dtype, shape, data);
        }
        Ok(gguf)
    }

    fn push_dense(&mut self, layer: &str, rest: &str, tensor: &RawTensor, config: &Value, architecture: &str) {
        let (module, kind) = rest.rsplit_once('.').unwrap_or((rest, ""));
        let name = match module.trim_start_matches("self_attn.") {
            "input_layernorm" => "attn_norm",
            "post_attention_layernorm" => "ffn_norm",
            "q_proj" => "attn_q",
            "k_proj" => "attn_k",
            "v_proj" => "attn_v",
            "o_proj" => "attn_output",
            "q_norm" => "attn_q_norm",
            "k_norm" => "attn_k_norm",
            "mlp.gate_proj" => "ffn_gate",
            "mlp.up_proj" => "ffn_up",
            "mlp.down_proj" => "ffn_down",
            "mlp.gate" | "block_sparse_moe.gate" | "block_sparse_moe.router.layer" => "ffn_gate_inp",
            "mlp.shared_expert.gate_proj" => "ffn_gate_shexp",
            "mlp.shared_expert.up_proj" => "ffn_up_shexp",
            "mlp.shared_expert.down_proj" => "ffn_down_shexp",
            "mlp.shared_expert_gate" => "ffn_gate_inp_shexp",
            "block_sparse_moe.output_linear" => "ffn_down_exps",
            other => other,
        };
        let mut data = tensor.data.clone();
        if matches!(architecture, "llama" | "granitemoe") && matches!(name, "attn_q" | "attn_k") {
            data = interleave(&data, tensor.shape[0], head_dim(config));
        }
        let mut shape = tensor.shape.clone();
        if name == "ffn_gate_inp_shexp" {
            shape = vec![shape.iter().product()];
        }
        self.push(format!("blk.{layer}.{name}.{kind}"), &tensor.dtype, shape, data);
    }

    fn push(&mut self, name: String, dtype: &str, shape: Vec<usize>, data: Vec<u8>) {
        self.tensors.push(GgufRawTensor {
            name,
            type_code: match dtype {
                "F16" => 1,
                "BF16" => 30,
                _ => 0,
            },
            dims: shape.iter().rev().map(|&dim| dim as u64).collect(),
            data,
        });
    }
}

/// Rows `[heads, 2, head/2]` become `[heads, head/2, 2]`.
fn interleave(data: &[u8], rows: usize, head: usize) -> Vec<u8> {
    let row_bytes = data.len() / rows;
    let row = |index: usize| &data[index * row_bytes..(index + 1) * row_bytes];
    (0..rows)
        .flat_map(|stored| {
            let (start, within) = (stored / head * head, stored % head);
            row(start + within % 2 * (head / 2) + within / 2).iter().copied()
        })
        .collect()
}

fn architecture(config: &Value) -> &'static str {
    match config["model_type"].as_str() {
        Some("qwen2_moe") => "qwen2moe",
        Some("qwen3_moe") => "qwen3moe",
        Some("qwen3") => "qwen3",
        Some("olmoe") => "olmoe",
        Some("granitemoe") => "granitemoe",
        _ => "llama",
    }
}

fn size(config: &Value, name: &str) -> Option<u32> {
    config[name].as_u64().map(|size| size as u32)
}

fn head_dim(config: &Value) -> usize {
    let divided = || size(config, "hidden_size").unwrap_or(1) / size(config, "num_attention_heads").unwrap_or(1);
    size(config, "head_dim").unwrap_or_else(divided) as usize
}

fn metadata(config: &Value, architecture: &str) -> Vec<(String, GgufValue)> {
    let text = |text: &str| GgufValue::Text(text.to_owned());
    let mut entries = vec![("general.architecture".to_owned(), text(architecture))];
    let expert_width = size(config, "moe_intermediate_size");
    let experts = size(config, "num_local_experts").or_else(|| size(config, "num_experts"));
    let sizes = [
        ("context_length", size(config, "max_position_embeddings")),
        ("embedding_length", size(config, "hidden_size")),
        ("block_count", size(config, "num_hidden_layers")),
        ("feed_forward_length", size(config, "intermediate_size")),
        ("attention.head_count", size(config, "num_attention_heads")),
        ("attention.head_count_kv", size(config, "num_key_value_heads")),
        ("attention.key_length", Some(head_dim(config) as u32)),
        ("attention.value_length", Some(head_dim(config) as u32)),
        ("rope.dimension_count", Some(head_dim(config) as u32)),
        ("expert_count", experts),
        ("expert_used_count", size(config, "num_experts_per_tok")),
        ("expert_feed_forward_length", expert_width),
        (
            "expert_shared_feed_forward_length",
            size(config, "shared_expert_intermediate_size"),
        ),
        ("vocab_size", size(config, "vocab_size")),
    ];
    let theta = config["rope_parameters"]["rope_theta"]
        .as_f64()
        .or_else(|| config["rope_theta"].as_f64());
    let numbers = [
        ("attention.layer_norm_rms_epsilon", config["rms_norm_eps"].as_f64()),
        ("rope.freq_base", theta),
        ("attention.scale", config["attention_multiplier"].as_f64()),
        ("embedding_scale", config["embedding_multiplier"].as_f64()),
        ("residual_scale", config["residual_multiplier"].as_f64()),
        ("logit_scale", config["logits_scaling"].as_f64()),
    ];
    let key = |name: &str| format!("{architecture}.{name}");
    entries.extend(
        sizes
            .into_iter()
            .filter_map(|(name, size)| Some((key(name), GgufValue::U32(size?)))),
    );
    entries.extend(
        numbers
            .into_iter()
            .filter_map(|(name, number)| Some((key(name), GgufValue::F32(number? as f32)))),
    );
    entries
}

/// A byte-level tokenizer with the pre-tokenizer of GPT-2. Ids that the tokenizer does not use are written as unused,
/// as the converter does.
fn tokenizer(json: &Value, config: &Value) -> Vec<(String, GgufValue)> {
    const NORMAL: i32 = 1;
    const CONTROL: i32 = 3;
    const UNUSED: i32 = 5;
    let size = size(config, "vocab_size").unwrap_or(0) as usize;
    let mut tokens: Vec<(String, i32)> = (0..size).map(|id| (format!("[PAD{id}]"), UNUSED)).collect();
    for (token, id) in json["model"]["vocab"].as_object().into_iter().flatten() {
        if let Some(slot) = id.as_u64().and_then(|id| tokens.get_mut(id as usize)) {
            *slot = (token.clone(), NORMAL);
        }
    }
    for added in json["added_tokens"].as_array().into_iter().flatten() {
        let slot = added["id"].as_u64().and_then(|id| tokens.get_mut(id as usize));
        if let (Some(slot), Some(content)) = (slot, added["content"].as_str()) {
            *slot = (content.to_owned(), CONTROL);
        }
    }
    let merges = json["model"]["merges"].as_array().into_iter().flatten().map(|merge| {
        let parts = merge.as_array().into_iter().flatten().filter_map(Value::as_str);
        let joined = parts.collect::<Vec<_>>().join(" ");
        merge.as_str().map_or(joined, str::to_owned)
    });
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let text = |text: &str| GgufValue::Text(text.to_owned());
    let mut entries = vec![
        (key("model"), text("gpt2")),
        (key("pre"), text("gpt-2")),
        (key("merges"), GgufValue::Texts(merges.collect())),
        (key("add_bos_token"), GgufValue::Flag(false)),
    ];
    for (ours, theirs) in [("bos", "bos"), ("eos", "eos"), ("pad", "padding")] {
        let id = config[format!("{ours}_token_id")].as_u64();
        entries.extend(id.map(|id| (key(&format!("{theirs}_token_id")), GgufValue::U32(id as u32))));
    }
    let (tokens, types) = tokens.into_iter().unzip();
    entries.push((key("tokens"), GgufValue::Texts(tokens)));
    entries.push((key("token_type"), GgufValue::Ints(types)));
    entries
}

fn read_json(path: &Path) -> Result<Value, TestkitError> {
    let text = fs::read_to_string(path).map_err(TestkitError::io(path))?;
    serde_json::from_str(&text).map_err(|source| TestkitError::Json {
        path: path.to_owned(),
        source,
    })
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
