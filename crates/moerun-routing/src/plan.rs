//! What each holder is asked for one layer: the work on its rows, cut by the placement and by the choice among holders.

#[cfg(test)]
mod tests;

use moerun_types::{BlockRange, ExpertId, LayerId};

use crate::{Placement, Routing};

/// One expert (or the blocks of it that one holder runs) on one row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Assignment {
    /// Row of the batch's activations.
    pub row: u32,
    /// Expert of the layer.
    pub expert: ExpertId,
    /// Blocks to run.
    pub blocks: BlockRange,
    /// Final routing weight.
    pub weight: f32,
}

/// What one worker is asked to do for one layer: rows are sent once, whatever the number of experts on them.
#[derive(Debug, Clone, PartialEq)]
pub struct WorkerBatch {
    /// Index of the worker in the placement.
    pub worker: usize,
    /// Rows of the layer's activations that travel to it, ascending.
    pub rows: Vec<u32>,
    /// Work on them; `row` counts within `rows`, ascending.
    pub assignments: Vec<Assignment>,
}

/// The work of one layer, given out.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LayerPlan {
    /// One per worker that has work, ascending by worker.
    pub batches: Vec<WorkerBatch>,
    /// Work for which nobody was chosen; `row` counts within the layer's activations, ascending.
    pub unheld: Vec<Assignment>,
}

/// Blocks of an expert that are to be given to one of their holders.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidates<'a> {
    /// Workers that hold them, ascending.
    pub holders: &'a [u32],
    /// Rows that want them.
    pub rows: usize,
}

impl Placement {
    /// Gives `work` of one layer (ascending by row, which counts within the layer's activations) to holders.
    ///
    /// `choose` is asked once for each run of blocks that has work, those with the most rows first (so that what is large
    /// is spread before what is small); `None` leaves the run to nobody. Takes time linear in the number of assignments
    /// (and workers and runs of the layer).
    ///
    /// Panics if `layer` has no experts, if `work` names an expert that it does not have, or `choose` a worker that is not
    /// there: all come from the model that the placement was made for.
    pub fn plan_layer(
        &self,
        layer: LayerId,
        work: &[Assignment],
        choose: &mut dyn FnMut(Candidates<'_>) -> Option<usize>,
    ) -> LayerPlan {
        let chosen = self.choose_runs(layer, work, choose);
        let first_run = self.runs_of_layer(layer).start;
        let mut plan = LayerPlan {
            batches: (0..self.num_workers())
                .map(|worker| WorkerBatch {
                    worker,
                    rows: Vec::new(),
                    assignments: Vec::new(),
                })
                .collect(),
            unheld: Vec::new(),
        };
        for part in work {
            for index in self.run_range(layer, part.expert) {
                let Some(blocks) = overlap(self.run(index).blocks, part.blocks) else {
                    continue;
                };
                let Assignment {
                    row, expert, weight, ..
                } = *part;
                match chosen[index - first_run] {
                    Some(worker) => plan.batches[worker].push(row, expert, blocks, weight),
                    None => push_joined(
                        &mut plan.unheld,
                        Assignment {
                            row,
                            expert,
                            blocks,
                            weight,
                        },
                    ),
                }
            }
        }
        plan.batches.retain(|batch| !batch.rows.is_empty());
        plan
    }

    /// The choice for each run of the layer, counted from its first; `None` for those without work too.
    fn choose_runs(
        &self,
        layer: LayerId,
        work: &[Assignment],
        choose: &mut dyn FnMut(Candidates<'_>) -> Option<usize>,
    ) -> Vec<Option<usize>> {
        let of_layer = self.runs_of_layer(layer);
        let mut rows = vec![0usize; of_layer.len()];
        for part in work {
            for index in self.run_range(layer, part.expert) {
                if overlap(self.run(index).blocks, part.blocks).is_some() {
                    rows[index - of_layer.start] += 1;
                }
            }
        }
        let mut wanted: Vec<usize> = (0..rows.len()).filter(|&run| rows[run] > 0).collect();
        wanted.sort_by_key(|&run| std::cmp::Reverse(rows[run]));
        let mut chosen = vec![None; rows.len()];
        for run in wanted {
            chosen[run] = choose(Candidates {
                holders: self.holders(self.run(of_layer.start + run)),
                rows: rows[run],
            });
        }
        chosen
    }
}

fn overlap(one: BlockRange, other: BlockRange) -> Option<BlockRange> {
    let common = BlockRange {
        first: one.first.max(other.first),
        end: one.end.min(other.end),
    };
    (common.first < common.end).then_some(common)
}

/// Appends work, joined to the one before if it goes on where that ends.
fn push_joined(assignments: &mut Vec<Assignment>, work: Assignment) {
    match assignments.last_mut() {
        Some(last) if (last.row, last.expert, last.blocks.end) == (work.row, work.expert, work.blocks.first) => {
            last.blocks.end = work.blocks.end;
        }
        _ => assignments.push(work),
    }
}

impl WorkerBatch {
    /// Appends work on a row of the layer's activations, not before the last one.
    fn push(&mut self, row: u32, expert: ExpertId, blocks: BlockRange, weight: f32) {
        if self.rows.last() != Some(&row) {
            self.rows.push(row);
        }
        let row = self.rows.len() as u32 - 1;
        push_joined(
            &mut self.assignments,
            Assignment {
                row,
                expert,
                blocks,
                weight,
            },
        );
    }

    /// The same work with `row` counting within the layer's activations.
    pub fn work(&self) -> Vec<Assignment> {
        let row = |work: &Assignment| self.rows[work.row as usize];
        self.assignments
            .iter()
            .map(|work| Assignment {
                row: row(work),
                ..*work
            })
            .collect()
    }
}

impl WorkerBatch {
    /// The same work in batches of at most `max_rows` rows (at least one each), in the order of the rows, so that a
    /// long prefill streams in messages of bounded size.
    pub fn split(self, max_rows: usize) -> Vec<WorkerBatch> {
        let max_rows = max_rows.max(1);
        if self.rows.len() <= max_rows {
            return vec![self];
        }
        let mut rest = self.assignments.as_slice();
        let mut parts = Vec::with_capacity(self.rows.len().div_ceil(max_rows));
        for (part, rows) in self.rows.chunks(max_rows).enumerate() {
            let first_row = part * max_rows;
            let (here, after) =
                rest.split_at(rest.partition_point(|work| (work.row as usize) < first_row + rows.len()));
            rest = after;
            let assignments = here
                .iter()
                .map(|work| Assignment {
                    row: work.row - first_row as u32,
                    ..*work
                })
                .collect();
            parts.push(WorkerBatch {
                worker: self.worker,
                rows: rows.to_vec(),
                assignments,
            });
        }
        parts
    }
}

/// All assignments of one layer for a holder that has every expert whole, ascending by row, best expert first.
pub fn whole_assignments(routing: &Routing, num_blocks: usize) -> impl Iterator<Item = Assignment> {
    let end = u16::try_from(num_blocks).expect("blocks are numbered by u16: checked when the experts were loaded");
    let blocks = BlockRange { first: 0, end };
    assigned(routing).map(move |(row, expert, weight)| Assignment {
        row,
        expert,
        blocks,
        weight,
    })
}

/// `(row, expert, weight)` of every choice, ascending by row, best expert first.
fn assigned(routing: &Routing) -> impl Iterator<Item = (u32, ExpertId, f32)> {
    let choices = routing.expert_ids.iter().zip(&routing.routing_weights);
    choices
        .enumerate()
        .map(|(index, (&expert, &weight))| ((index / routing.top_k) as u32, expert, weight))
}
