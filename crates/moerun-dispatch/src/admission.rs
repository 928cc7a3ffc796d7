//! Whether a worker may be used: the same protocol, the same model, the same arithmetic, the same contents.

use std::{collections::HashMap, fmt::Write, sync::Arc};

use moerun_proto::{
    BlockHash, HeldExpert, ModelLimits, PROTOCOL_VERSION, WorkerIdentity, decode_handshake, speaks_same_major, v1,
};
use moerun_routing::planner::{PlanFile, PlanIdentity};
use moerun_types::{ExpertId, ExpertSlice, LayerId, ModelConfig, Numerics};
use moerun_weights::Checkpoint;

use crate::DispatchError;

/// What the gateway knows of the model, and compares every worker with.
#[derive(Debug)]
pub(crate) struct Admission {
    checkpoint: Arc<Checkpoint>,
    numerics: Numerics,
    limits: ModelLimits,
    config_hash: String,
    expert_header_hash: Option<String>,
    dense_header_hash: Option<String>,
    router_hash: Option<String>,
}

impl Admission {
    pub(crate) fn new(checkpoint: Arc<Checkpoint>, numerics: Numerics) -> Self {
        Self {
            limits: ModelLimits::new(checkpoint.config(), numerics),
            config_hash: checkpoint.config_hash(),
            expert_header_hash: checkpoint.expert_header_hash(),
            dense_header_hash: checkpoint.dense_header_hash(),
            router_hash: checkpoint.router_hash(),
            checkpoint,
            numerics,
        }
    }

    pub(crate) fn config(&self) -> &ModelConfig {
        self.checkpoint.config()
    }

    /// BLAKE3 (hex) of the canonical form of the config.
    pub(crate) fn config_hash(&self) -> &str {
        &self.config_hash
    }

    pub(crate) fn numerics(&self) -> Numerics {
        self.numerics
    }

    pub(crate) fn limits(&self) -> &ModelLimits {
        &self.limits
    }

    /// Admits the worker at `worker` by its answer to a handshake, or says what differs.
    pub(crate) fn admit(
        &self,
        worker: &str,
        response: &v1::HandshakeResponse,
    ) -> Result<WorkerIdentity, DispatchError> {
        let malformed = |source| DispatchError::Malformed {
            worker: worker.to_owned(),
            source,
        };
        // What it holds can be read only once its model is known to be ours.
        let identity = decode_handshake(response, None).map_err(malformed)?;
        self.compare(worker, &identity)?;
        let identity = decode_handshake(response, Some(&self.limits)).map_err(malformed)?;
        self.spot_check(worker, &identity.held)?;
        Ok(identity)
    }

    /// What each worker of a plan is to hold, by name; an error if the plan is for something else.
    pub(crate) fn resolve(&self, file: &PlanFile) -> Result<Vec<(String, Vec<ExpertSlice>)>, DispatchError> {
        let identity = PlanIdentity {
            config_hash: self.config_hash.clone(),
            numerics: self.numerics.id(),
        };
        file.resolve(&identity, self.config(), &self.numerics)
            .map_err(|error| DispatchError::Unplanned(Arc::new(error)))
    }

    /// `slice` with the hashes of its blocks in the gateway's own checkpoint; `None` if that lacks it. Reads the disk.
    pub(crate) fn own_content(&self, slice: ExpertSlice) -> Result<Option<HeldExpert>, DispatchError> {
        if !self.checkpoint.has_expert(slice.layer, slice.expert) {
            return Ok(None);
        }
        let hashes =
            self.checkpoint
                .expert_block_hashes(slice.layer, slice.expert, slice.blocks, self.numerics.combine_block);
        match hashes {
            Ok(block_hashes) => Ok(Some(HeldExpert { slice, block_hashes })),
            Err(error) => Err(DispatchError::OwnCheckpoint {
                reason: error.to_string(),
            }),
        }
    }

    fn compare(&self, worker: &str, identity: &WorkerIdentity) -> Result<(), DispatchError> {
        let mismatch = |what, wanted: &str, found: &str| DispatchError::Mismatch {
            worker: worker.to_owned(),
            what,
            wanted: wanted.to_owned(),
            found: found.to_owned(),
        };
        if !speaks_same_major(identity.protocol_version) {
            let (wanted, found) = (PROTOCOL_VERSION.to_string(), identity.protocol_version.to_string());
            return Err(mismatch("protocol version", &wanted, &found));
        }
        for (what, wanted, found) in [
            ("config hash", &self.config_hash, &identity.config_hash),
            ("numerics id", &self.numerics.id(), &identity.numerics_id),
        ] {
            if wanted != found {
                return Err(mismatch(what, wanted, found));
            }
        }
        // A checkpoint may lack the other side's tensors; what both have must be equal.
        for (what, wanted, found) in [
            (
                "hash of the expert tensors' headers",
                &self.expert_header_hash,
                &identity.expert_header_hash,
            ),
            (
                "hash of the other tensors' headers",
                &self.dense_header_hash,
                &identity.dense_header_hash,
            ),
            ("hash of the routers", &self.router_hash, &identity.router_hash),
        ] {
            if let (Some(wanted), Some(found)) = (wanted, found)
                && wanted != found
            {
                return Err(mismatch(what, wanted, found));
            }
        }
        Ok(())
    }

    /// Hashes the first slice that the worker announces and that the gateway's own checkpoint has.
    fn spot_check(&self, worker: &str, held: &[HeldExpert]) -> Result<(), DispatchError> {
        let in_checkpoint = |held: &&HeldExpert| self.checkpoint.has_expert(held.slice.layer, held.slice.expert);
        let Some(HeldExpert { slice, block_hashes }) = held.iter().find(in_checkpoint) else {
            return Ok(());
        };
        let own = self
            .checkpoint
            .expert_block_hashes(slice.layer, slice.expert, slice.blocks, self.numerics.combine_block)
            .map_err(|error| DispatchError::OwnCheckpoint {
                reason: error.to_string(),
            })?;
        for ((block, wanted), found) in (slice.blocks.first..).zip(&own).zip(block_hashes) {
            if wanted != found {
                return Err(content_differs(
                    worker,
                    (slice.layer, slice.expert, block),
                    wanted,
                    found,
                ));
            }
        }
        Ok(())
    }
}

/// That all holders of a block hold the same; `holders` are addresses and what they hold.
pub(crate) fn check_agreement<'a>(
    holders: impl IntoIterator<Item = (&'a str, &'a [HeldExpert])>,
) -> Result<(), DispatchError> {
    let mut seen: HashMap<Block, (&str, &BlockHash)> = HashMap::new();
    for (worker, held) in holders {
        for (block, hash) in blocks(held) {
            let &mut (first_worker, first_hash) = seen.entry(block).or_insert((worker, hash));
            if first_hash != hash {
                let (layer, expert, block) = block;
                return Err(DispatchError::HoldersDisagree {
                    first_worker: first_worker.to_owned(),
                    second_worker: worker.to_owned(),
                    layer,
                    expert,
                    block,
                    first_hash: hex(first_hash),
                    second_hash: hex(hash),
                });
            }
        }
    }
    Ok(())
}

/// That no block that a worker holds `now` is another than it held `before`. It may hold more, or less: what it holds
/// changes while it runs, and a restart brings it back to what it was told at first.
pub(crate) fn check_unchanged(worker: &str, before: &[HeldExpert], now: &[HeldExpert]) -> Result<(), DispatchError> {
    if before == now {
        return Ok(());
    }
    let now: HashMap<Block, &BlockHash> = blocks(now).collect();
    for (block, wanted) in blocks(before) {
        match now.get(&block).copied() {
            Some(found) if found != wanted => return Err(content_differs(worker, block, wanted, found)),
            _ => {}
        }
    }
    Ok(())
}

/// The content of every block that some of `holders` hold.
pub(crate) fn contents<'a>(holders: impl IntoIterator<Item = &'a [HeldExpert]>) -> Contents {
    let all = holders.into_iter().flat_map(blocks);
    Contents(all.map(|(block, hash)| (block, *hash)).collect())
}

/// The content of blocks, as their holders announced it.
#[derive(Debug)]
pub(crate) struct Contents(HashMap<Block, BlockHash>);

impl Contents {
    /// `slice` with the hashes of its blocks; `None` if nobody has announced one of them.
    pub(crate) fn of(&self, slice: ExpertSlice) -> Option<HeldExpert> {
        let hash = |block| self.0.get(&(slice.layer, slice.expert, block)).copied();
        let block_hashes = (slice.blocks.first..slice.blocks.end)
            .map(hash)
            .collect::<Option<_>>()?;
        Some(HeldExpert { slice, block_hashes })
    }
}

type Block = (LayerId, ExpertId, u16);

fn blocks(held: &[HeldExpert]) -> impl Iterator<Item = (Block, &BlockHash)> {
    held.iter().flat_map(|HeldExpert { slice, block_hashes }| {
        (slice.blocks.first..)
            .zip(block_hashes)
            .map(|(block, hash)| ((slice.layer, slice.expert, block), hash))
    })
}

fn content_differs(worker: &str, block: Block, wanted: &BlockHash, found: &BlockHash) -> DispatchError {
    let (layer, expert, block) = block;
    DispatchError::ContentDiffers {
        worker: worker.to_owned(),
        layer,
        expert,
        block,
        wanted: hex(wanted),
        found: hex(found),
    }
}

fn hex(hash: &BlockHash) -> String {
    hash.iter().fold(String::with_capacity(32), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use moerun_types::BlockRange;

    use super::*;

    fn held(expert: u16, first: u16, hashes: &[u8]) -> HeldExpert {
        let blocks = BlockRange {
            first,
            end: first + hashes.len() as u16,
        };
        HeldExpert {
            slice: ExpertSlice {
                layer: LayerId(2),
                expert: ExpertId(expert),
                blocks,
            },
            block_hashes: hashes.iter().map(|&byte| [byte; 16]).collect(),
        }
    }

    #[test]
    fn holders_of_different_contents_are_both_named() {
        let (one, other) = ([held(0, 0, &[1, 2]), held(3, 0, &[5, 6, 7])], [held(3, 1, &[6, 8])]);
        check_agreement([("a:1", &one[..]), ("b:2", &other[..1])].into_iter().take(1)).unwrap();
        let error = check_agreement([("a:1", &one[..]), ("b:2", &other[..])]).unwrap_err();
        let wanted = format!(
            "workers a:1 and b:2 differ in layer 2 expert 3 block 2: {} and {}",
            "07".repeat(16),
            "08".repeat(16)
        );
        assert_eq!(error.to_string(), wanted);
        let agreeing = [held(3, 1, &[6, 7])];
        check_agreement([("a:1", &one[..]), ("b:2", &agreeing[..])]).unwrap();
    }

    #[test]
    fn a_worker_may_come_back_with_more_or_less_but_not_with_other_contents() {
        let before = [held(0, 1, &[1, 2])];
        check_unchanged("a:1", &before, &before).unwrap();
        check_unchanged("a:1", &before, &[held(0, 0, &[9, 1, 2]), held(1, 0, &[4])]).unwrap();
        check_unchanged("a:1", &before, &[held(0, 1, &[1])]).unwrap();
        check_unchanged("a:1", &before, &[]).unwrap();
        let other = check_unchanged("a:1", &before, &[held(0, 1, &[3, 2])]).unwrap_err();
        assert!(
            matches!(other, DispatchError::ContentDiffers { block: 1, .. }),
            "{other}"
        );
    }
}
