//! What a worker is told to hold: `--shard I/N`, `--shard slice:I/N`, `--experts SPEC`.

mod error;
mod parse;
#[cfg(test)]
mod tests;

use std::{fmt, ops::Range};

use moerun_types::{BlockRange, ExpertId, ExpertSlice, LayerId, ModelConfig, Numerics};

use crate::slices::merge_slices;
pub use error::ShardError;

/// What a worker holds, as given on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ShardSpec {
    /// Every expert whole.
    All,
    /// Experts `i` with `i mod count == index`, in every layer.
    Experts {
        /// From 0.
        index: usize,
        /// Number of shards.
        count: usize,
    },
    /// The `index`-th of `count` runs of blocks of every expert: `index * blocks / count` up to the next one's first.
    Slices {
        /// From 0.
        index: usize,
        /// Number of shards.
        count: usize,
    },
    /// `L:E[:S]` items with ranges and `*`, comma-separated: layers, experts, blocks.
    List(Vec<ShardItem>),
    /// All that these name.
    Union(Vec<ShardSpec>),
}

/// One item of an expert list; `None` is `*`, ranges are inclusive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardItem {
    /// Model layers.
    pub layers: Option<(usize, usize)>,
    /// Experts.
    pub experts: Option<(usize, usize)>,
    /// Combine blocks.
    pub blocks: Option<(usize, usize)>,
}

impl ShardSpec {
    /// This shard and the `replicas - 1` that follow it, the first again after the last: of `count` workers that all do so,
    /// each shard is on `replicas`, and two neighbours share the work of one that is lost. Wants a shard `I/N` or
    /// `slice:I/N` and 1 to N replicas, so that no worker holds a shard twice.
    pub fn replicated(self, replicas: usize) -> Result<Self, ShardError> {
        let (index, count) = match self {
            ShardSpec::Experts { index, count } | ShardSpec::Slices { index, count } => (index, count),
            _ if replicas == 1 => return Ok(self),
            _ => {
                return Err(ShardError::Replicas {
                    shard: self.to_string(),
                    replicas,
                    most: 1,
                });
            }
        };
        if !(1..=count).contains(&replicas) {
            return Err(ShardError::Replicas {
                shard: self.to_string(),
                replicas,
                most: count,
            });
        }
        let following = |step: usize| {
            let index = (index + step) % count;
            match self {
                ShardSpec::Slices { .. } => ShardSpec::Slices { index, count },
                _ => ShardSpec::Experts { index, count },
            }
        };
        if replicas == 1 {
            return Ok(self);
        }
        Ok(ShardSpec::Union((0..replicas).map(following).collect()))
    }

    /// Whether it is the list that names nothing, whatever the model has.
    pub fn names_nothing(&self) -> bool {
        matches!(self, ShardSpec::List(items) if items.is_empty())
    }

    /// The slices of `config` that this names, sorted, runs of blocks merged; empty slices are left out. A model
    /// without experts has none, and a shard beyond the number of experts or blocks is empty.
    ///
    /// Numbers outside the model are an error that names them, and so is a list item without any layer that has
    /// experts. A range of layers stands for those within it that have experts.
    pub fn resolve(&self, config: &ModelConfig, numerics: &Numerics) -> Result<Vec<ExpertSlice>, ShardError> {
        let extent = Extent::of(config, numerics)?;
        let mut slices = Vec::new();
        match self {
            ShardSpec::All => extent.push(0..extent.num_experts, 0..extent.num_blocks, &mut slices),
            &ShardSpec::Experts { index, count } => {
                check_shard(self, index, count)?;
                for expert in (index..extent.num_experts).step_by(count) {
                    extent.push(expert..expert + 1, 0..extent.num_blocks, &mut slices);
                }
            }
            &ShardSpec::Slices { index, count } => {
                check_shard(self, index, count)?;
                let border = |index: usize| (index as u128 * extent.num_blocks as u128 / count as u128) as usize;
                extent.push(0..extent.num_experts, border(index)..border(index + 1), &mut slices);
            }
            ShardSpec::List(items) => {
                for item in items {
                    extent.push_item(item, &mut slices)?;
                }
            }
            ShardSpec::Union(specs) => {
                for spec in specs {
                    slices.extend(spec.resolve(config, numerics)?);
                }
            }
        }
        Ok(merge_slices(slices))
    }
}

/// A spec may also be made by hand: its numbers are checked here as well as when parsed.
fn check_shard(spec: &ShardSpec, index: usize, count: usize) -> Result<(), ShardError> {
    if index < count {
        return Ok(());
    }
    Err(ShardError::Syntax {
        text: spec.to_string(),
        reason: parse::INDEX_BELOW_COUNT.to_owned(),
    })
}

/// What the model has.
struct Extent {
    num_layers: usize,
    moe_layers: Vec<LayerId>,
    num_experts: usize,
    num_blocks: usize,
}

impl Extent {
    fn of(config: &ModelConfig, numerics: &Numerics) -> Result<Self, ShardError> {
        let (num_experts, num_blocks) = match &config.moe {
            Some(moe) => (moe.num_experts, numerics.num_blocks(moe.intermediate)),
            None => (0, 0),
        };
        if num_blocks > usize::from(u16::MAX) || num_experts > 1 << 16 {
            return Err(ShardError::TooMany {
                num_experts,
                num_blocks,
            });
        }
        Ok(Self {
            num_layers: config.layers.len(),
            moe_layers: config.moe_layers(),
            num_experts,
            num_blocks,
        })
    }

    /// These experts and blocks of every layer.
    fn push(&self, experts: Range<usize>, blocks: Range<usize>, slices: &mut Vec<ExpertSlice>) {
        for &layer in &self.moe_layers {
            push_layer(layer, experts.clone(), blocks.clone(), slices);
        }
    }

    fn push_item(&self, item: &ShardItem, slices: &mut Vec<ExpertSlice>) -> Result<(), ShardError> {
        let layers = within(item, "layer", item.layers, self.num_layers)?;
        let mut moe_layers = self
            .moe_layers
            .iter()
            .filter(|layer| layers.contains(&(layer.0 as usize)))
            .peekable();
        if moe_layers.peek().is_none() {
            return Err(ShardError::NoMoeLayer {
                item: item.to_string(),
                moe_layers: self.moe_layers.clone(),
            });
        }
        let experts = within(item, "expert", item.experts, self.num_experts)?;
        let blocks = within(item, "block", item.blocks, self.num_blocks)?;
        for &layer in moe_layers {
            push_layer(layer, experts.clone(), blocks.clone(), slices);
        }
        Ok(())
    }
}

/// An inclusive range of the model's `count` things, half-open; all of them if it is `*`.
fn within(
    item: &ShardItem,
    what: &'static str,
    range: Option<(usize, usize)>,
    count: usize,
) -> Result<Range<usize>, ShardError> {
    match range {
        None => Ok(0..count),
        Some((first, last)) if last < count => Ok(first..last + 1),
        Some((_, last)) => Err(ShardError::OutOfModel {
            item: item.to_string(),
            what,
            number: last,
            count,
        }),
    }
}

/// `Extent::of` checked that `u16` numbers experts and blocks.
fn push_layer(layer: LayerId, experts: Range<usize>, blocks: Range<usize>, slices: &mut Vec<ExpertSlice>) {
    let blocks = BlockRange {
        first: blocks.start as u16,
        end: blocks.end as u16,
    };
    slices.extend(experts.map(|expert| ExpertSlice {
        layer,
        expert: ExpertId(expert as u16),
        blocks,
    }));
}

impl fmt::Display for ShardSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ShardSpec::All => f.write_str("*:*"),
            ShardSpec::Experts { index, count } => write!(f, "{index}/{count}"),
            ShardSpec::Slices { index, count } => write!(f, "slice:{index}/{count}"),
            ShardSpec::List(items) if items.is_empty() => f.write_str(parse::NOTHING),
            ShardSpec::List(items) => join(f, items),
            ShardSpec::Union(specs) => join(f, specs),
        }
    }
}

fn join(f: &mut fmt::Formatter<'_>, parts: &[impl fmt::Display]) -> fmt::Result {
    for (index, part) in parts.iter().enumerate() {
        write!(f, "{}{part}", if index == 0 { "" } else { "," })?;
    }
    Ok(())
}

impl fmt::Display for ShardItem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let part = |range: Option<(usize, usize)>| match range {
            None => "*".to_owned(),
            Some((first, last)) if first == last => first.to_string(),
            Some((first, last)) => format!("{first}-{last}"),
        };
        write!(f, "{}:{}", part(self.layers), part(self.experts))?;
        if self.blocks.is_some() {
            write!(f, ":{}", part(self.blocks))?;
        }
        Ok(())
    }
}
