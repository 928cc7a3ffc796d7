use moerun_types::LayerId;

/// Why a shard was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ShardError {
    /// Not of the form.
    #[error("shard {text:?}: {reason}")]
    Syntax {
        /// What was given.
        text: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A list item names something beyond the model.
    #[error("shard item {item:?}: {what} {number} is not in the model, which has {count} (numbered from 0)")]
    OutOfModel {
        /// The item.
        item: String,
        /// `layer`, `expert` or `block`.
        what: &'static str,
        /// The number named.
        number: usize,
        /// How many the model has.
        count: usize,
    },
    /// A list item names only layers without experts.
    #[error("shard item {item:?} names no layer that has experts; those that have: {}", list(.moe_layers))]
    NoMoeLayer {
        /// The item.
        item: String,
        /// Layers that have experts.
        moe_layers: Vec<LayerId>,
    },
    /// More replicas than shards, or of what is no single shard.
    #[error("shard {shard}: wanted 1 to {most} replicas, found {replicas}")]
    Replicas {
        /// The shard.
        shard: String,
        /// How many were wanted.
        replicas: usize,
        /// Most there can be.
        most: usize,
    },
    /// Experts and blocks are numbered by `u16`.
    #[error(
        "{num_experts} experts of {num_blocks} combine blocks: wanted at most 65536 of {}",
        u16::MAX
    )]
    TooMany {
        /// Experts of a layer.
        num_experts: usize,
        /// Blocks of an expert.
        num_blocks: usize,
    },
}

fn list(layers: &[LayerId]) -> String {
    if layers.is_empty() {
        return "none".to_owned();
    }
    layers.iter().map(LayerId::to_string).collect::<Vec<_>>().join(", ")
}
