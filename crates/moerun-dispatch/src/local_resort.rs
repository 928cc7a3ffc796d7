//! The gateway computes experts itself, from the checkpoint on its own disk, when no worker can.

use std::{collections::BTreeMap, sync::Arc};

use moerun_kernels::{Activations, CpuPool};
use moerun_model::ExpertBank;
use moerun_routing::{Assignment, PartialSums};
use moerun_types::{BlockRange, ExpertId, ExpertSlice, LayerId, Numerics};
use moerun_weights::Checkpoint;
use parking_lot::Mutex;

use crate::DispatchError;

/// Loads experts when they are first wanted and keeps them up to a limit, those used last.
#[derive(Debug)]
pub(crate) struct LocalResort {
    checkpoint: Arc<Checkpoint>,
    numerics: Numerics,
    num_blocks: u16,
    pool: Arc<CpuPool>,
    max_bytes: u64,
    loaded: Mutex<Loaded>,
}

#[derive(Debug, Default)]
struct Loaded {
    banks: BTreeMap<(LayerId, ExpertId), Bank>,
    bytes: u64,
    /// Counts uses, so that the idle longest goes first.
    clock: u64,
}

#[derive(Debug)]
struct Bank {
    bank: Arc<ExpertBank>,
    used: u64,
}

impl LocalResort {
    /// Computes on `pool`, and keeps packed experts of up to `max_bytes` (but always the one in use).
    pub(crate) fn new(
        checkpoint: Arc<Checkpoint>,
        numerics: Numerics,
        num_blocks: usize,
        pool: Arc<CpuPool>,
        max_bytes: u64,
    ) -> Self {
        Self {
            checkpoint,
            numerics,
            num_blocks: u16::try_from(num_blocks).unwrap_or(u16::MAX),
            pool,
            max_bytes,
            loaded: Mutex::default(),
        }
    }

    /// Whether the checkpoint has this expert.
    pub(crate) fn has(&self, layer: LayerId, expert: ExpertId) -> bool {
        self.checkpoint.has_expert(layer, expert)
    }

    /// Runs `work`, whose rows count within `activations`; returns the sums of all its rows, `[rows, hidden]`: bit-equal to
    /// those of workers. Blocks, and reads the disk where an expert is not loaded.
    pub(crate) fn run(
        &self,
        layer: LayerId,
        activations: &Activations,
        work: &[Assignment],
    ) -> Result<PartialSums, DispatchError> {
        let mut sums = PartialSums::zeros(self.numerics.combine, activations.rows(), activations.cols());
        let mut by_expert: BTreeMap<ExpertId, Vec<Assignment>> = BTreeMap::new();
        for assignment in work {
            by_expert.entry(assignment.expert).or_default().push(*assignment);
        }
        for (expert, mut work) in by_expert {
            let mut rows: Vec<u32> = work.iter().map(|work| work.row).collect();
            rows.dedup();
            for work in &mut work {
                // Ascending by row, as all work of a layer is.
                work.row = rows.partition_point(|&row| row < work.row) as u32;
            }
            let bank = self.bank(layer, expert)?;
            let partial = bank.execute(&self.pool, layer, &activations.select_rows(&rows), &work)?;
            sums.add_rows(&rows, &partial).map_err(|error| DispatchError::Start {
                reason: error.to_string(),
            })?;
        }
        Ok(sums)
    }

    fn bank(&self, layer: LayerId, expert: ExpertId) -> Result<Arc<ExpertBank>, DispatchError> {
        {
            let mut loaded = self.loaded.lock();
            loaded.clock += 1;
            let now = loaded.clock;
            if let Some(bank) = loaded.banks.get_mut(&(layer, expert)) {
                bank.used = now;
                return Ok(Arc::clone(&bank.bank));
            }
        }
        let slice = ExpertSlice {
            layer,
            expert,
            blocks: BlockRange {
                first: 0,
                end: self.num_blocks,
            },
        };
        let bank = ExpertBank::load(&self.checkpoint, &[slice], self.numerics, &mut |_, _| {}).map_err(|error| {
            DispatchError::OwnCheckpoint {
                reason: error.to_string(),
            }
        })?;
        let bank = Arc::new(bank);
        self.loaded
            .lock()
            .keep((layer, expert), Arc::clone(&bank), self.max_bytes);
        Ok(bank)
    }

    /// Bytes of the experts that are kept.
    pub(crate) fn kept_bytes(&self) -> u64 {
        self.loaded.lock().bytes
    }
}

impl Loaded {
    fn keep(&mut self, expert: (LayerId, ExpertId), bank: Arc<ExpertBank>, max_bytes: u64) {
        self.clock += 1;
        self.bytes += bank.memory_bytes();
        let used = self.clock;
        if let Some(twice) = self.banks.insert(expert, Bank { bank, used }) {
            self.bytes -= twice.bank.memory_bytes();
        }
        while self.bytes > max_bytes && self.banks.len() > 1 {
            let Some((&idle, _)) = self.banks.iter().min_by_key(|(_, bank)| bank.used) else {
                return;
            };
            if let Some(gone) = self.banks.remove(&idle) {
                self.bytes -= gone.bank.memory_bytes();
            }
        }
    }
}
