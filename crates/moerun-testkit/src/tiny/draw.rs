//! Sizes drawn from a seed, within what each family can be.

use rand::{Rng, RngExt, SeedableRng, rngs::ChaCha8Rng};

use super::{LatentSizes, Spelling, Storage, TinyCheckpoint, TinyRope};
use crate::{Element, Family};

impl TinyCheckpoint {
    /// Everything drawn from `seed`: odd widths, expert counts that are no powers of two, `top_k` from 1 to all,
    /// patterns of layers, windows, heads, element types, shards and spellings. Storage stays plain.
    pub fn from_seed(family: Family, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 0x7419_5e7d_2b60_c0de);
        let rng = &mut rng;
        let kv_heads = rng.random_range(1..=3);
        let heads = kv_heads * rng.random_range(1..=3);
        let layers = rng.random_range(1..=4);
        let experts = rng.random_range(2..=11);
        let dense_first = rng.random_range(0..layers);
        let mut tiny = TinyCheckpoint {
            family,
            seed,
            element: pick(rng, &[Element::F32, Element::F32, Element::Bf16, Element::F16]),
            storage: Storage::Plain,
            shards: rng.random_range(1..=3),
            spelling: pick(rng, &[Spelling::Parameters, Spelling::Hub]),
            vocab: rng.random_range(320..=360),
            hidden: rng.random_range(17..=50),
            layers,
            heads,
            kv_heads,
            head_dim: 2 * rng.random_range(2..=8),
            latent: LatentSizes {
                q_rank: if rng.random_bool(0.7) {
                    Some(rng.random_range(5..=20))
                } else {
                    None
                },
                kv_rank: rng.random_range(5..=20),
                nope: rng.random_range(3..=12),
                rope: 2 * rng.random_range(1..=4),
                value: rng.random_range(3..=12),
            },
            dense_intermediate: rng.random_range(9..=60),
            expert_intermediate: rng.random_range(5..=40),
            experts,
            top_k: if rng.random_bool(0.2) {
                experts
            } else {
                rng.random_range(1..=experts.min(4))
            },
            shared_experts: rng.random_range(1..=3),
            groups: rng.random_range(1..=3),
            top_groups: rng.random_range(1..=3),
            renormalise: rng.random_bool(0.5),
            dense_first,
            sparse_step: rng.random_range(1..=layers - dense_first),
            window: if rng.random_bool(0.5) {
                Some(rng.random_range(2..=9))
            } else {
                None
            },
            clip_qkv: if rng.random_bool(0.5) {
                Some(rng.random_range(0.5..2.0))
            } else {
                None
            },
            qk_norm: rng.random_bool(0.5),
            biases: rng.random_bool(0.5),
            tied: rng.random_bool(0.4),
            rope: pick(
                rng,
                &[TinyRope::Default, TinyRope::Linear, TinyRope::Llama3, TinyRope::Yarn],
            ),
            epsilon: pick(rng, &[1e-5, 1e-6]),
        };
        tiny.obey_family();
        tiny
    }

    /// Brings sizes that the family ties together into line.
    pub(crate) fn obey_family(&mut self) {
        match self.family {
            Family::Olmoe => self.kv_heads = self.heads,
            Family::PhiMoe => self.top_k = 2,
            Family::Llama4Text => self.top_k = 1,
            Family::Glm4Moe => self.head_dim = self.head_dim.next_multiple_of(4),
            _ => {}
        }
        if matches!(
            self.family,
            Family::Qwen2Moe | Family::Olmoe | Family::GraniteMoe | Family::PhiMoe | Family::Ernie45Moe
        ) {
            self.hidden = self.heads * self.head_dim;
        }
        match self.family {
            Family::Qwen2Moe | Family::Qwen3Moe | Family::Ernie45Moe => {}
            Family::Llama4Text => self.dense_first = 0,
            Family::DeepseekV2 | Family::DeepseekV3 | Family::Glm4Moe => self.sparse_step = 1,
            _ => (self.dense_first, self.sparse_step) = (0, 1),
        }
        if matches!(self.family, Family::DeepseekV2 | Family::DeepseekV3 | Family::Glm4Moe) {
            let group_size = (self.experts / self.groups).max(2);
            self.experts = self.groups * group_size;
            self.top_k = self.top_k.min(self.experts);
            self.top_groups = self.top_groups.max(self.top_k.div_ceil(group_size)).min(self.groups);
        }
        // A step must still meet a layer, or the model would have no experts at all.
        if !(0..self.layers).any(|layer| self.is_moe_layer(layer)) {
            self.sparse_step = self.layers;
        }
    }
}

fn pick<T: Copy>(rng: &mut impl Rng, choices: &[T]) -> T {
    choices[rng.random_range(0..choices.len())]
}
