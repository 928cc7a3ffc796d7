//! Tiny random-weight checkpoints of any family, in any size: what the golden folders cannot cover.

mod config;
mod draw;
mod storage;
mod tensors;

use std::{fs, path::Path};

use crate::{Element, Family, NaiveModel, TestkitError, golden_dir};

/// What a tiny checkpoint is to be. Start from [`TinyCheckpoint::new`] or [`TinyCheckpoint::from_seed`], change fields,
/// then [`TinyCheckpoint::write`]. A field that the family has no use for is ignored.
#[derive(Debug, Clone, PartialEq)]
pub struct TinyCheckpoint {
    /// Family.
    pub family: Family,
    /// Seed of the weights.
    pub seed: u64,
    /// Element type of the tensors that are not quantised.
    pub element: Element,
    /// How matrices are quantised.
    pub storage: Storage,
    /// Files that the tensors are spread over; more than one comes with an index.
    pub shards: usize,
    /// Spelling of `config.json`.
    pub spelling: Spelling,
    /// Rows of the embedding; at least 320, the size of the golden tokenizers.
    pub vocab: usize,
    /// Width of the residual stream; `heads * head_dim` in families whose config names no `head_dim`.
    pub hidden: usize,
    /// Layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`, equals it for olmoe.
    pub kv_heads: usize,
    /// Width of a head; even, a multiple of 4 for glm4_moe.
    pub head_dim: usize,
    /// Widths of latent attention.
    pub latent: LatentSizes,
    /// Width of dense feed-forwards.
    pub dense_intermediate: usize,
    /// Width of an expert.
    pub expert_intermediate: usize,
    /// Experts per layer.
    pub experts: usize,
    /// Experts per token; 2 for phimoe, 1 for llama4_text.
    pub top_k: usize,
    /// Shared experts; for qwen2_moe their summed width is this many times `expert_intermediate` plus 1.
    pub shared_experts: usize,
    /// Groups of the group-limited gates; divides `experts`, at least two experts each.
    pub groups: usize,
    /// Groups that stay; together they hold at least `top_k` experts.
    pub top_groups: usize,
    /// Whether the chosen weights are divided by their sum (qwen2_moe, qwen3_moe, olmoe, deepseek_v3, glm4_moe).
    pub renormalise: bool,
    /// Layers at the start that have no experts (qwen, deepseek, glm4, ernie).
    pub dense_first: usize,
    /// Of the layers after those, every how-many-th has experts (qwen, ernie, llama4).
    pub sparse_step: usize,
    /// Sliding window (mixtral, phimoe, gpt_oss, qwen) or chunk (llama4).
    pub window: Option<usize>,
    /// Clamp of q, k and v (olmoe).
    pub clip_qkv: Option<f64>,
    /// Whether q and k are normalised (glm4_moe, llama4_text).
    pub qk_norm: bool,
    /// Whether the families with optional biases have them (llama, qwen3, ernie, deepseek attention …).
    pub biases: bool,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Extension of the rotary embedding; phimoe always has longrope.
    pub rope: TinyRope,
    /// Added inside the norms.
    pub epsilon: f64,
}

/// Widths of latent attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LatentSizes {
    /// Query latent; `None` = plain query projection.
    pub q_rank: Option<usize>,
    /// Key and value latent.
    pub kv_rank: usize,
    /// Part of a head without rotary.
    pub nope: usize,
    /// Rotary part; even.
    pub rope: usize,
    /// Width of a value.
    pub value: usize,
}

/// How the matrices of a checkpoint are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// As [`TinyCheckpoint::element`].
    Plain,
    /// fp8 with a scale per 128 × 128 block (deepseek_v3).
    Fp8Block,
    /// 4-bit experts in blocks of 32 (gpt_oss); `hidden` and `expert_intermediate` are multiples of 32.
    Mxfp4,
}

/// Which of the two spellings a `config.json` has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spelling {
    /// transformers 5: `rope_parameters`, `dtype`.
    Parameters,
    /// Most checkpoints on the Hub: `rope_theta`, `rope_scaling`, `torch_dtype`.
    Hub,
}

/// Extension of the rotary embedding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum TinyRope {
    Default,
    Linear,
    Llama3,
    Yarn,
}

impl TinyCheckpoint {
    /// A plain f32 checkpoint whose rows are several blocks of 32 long, the last one short, and whose experts have three
    /// combine blocks of 32.
    pub fn wide(family: Family, seed: u64) -> Self {
        TinyCheckpoint {
            hidden: 72,
            head_dim: 12,
            latent: LatentSizes {
                q_rank: Some(36),
                kv_rank: 40,
                nope: 34,
                rope: 8,
                value: 10,
            },
            dense_intermediate: 100,
            expert_intermediate: 80,
            layers: 2,
            ..TinyCheckpoint::new(family, seed)
        }
    }

    /// The same, stored as the family's released checkpoints are: gpt_oss in MXFP4, whose blocks are whole.
    pub fn wide_as_released(family: Family, seed: u64) -> Self {
        let wide = Self::wide(family, seed);
        if family != Family::GptOss {
            return wide;
        }
        TinyCheckpoint {
            storage: Storage::Mxfp4,
            hidden: 96,
            expert_intermediate: 96,
            ..wide
        }
    }

    /// A plain f32 checkpoint of middling size.
    pub fn new(family: Family, seed: u64) -> Self {
        let mut tiny = TinyCheckpoint {
            family,
            seed,
            element: Element::F32,
            storage: Storage::Plain,
            shards: 1,
            spelling: Spelling::Parameters,
            vocab: 320,
            hidden: 36,
            layers: 3,
            heads: 6,
            kv_heads: 2,
            head_dim: 6,
            latent: LatentSizes {
                q_rank: Some(14),
                kv_rank: 10,
                nope: 6,
                rope: 4,
                value: 7,
            },
            dense_intermediate: 44,
            expert_intermediate: 20,
            experts: 6,
            top_k: 2,
            shared_experts: 1,
            groups: 3,
            top_groups: 2,
            renormalise: true,
            dense_first: 1,
            sparse_step: 1,
            window: None,
            clip_qkv: None,
            qk_norm: true,
            biases: false,
            tied: false,
            rope: TinyRope::Default,
            epsilon: 1e-5,
        };
        tiny.obey_family();
        tiny
    }

    /// Writes `config.json`, the tensors, `generation_config.json`, and the golden folder's tokenizer into `dir`,
    /// which is created.
    pub fn write(&self, dir: &Path) -> Result<(), TestkitError> {
        fs::create_dir_all(dir).map_err(TestkitError::io(dir))?;
        let golden = golden_dir(self.family);
        for file in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
            fs::copy(golden.join(file), dir.join(file)).map_err(TestkitError::io(&golden.join(file)))?;
        }
        let path = dir.join("config.json");
        let config = self.config_json()?;
        fs::write(&path, format!("{config:#}\n")).map_err(TestkitError::io(&path))?;
        storage::write_shards(dir, self.raw_tensors(), self.shards)
    }

    /// As [`TinyCheckpoint::write`], with the first seed from `self.seed` upwards for which every routing decision on
    /// `prompts` and their `greedy_tokens` continuations keeps a distance of `routing_margin`, and every greedy choice
    /// one of ten times that. So an f32 computation must take the same decisions. Returns the seed.
    pub fn write_safe(
        &self,
        dir: &Path,
        prompts: &[Vec<u32>],
        greedy_tokens: usize,
        routing_margin: f64,
    ) -> Result<u64, TestkitError> {
        const TRIES: u64 = 200;
        for seed in self.seed..self.seed + TRIES {
            TinyCheckpoint { seed, ..self.clone() }.write(dir)?;
            if is_safe(&NaiveModel::open(dir)?, prompts, greedy_tokens, routing_margin)? {
                return Ok(seed);
            }
        }
        Err(TestkitError::NoSafeSeed {
            first: self.seed,
            tries: TRIES,
            margin: routing_margin,
        })
    }

    /// Whether layer `layer` has experts.
    pub fn is_moe_layer(&self, layer: usize) -> bool {
        self.family.has_experts() && layer >= self.dense_first && (layer + 1).is_multiple_of(self.sparse_step)
    }
}

fn is_safe(model: &NaiveModel, prompts: &[Vec<u32>], greedy_tokens: usize, margin: f64) -> Result<bool, TestkitError> {
    for prompt in prompts {
        let mut ids = prompt.clone();
        for step in 0..=greedy_tokens {
            let forward = model.forward(&ids)?;
            if forward.routing_margin() < margin {
                return Ok(false);
            }
            if step < greedy_tokens {
                if forward.greedy_margin() < 10.0 * margin {
                    return Ok(false);
                }
                ids.extend(forward.greedy_token());
            }
        }
    }
    Ok(true)
}
