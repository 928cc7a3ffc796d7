//! A checkpoint directory as a GGUF file: names and order of the tensors.

use std::{collections::BTreeMap, fs, path::Path};

use serde_json::Value;

use super::{GgufRawTensor, RawGguf, metadata, rows, tokenizer};
use crate::{RawFile, RawTensor, TestkitError};

impl RawGguf {
    /// What the converter makes of a checkpoint directory with one weight file of f32, f16 or bf16 (gpt_oss: or MXFP4);
    /// each tensor keeps its type.
    ///
    /// The format has no place for some of what a config says (`swiglu_limit`, yarn's `truncate`, …): a reader takes it
    /// for granted, and so a config that says otherwise becomes a file of another model.
    ///
    /// # Errors
    /// If a file is missing or malformed.
    pub fn from_checkpoint(dir: &Path) -> Result<Self, TestkitError> {
        let config = read_json(&dir.join("config.json"))?;
        let weights = RawFile::read(&dir.join("model.safetensors"))?;
        let architecture = metadata::architecture(&config);
        let mut gguf = RawGguf {
            metadata: metadata::entries(&config, architecture),
            tensors: Vec::new(),
        };
        gguf.metadata
            .extend(tokenizer::entries(&read_json(&dir.join("tokenizer.json"))?, &config));
        if let Some(factors) = metadata::rotary_factors(&config) {
            let data = factors.iter().flat_map(|factor| factor.to_le_bytes()).collect();
            gguf.push("rope_freqs.weight".to_owned(), "F32", vec![factors.len()], data);
        }
        let mut stacks: BTreeMap<String, Vec<(usize, &RawTensor)>> = BTreeMap::new();
        for tensor in &weights.tensors {
            let Some((layer, rest)) = tensor
                .name
                .strip_prefix("model.layers.")
                .and_then(|rest| rest.split_once('.'))
            else {
                gguf.push_same(global_name(&tensor.name).to_owned(), tensor);
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
            } else if !gguf.push_stack(layer, rest, tensor, &weights, architecture)
                && !gguf.push_keys_and_values(layer, rest, tensor, &config)
            {
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

    /// Experts that the checkpoint stacks as well; `false` if the tensor is none of them.
    fn push_stack(
        &mut self,
        layer: &str,
        rest: &str,
        tensor: &RawTensor,
        weights: &RawFile,
        architecture: &str,
    ) -> bool {
        let name = |stack: &str| format!("blk.{layer}.ffn_{stack}_exps.weight");
        let bias = |stack: &str| format!("blk.{layer}.ffn_{stack}_exps.bias");
        let halves = [(0, "gate"), (1, "up")];
        let (dtype, data) = (&tensor.dtype, &tensor.data);
        let end = rest.rsplit_once('.').map_or(rest, |(module, kind)| match kind {
            "weight" => module.rsplit_once('.').map_or(module, |(_, end)| end),
            end => end,
        });
        match (end, &tensor.shape[..]) {
            ("input_linear", &[experts, both, cols]) => {
                for (first, half) in halves {
                    let shape = vec![experts, both / 2, cols];
                    self.push(
                        name(half),
                        dtype,
                        shape,
                        rows::every_second(data, data.len() / experts / 2, first),
                    );
                }
            }
            ("output_linear", _) => self.push_same(name("down"), tensor),
            ("gate_up_proj", &[experts, hidden, both]) => {
                let by_rows = rows::transpose(data, [experts, hidden, both]);
                let row = by_rows.len() / (experts * both);
                // llama4 has the gate's columns first; gpt_oss alternates.
                let piece = if architecture == "llama4" { row * both / 2 } else { row };
                for (first, half) in halves {
                    self.push(
                        name(half),
                        dtype,
                        vec![experts, both / 2, hidden],
                        rows::every_second(&by_rows, piece, first),
                    );
                }
            }
            ("gate_up_proj_bias", &[experts, both]) => {
                for (first, half) in halves {
                    let biases = rows::every_second(data, data.len() / (experts * both), first);
                    self.push(bias(half), dtype, vec![experts, both / 2], biases);
                }
            }
            ("down_proj", &[experts, width, hidden]) => {
                let by_rows = rows::transpose(data, [experts, width, hidden]);
                self.push(name("down"), dtype, vec![experts, hidden, width], by_rows);
            }
            ("down_proj_bias", _) => self.push_same(bias("down"), tensor),
            ("gate_up_proj_blocks", &[experts, both, groups, _]) => {
                let exponents = scales_of(tensor, weights);
                for (first, half) in halves {
                    let codes = rows::every_second(data, groups * 16, first);
                    let exponents = rows::every_second(exponents, groups, first);
                    let shape = vec![experts, both / 2, groups * 32];
                    self.push(name(half), MXFP4, shape, rows::mxfp4_blocks(&codes, &exponents));
                }
            }
            ("down_proj_blocks", &[experts, hidden, groups, _]) => {
                let blocks = rows::mxfp4_blocks(data, scales_of(tensor, weights));
                self.push(name("down"), MXFP4, vec![experts, hidden, groups * 32], blocks);
            }
            ("gate_up_proj_scales" | "down_proj_scales", _) => {} // beside their codes
            _ => return false,
        }
        true
    }

    /// `kv_b_proj` in two, the keys transposed; `false` if the tensor is another.
    fn push_keys_and_values(&mut self, layer: &str, rest: &str, tensor: &RawTensor, config: &Value) -> bool {
        let (Some(heads), Some(keys), Some(values)) = (
            metadata::size(config, "num_attention_heads").filter(|_| rest == "self_attn.kv_b_proj.weight"),
            metadata::size(config, "qk_nope_head_dim"),
            metadata::size(config, "v_head_dim"),
        ) else {
            return false;
        };
        let [heads, keys, values] = [heads, keys, values].map(|size| size as usize);
        let (latent, row) = (tensor.shape[1], tensor.data.len() / tensor.shape[0]);
        let (run, split) = ((keys + values) * row, keys * row);
        let key_rows = rows::part_of_each(&tensor.data, run, 0, split);
        let value_rows = rows::part_of_each(&tensor.data, run, split, run);
        let name = |half| format!("blk.{layer}.attn_{half}_b.weight");
        let key_cols = rows::transpose(&key_rows, [heads, keys, latent]);
        self.push(name("k"), &tensor.dtype, vec![heads, latent, keys], key_cols);
        self.push(name("v"), &tensor.dtype, vec![heads, values, latent], value_rows);
        true
    }

    fn push_dense(&mut self, layer: &str, rest: &str, tensor: &RawTensor, config: &Value, architecture: &str) {
        let (module, kind) = rest.rsplit_once('.').unwrap_or((rest, ""));
        let name = dense_name(module, kind, architecture);
        let kind = match kind {
            "e_score_correction_bias" => "bias",
            "sinks" => "weight",
            kind => kind,
        };
        let mut data = tensor.data.clone();
        if matches!(architecture, "llama" | "granitemoe") && matches!(name, "attn_q" | "attn_k") {
            data = rows::interleave(&data, tensor.shape[0], metadata::head_dim(config));
        }
        let mut shape = tensor.shape.clone();
        if matches!(name, "ffn_gate_inp_shexp" | "exp_probs_b") {
            shape = vec![shape.iter().product()];
        }
        self.push(format!("blk.{layer}.{name}.{kind}"), &tensor.dtype, shape, data);
    }

    fn push_same(&mut self, name: String, tensor: &RawTensor) {
        self.push(name, &tensor.dtype, tensor.shape.clone(), tensor.data.clone());
    }

    fn push(&mut self, name: String, dtype: &str, shape: Vec<usize>, data: Vec<u8>) {
        self.tensors.push(GgufRawTensor {
            name,
            type_code: match dtype {
                "F16" => 1,
                "BF16" => 30,
                MXFP4 => 39,
                _ => 0,
            },
            dims: shape.iter().rev().map(|&dim| dim as u64).collect(),
            data,
        });
    }
}

const MXFP4: &str = "MXFP4";

/// The exponents beside 4-bit codes; none if there are none.
fn scales_of<'a>(codes: &RawTensor, weights: &'a RawFile) -> &'a [u8] {
    let name = codes.name.replace("_blocks", "_scales");
    let found = weights.tensors.iter().find(|tensor| tensor.name == name);
    found.map_or(&[], |scales| &scales.data)
}

fn global_name(name: &str) -> &str {
    match name {
        "model.embed_tokens.weight" => "token_embd.weight",
        "model.norm.weight" => "output_norm.weight",
        "lm_head.weight" => "output.weight",
        other => other,
    }
}

fn dense_name<'a>(module: &'a str, kind: &str, architecture: &str) -> &'a str {
    match module.trim_start_matches("self_attn.") {
        "self_attn" if kind == "sinks" => "attn_sinks",
        "mlp.gate" | "mlp.moe_statics" if kind == "e_score_correction_bias" => "exp_probs_b",
        "input_layernorm" => "attn_norm",
        "post_attention_layernorm" if matches!(architecture, "gpt-oss" | "glm4moe") => "post_attention_norm",
        "post_attention_layernorm" => "ffn_norm",
        "q_proj" => "attn_q",
        "k_proj" => "attn_k",
        "v_proj" => "attn_v",
        "o_proj" => "attn_output",
        "q_norm" => "attn_q_norm",
        "k_norm" => "attn_k_norm",
        "q_a_proj" => "attn_q_a",
        "q_a_layernorm" => "attn_q_a_norm",
        "q_b_proj" => "attn_q_b",
        "kv_a_proj_with_mqa" => "attn_kv_a_mqa",
        "kv_a_layernorm" => "attn_kv_a_norm",
        "mlp.gate_proj" | "feed_forward.gate_proj" => "ffn_gate",
        "mlp.up_proj" | "feed_forward.up_proj" => "ffn_up",
        "mlp.down_proj" | "feed_forward.down_proj" => "ffn_down",
        "mlp.gate"
        | "mlp.router"
        | "feed_forward.router"
        | "block_sparse_moe.gate"
        | "block_sparse_moe.router.layer" => "ffn_gate_inp",
        "mlp.shared_expert.gate_proj" | "mlp.shared_experts.gate_proj" | "feed_forward.shared_expert.gate_proj" => {
            "ffn_gate_shexp"
        }
        "mlp.shared_expert.up_proj" | "mlp.shared_experts.up_proj" | "feed_forward.shared_expert.up_proj" => {
            "ffn_up_shexp"
        }
        "mlp.shared_expert.down_proj" | "mlp.shared_experts.down_proj" | "feed_forward.shared_expert.down_proj" => {
            "ffn_down_shexp"
        }
        "mlp.shared_expert_gate" => "ffn_gate_inp_shexp",
        other => other,
    }
}

fn read_json(path: &Path) -> Result<Value, TestkitError> {
    let text = fs::read_to_string(path).map_err(TestkitError::io(path))?;
    serde_json::from_str(&text).map_err(|source| TestkitError::Json {
        path: path.to_owned(),
        source,
    })
}
