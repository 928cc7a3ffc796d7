//! Names, shapes and random values of a tiny checkpoint's tensors.

use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};

use super::{Storage, TinyCheckpoint, storage};
use crate::{Element, Family, RawTensor};

/// What a tensor is, as far as the size of its values goes.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    /// Rows of unit size, or small ones where the head shares them.
    Embedding,
    /// Logits of standard deviation 2.
    Head,
    /// Keeps the size of a vector of `fan_in` elements.
    Matrix {
        fan_in: usize,
    },
    /// Router logits of standard deviation 2, so that few choices are close.
    Router,
    /// Around 1.
    NormWeight,
    Bias,
    CorrectionBias,
    Sink,
}

/// A tensor that the family's checkpoint has.
#[derive(Debug)]
struct Planned {
    name: String,
    shape: Vec<usize>,
    kind: Kind,
}

/// The list under construction.
struct Plan<'a> {
    tiny: &'a TinyCheckpoint,
    tensors: Vec<Planned>,
}

impl TinyCheckpoint {
    /// All tensors with their values, in the order of the model.
    pub(crate) fn raw_tensors(&self) -> Vec<RawTensor> {
        let mut plan = Plan {
            tiny: self,
            tensors: Vec::new(),
        };
        plan.model();
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        plan.tensors
            .iter()
            .flat_map(|planned| self.fill(planned, &mut rng))
            .collect()
    }

    fn fill(&self, planned: &Planned, rng: &mut ChaCha8Rng) -> Vec<RawTensor> {
        let Planned { name, shape, kind } = planned;
        let hidden = self.hidden as f64;
        let (mean, deviation) = match *kind {
            Kind::Embedding if self.tied => (0.0, 2.0 / hidden.sqrt()),
            Kind::Embedding => (0.0, 1.0),
            Kind::Head | Kind::Router => (0.0, 2.0 / hidden.sqrt()),
            Kind::Matrix { fan_in } => (0.0, 1.0 / (fan_in as f64).sqrt()),
            Kind::NormWeight => (1.0, 0.2),
            Kind::Bias => (0.0, 0.3),
            Kind::CorrectionBias => (0.0, 0.2),
            Kind::Sink => (0.0, 1.0),
        };
        let count = shape.iter().product();
        let values: Vec<f64> = (0..count).map(|_| mean + deviation * normal(rng)).collect();
        let is_expert = name.contains(".experts.");
        match (self.storage, kind) {
            (Storage::Fp8Block, Kind::Matrix { .. }) => storage::fp8_block(name, shape, &values),
            (Storage::Mxfp4, Kind::Matrix { .. }) if is_expert => storage::mxfp4(name, shape, &values),
            // Upstream keeps this one in f32 whatever the rest is.
            (_, Kind::CorrectionBias) => vec![RawTensor::new(name, Element::F32, shape, &values)],
            _ => vec![RawTensor::new(name, self.element, shape, &values)],
        }
    }
}

impl Plan<'_> {
    fn add(&mut self, name: impl Into<String>, shape: &[usize], kind: Kind) {
        self.tensors.push(Planned {
            name: name.into(),
            shape: shape.to_vec(),
            kind,
        });
    }

    /// A matrix `[rows, cols]`, and its bias if there is one.
    fn linear(&mut self, prefix: &str, rows: usize, cols: usize, biased: bool) {
        self.add(format!("{prefix}.weight"), &[rows, cols], Kind::Matrix { fan_in: cols });
        if biased {
            self.add(format!("{prefix}.bias"), &[rows], Kind::Bias);
        }
    }

    fn norm(&mut self, prefix: &str, len: usize) {
        self.add(format!("{prefix}.weight"), &[len], Kind::NormWeight);
        if self.tiny.family == Family::PhiMoe && len == self.tiny.hidden {
            self.add(format!("{prefix}.bias"), &[len], Kind::Bias);
        }
    }

    fn model(&mut self) {
        let tiny = self.tiny;
        self.add("model.embed_tokens.weight", &[tiny.vocab, tiny.hidden], Kind::Embedding);
        for layer in 0..tiny.layers {
            let prefix = format!("model.layers.{layer}");
            self.norm(&format!("{prefix}.input_layernorm"), tiny.hidden);
            match tiny.family {
                Family::DeepseekV2 | Family::DeepseekV3 => self.latent_attention(&format!("{prefix}.self_attn")),
                _ => self.grouped_attention(&format!("{prefix}.self_attn")),
            }
            self.norm(&format!("{prefix}.post_attention_layernorm"), tiny.hidden);
            let block = match tiny.family {
                Family::Mixtral | Family::PhiMoe | Family::GraniteMoe => "block_sparse_moe",
                Family::Llama4Text => "feed_forward",
                _ => "mlp",
            };
            let prefix = format!("{prefix}.{block}");
            if tiny.is_moe_layer(layer) {
                self.router(&prefix);
                self.experts(&prefix);
                self.shared_experts(&prefix);
            } else {
                let biased = tiny.family == Family::Llama && tiny.biases;
                self.feed_forward(&prefix, tiny.dense_intermediate, biased);
            }
        }
        self.norm("model.norm", tiny.hidden);
        if !tiny.tied {
            self.add("lm_head.weight", &[tiny.vocab, tiny.hidden], Kind::Head);
        }
        if tiny.family == Family::PhiMoe {
            self.add("lm_head.bias", &[tiny.vocab], Kind::Bias);
        }
    }

    fn grouped_attention(&mut self, prefix: &str) {
        let tiny = self.tiny;
        let (queries, keys) = (tiny.heads * tiny.head_dim, tiny.kv_heads * tiny.head_dim);
        let (qkv_bias, output_bias) = match tiny.family {
            Family::Qwen2Moe => (true, false),
            Family::GptOss | Family::PhiMoe => (true, true),
            Family::Glm4Moe => (tiny.biases, false),
            Family::Llama | Family::Qwen3 => (tiny.biases, tiny.biases),
            _ => (false, false),
        };
        self.linear(&format!("{prefix}.q_proj"), queries, tiny.hidden, qkv_bias);
        self.linear(&format!("{prefix}.k_proj"), keys, tiny.hidden, qkv_bias);
        self.linear(&format!("{prefix}.v_proj"), keys, tiny.hidden, qkv_bias);
        self.linear(&format!("{prefix}.o_proj"), tiny.hidden, queries, output_bias);
        let norms = match tiny.family {
            Family::Olmoe => Some((queries, keys)),
            Family::Qwen3 | Family::Qwen3Moe => Some((tiny.head_dim, tiny.head_dim)),
            Family::Glm4Moe if tiny.qk_norm => Some((tiny.head_dim, tiny.head_dim)),
            _ => None,
        };
        if let Some((query_norm, key_norm)) = norms {
            self.add(format!("{prefix}.q_norm.weight"), &[query_norm], Kind::NormWeight);
            self.add(format!("{prefix}.k_norm.weight"), &[key_norm], Kind::NormWeight);
        }
        if tiny.family == Family::GptOss {
            self.add(format!("{prefix}.sinks"), &[tiny.heads], Kind::Sink);
        }
    }

    fn latent_attention(&mut self, prefix: &str) {
        let tiny = self.tiny;
        let latent = tiny.latent;
        let queries = tiny.heads * (latent.nope + latent.rope);
        match latent.q_rank {
            Some(rank) => {
                self.linear(&format!("{prefix}.q_a_proj"), rank, tiny.hidden, tiny.biases);
                self.add(format!("{prefix}.q_a_layernorm.weight"), &[rank], Kind::NormWeight);
                self.linear(&format!("{prefix}.q_b_proj"), queries, rank, false);
            }
            None => self.linear(&format!("{prefix}.q_proj"), queries, tiny.hidden, false),
        }
        self.linear(
            &format!("{prefix}.kv_a_proj_with_mqa"),
            latent.kv_rank + latent.rope,
            tiny.hidden,
            tiny.biases,
        );
        self.add(
            format!("{prefix}.kv_a_layernorm.weight"),
            &[latent.kv_rank],
            Kind::NormWeight,
        );
        self.linear(
            &format!("{prefix}.kv_b_proj"),
            tiny.heads * (latent.nope + latent.value),
            latent.kv_rank,
            false,
        );
        self.linear(
            &format!("{prefix}.o_proj"),
            tiny.hidden,
            tiny.heads * latent.value,
            tiny.biases,
        );
    }

    fn feed_forward(&mut self, prefix: &str, width: usize, biased: bool) {
        self.linear(&format!("{prefix}.gate_proj"), width, self.tiny.hidden, biased);
        self.linear(&format!("{prefix}.up_proj"), width, self.tiny.hidden, biased);
        self.linear(&format!("{prefix}.down_proj"), self.tiny.hidden, width, biased);
    }

    fn router(&mut self, prefix: &str) {
        let tiny = self.tiny;
        let name = match tiny.family {
            Family::GraniteMoe => "router.layer",
            Family::GptOss | Family::Llama4Text => "router",
            _ => "gate",
        };
        self.add(
            format!("{prefix}.{name}.weight"),
            &[tiny.experts, tiny.hidden],
            Kind::Router,
        );
        match tiny.family {
            Family::GptOss => self.add(format!("{prefix}.router.bias"), &[tiny.experts], Kind::Bias),
            Family::DeepseekV3 | Family::Glm4Moe => {
                self.add(
                    format!("{prefix}.gate.e_score_correction_bias"),
                    &[tiny.experts],
                    Kind::CorrectionBias,
                );
            }
            Family::Ernie45Moe => {
                let name = format!("{prefix}.moe_statics.e_score_correction_bias");
                self.add(name, &[1, tiny.experts], Kind::CorrectionBias);
            }
            _ => {}
        }
    }

    fn experts(&mut self, prefix: &str) {
        let tiny = self.tiny;
        let (experts, hidden, width) = (tiny.experts, tiny.hidden, tiny.expert_intermediate);
        let (into, back) = (Kind::Matrix { fan_in: hidden }, Kind::Matrix { fan_in: width });
        match tiny.family {
            Family::GraniteMoe => {
                self.add(
                    format!("{prefix}.input_linear.weight"),
                    &[experts, 2 * width, hidden],
                    into,
                );
                self.add(
                    format!("{prefix}.output_linear.weight"),
                    &[experts, hidden, width],
                    back,
                );
            }
            Family::GptOss | Family::Llama4Text => {
                self.add(
                    format!("{prefix}.experts.gate_up_proj"),
                    &[experts, hidden, 2 * width],
                    into,
                );
                self.add(format!("{prefix}.experts.down_proj"), &[experts, width, hidden], back);
                if tiny.family == Family::GptOss {
                    self.add(
                        format!("{prefix}.experts.gate_up_proj_bias"),
                        &[experts, 2 * width],
                        Kind::Bias,
                    );
                    self.add(
                        format!("{prefix}.experts.down_proj_bias"),
                        &[experts, hidden],
                        Kind::Bias,
                    );
                }
            }
            Family::Mixtral | Family::PhiMoe => {
                for expert in 0..experts {
                    let prefix = format!("{prefix}.experts.{expert}");
                    self.linear(&format!("{prefix}.w1"), width, hidden, false);
                    self.linear(&format!("{prefix}.w2"), hidden, width, false);
                    self.linear(&format!("{prefix}.w3"), width, hidden, false);
                }
            }
            _ => {
                for expert in 0..experts {
                    self.feed_forward(&format!("{prefix}.experts.{expert}"), width, false);
                }
            }
        }
    }

    fn shared_experts(&mut self, prefix: &str) {
        let name = match self.tiny.family {
            Family::Qwen2Moe | Family::Llama4Text => "shared_expert",
            Family::DeepseekV2 | Family::DeepseekV3 | Family::Glm4Moe | Family::Ernie45Moe => "shared_experts",
            _ => return,
        };
        self.feed_forward(&format!("{prefix}.{name}"), self.tiny.shared_width(), false);
        if self.tiny.family == Family::Qwen2Moe {
            let hidden = self.tiny.hidden;
            self.add(
                format!("{prefix}.shared_expert_gate.weight"),
                &[1, hidden],
                Kind::Matrix { fan_in: hidden },
            );
        }
    }
}

/// A standard normal number (Box–Muller).
fn normal(rng: &mut ChaCha8Rng) -> f64 {
    let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
    radius * (std::f64::consts::TAU * rng.random::<f64>()).cos()
}
