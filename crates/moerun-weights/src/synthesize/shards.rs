//! Tensors spread over files of bounded size, and each file written as its elements are made.

use std::{
    fs::File,
    io::{self, Write},
    path::Path,
    sync::{
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc::{Receiver, sync_channel},
    },
    thread,
};

use serde_json::{Map, Value, json};

use crate::staging::{WriteError, stop_if_interrupted};

use super::{
    element::Element,
    random::{ELEMENTS_PER_NUMBER, TensorValues},
};

/// Elements made at once by one thread: a few milliseconds of work.
const PIECE_ELEMENTS: usize = 1 << 21;
const _: () = assert!(PIECE_ELEMENTS.is_multiple_of(ELEMENTS_PER_NUMBER));

/// A tensor to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PlannedTensor {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
}

impl PlannedTensor {
    fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// One file to be written.
#[derive(Debug)]
pub(super) struct ShardPlan {
    pub(super) file: String,
    pub(super) tensors: Vec<PlannedTensor>,
    /// Length and JSON of the header, as they are written.
    pub(super) header: Vec<u8>,
    pub(super) data_bytes: u64,
}

/// How a file is to be written.
pub(super) struct Writing<'a> {
    pub(super) seed: u64,
    pub(super) dtype: Element,
    /// Told how many bytes of data are in the file.
    pub(super) progress: &'a (dyn Fn(u64) + Sync),
    pub(super) interrupted: Option<&'a AtomicBool>,
}

/// Part of a tensor.
#[derive(Debug, Clone, Copy)]
struct Piece {
    tensor: usize,
    first: usize,
    elements: usize,
}

/// Puts tensors into files in their order; a file is closed when the next tensor would exceed `max_shard_bytes`.
pub(super) fn split(tensors: Vec<PlannedTensor>, dtype: Element, max_shard_bytes: u64) -> Vec<ShardPlan> {
    let bytes = |tensor: &PlannedTensor| (tensor.elements() * dtype.bytes()) as u64;
    let mut groups: Vec<(Vec<PlannedTensor>, u64)> = Vec::new();
    for tensor in tensors {
        let added = bytes(&tensor);
        match groups.last_mut() {
            Some((group, size)) if *size + added <= max_shard_bytes => {
                group.push(tensor);
                *size += added;
            }
            _ => groups.push((vec![tensor], added)),
        }
    }
    let count = groups.len();
    let file = |i: usize| match count {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
    };
    groups
        .into_iter()
        .enumerate()
        .map(|(i, (tensors, data_bytes))| ShardPlan {
            file: file(i),
            header: header(&tensors, dtype),
            tensors,
            data_bytes,
        })
        .collect()
}

/// `model.safetensors.index.json`, if there is more than one file.
pub(super) fn index(plans: &[ShardPlan]) -> Option<String> {
    if plans.len() < 2 {
        return None;
    }
    let total_size: u64 = plans.iter().map(|plan| plan.data_bytes).sum();
    let weight_map: Map<String, Value> = plans
        .iter()
        .flat_map(|plan| {
            plan.tensors
                .iter()
                .map(|tensor| (tensor.name.clone(), json!(plan.file)))
        })
        .collect();
    Some(format!(
        "{:#}\n",
        json!({ "metadata": { "total_size": total_size }, "weight_map": weight_map })
    ))
}

fn header(tensors: &[PlannedTensor], dtype: Element) -> Vec<u8> {
    let name = match dtype {
        Element::F32 => "F32",
        Element::Bf16 => "BF16",
    };
    let mut entries = Map::new();
    entries.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut start = 0;
    for tensor in tensors {
        let end = start + tensor.elements() * dtype.bytes();
        let entry = json!({ "dtype": name, "shape": tensor.shape, "data_offsets": [start, end] });
        entries.insert(tensor.name.clone(), entry);
        start = end;
    }
    let mut text = Value::Object(entries).to_string();
    // Spaces until the data is aligned, as the format's own writer does.
    text.extend(std::iter::repeat_n(' ', text.len().next_multiple_of(8) - text.len()));
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.extend_from_slice(text.as_bytes());
    header
}

/// Makes and writes one file, down to the disk.
pub(super) fn write(path: &Path, plan: &ShardPlan, writing: &Writing<'_>) -> Result<(), WriteError> {
    let mut file = File::create_new(path).map_err(WriteError::io(path))?;
    file.write_all(&plan.header).map_err(WriteError::io(path))?;
    write_data(file, path, plan, writing)
}

/// All threads make pieces while one writes those that are done.
pub(super) fn write_data(file: File, path: &Path, plan: &ShardPlan, writing: &Writing<'_>) -> Result<(), WriteError> {
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let values: Vec<TensorValues> = plan
        .tensors
        .iter()
        .map(|tensor| TensorValues::new(writing.seed, &tensor.name, writing.dtype))
        .collect();
    let pieces = pieces(&plan.tensors);
    thread::scope(|scope| {
        // One batch may wait while the next is made: memory stays at a few pieces per thread.
        let (sender, receiver) = sync_channel::<Vec<u8>>(threads);
        let writer = scope.spawn(|| write_pieces(file, receiver, writing.progress));
        let mut outcome = Ok(());
        for batch in batches(&pieces, threads * PIECE_ELEMENTS) {
            outcome = stop_if_interrupted(writing.interrupted);
            if outcome.is_err() {
                break;
            }
            let made = make(batch, &values, writing.dtype, threads);
            // A send fails only if the writer has stopped; why, it says below.
            if made.into_iter().any(|piece| sender.send(piece).is_err()) {
                break;
            }
        }
        drop(sender);
        let written = writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        outcome.and(written.map_err(WriteError::io(path)))
    })
}

fn write_pieces(mut file: File, pieces: Receiver<Vec<u8>>, progress: &(dyn Fn(u64) + Sync)) -> io::Result<()> {
    let mut written_bytes = 0;
    for piece in pieces {
        file.write_all(&piece)?;
        written_bytes += piece.len() as u64;
        progress(written_bytes);
    }
    file.sync_all()
}

fn pieces(tensors: &[PlannedTensor]) -> Vec<Piece> {
    let of_tensor = |(tensor, elements): (usize, usize)| {
        (0..elements).step_by(PIECE_ELEMENTS).map(move |first| Piece {
            tensor,
            first,
            elements: PIECE_ELEMENTS.min(elements - first),
        })
    };
    tensors
        .iter()
        .map(PlannedTensor::elements)
        .enumerate()
        .flat_map(of_tensor)
        .collect()
}

/// Runs of pieces with about `elements` elements each: many small tensors are one batch.
fn batches(pieces: &[Piece], elements: usize) -> impl Iterator<Item = &[Piece]> {
    let mut rest = pieces;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let mut sum = 0;
        let taken = rest
            .iter()
            .take_while(|piece| {
                let fits = sum < elements;
                sum += piece.elements;
                fits
            })
            .count();
        let (batch, after) = rest.split_at(taken);
        rest = after;
        Some(batch)
    })
}

/// The bytes of each piece, in order; threads take the next piece as they become free.
fn make(batch: &[Piece], values: &[TensorValues], dtype: Element, threads: usize) -> Vec<Vec<u8>> {
    let next = AtomicUsize::new(0);
    let take_pieces = || {
        let mut made = Vec::new();
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some(piece) = batch.get(i) else { return made };
            let mut bytes = vec![0; piece.elements * dtype.bytes()];
            values[piece.tensor].fill(piece.first, &mut bytes);
            made.push((i, bytes));
        }
    };
    let mut made: Vec<(usize, Vec<u8>)> = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.min(batch.len()))
            .map(|_| scope.spawn(take_pieces))
            .collect();
        workers
            .into_iter()
            .flat_map(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    made.sort_unstable_by_key(|(i, _)| *i);
    made.into_iter().map(|(_, bytes)| bytes).collect()
}
