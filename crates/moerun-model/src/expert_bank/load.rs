//! Reading and packing: rows of gate and up, columns of down, of the blocks that are held.

use std::{
    num::NonZeroUsize,
    ops::Range,
    sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
};

use moerun_kernels::{FeedForward, PackError, PackedMatrix};
use moerun_types::{BlockRange, ExpertSlice, MoeConfig, Numerics};
use moerun_weights::{Checkpoint, MemoryNeed};

use crate::{ModelError, pack};

/// Packs the weights of every entry of `held`, on all cores; the result is in the order of `held`.
pub(super) fn load_all(
    checkpoint: &Checkpoint,
    moe: &MoeConfig,
    held: &[ExpertSlice],
    numerics: Numerics,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Vec<FeedForward>, ModelError> {
    let slice_bytes = |slice: &ExpertSlice| MemoryNeed::of_slice(checkpoint.config(), &numerics, slice.blocks);
    let total_bytes = held.iter().map(slice_bytes).sum();
    let mut done_bytes = 0;
    let mut loaded: Vec<Option<FeedForward>> = vec![None; held.len()];
    progress(done_bytes, total_bytes);

    let next = AtomicUsize::new(0);
    let threads = thread::available_parallelism()
        .map_or(1, NonZeroUsize::get)
        .min(held.len());
    thread::scope(|scope| {
        // As many as there are loaders: a slow `progress` holds them back instead of piling up weights here.
        let (sender, receiver) = mpsc::sync_channel(threads.max(1));
        for _ in 0..threads {
            let (sender, next) = (sender.clone(), &next);
            scope.spawn(move || {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(&slice) = held.get(index) else { return };
                    let packed = load_slice(checkpoint, moe, slice, numerics);
                    // Nobody listens any more once a slice has failed.
                    if sender.send((index, packed)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        for (index, packed) in receiver {
            loaded[index] = Some(packed?);
            done_bytes += slice_bytes(&held[index]);
            progress(done_bytes, total_bytes);
        }
        Ok::<_, ModelError>(())
    })?;
    Ok(loaded
        .into_iter()
        .map(|weights| weights.expect("every slice was loaded or an error returned"))
        .collect())
}

fn load_slice(
    checkpoint: &Checkpoint,
    moe: &MoeConfig,
    slice: ExpertSlice,
    numerics: Numerics,
) -> Result<FeedForward, ModelError> {
    let expert = checkpoint.expert(slice.layer, slice.expert)?;
    let held = columns(slice.blocks, moe, numerics);
    let named = |matrix: &'static str| {
        move |source: PackError| ModelError::PackExpert {
            layer: slice.layer,
            expert: slice.expert,
            matrix,
            source,
        }
    };
    let (format, down) = (numerics.format, &expert.down_proj);
    Ok(FeedForward {
        gate_proj: pack::rows(format, &expert.gate_proj, held.clone()).map_err(named("gate_proj"))?,
        up_proj: pack::rows(format, &expert.up_proj, held.clone()).map_err(named("up_proj"))?,
        down_proj: pack::part(format, down, 0..down.rows(), held.clone()).map_err(named("down_proj"))?,
        gate_bias: expert.gate_bias.map(|bias| bias[held.clone()].to_vec()),
        up_bias: expert.up_bias.map(|bias| bias[held.clone()].to_vec()),
        // A term of its own, owed by the holder of block 0.
        down_bias: expert.down_bias.filter(|_| slice.blocks.first == 0),
        activation: moe.activation,
    })
}

/// Elements of the intermediate dimension that `blocks` cover; the last block may be short.
fn columns(blocks: BlockRange, moe: &MoeConfig, numerics: Numerics) -> Range<usize> {
    let element = |block: u16| (usize::from(block) * numerics.combine_block).min(moe.intermediate);
    element(blocks.first)..element(blocks.end)
}

/// Bytes that one slice's weights and biases take.
pub(super) fn packed_bytes(weights: &FeedForward) -> u64 {
    let matrices = [&weights.gate_proj, &weights.up_proj, &weights.down_proj];
    let biases = [&weights.gate_bias, &weights.up_bias, &weights.down_bias];
    let bias_bytes = biases.into_iter().flatten().map(|bias| size_of_val(bias.as_slice()));
    (matrices.into_iter().map(PackedMatrix::bytes).sum::<usize>() + bias_bytes.sum::<usize>()) as u64
}
