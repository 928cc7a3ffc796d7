//! What this worker holds: one immutable value after another, each with an epoch. What runs keeps the one it began with.

use std::{collections::HashMap, path::PathBuf, sync::Arc};

use moerun_model::ExpertBank;
use moerun_proto::{BlockHash, HeldExpert, HeldNow, WorkerIdentity};
use moerun_routing::{merge_slices, subtract_slices};
use moerun_transport::ClientProtection;
use moerun_types::{BlockRange, ExpertId, ExpertSlice, LayerId, ModelConfig, Numerics};
use moerun_weights::{Checkpoint, Load, MemoryNeed, Needs, ReceivedExpert, available_memory_bytes};
use tokio::sync::{Mutex, watch};

use crate::HoldingError;

/// Where more experts come from, and how many there may be.
#[derive(Debug, Clone)]
pub struct ExpertSource {
    /// Checkpoint directory or GGUF file; it is opened anew for each change, so that nothing stays mapped between them.
    pub model_dir: PathBuf,
    /// How packed weights come into memory.
    pub load: Load,
    /// Most bytes that experts may take; `None` = what the system has.
    pub max_expert_bytes: Option<u64>,
    /// How connections to other workers are protected, which hand over what the checkpoint lacks.
    pub dial: ClientProtection,
}

/// What is held at one time.
#[derive(Debug)]
pub(crate) struct Held {
    /// Counts the changes.
    pub(crate) epoch: u64,
    /// What the worker tells of itself.
    pub(crate) identity: WorkerIdentity,
    /// The experts; `None` where something else answers for them.
    pub(crate) bank: Option<Arc<ExpertBank>>,
}

/// Experts that other workers handed over.
pub(crate) type Received = HashMap<(LayerId, ExpertId), ReceivedExpert>;

/// What is to be held more, and where it comes from.
#[derive(Debug)]
pub(crate) struct Change {
    before: Arc<Held>,
    checkpoint: Checkpoint,
    /// Of all blocks that are held then.
    hashes: Hashes,
    /// Runs that the checkpoint has.
    own: Vec<ExpertSlice>,
    /// Runs that it lacks.
    foreign: Vec<ExpertSlice>,
}

impl Change {
    /// Experts that must come from another worker.
    pub(crate) fn lacking(&self) -> Vec<(LayerId, ExpertId)> {
        let mut lacking: Vec<_> = self.foreign.iter().map(|run| (run.layer, run.expert)).collect();
        lacking.dedup();
        lacking
    }

    /// The model's shape.
    pub(crate) fn config(&self) -> &ModelConfig {
        self.checkpoint.config()
    }
}

/// What is held now, and the way to the next.
#[derive(Debug)]
pub(crate) struct Holdings {
    now: watch::Sender<Arc<Held>>,
    source: Option<ExpertSource>,
    /// Held while a change is made: there is one at a time.
    pub(crate) changing: Arc<Mutex<()>>,
}

type Hashes = HashMap<(LayerId, ExpertId, u16), BlockHash>;

impl Holdings {
    pub(crate) fn new(identity: WorkerIdentity, bank: Option<ExpertBank>, source: Option<ExpertSource>) -> Self {
        let held = Held {
            epoch: 0,
            identity,
            bank: bank.map(Arc::new),
        };
        Self {
            now: watch::Sender::new(Arc::new(held)),
            source,
            changing: Arc::default(),
        }
    }

    /// What is held now.
    pub(crate) fn now(&self) -> Arc<Held> {
        Arc::clone(&self.now.borrow())
    }

    /// Tells of each change.
    pub(crate) fn watch(&self) -> watch::Receiver<Arc<Held>> {
        self.now.subscribe()
    }

    /// In words of the wire.
    pub(crate) fn describe(&self, held: &Held) -> HeldNow {
        let held_bytes = held.bank.as_ref().map_or(0, |bank| bank.memory_bytes());
        HeldNow {
            epoch: held.epoch,
            held: held.identity.held.clone(),
            held_bytes,
            free_bytes: self.free_bytes(held_bytes),
        }
    }

    /// What more may take.
    fn free_bytes(&self, held_bytes: u64) -> Option<u64> {
        let source = self.source.as_ref()?;
        let allowed = source.max_expert_bytes.map(|most| most.saturating_sub(held_bytes));
        allowed.into_iter().chain(available_memory_bytes()).min()
    }

    /// What it takes to hold `wanted` too, each block with the content it names; `None` if that is so already. Blocks, and
    /// reads the disk.
    pub(crate) fn prepare(&self, wanted: &[HeldExpert]) -> Result<Option<Change>, HoldingError> {
        let before = self.now();
        let (Some(bank), Some(source)) = (&before.bank, &self.source) else {
            return Err(HoldingError::NoSource);
        };
        let mut hashes = hashes_of(&before.identity.held);
        check_contents(&before.identity.held, &hashes_of(wanted))?;
        hashes.extend(hashes_of(wanted));
        let named: Vec<ExpertSlice> = wanted.iter().map(|held| held.slice).collect();
        // A run that grows is loaded whole: runs of one expert never touch.
        let after = merge_slices(bank.held().iter().copied().chain(named).collect());
        let new: Vec<ExpertSlice> = after
            .into_iter()
            .filter(|run| bank.held().binary_search(run).is_err())
            .collect();
        if new.is_empty() {
            return Ok(None);
        }
        let checkpoint = Checkpoint::open(&source.model_dir, Needs::Nothing)?.loading(source.load);
        self.check_model(&checkpoint, &before.identity)?;
        checkpoint.check_format(bank.numerics().format)?;
        let in_checkpoint = |run: &ExpertSlice| checkpoint.has_expert(run.layer, run.expert);
        let (own, foreign): (Vec<_>, Vec<_>) = new.into_iter().partition(in_checkpoint);
        self.check_fits(source, bank, &checkpoint, (&own, &foreign))?;
        Ok(Some(Change {
            before,
            checkpoint,
            hashes,
            own,
            foreign,
        }))
    }

    /// Carries a change out; `received` has the experts that the checkpoint lacks. Blocks, and reads the disk. All or nothing.
    pub(crate) fn load(&self, change: &Change, received: &Received) -> Result<Arc<Held>, HoldingError> {
        let Change {
            before,
            checkpoint,
            hashes,
            own,
            foreign,
        } = change;
        let Some(bank) = &before.bank else {
            return Err(HoldingError::NoSource);
        };
        let (config, numerics) = (checkpoint.config(), bank.numerics());
        for &slice in own {
            let block_hashes =
                checkpoint.expert_block_hashes(slice.layer, slice.expert, slice.blocks, numerics.combine_block)?;
            check_contents(&[HeldExpert { slice, block_hashes }], hashes)?;
        }
        let mut fetched = Vec::with_capacity(foreign.len());
        for &slice in foreign {
            let (layer, expert) = (slice.layer, slice.expert);
            let from = received.get(&(layer, expert));
            let from = from.ok_or(HoldingError::NowhereToBeHad { layer, expert })?;
            let block_hashes = from.block_hashes(config, slice.blocks, numerics.combine_block)?;
            check_contents(&[HeldExpert { slice, block_hashes }], hashes)?;
            let columns = numerics.columns(slice.blocks, config.moe.as_ref().map_or(0, |moe| moe.intermediate));
            fetched.push((slice, from.load(config, (layer, expert), numerics.format, columns)?));
        }
        let more = ExpertBank::load(checkpoint, own, numerics, &mut |_, _| {})?;
        let grown = bank.with(&more).with(&bank.made_of_weights(fetched));
        Ok(self.become_holder(before, grown, hashes))
    }

    /// How experts are fetched from another worker.
    pub(crate) fn dial(&self) -> ClientProtection {
        self.source
            .as_ref()
            .map_or_else(ClientProtection::default, |source| source.dial.clone())
    }

    /// The checkpoint, to hand experts over from. Blocks, and reads the disk.
    pub(crate) fn open_source(&self) -> Result<Checkpoint, HoldingError> {
        let source = self.source.as_ref().ok_or(HoldingError::NoSource)?;
        let checkpoint = Checkpoint::open(&source.model_dir, Needs::Nothing)?;
        self.check_model(&checkpoint, &self.now().identity)?;
        Ok(checkpoint)
    }

    /// Holds `slices` no more.
    pub(crate) fn unload(&self, slices: &[ExpertSlice]) -> Result<Arc<Held>, HoldingError> {
        let now = self.now();
        let Some(bank) = &now.bank else {
            return Err(HoldingError::NoSource);
        };
        if subtract_slices(bank.held(), slices) == bank.held() {
            return Ok(now);
        }
        let less = bank.without(slices);
        Ok(self.become_holder(&now, less, &hashes_of(&now.identity.held)))
    }

    fn become_holder(&self, before: &Held, bank: ExpertBank, hashes: &Hashes) -> Arc<Held> {
        let named = |&slice: &ExpertSlice| HeldExpert {
            slice,
            block_hashes: (slice.blocks.first..slice.blocks.end)
                .map(|block| hashes[&(slice.layer, slice.expert, block)])
                .collect(),
        };
        let held = Arc::new(Held {
            epoch: before.epoch + 1,
            identity: WorkerIdentity {
                held: bank.held().iter().map(named).collect(),
                ..before.identity.clone()
            },
            bank: Some(Arc::new(bank)),
        });
        tracing::info!(
            slices = held.identity.held.len(),
            epoch = held.epoch,
            "what this worker holds has changed"
        );
        self.now.send_replace(Arc::clone(&held));
        held
    }

    /// The files may have been replaced since the start.
    fn check_model(&self, checkpoint: &Checkpoint, identity: &WorkerIdentity) -> Result<(), HoldingError> {
        let found = checkpoint.config_hash();
        if found == identity.config_hash {
            return Ok(());
        }
        Err(HoldingError::OtherModel {
            wanted: identity.config_hash.clone(),
            found,
        })
    }

    fn check_fits(
        &self,
        source: &ExpertSource,
        bank: &ExpertBank,
        checkpoint: &Checkpoint,
        (own, foreign): (&[ExpertSlice], &[ExpertSlice]),
    ) -> Result<(), HoldingError> {
        let (config, numerics) = (checkpoint.config(), bank.numerics());
        let bytes = |slices: &[ExpertSlice], of: fn(&ModelConfig, &Numerics, BlockRange) -> u64| {
            let of_slice = |slice: &ExpertSlice| of(config, &numerics, slice.blocks);
            slices.iter().map(of_slice).fold(0, u64::saturating_add)
        };
        let grown_bytes = bytes(
            &subtract_slices(&[own, foreign].concat(), bank.held()),
            MemoryNeed::of_slice,
        );
        let refused = |needed_bytes, free_bytes| HoldingError::OutOfMemory {
            slices: own.len() + foreign.len(),
            format: numerics.format,
            needed_bytes,
            held_bytes: bank.memory_bytes(),
            free_bytes,
            max_expert_bytes: source.max_expert_bytes,
        };
        if let Some(most) = source.max_expert_bytes {
            let free_bytes = most.saturating_sub(bank.memory_bytes());
            if grown_bytes > free_bytes {
                return Err(refused(grown_bytes, free_bytes));
            }
        }
        // A run that grows stands beside the one before until batches under way have ended.
        let of_own = match checkpoint.is_mapped() {
            true => MemoryNeed::of_mapped_slice,
            false => MemoryNeed::of_slice,
        };
        let needed_bytes = bytes(own, of_own).saturating_add(bytes(foreign, MemoryNeed::of_slice));
        match available_memory_bytes() {
            Some(free_bytes) if needed_bytes > free_bytes => Err(refused(needed_bytes, free_bytes)),
            _ => Ok(()),
        }
    }
}

fn hashes_of(held: &[HeldExpert]) -> Hashes {
    let blocks = |held: &HeldExpert| {
        let HeldExpert { slice, block_hashes } = held.clone();
        (slice.blocks.first..slice.blocks.end)
            .zip(block_hashes)
            .map(move |(block, hash)| ((slice.layer, slice.expert, block), hash))
    };
    held.iter().flat_map(blocks).collect()
}

/// That no block of `found` has another hash than in `wanted`, where that has it.
fn check_contents(found: &[HeldExpert], wanted: &Hashes) -> Result<(), HoldingError> {
    for (key, found) in hashes_of(found) {
        match wanted.get(&key) {
            Some(wanted) if *wanted != found => {
                let (layer, expert, block) = key;
                return Err(HoldingError::Content {
                    layer,
                    expert,
                    block,
                    wanted: hex(wanted),
                    found: hex(&found),
                });
            }
            _ => {}
        }
    }
    Ok(())
}

fn hex(hash: &BlockHash) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
