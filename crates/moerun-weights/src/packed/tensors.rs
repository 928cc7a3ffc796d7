//! The tensors of a packed checkpoint: names, sizes, order; and the check that a directory has them.

use std::collections::HashSet;

use moerun_types::{ExpertId, LayerId, ModelConfig, NumberFormat};

use super::form::{ALIGNMENT, Part, dense_parts, expert_parts};
use crate::{
    Dtype, Needs, TensorRole, WeightsError, dense_tensors::dense_tensors, expected::ModelPart, hashes,
    store::TensorStore, tensor_names,
};

/// Name of the tensor with the hashes of all experts' blocks.
pub(crate) const HASHES: &str = "expert_hashes";

/// One tensor of a packed checkpoint.
#[derive(Debug, Clone)]
pub(crate) struct PackedTensor {
    pub(crate) name: String,
    /// A multiple of the alignment.
    pub(crate) bytes: u64,
    pub(crate) content: Content,
}

/// What a tensor holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    /// A tensor outside the experts.
    Dense(TensorRole),
    /// All of one expert; `index` counts experts layer by layer.
    Expert {
        layer: LayerId,
        expert: ExpertId,
        index: usize,
    },
    /// `[experts of all layers][units][16]`: the hashes of every unit of every expert.
    Hashes { first_layer: LayerId },
}

impl PackedTensor {
    /// Who reads it.
    pub(crate) fn part(&self) -> ModelPart {
        match self.content {
            Content::Dense(role) => ModelPart::Dense(role),
            Content::Expert { layer, .. } | Content::Hashes { first_layer: layer } => ModelPart::Experts(layer),
        }
    }
}

/// Name of an expert's tensor.
pub(crate) fn expert_name(layer: LayerId, expert: ExpertId) -> String {
    format!("model.layers.{layer}.experts.{expert}")
}

/// All tensors in the order of the files: those outside the experts, experts layer by layer, their hashes.
pub(crate) fn packed_tensors(config: &ModelConfig, format: NumberFormat) -> Vec<PackedTensor> {
    let total = |parts: Vec<Part>| parts.into_iter().map(Part::file_bytes).fold(0, u64::saturating_add);
    let mut tensors: Vec<PackedTensor> = dense_tensors(config)
        .into_iter()
        .map(|(role, shape)| PackedTensor {
            name: tensor_names::name(config.family, role),
            bytes: total(dense_parts(config, role, &shape, format)),
            content: Content::Dense(role),
        })
        .collect();
    let layers = config.moe_layers();
    let (Some(moe), Some(&first_layer)) = (&config.moe, layers.first()) else {
        return tensors;
    };
    let bytes = total(expert_parts(config, moe, format, 0..moe.intermediate));
    let experts = layers
        .iter()
        .flat_map(|&layer| (0..moe.num_experts).map(move |expert| (layer, ExpertId(expert as u16))));
    tensors.extend(experts.enumerate().map(|(index, (layer, expert))| PackedTensor {
        name: expert_name(layer, expert),
        bytes,
        content: Content::Expert { layer, expert, index },
    }));
    let hash_bytes = (layers.len() * moe.num_experts * hashes::num_units(moe.intermediate) * hashes::HASH_BYTES) as u64;
    tensors.push(PackedTensor {
        name: HASHES.to_owned(),
        bytes: hash_bytes.next_multiple_of(ALIGNMENT),
        content: Content::Hashes { first_layer },
    });
    tensors
}

/// Checks presence, length, type and alignment of every tensor, and that nothing else is there.
pub(crate) fn verify(store: &TensorStore, tensors: &[PackedTensor], needs: Needs) -> Result<(), WeightsError> {
    for tensor in tensors {
        let Some(stored) = store.get(&tensor.name) else {
            if needs.allow_absence(tensor.part()) {
                continue;
            }
            return Err(WeightsError::Missing {
                tensor: tensor.name.clone(),
                wanted: vec![tensor.bytes as usize],
                found: "nothing".to_owned(),
            });
        };
        let wanted = vec![tensor.bytes as usize];
        if stored.shape != wanted {
            return Err(WeightsError::Shape {
                tensor: tensor.name.clone(),
                wanted,
                found: stored.shape.clone(),
            });
        }
        if stored.element.dtype != Some(Dtype::U8) {
            return Err(WeightsError::wrong_type(&tensor.name, "U8", stored.element.name));
        }
        let (_, place) = store.place(stored);
        if !(place.start as u64).is_multiple_of(ALIGNMENT) {
            return Err(WeightsError::Alignment {
                tensor: tensor.name.clone(),
                wanted: ALIGNMENT,
                found: place.start as u64,
            });
        }
    }
    let known: HashSet<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    let unknown = store.iter().filter(|(name, _)| !known.contains(name));
    // The store has no order; the first by name makes the message the same every time.
    match unknown.min_by_key(|(name, _)| *name) {
        None => Ok(()),
        Some((name, stored)) => Err(WeightsError::Unexpected {
            tensor: name.to_owned(),
            shard: store.shard_name(stored).to_owned(),
            dtype: stored.element.name.to_owned(),
            shape: stored.shape.clone(),
        }),
    }
}
