//! One batch: check it, group it by slice, run the groups.

use moerun_kernels::{Activations, CpuPool, ExactTermError, Group, Workspace, grouped_exact, grouped_fast};
use moerun_routing::{Assignment, PartialSums, Routing, whole_assignments};
use moerun_types::{BlockRange, LayerId, MoeConfig, RoutingWeightTarget};

use super::{ExpertBank, ExpertError};

/// An assignment and the held run of blocks that serves it.
#[derive(Debug, Clone, Copy)]
struct Located {
    row: u32,
    /// Position in the bank's `held`: ascending by expert.
    held: usize,
    /// Counted in the whole expert.
    blocks: BlockRange,
    weight: f32,
}

impl ExpertBank {
    /// Runs `assignments` on `x`, `[rows, hidden]`; returns the weighted partial sums, `[rows, hidden]`.
    ///
    /// The holder of block 0 also owes the down bias. Everything is checked: a row, expert or block that is not there
    /// is an error, never a panic, and so are a block assigned to one row twice and more than `top_k` experts on a row.
    /// The order of the assignments changes nothing.
    pub fn execute(
        &self,
        pool: &CpuPool,
        layer: LayerId,
        x: &Activations,
        assignments: &[Assignment],
    ) -> Result<PartialSums, ExpertError> {
        let mut sums = PartialSums::zeros(self.numerics.combine, 0, self.config.hidden);
        self.execute_into(pool, layer, x, assignments.iter().copied(), &mut sums)?;
        Ok(sums)
    }

    /// Runs all that `routing` chose on `x`, by a bank that holds every expert whole, as [`ExpertBank::execute`] does,
    /// into `sums`, whatever that was before; after an error it is meaningless.
    pub fn execute_whole(
        &self,
        pool: &CpuPool,
        layer: LayerId,
        x: &Activations,
        routing: &Routing,
        sums: &mut PartialSums,
    ) -> Result<(), ExpertError> {
        let intermediate = self.config.moe.as_ref().map_or(0, |moe| moe.intermediate);
        let assignments = whole_assignments(routing, self.numerics.num_blocks(intermediate));
        self.execute_into(pool, layer, x, assignments, sums)
    }

    fn execute_into(
        &self,
        pool: &CpuPool,
        layer: LayerId,
        x: &Activations,
        assignments: impl Iterator<Item = Assignment>,
        sums: &mut PartialSums,
    ) -> Result<(), ExpertError> {
        self.check_activations(x)?;
        let workspace = pool.workspace();
        let located = assignments.map(|assignment| self.locate(layer, x.rows(), &assignment));
        let located = workspace.try_collect(located)?;
        sums.reset(self.numerics.combine, x.rows(), self.config.hidden);
        let Some(moe) = self.config.moe.as_ref().filter(|_| !located.is_empty()) else {
            return Ok(());
        };
        located.sort_unstable_by_key(|work| (work.row, work.held, work.blocks));
        self.check_rows(moe, located)?;

        // Groups ascend by expert, so that fast mode too adds a row's experts in an order of its own.
        located.sort_unstable_by_key(|work| (work.held, work.blocks, work.row));
        let groups = self.groups(&workspace, located);
        let weight_on_input = moe.weight_target == RoutingWeightTarget::Input;
        let block = self.numerics.combine_block;
        match sums {
            PartialSums::Exact { sums, .. } => {
                grouped_exact(pool, x, groups, weight_on_input, block, self.term_limit, sums)
                    .map_err(|error| self.term_error(located, error))?;
            }
            PartialSums::Fast { sums, .. } => grouped_fast(pool, x, groups, weight_on_input, block, sums),
        }
        Ok(())
    }

    fn check_activations(&self, x: &Activations) -> Result<(), ExpertError> {
        if x.cols() != self.config.hidden {
            return Err(ExpertError::Shape {
                what: "length of a row",
                wanted: self.config.hidden,
                found: x.cols(),
            });
        }
        let wanted = self.numerics.format.activations();
        if x.format() != wanted {
            return Err(ExpertError::Format {
                wanted,
                found: x.format(),
            });
        }
        Ok(())
    }

    fn locate(&self, layer: LayerId, rows: usize, assignment: &Assignment) -> Result<Located, ExpertError> {
        let &Assignment {
            row,
            expert,
            blocks,
            weight,
        } = assignment;
        if row as usize >= rows {
            return Err(ExpertError::Row { row, rows });
        }
        if blocks.is_empty() {
            return Err(ExpertError::NoBlocks { row, expert, blocks });
        }
        if !weight.is_finite() {
            return Err(ExpertError::Weight { row, expert, weight });
        }
        let mut runs = self.runs_of(layer, expert);
        match runs.find(|&held| self.held[held].blocks.contains(blocks)) {
            Some(held) => Ok(Located {
                row,
                held,
                blocks,
                weight,
            }),
            None => Err(ExpertError::NotHeld { layer, expert, blocks }),
        }
    }

    /// Checks each row's assignments among themselves; `located` ascends by row, held run and blocks.
    ///
    /// Held runs of one expert are disjoint, so blocks can only overlap within one of them.
    fn check_rows(&self, moe: &MoeConfig, located: &[Located]) -> Result<(), ExpertError> {
        for of_row in located.chunk_by(|a, b| a.row == b.row) {
            let row = of_row[0].row;
            let mut num_experts = 1;
            for pair in of_row.windows(2) {
                let expert = self.held[pair[1].held].expert;
                if pair[0].held == pair[1].held && pair[1].blocks.first < pair[0].blocks.end {
                    return Err(ExpertError::Duplicate {
                        row,
                        expert,
                        block: pair[1].blocks.first,
                    });
                }
                num_experts += usize::from(self.held[pair[0].held].expert != expert);
            }
            // The bound on a term's size, which keeps sums from overflowing, counts on this.
            if num_experts > moe.top_k {
                return Err(ExpertError::TooManyExperts {
                    row,
                    top_k: moe.top_k,
                    found: num_experts,
                });
            }
        }
        Ok(())
    }

    /// One group per held run and blocks of `located`, which ascends by held run, blocks and row.
    fn groups<'a>(&'a self, workspace: &'a Workspace<'_>, located: &[Located]) -> &'a [Group<'a>] {
        let rows = &*workspace.collect(located.iter().map(|work| work.row));
        let routing_weights = &*workspace.collect(located.iter().map(|work| work.weight));
        let mut start = 0;
        workspace.collect(by_group(located).map(|of_group| {
            let places = start..start + of_group.len();
            start = places.end;
            let Located { held, blocks, .. } = of_group[0];
            let (weights, first) = (&self.weights[held], self.held[held].blocks.first);
            Group {
                weights,
                rows: &rows[places.clone()],
                routing_weights: &routing_weights[places],
                blocks: usize::from(blocks.first - first)..usize::from(blocks.end - first),
                owes_down_bias: blocks.first == 0 && weights.down_bias.is_some(),
            }
        }))
    }

    fn term_error(&self, located: &[Located], error: ExactTermError) -> ExpertError {
        let of_group = by_group(located)
            .nth(error.group)
            .expect("the kernel names one of the groups it was given");
        let slice = self.held[of_group[0].held];
        ExpertError::Term {
            layer: slice.layer,
            expert: slice.expert,
            block: error.block.map(|block| slice.blocks.first + block as u16),
            term: error.term,
            limit: error.limit,
        }
    }
}

fn by_group(located: &[Located]) -> impl Iterator<Item = &[Located]> {
    located.chunk_by(|a, b| (a.held, a.blocks) == (b.held, b.blocks))
}
