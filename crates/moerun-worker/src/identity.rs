//! What a worker tells of itself: hashes of the model, and of every block it holds.

use moerun_proto::{HeldExpert, PROTOCOL_VERSION, WorkerIdentity};
use moerun_types::{ExpertSlice, Numerics};
use moerun_weights::{Checkpoint, WeightsError};

/// Hashes `slices` of `checkpoint`, block by block; `progress(done, total)` counts slices.
pub fn identify(
    checkpoint: &Checkpoint,
    slices: &[ExpertSlice],
    numerics: Numerics,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<WorkerIdentity, WeightsError> {
    let mut held = Vec::with_capacity(slices.len());
    for (index, &slice) in slices.iter().enumerate() {
        progress(index as u64, slices.len() as u64);
        let block_hashes =
            checkpoint.expert_block_hashes(slice.layer, slice.expert, slice.blocks, numerics.combine_block)?;
        held.push(HeldExpert { slice, block_hashes });
    }
    progress(slices.len() as u64, slices.len() as u64);
    Ok(WorkerIdentity {
        protocol_version: PROTOCOL_VERSION,
        build: env!("CARGO_PKG_VERSION").to_owned(),
        config_hash: checkpoint.config_hash(),
        expert_header_hash: checkpoint.expert_header_hash(),
        dense_header_hash: checkpoint.dense_header_hash(),
        router_hash: checkpoint.router_hash(),
        numerics_id: numerics.id(),
        held,
    })
}
