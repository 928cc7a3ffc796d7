//! Who runs what: every block of every expert is given to one of its holders.

mod error;
#[cfg(test)]
mod tests;

use std::ops::Range;

use moerun_types::{BlockRange, ExpertId, ExpertSlice, LayerId, ModelConfig};

use crate::slices::merge_slices;
pub use error::PlanError;

/// Which worker runs which blocks of which expert: every block of every expert has exactly one runner.
#[derive(Debug, Clone, PartialEq)]
pub struct Placement {
    num_workers: usize,
    /// Experts of each MoE layer.
    num_experts: usize,
    /// Position of each model layer among the MoE layers.
    moe_index: Vec<Option<usize>>,
    /// Where the runs of each `(MoE layer, expert)` are.
    expert_runs: Vec<Range<usize>>,
    /// Runs of one expert stand together, ascending by block.
    runs: Vec<Run>,
}

/// Blocks of one expert that one worker runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) blocks: BlockRange,
    pub(crate) worker: u32,
}

/// What one worker says it holds of one expert.
#[derive(Debug, Clone, Copy)]
struct Holding {
    slice: ExpertSlice,
    worker: u32,
}

impl Placement {
    /// Gives each block of each expert of `config` to one of its holders: `held[w]` lists what worker `w` holds.
    ///
    /// Where several hold a block, it goes to the one with the fewest blocks of that layer so far, then of all layers
    /// so far, then to the lower worker: replicas share the work of every layer, and the same `held` always gives the
    /// same placement. Errors: a slice that the model does not have, a block that nobody holds.
    pub fn new(config: &ModelConfig, num_blocks: usize, held: &[Vec<ExpertSlice>]) -> Result<Self, PlanError> {
        let end = u16::try_from(num_blocks).map_err(|_| PlanError::TooManyBlocks { num_blocks })?;
        let num_experts = config.moe.as_ref().map_or(0, |moe| moe.num_experts);
        let moe_layers = config.moe_layers();
        let holdings = Holdings::new(config, num_blocks, held)?;

        let mut sharing = Sharing::new(held.len());
        let mut missing: Vec<ExpertSlice> = Vec::new();
        let mut runs: Vec<Run> = Vec::new();
        let mut expert_runs = Vec::with_capacity(moe_layers.len() * num_experts);
        for &layer in &moe_layers {
            sharing.begin_layer();
            for expert in (0..num_experts).map(|expert| ExpertId(expert as u16)) {
                let start = runs.len();
                let holders = holdings.of(layer, expert);
                for blocks in elementary_runs(holders, end) {
                    match sharing.choose(holders, blocks) {
                        Some(worker) => push_run(&mut runs, start, Run { blocks, worker }),
                        None => push_missing(&mut missing, ExpertSlice { layer, expert, blocks }),
                    }
                }
                expert_runs.push(start..runs.len());
            }
        }
        if let Some(&first) = missing.first() {
            return Err(PlanError::Uncovered {
                missing: first,
                others: missing.len() - 1,
            });
        }
        let mut moe_index = vec![None; config.layers.len()];
        for (index, layer) in moe_layers.iter().enumerate() {
            moe_index[layer.0 as usize] = Some(index);
        }
        Ok(Self {
            num_workers: held.len(),
            num_experts,
            moe_index,
            expert_runs,
            runs,
        })
    }

    /// Number of workers, those without work included.
    pub fn num_workers(&self) -> usize {
        self.num_workers
    }

    /// What worker `worker` runs, sorted: at most what it holds.
    pub fn slices_of(&self, worker: usize) -> Vec<ExpertSlice> {
        let layers = (0..)
            .map(LayerId)
            .zip(&self.moe_index)
            .filter(|(_, moe_index)| moe_index.is_some());
        layers
            .flat_map(|(layer, _)| (0..self.num_experts).map(move |expert| (layer, ExpertId(expert as u16))))
            .flat_map(|(layer, expert)| {
                let runs = self
                    .runs(layer, expert)
                    .iter()
                    .filter(|run| run.worker as usize == worker);
                runs.map(move |run| ExpertSlice {
                    layer,
                    expert,
                    blocks: run.blocks,
                })
            })
            .collect()
    }

    /// Who runs the blocks of one expert, ascending by block. Panics if the layer has no such expert.
    pub(crate) fn runs(&self, layer: LayerId, expert: ExpertId) -> &[Run] {
        let moe_index = self.moe_index[layer.0 as usize].expect("the layer has experts");
        let expert = usize::from(expert.0);
        assert!(
            expert < self.num_experts,
            "expert {expert} of {} routed to",
            self.num_experts
        );
        &self.runs[self.expert_runs[moe_index * self.num_experts + expert].clone()]
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

/// Blocks given to each worker so far.
struct Sharing {
    of_layer: Vec<u64>,
    in_all: Vec<u64>,
}

impl Sharing {
    fn new(num_workers: usize) -> Self {
        Self {
            of_layer: vec![0; num_workers],
            in_all: vec![0; num_workers],
        }
    }

    fn begin_layer(&mut self) {
        self.of_layer.fill(0);
    }

    /// Gives `blocks` to the holder of all of them that has least; `None` if nobody holds them.
    fn choose(&mut self, holders: &[Holding], blocks: BlockRange) -> Option<u32> {
        let able = holders
            .iter()
            .filter(|holding| holding.slice.blocks.contains(blocks))
            .map(|holding| holding.worker);
        let worker =
            able.min_by_key(|&worker| (self.of_layer[worker as usize], self.in_all[worker as usize], worker))?;
        self.of_layer[worker as usize] += blocks.len() as u64;
        self.in_all[worker as usize] += blocks.len() as u64;
        Some(worker)
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

/// Appends a run of the expert whose runs begin at `start`, joined to the one before if the same worker runs that.
fn push_run(runs: &mut Vec<Run>, start: usize, run: Run) {
    match runs[start..].last_mut() {
        Some(last) if last.worker == run.worker => last.blocks.end = run.blocks.end,
        _ => runs.push(run),
    }
}

fn push_missing(missing: &mut Vec<ExpertSlice>, slice: ExpertSlice) {
    match missing.last_mut() {
        Some(last) if (last.layer, last.expert, last.blocks.end) == (slice.layer, slice.expert, slice.blocks.first) => {
            last.blocks.end = slice.blocks.end;
        }
        _ => missing.push(slice),
    }
}
