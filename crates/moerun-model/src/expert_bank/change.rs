//! Banks made of others: what a worker holds changes while batches run on the bank before.

use std::sync::Arc;

use moerun_kernels::{FeedForward, PackedMatrix};
use moerun_routing::subtract_slices;
use moerun_types::{BlockRange, ExpertSlice, MoeConfig};

use super::{ExpertBank, expert_runs, load};

impl ExpertBank {
    /// The runs of this bank and of `more`, which is of the same model and numerics; a run of this bank of which `more` has
    /// a block is left out, so `more` must hold all of it that is still wanted. Weights are shared, not copied.
    pub fn with(&self, more: &ExpertBank) -> ExpertBank {
        let overlaps = |slice: &ExpertSlice| {
            more.runs_of(slice.layer, slice.expert).any(|run| {
                let other = more.held[run].blocks;
                other.first < slice.blocks.end && slice.blocks.first < other.end
            })
        };
        let kept = self.entries().filter(|(slice, _)| !overlaps(slice));
        self.made_of(kept.chain(more.entries()).collect())
    }

    /// What is left of this bank without `slices`. Whole runs are shared; of others what is left is cut out, whole panels
    /// of mapped matrices staying where they are.
    pub fn without(&self, slices: &[ExpertSlice]) -> ExpertBank {
        let Some(moe) = &self.config.moe else {
            return self.made_of(Vec::new());
        };
        let mut entries = Vec::with_capacity(self.held.len());
        for (slice, weights) in self.entries() {
            for left in subtract_slices(&[slice], slices) {
                let weights = if left == slice {
                    Arc::clone(&weights)
                } else {
                    Arc::new(self.cut(moe, slice.blocks, &weights, left.blocks))
                };
                entries.push((left, weights));
            }
        }
        self.made_of(entries)
    }

    /// A bank of the same model and numerics that holds these, which must be what they are called.
    pub fn made_of_weights(&self, weights: Vec<(ExpertSlice, FeedForward)>) -> ExpertBank {
        self.made_of(
            weights
                .into_iter()
                .map(|(slice, weights)| (slice, Arc::new(weights)))
                .collect(),
        )
    }

    fn entries(&self) -> impl Iterator<Item = (ExpertSlice, Arc<FeedForward>)> + '_ {
        self.held.iter().copied().zip(self.weights.iter().cloned())
    }

    /// `entries` are disjoint.
    fn made_of(&self, mut entries: Vec<(ExpertSlice, Arc<FeedForward>)>) -> ExpertBank {
        entries.sort_by_key(|(slice, _)| *slice);
        let (held, weights): (Vec<ExpertSlice>, Vec<Arc<FeedForward>>) = entries.into_iter().unzip();
        ExpertBank {
            expert_runs: expert_runs(&self.config, &held),
            memory_bytes: weights.iter().map(|weights| load::packed_bytes(weights)).sum(),
            config: self.config.clone(),
            numerics: self.numerics,
            term_limit: self.term_limit,
            held,
            weights,
        }
    }

    /// The blocks `left` of weights that are those of `blocks`.
    fn cut(&self, moe: &MoeConfig, blocks: BlockRange, weights: &FeedForward, left: BlockRange) -> FeedForward {
        let (all, kept) = (
            self.numerics.columns(blocks, moe.intermediate),
            self.numerics.columns(left, moe.intermediate),
        );
        let columns = kept.start - all.start..kept.end - all.start;
        let rows = |matrix: &PackedMatrix| matrix.part(columns.clone(), 0..matrix.cols());
        let bias = |bias: &Option<Vec<f32>>| bias.as_ref().map(|bias| bias[columns.clone()].to_vec());
        FeedForward {
            gate_proj: rows(&weights.gate_proj),
            up_proj: rows(&weights.up_proj),
            down_proj: weights.down_proj.part(0..weights.down_proj.rows(), columns.clone()),
            gate_bias: bias(&weights.gate_bias),
            up_bias: bias(&weights.up_bias),
            down_bias: weights.down_bias.clone().filter(|_| left.first == 0),
            activation: weights.activation,
        }
    }
}
