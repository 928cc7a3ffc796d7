//! What each holder is asked for one layer: the routing of its rows, cut by the placement.

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

impl Placement {
    /// The batches of one layer, one per worker that has work, ascending by worker. Takes time linear in the number of
    /// assignments (and workers).
    ///
    /// Panics if `layer` has no experts, or `routing` names one that it does not have: both come from the model that
    /// the placement was made for.
    pub fn plan_layer(&self, layer: LayerId, routing: &Routing) -> Vec<WorkerBatch> {
        let mut batches: Vec<WorkerBatch> = (0..self.num_workers())
            .map(|worker| WorkerBatch {
                worker,
                rows: Vec::new(),
                assignments: Vec::new(),
            })
            .collect();
        for (row, expert, weight) in assigned(routing) {
            for run in self.runs(layer, expert) {
                let batch = &mut batches[run.worker as usize];
                if batch.rows.last() != Some(&row) {
                    batch.rows.push(row);
                }
                let row = batch.rows.len() as u32 - 1;
                batch.assignments.push(Assignment {
                    row,
                    expert,
                    blocks: run.blocks,
                    weight,
                });
            }
        }
        batches.retain(|batch| !batch.rows.is_empty());
        batches
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
