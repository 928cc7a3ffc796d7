//! Rows of gate and up, columns of down, of the blocks that are held: packed, mapped, or moved to huge pages.

use std::{
    num::NonZeroUsize,
    ops::Range,
    sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
};

use moerun_kernels::{FeedForward, PackedMatrix};
use moerun_types::{ExpertSlice, MoeConfig, Numerics};
use moerun_weights::{Checkpoint, MemoryNeed};

use crate::ModelError;

/// Loads the weights of every entry of `held`, on all cores; the result is in the order of `held`.
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

    let threads = thread::available_parallelism()
        .map_or(1, NonZeroUsize::get)
        .min(held.len());
    let runs = runs(held, &slice_bytes, total_bytes / (4 * threads.max(1) as u64));
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        // As many as there are loaders: a slow `progress` holds them back instead of piling up weights here.
        let (sender, receiver) = mpsc::sync_channel(threads.max(1));
        for _ in 0..threads {
            let (sender, next, runs) = (sender.clone(), &next, &runs);
            scope.spawn(move || {
                loop {
                    let Some(run) = runs.get(next.fetch_add(1, Ordering::Relaxed)) else {
                        return;
                    };
                    let loaded = load_run(checkpoint, moe, &held[run.clone()], numerics);
                    // Nobody listens any more once a slice has failed.
                    if sender.send((run.clone(), loaded)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        for (run, weights) in receiver {
            for (index, weights) in run.zip(weights?) {
                loaded[index] = Some(weights);
                done_bytes += slice_bytes(&held[index]);
                progress(done_bytes, total_bytes);
            }
        }
        Ok::<_, ModelError>(())
    })?;
    Ok(loaded
        .into_iter()
        .map(|weights| weights.expect("every slice was loaded or an error returned"))
        .collect())
}

/// Most weights that are loaded before they are moved together, unless a single slice has more: on huge pages of 2 MiB
/// the last one is then mostly used, and what is held twice meanwhile is little.
const MAX_RUN_BYTES: u64 = 64 << 20;

/// Runs of slices of about `bytes` each, at most [`MAX_RUN_BYTES`]: one thread loads one run, in the order of the files.
fn runs(held: &[ExpertSlice], slice_bytes: &dyn Fn(&ExpertSlice) -> u64, bytes: u64) -> Vec<Range<usize>> {
    let bytes = bytes.min(MAX_RUN_BYTES);
    let (mut runs, mut start, mut sum) = (Vec::new(), 0, 0);
    for (index, slice) in held.iter().enumerate() {
        let added = slice_bytes(slice);
        if index > start && sum + added > bytes {
            runs.push(start..index);
            (start, sum) = (index, 0);
        }
        sum += added;
    }
    if start < held.len() {
        runs.push(start..held.len());
    }
    runs
}

/// Loads slices, and moves what this process holds itself into one piece of memory.
fn load_run(
    checkpoint: &Checkpoint,
    moe: &MoeConfig,
    slices: &[ExpertSlice],
    numerics: Numerics,
) -> Result<Vec<FeedForward>, ModelError> {
    let load = |slice: &ExpertSlice| {
        checkpoint.load_expert(
            slice.layer,
            slice.expert,
            numerics.format,
            numerics.columns(slice.blocks, moe.intermediate),
        )
    };
    let mut loaded = slices.iter().map(load).collect::<Result<Vec<_>, _>>()?;
    let mut owned: Vec<&mut PackedMatrix> = loaded
        .iter_mut()
        .flat_map(|weights| [&mut weights.gate_proj, &mut weights.up_proj, &mut weights.down_proj])
        .filter(|matrix| !(checkpoint.is_mapped() && matrix.is_mapped()))
        .collect();
    if !owned.is_empty() {
        checkpoint.gather(&mut owned)?;
    }
    Ok(loaded)
}

/// Bytes that one slice's weights and biases take.
pub(super) fn packed_bytes(weights: &FeedForward) -> u64 {
    let matrices = [&weights.gate_proj, &weights.up_proj, &weights.down_proj];
    let biases = [&weights.gate_bias, &weights.up_bias, &weights.down_bias];
    let bias_bytes = biases.into_iter().flatten().map(|bias| size_of_val(bias.as_slice()));
    (matrices.into_iter().map(PackedMatrix::bytes).sum::<usize>() + bias_bytes.sum::<usize>()) as u64
}
