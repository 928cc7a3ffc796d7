//! A decoder in the plainest possible arithmetic: f64, loops, the whole sequence at once, no cache.
//!
//! Written to be compared with a paper rather than to be fast. Every concept reads what it needs from `config.json` by
//! the name that the family's upstream gives it.

mod attention;
mod config;
mod experts;
mod gate;
mod latent_attention;
mod maths;
mod rotary;
mod weights;

use std::path::Path;

use config::Config;
use gate::Choice;
use maths::{argmax, layer_norm, linear, rms_norm};
use weights::Weights;

use crate::{Family, TestkitError};

/// One row of activations per token.
pub(crate) type Rows = Vec<Vec<f64>>;

/// A checkpoint, all of it in memory as f64.
#[derive(Debug)]
pub struct NaiveModel {
    config: Config,
    weights: Weights,
}

/// What one forward pass computed. Every outer `Vec` runs over tokens unless it says otherwise.
#[derive(Debug, Clone, PartialEq)]
pub struct NaiveForward {
    /// `[tokens, vocab]`.
    pub logits: Vec<Vec<f64>>,
    /// `[tokens, hidden]`, after the final norm.
    pub hidden_final: Vec<Vec<f64>>,
    /// Residual stream after each layer, `[layers, tokens, hidden]`.
    pub layer_outputs: Vec<Vec<Vec<f64>>>,
    /// One entry per MoE block, in layer order.
    pub moe: Vec<NaiveMoeBlock>,
}

/// What one MoE block saw and did.
#[derive(Debug, Clone, PartialEq)]
pub struct NaiveMoeBlock {
    /// Layer that the block stands in.
    pub layer: usize,
    /// `[tokens, hidden]`, after the pre-MLP norm.
    pub input: Vec<Vec<f64>>,
    /// `[tokens, hidden]`, shared experts included, before the residual add.
    pub output: Vec<Vec<f64>>,
    /// `[tokens, num_experts]`, router bias included.
    pub router_logits: Vec<Vec<f64>>,
    /// Chosen experts, ascending, `[tokens, top_k]`.
    pub topk_ids: Vec<Vec<usize>>,
    /// Their weights, in the same order.
    pub topk_weights: Vec<Vec<f64>>,
    /// By how much each token's choice was safe: smallest distance between a score that was taken and one that was
    /// left (infinite where every expert was taken).
    pub margins: Vec<f64>,
}

impl NaiveForward {
    /// The safest distance that every routing decision kept; infinite for a dense model.
    pub fn routing_margin(&self) -> f64 {
        self.moe
            .iter()
            .flat_map(|block| &block.margins)
            .copied()
            .fold(f64::INFINITY, f64::min)
    }

    /// The likeliest token after the last one, the lower id of equals; `None` after an empty prompt.
    pub fn greedy_token(&self) -> Option<u32> {
        self.logits.last().map(|row| argmax(row) as u32)
    }

    /// Distance between the two largest logits of the last token.
    pub fn greedy_margin(&self) -> f64 {
        let Some(row) = self.logits.last() else {
            return f64::INFINITY;
        };
        let mut sorted = row.clone();
        sorted.sort_by(|a, b| b.total_cmp(a));
        match sorted[..] {
            [best, second, ..] => best - second,
            _ => f64::INFINITY,
        }
    }
}

impl NaiveModel {
    /// Reads `config.json` and all tensors of a checkpoint directory.
    pub fn open(dir: &Path) -> Result<Self, TestkitError> {
        Self::open_with_config(dir, "config.json")
    }

    /// As [`NaiveModel::open`], with the config from another file of the directory (`config.hub.json`).
    pub fn open_with_config(dir: &Path, config_file: &str) -> Result<Self, TestkitError> {
        let config = Config::read(&dir.join(config_file))?;
        let weights = Weights::read(dir)?;
        Ok(NaiveModel { config, weights })
    }

    /// The family.
    pub fn family(&self) -> Family {
        self.config.family
    }

    /// One pass over `ids`, `[tokens]`, at positions `0..tokens`.
    pub fn forward(&self, ids: &[u32]) -> Result<NaiveForward, TestkitError> {
        let residual_multiplier = self.config.float_or("residual_multiplier", 1.0)?;
        let mut hidden = self.embed(ids)?;
        let mut layer_outputs = Vec::new();
        let mut moe = Vec::new();
        for layer in 0..self.config.size("num_hidden_layers")? {
            let prefix = format!("model.layers.{layer}");

            let normed = self.norm(&format!("{prefix}.input_layernorm"), &hidden)?;
            let attended = match self.config.family {
                Family::DeepseekV2 | Family::DeepseekV3 => {
                    latent_attention::attention(&self.config, &self.weights, layer, &normed)?
                }
                _ => attention::attention(&self.config, &self.weights, layer, &normed)?,
            };
            add_scaled(&mut hidden, &attended, residual_multiplier);

            let normed = self.norm(&format!("{prefix}.post_attention_layernorm"), &hidden)?;
            let fed_forward = if self.config.is_moe_layer(layer)? {
                let block = self.moe_block(layer, normed)?;
                let output = block.output.clone();
                moe.push(block);
                output
            } else {
                experts::dense(&self.config, &self.weights, layer, &normed)?
            };
            add_scaled(&mut hidden, &fed_forward, residual_multiplier);
            layer_outputs.push(hidden.clone());
        }
        let hidden_final = self.norm("model.norm", &hidden)?;
        let logits = self.head(&hidden_final)?;
        Ok(NaiveForward {
            logits,
            hidden_final,
            layer_outputs,
            moe,
        })
    }

    /// The `num_tokens` likeliest next tokens one by one, end-of-sequence ids included and not stopped at; of equal
    /// logits the lower id wins.
    pub fn greedy(&self, prompt: &[u32], num_tokens: usize) -> Result<Vec<u32>, TestkitError> {
        let mut ids = prompt.to_vec();
        for _ in 0..num_tokens {
            ids.extend(self.forward(&ids)?.greedy_token());
        }
        Ok(ids.split_off(prompt.len()))
    }

    fn embed(&self, ids: &[u32]) -> Result<Rows, TestkitError> {
        let multiplier = self.config.float_or("embedding_multiplier", 1.0)?;
        let table = self.weights.matrix(
            "model.embed_tokens.weight",
            self.config.size("vocab_size")?,
            self.config.size("hidden_size")?,
        )?;
        ids.iter()
            .map(|&id| match table.rows().nth(id as usize) {
                Some(row) => Ok(row.iter().map(|value| value * multiplier).collect()),
                None => Err(TestkitError::Unknown {
                    what: "token id",
                    name: id.to_string(),
                }),
            })
            .collect()
    }

    fn norm(&self, name: &str, rows: &Rows) -> Result<Rows, TestkitError> {
        let hidden = self.config.size("hidden_size")?;
        let epsilon = self.config.float("rms_norm_eps")?;
        let weight = self.weights.vector(&format!("{name}.weight"), hidden)?;
        if self.config.family == Family::PhiMoe {
            let bias = self.weights.vector(&format!("{name}.bias"), hidden)?;
            return Ok(rows.iter().map(|row| layer_norm(row, weight, bias, epsilon)).collect());
        }
        Ok(rows.iter().map(|row| rms_norm(row, Some(weight), epsilon)).collect())
    }

    fn moe_block(&self, layer: usize, input: Rows) -> Result<NaiveMoeBlock, TestkitError> {
        let router_logits = gate::router_logits(&self.config, &self.weights, layer, &input)?;
        let choices = router_logits
            .iter()
            .map(|logits| gate::choose(&self.config, &self.weights, layer, logits))
            .collect::<Result<Vec<Choice>, _>>()?;
        let output = experts::mixture(&self.config, &self.weights, layer, &input, &choices)?;
        Ok(NaiveMoeBlock {
            layer,
            input,
            output,
            router_logits,
            topk_ids: choices.iter().map(|choice| choice.ids.clone()).collect(),
            topk_weights: choices.iter().map(|choice| choice.weights.clone()).collect(),
            margins: choices.iter().map(|choice| choice.margin).collect(),
        })
    }

    fn head(&self, hidden_final: &Rows) -> Result<Rows, TestkitError> {
        let vocab = self.config.size("vocab_size")?;
        let tied = self.config.flag_or("tie_word_embeddings", false)?;
        let name = if tied {
            "model.embed_tokens.weight"
        } else {
            "lm_head.weight"
        };
        let weight = self.weights.matrix(name, vocab, self.config.size("hidden_size")?)?;
        let bias = match self.config.flag_or("lm_head_bias", false)? {
            true => Some(self.weights.vector("lm_head.bias", vocab)?),
            false => None,
        };
        let scaling = self.config.float_or("logits_scaling", 1.0)?;
        let logits = |row: &Vec<f64>| linear(&weight, bias, row).iter().map(|logit| logit / scaling).collect();
        Ok(hidden_final.iter().map(logits).collect())
    }
}

fn add_scaled(hidden: &mut Rows, branch: &Rows, multiplier: f64) {
    for (row, branch) in hidden.iter_mut().zip(branch) {
        for (value, branch) in row.iter_mut().zip(branch) {
            *value += multiplier * branch;
        }
    }
}
