//! Experts held by this process, in the gateway (local) or in a worker, and how they run on a batch.

mod change;
mod error;
mod execute;
mod load;
#[cfg(test)]
mod tests;

use std::{ops::Range, sync::Arc};

use moerun_kernels::FeedForward;
use moerun_routing::{merge_slices, term_limit, terms_per_element};
use moerun_types::{ExpertId, ExpertSlice, LayerId, ModelConfig, MoeConfig, Numerics};
use moerun_weights::Checkpoint;

use crate::ModelError;
pub use error::ExpertError;

/// Slices of experts, packed, and the one function that runs them.
#[derive(Debug)]
pub struct ExpertBank {
    config: ModelConfig,
    numerics: Numerics,
    /// Sorted and disjoint; several runs of one expert stand together.
    held: Vec<ExpertSlice>,
    /// The weights of each entry of `held`.
    weights: Vec<Arc<FeedForward>>,
    /// Where in `held` the runs of expert `e` of layer `l` are: at `l * num_experts + e`.
    expert_runs: Vec<Range<usize>>,
    /// Bound on the magnitude of a term of the exact combine.
    term_limit: f32,
    memory_bytes: u64,
}

impl ExpertBank {
    /// Loads and packs `slices` of `checkpoint`, in any order; slices of one expert that overlap or touch become one.
    ///
    /// Experts are read and packed on all cores; `progress(done_bytes, total_bytes)`, counted as held in memory, is
    /// called on the caller's thread as they come. Errors: a slice that the model does not have, an expert that the
    /// checkpoint does not have, a value that the number format cannot hold.
    pub fn load(
        checkpoint: &Checkpoint,
        slices: &[ExpertSlice],
        numerics: Numerics,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, ModelError> {
        let config = checkpoint.config().clone();
        let held = merge_slices(slices.to_vec());
        for &slice in &held {
            check_in_model(&config, numerics, slice)?;
        }
        let weights = match &config.moe {
            Some(moe) => load::load_all(checkpoint, moe, &held, numerics, progress)?
                .into_iter()
                .map(Arc::new)
                .collect(),
            None => Vec::new(),
        };
        Ok(Self {
            expert_runs: expert_runs(&config, &held),
            term_limit: term_limit(config.moe.as_ref().map_or(0, |moe| terms_per_element(moe, &numerics))),
            memory_bytes: weights.iter().map(|weights| load::packed_bytes(weights)).sum(),
            config,
            numerics,
            held,
            weights,
        })
    }

    /// What is held, sorted.
    pub fn held(&self) -> &[ExpertSlice] {
        &self.held
    }

    /// The arithmetic.
    pub fn numerics(&self) -> Numerics {
        self.numerics
    }

    /// The model's config.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Bytes that the packed weights and biases take.
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// Positions in `held` of the runs of one expert; none if the model has no such expert.
    fn runs_of(&self, layer: LayerId, expert: ExpertId) -> Range<usize> {
        let num_experts = num_experts(&self.config);
        let index = (layer.0 as usize)
            .checked_mul(num_experts)
            .and_then(|base| base.checked_add(expert.0.into()));
        match index {
            Some(index) if usize::from(expert.0) < num_experts => self.expert_runs.get(index).cloned().unwrap_or(0..0),
            _ => 0..0,
        }
    }
}

fn num_experts(config: &ModelConfig) -> usize {
    config.moe.as_ref().map_or(0, |moe| moe.num_experts)
}

fn check_in_model(config: &ModelConfig, numerics: Numerics, slice: ExpertSlice) -> Result<(), ExpertError> {
    let has = |moe: &MoeConfig| {
        config.moe_layers().binary_search(&slice.layer).is_ok()
            && usize::from(slice.expert.0) < moe.num_experts
            && usize::from(slice.blocks.end) <= numerics.num_blocks(moe.intermediate)
    };
    match &config.moe {
        Some(moe) if has(moe) => Ok(()),
        _ => Err(ExpertError::NotInModel { slice }),
    }
}

fn expert_runs(config: &ModelConfig, held: &[ExpertSlice]) -> Vec<Range<usize>> {
    let num_experts = num_experts(config);
    let mut runs = vec![0..0; config.layers.len() * num_experts];
    let mut start = 0;
    for of_expert in held.chunk_by(|a, b| (a.layer, a.expert) == (b.layer, b.expert)) {
        let index = of_expert[0].layer.0 as usize * num_experts + usize::from(of_expert[0].expert.0);
        runs[index] = start..start + of_expert.len();
        start += of_expert.len();
    }
    runs
}
