//! The files of a packed checkpoint: tensors are made by all threads and written in their order.

use std::{
    fs::File,
    io::{self, Write},
    path::Path,
    sync::{
        Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
};

use moerun_kernels::PackedMatrix;
use serde_json::{Map, Value, json};

use super::{
    form::ALIGNMENT,
    metadata::PackedMetadata,
    tensors::{Content, PackedTensor},
};
use crate::{
    header::METADATA,
    index::{PACKED_INDEX, PACKED_SINGLE},
    staging::{Staging, WriteError, stop_if_interrupted},
};

/// Something to be written, filled up to the next border.
pub(crate) enum Piece {
    Matrix(PackedMatrix),
    Bytes(Vec<u8>),
}

impl Piece {
    /// Values of a vector.
    pub(crate) fn of_values(values: &[f32]) -> Self {
        Piece::Bytes(values.iter().flat_map(|value| value.to_le_bytes()).collect())
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Piece::Matrix(matrix) => matrix.as_bytes(),
            Piece::Bytes(bytes) => bytes,
        }
    }
}

/// The files to be written.
pub(crate) struct PackedPlan {
    files: Vec<PlannedFile>,
    /// Bytes of all tensors.
    pub(crate) data_bytes: u64,
}

struct PlannedFile {
    name: String,
    /// Length and JSON of the header, as they are written.
    header: Vec<u8>,
    tensors: Vec<PackedTensor>,
}

/// How files are written.
pub(crate) struct Writing<'a> {
    /// Told of bytes of tensors written and in all.
    pub(crate) progress: Option<&'a (dyn Fn(u64, u64) + Sync)>,
    pub(crate) interrupted: Option<&'a AtomicBool>,
}

impl PackedPlan {
    /// Puts tensors into files in their order; a file is closed when the next tensor would exceed `max_shard_bytes`, and
    /// before the first expert, so that a gateway's or a worker's copy may lack whole files.
    pub(crate) fn new(tensors: Vec<PackedTensor>, metadata: &PackedMetadata, max_shard_bytes: u64) -> Self {
        let data_bytes = tensors.iter().map(|tensor| tensor.bytes).sum();
        let is_dense = |tensor: &PackedTensor| matches!(tensor.content, Content::Dense(_));
        let mut groups: Vec<(Vec<PackedTensor>, u64)> = Vec::new();
        for tensor in tensors {
            match groups.last_mut() {
                Some((group, size))
                    if *size + tensor.bytes <= max_shard_bytes
                        && group.last().is_some_and(|last| is_dense(last) == is_dense(&tensor)) =>
                {
                    *size += tensor.bytes;
                    group.push(tensor);
                }
                _ => groups.push((vec![tensor.clone()], tensor.bytes)),
            }
        }
        let count = groups.len();
        let files = groups
            .into_iter()
            .enumerate()
            .map(|(index, (tensors, _))| PlannedFile {
                name: match count {
                    1 => PACKED_SINGLE.to_owned(),
                    _ => format!("packed-{:05}-of-{count:05}.safetensors", index + 1),
                },
                header: header(&tensors, metadata),
                tensors,
            })
            .collect();
        PackedPlan { files, data_bytes }
    }

    /// Files with weights.
    pub(crate) fn num_files(&self) -> usize {
        self.files.len()
    }

    /// Bytes of all files, the index included.
    pub(crate) fn file_bytes(&self) -> u64 {
        let headers: usize = self.files.iter().map(|file| file.header.len()).sum();
        self.data_bytes + headers as u64 + self.index().map_or(0, |index| index.len() as u64)
    }

    fn index(&self) -> Option<String> {
        if self.files.len() < 2 {
            return None;
        }
        let weight_map: Map<String, Value> = self
            .files
            .iter()
            .flat_map(|file| {
                file.tensors
                    .iter()
                    .map(|tensor| (tensor.name.clone(), json!(file.name)))
            })
            .collect();
        Some(format!(
            "{:#}\n",
            json!({ "metadata": { "total_size": self.data_bytes }, "weight_map": weight_map })
        ))
    }

    /// Writes all files, down to the disk. `make` is called on several threads at once; for [`Content::Hashes`] only when
    /// everything before it is written. Memory: what `make` gives, once per thread.
    pub(crate) fn write<E: From<WriteError> + Send>(
        &self,
        staging: &Staging,
        writing: &Writing<'_>,
        make: &(dyn Fn(&PackedTensor) -> Result<Vec<Piece>, E> + Sync),
    ) -> Result<(), E> {
        let mut before_bytes = 0;
        for file in &self.files {
            let progress = |bytes| {
                if let Some(progress) = writing.progress {
                    progress(before_bytes + bytes, self.data_bytes);
                }
            };
            let path = staging.path().join(&file.name);
            let created = File::create_new(&path).map_err(WriteError::io(&path))?;
            write_file(created, &path, file, writing.interrupted, &progress, make)?;
            before_bytes += file.tensors.iter().map(|tensor| tensor.bytes).sum::<u64>();
        }
        if let Some(index) = self.index() {
            staging.write(PACKED_INDEX, index.as_bytes())?;
        }
        Ok(())
    }
}

fn header(tensors: &[PackedTensor], metadata: &PackedMetadata) -> Vec<u8> {
    const LENGTH_BYTES: usize = 8;
    let mut entries = Map::new();
    entries.insert(METADATA.to_owned(), metadata.to_json());
    let mut start = 0;
    for PackedTensor { name, bytes, .. } in tensors {
        let entry = json!({ "dtype": "U8", "shape": [bytes], "data_offsets": [start, start + bytes] });
        entries.insert(name.clone(), entry);
        start += bytes;
    }
    let mut text = Value::Object(entries).to_string();
    // Spaces until the data is aligned in the file, and so in its mapping.
    let end = (LENGTH_BYTES + text.len()).next_multiple_of(ALIGNMENT as usize);
    text.extend(std::iter::repeat_n(' ', end - LENGTH_BYTES - text.len()));
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.extend_from_slice(text.as_bytes());
    header
}

/// Whose turn it is to write, and why nobody's any more.
struct Turn<E> {
    file: File,
    next: usize,
    written_bytes: u64,
    stopped: bool,
    error: Option<E>,
}

struct Turns<E> {
    turn: Mutex<Turn<E>>,
    changed: Condvar,
}

impl<E> Turns<E> {
    fn lock(&self) -> MutexGuard<'_, Turn<E>> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until everything before `index` is written; `None` if the work was stopped.
    fn wait(&self, index: usize) -> Option<MutexGuard<'_, Turn<E>>> {
        let turn = self.lock();
        let turn = self
            .changed
            .wait_while(turn, |turn| turn.next != index && !turn.stopped)
            .unwrap_or_else(PoisonError::into_inner);
        (!turn.stopped).then_some(turn)
    }

    fn stop(&self, error: Option<E>) {
        let mut turn = self.lock();
        turn.stopped = true;
        if turn.error.is_none() {
            turn.error = error;
        }
        self.changed.notify_all();
    }
}

/// Stops the others if its thread panics.
struct StopOnPanic<'a, E>(&'a Turns<E>);

impl<E> Drop for StopOnPanic<'_, E> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.stop(None);
        }
    }
}

fn write_file<E: From<WriteError> + Send>(
    mut file: File,
    path: &Path,
    planned: &PlannedFile,
    interrupted: Option<&AtomicBool>,
    progress: &(dyn Fn(u64) + Sync),
    make: &(dyn Fn(&PackedTensor) -> Result<Vec<Piece>, E> + Sync),
) -> Result<(), E> {
    let failed = |error: io::Error| E::from(WriteError::io(path)(error));
    file.write_all(&planned.header).map_err(failed)?;
    let turns = Turns {
        turn: Mutex::new(Turn {
            file,
            next: 0,
            written_bytes: 0,
            stopped: false,
            error: None,
        }),
        changed: Condvar::new(),
    };
    let next = AtomicUsize::new(0);
    let work = || {
        let _stop = StopOnPanic(&turns);
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(tensor) = planned.tensors.get(index) else {
                return;
            };
            if matches!(tensor.content, Content::Hashes { .. }) && turns.wait(index).is_none() {
                return;
            }
            let made = stop_if_interrupted(interrupted)
                .map_err(E::from)
                .and_then(|()| make(tensor));
            let pieces = match made {
                Ok(pieces) => pieces,
                Err(error) => return turns.stop(Some(error)),
            };
            let Some(mut turn) = turns.wait(index) else { return };
            if let Err(error) = write_pieces(&mut turn.file, tensor, &pieces) {
                drop(turn);
                return turns.stop(Some(failed(error)));
            }
            turn.next += 1;
            turn.written_bytes += tensor.bytes;
            progress(turn.written_bytes);
            turns.changed.notify_all();
        }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..threads.min(planned.tensors.len()) {
            scope.spawn(work);
        }
    });
    let turn = turns.turn.into_inner().unwrap_or_else(PoisonError::into_inner);
    match turn.error {
        Some(error) => Err(error),
        None => turn.file.sync_all().map_err(failed),
    }
}

fn write_pieces(file: &mut File, tensor: &PackedTensor, pieces: &[Piece]) -> io::Result<()> {
    let mut written = 0;
    for piece in pieces {
        let bytes = piece.bytes();
        let padding = bytes.len().next_multiple_of(ALIGNMENT as usize) - bytes.len();
        file.write_all(bytes)?;
        file.write_all(&[0; ALIGNMENT as usize][..padding])?;
        written += (bytes.len() + padding) as u64;
    }
    assert_eq!(written, tensor.bytes, "bytes of {} as they were planned", tensor.name);
    Ok(())
}

#[cfg(test)]
mod tests {
    use moerun_types::{LayerId, NumberFormat};

    use super::*;
    use crate::TensorRole;

    fn plan(tensors: usize) -> PackedPlan {
        let metadata = PackedMetadata {
            format: NumberFormat::Int8,
            expert_header_hash: None,
            dense_header_hash: None,
            router_hash: None,
        };
        let tensor = |index: usize| PackedTensor {
            name: format!("tensor {index}"),
            bytes: 1 << 20,
            content: Content::Dense(TensorRole::Layer(LayerId(index as u32), crate::LayerTensor::QProj)),
        };
        PackedPlan::new((0..tensors).map(tensor).collect(), &metadata, u64::MAX)
    }

    fn write_to(
        file: File,
        make: &(dyn Fn(&PackedTensor) -> Result<Vec<Piece>, WriteError> + Sync),
    ) -> Result<(), WriteError> {
        write_file(file, Path::new("shard"), &plan(20).files[0], None, &|_| {}, make)
    }

    #[test]
    fn a_full_device_is_reported_by_the_file() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let error = write_to(full, &|_| Ok(vec![Piece::Bytes(vec![1; 1 << 20])])).unwrap_err();
        assert!(error.to_string().starts_with("shard: No space left"), "{error}");
    }

    #[test]
    fn an_error_of_one_tensor_ends_the_work_of_all_threads() {
        let file = tempfile::tempfile().unwrap();
        let error = write_to(file, &|tensor| match tensor.name.as_str() {
            "tensor 7" => Err(WriteError::Interrupted),
            _ => Ok(vec![Piece::Bytes(vec![1; 1 << 20])]),
        });
        assert!(matches!(error, Err(WriteError::Interrupted)));
    }

    #[test]
    fn a_panic_in_one_thread_is_passed_on_and_stops_the_others() {
        let file = tempfile::tempfile().unwrap();
        let outcome = std::panic::catch_unwind(|| {
            write_to(file, &|tensor| {
                assert_ne!(tensor.name, "tensor 5", "a panic that is wanted");
                Ok(vec![Piece::Bytes(vec![1; 1 << 20])])
            })
        });
        assert!(outcome.is_err());
    }

    #[test]
    fn tensors_stand_in_their_order_however_long_each_takes() {
        use std::io::{Read, Seek};
        let mut file = tempfile::tempfile().unwrap();
        write_to(file.try_clone().unwrap(), &|tensor| {
            let index: u8 = tensor.name["tensor ".len()..].parse().unwrap();
            thread::sleep(std::time::Duration::from_millis(u64::from(index % 3)));
            // Short: the rest is filled up.
            Ok(vec![Piece::Bytes(vec![index; (1 << 20) - 5])])
        })
        .unwrap();
        let mut bytes = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut bytes).unwrap();
        let data = &bytes[plan(20).files[0].header.len()..];
        for (index, tensor) in data.chunks(1 << 20).enumerate() {
            let (content, padding) = tensor.split_at((1 << 20) - 5);
            assert!(content.iter().all(|&byte| byte == index as u8) && padding == [0; 5]);
        }
    }
}
