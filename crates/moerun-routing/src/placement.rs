//! Who can run what: the holders of every block of every expert.

mod error;
#[cfg(test)]
mod tests;

use std::ops::Range;

use moerun_types::{BlockRange, ExpertId, ExpertSlice, LayerId, ModelConfig};

use crate::slices::merge_slices;
pub use error::PlanError;

/// Which workers may be asked for which blocks of which expert. Blocks that nobody holds are there too, with no holder.
#[derive(Debug, Clone, PartialEq)]
pub struct Placement {
    num_workers: usize,
    /// Experts of each MoE layer.
    num_experts: usize,
    num_blocks: u16,
    /// Position of each model layer among the MoE layers.
    moe_index: Vec<Option<usize>>,
    /// Where the runs of each `(MoE layer, expert)` are.
    expert_runs: Vec<Range<usize>>,
    /// Runs of one expert stand together, ascending by block, and cover it.
    runs: Vec<Run>,
    /// Workers of all runs, each run's ascending.
    holders: Vec<u32>,
}

/// Blocks of one expert that the same workers hold throughout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) blocks: BlockRange,
    /// Where its workers are in `holders`.
    holders: Range<usize>,
}

/// What one worker says it holds of one expert.
#[derive(Debug, Clone, Copy)]
struct Holding {
    slice: ExpertSlice,
    worker: u32,
}

impl Placement {
    /// The holders of each block of each expert of `config`: `held[w]` lists what worker `w` holds. The same `held` always
    /// gives the same placement. Errors: a slice that the model does not have.
    pub fn new(config: &ModelConfig, num_blocks: usize, held: &[Vec<ExpertSlice>]) -> Result<Self, PlanError> {
        let end = u16::try_from(num_blocks).map_err(|_| PlanError::TooManyBlocks { num_blocks })?;
        let num_experts = config.moe.as_ref().map_or(0, |moe| moe.num_experts);
        let moe_layers = config.moe_layers();
        let holdings = Holdings::new(config, num_blocks, held)?;

        let mut placement = Self {
            num_workers: held.len(),
            num_experts,
            num_blocks: end,
            moe_index: vec![None; config.layers.len()],
            expert_runs: Vec::with_capacity(moe_layers.len() * num_experts),
            runs: Vec::new(),
            holders: Vec::new(),
        };
        for (index, &layer) in moe_layers.iter().enumerate() {
            placement.moe_index[layer.0 as usize] = Some(index);
            for expert in (0..num_experts).map(|expert| ExpertId(expert as u16)) {
                let start = placement.runs.len();
                let of_expert = holdings.of(layer, expert);
                for blocks in elementary_runs(of_expert, end) {
                    placement.push_run(start, blocks, of_expert);
                }
                placement.expert_runs.push(start..placement.runs.len());
            }
        }
        Ok(placement)
    }

    /// Appends a run of the expert whose runs begin at `start`, joined to the one before if the same workers hold that.
    fn push_run(&mut self, start: usize, blocks: BlockRange, of_expert: &[Holding]) {
        let first = self.holders.len();
        let able = of_expert.iter().filter(|holding| holding.slice.blocks.contains(blocks));
        self.holders.extend(able.map(|holding| holding.worker));
        if let Some(last) = self.runs[start..].last_mut()
            && self.holders[last.holders.clone()] == self.holders[first..]
        {
            last.blocks.end = blocks.end;
            self.holders.truncate(first);
            return;
        }
        let holders = first..self.holders.len();
        self.runs.push(Run { blocks, holders });
    }

    /// Number of workers, those that hold nothing included.
    pub fn num_workers(&self) -> usize {
        self.num_workers
    }

    /// Combine blocks of an expert.
    pub fn num_blocks(&self) -> u16 {
        self.num_blocks
    }

    /// Runs of blocks for which no worker `may_run` says yes to is a holder, sorted.
    pub fn uncovered(&self, mut may_run: impl FnMut(usize) -> bool) -> Vec<ExpertSlice> {
        let mut missing: Vec<ExpertSlice> = Vec::new();
        let layers = (0..).map(LayerId).zip(&self.moe_index);
        for (layer, _) in layers.filter(|(_, moe_index)| moe_index.is_some()) {
            for expert in (0..self.num_experts).map(|expert| ExpertId(expert as u16)) {
                for run in self.runs(layer, expert) {
                    if !self.holders(run).iter().any(|&worker| may_run(worker as usize)) {
                        let blocks = run.blocks;
                        push_missing(&mut missing, ExpertSlice { layer, expert, blocks });
                    }
                }
            }
        }
        missing
    }

    /// That every block has a holder to which `may_run` says yes.
    pub fn check_covered(&self, may_run: impl FnMut(usize) -> bool) -> Result<(), PlanError> {
        match self.uncovered(may_run).as_slice() {
            [] => Ok(()),
            &[missing, ref others @ ..] => Err(PlanError::Uncovered {
                missing,
                others: others.len(),
            }),
        }
    }

    /// Holders to which `may_run` says yes, of the block that has fewest of them; the number of workers if the model has no
    /// experts.
    pub fn fewest_holders(&self, may_run: impl Fn(usize) -> bool) -> usize {
        let count = |run: &Run| {
            self.holders(run)
                .iter()
                .filter(|&&worker| may_run(worker as usize))
                .count()
        };
        self.runs.iter().map(count).min().unwrap_or(self.num_workers)
    }

    /// Workers that hold all of `slice`, ascending. None if the model has no such slice.
    pub fn holders_of(&self, slice: ExpertSlice) -> Vec<usize> {
        let has_layer = matches!(self.moe_index.get(slice.layer.0 as usize), Some(Some(_)));
        if !has_layer || usize::from(slice.expert.0) >= self.num_experts || slice.blocks.end > self.num_blocks {
            return Vec::new();
        }
        let mut common: Option<Vec<usize>> = None;
        for run in self.runs(slice.layer, slice.expert) {
            if run.blocks.first < slice.blocks.end && slice.blocks.first < run.blocks.end {
                let holders = self.holders(run).iter().map(|&worker| worker as usize);
                common = Some(match common {
                    None => holders.collect(),
                    Some(mut common) => {
                        let here: Vec<usize> = holders.collect();
                        common.retain(|worker| here.contains(worker));
                        common
                    }
                });
            }
        }
        common.unwrap_or_default()
    }

    /// Position of the first run of `layer` among all runs, and the number of its runs. Panics if it has no experts.
    pub(crate) fn runs_of_layer(&self, layer: LayerId) -> Range<usize> {
        let first = self.moe_index[layer.0 as usize].expect("the layer has experts") * self.num_experts;
        match self.expert_runs.get(first..first + self.num_experts) {
            Some([one, .., last]) => one.start..last.end,
            Some([one]) => one.clone(),
            _ => 0..0,
        }
    }

    /// Where the runs of one expert are, ascending by block. Panics if the layer has no such expert.
    pub(crate) fn run_range(&self, layer: LayerId, expert: ExpertId) -> Range<usize> {
        let moe_index = self.moe_index[layer.0 as usize].expect("the layer has experts");
        let expert = usize::from(expert.0);
        assert!(
            expert < self.num_experts,
            "expert {expert} of {} routed to",
            self.num_experts
        );
        self.expert_runs[moe_index * self.num_experts + expert].clone()
    }

    /// One run, by its position among all runs.
    pub(crate) fn run(&self, index: usize) -> &Run {
        &self.runs[index]
    }

    /// The workers of a run, ascending.
    pub(crate) fn holders(&self, run: &Run) -> &[u32] {
        &self.holders[run.holders.clone()]
    }

    fn runs(&self, layer: LayerId, expert: ExpertId) -> &[Run] {
        &self.runs[self.run_range(layer, expert)]
    }
}

/// All that is held, checked against the model and grouped by expert.
struct Holdings(Vec<Holding>);

impl Holdings {
    fn new(config: &ModelConfig, num_blocks: usize, held: &[Vec<ExpertSlice>]) -> Result<Self, PlanError> {
        let moe_layers = config.moe_layers();
        let num_experts = config.moe.as_ref().map_or(0, |moe| moe.num_experts);
        let mut holdings = Vec::with_capacity(held.iter().map(Vec::len).sum());
        for (worker, slices) in held.iter().enumerate() {
            let unknown = slices.iter().find(|slice| {
                moe_layers.binary_search(&slice.layer).is_err()
                    || usize::from(slice.expert.0) >= num_experts
                    || usize::from(slice.blocks.end) > num_blocks
            });
            if let Some(&slice) = unknown {
                return Err(PlanError::Unknown { worker, slice });
            }
            let merged = merge_slices(slices.clone()).into_iter();
            holdings.extend(merged.map(|slice| Holding {
                slice,
                worker: worker as u32,
            }));
        }
        holdings.sort_by_key(|holding| {
            (
                holding.slice.layer,
                holding.slice.expert,
                holding.worker,
                holding.slice.blocks,
            )
        });
        Ok(Self(holdings))
    }

    /// Ascending by worker.
    fn of(&self, layer: LayerId, expert: ExpertId) -> &[Holding] {
        let key = |holding: &Holding| (holding.slice.layer, holding.slice.expert);
        let start = self.0.partition_point(|holding| key(holding) < (layer, expert));
        let len = self.0[start..].partition_point(|holding| key(holding) == (layer, expert));
        &self.0[start..start + len]
    }
}

/// `0..end` cut wherever some holding begins or ends, so that each piece has the same holders throughout.
fn elementary_runs(holders: &[Holding], end: u16) -> Vec<BlockRange> {
    let mut borders: Vec<u16> = holders
        .iter()
        .flat_map(|held| [held.slice.blocks.first, held.slice.blocks.end])
        .collect();
    borders.extend([0, end]);
    borders.sort_unstable();
    borders.dedup();
    borders
        .windows(2)
        .map(|pair| BlockRange {
            first: pair[0],
            end: pair[1],
        })
        .collect()
}

fn push_missing(missing: &mut Vec<ExpertSlice>, slice: ExpertSlice) {
    match missing.last_mut() {
        Some(last) if (last.layer, last.expert, last.blocks.end) == (slice.layer, slice.expert, slice.blocks.first) => {
            last.blocks.end = slice.blocks.end;
        }
        _ => missing.push(slice),
    }
}
