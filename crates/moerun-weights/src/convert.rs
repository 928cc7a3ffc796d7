//! Any checkpoint → a packed one.
//!
//! As with `synthesize` the files are written into `OUT.partial`, which gets its name when all of them are on the disk and
//! is removed on any error. Tensors are packed one by one and the source is mapped: memory does not grow with the model.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError, atomic::AtomicBool},
};

use moerun_kernels::FeedForward;
use moerun_types::NumberFormat;

use crate::{
    Checkpoint, DEFAULT_SHARD_BYTES, WeightsError,
    directory::{Directory, Found},
    gguf::{self, GgufFile},
    hashes::{HASH_BYTES, num_units},
    packed::{Content, PackedMetadata, PackedPlan, PackedTensor, Part, Piece, Writing, dense_parts, packed_tensors},
    staging::{FreeSpace, REAL_SPACE, Staging, WriteError, check_room, stop_if_interrupted},
};

/// Longest file that is taken over beside the weights; tokenizers of real checkpoints have up to 35 MB.
const MAX_TEXT_BYTES: u64 = 256 << 20;

/// What is to be packed.
#[derive(Clone, Copy)]
pub struct ConvertRequest<'a> {
    /// The original, with all its tensors.
    pub source: &'a Checkpoint,
    /// Format of the experts, and so of everything else, as a model is loaded in it.
    pub format: NumberFormat,
    /// Files to write beside the weights, besides those that a directory has already: what a GGUF file says of its
    /// tokenizer, for example. Names are plain.
    pub files: &'a [(String, String)],
    /// Directory to make; it must not exist, its parent must.
    pub out: &'a Path,
    /// Largest file of weights; usually [`DEFAULT_SHARD_BYTES`].
    pub max_shard_bytes: u64,
    /// Told of bytes of weights written and in all.
    pub progress: Option<&'a (dyn Fn(u64, u64) + Sync)>,
    /// Becomes true when the work shall stop with [`WriteError::Interrupted`].
    pub interrupted: Option<&'a AtomicBool>,
}

impl<'a> ConvertRequest<'a> {
    /// Nothing beside what `source` has.
    pub fn new(source: &'a Checkpoint, format: NumberFormat, out: &'a Path) -> Self {
        ConvertRequest {
            source,
            format,
            files: &[],
            out,
            max_shard_bytes: DEFAULT_SHARD_BYTES,
            progress: None,
            interrupted: None,
        }
    }
}

/// What was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConvertReport {
    /// The directory.
    pub dir: PathBuf,
    /// Format of the experts.
    pub format: NumberFormat,
    /// Tensors.
    pub tensors: usize,
    /// Bytes of all tensors.
    pub weight_bytes: u64,
    /// Weight files.
    pub shards: usize,
}

/// Why nothing was packed; nothing is left on the disk.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// The source could not be read, lacks a tensor, or has a value that the format cannot hold.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The source is packed: its elements are gone.
    #[error("{dir} is packed in {stored} already: wanted the checkpoint that it was made from")]
    Packed {
        /// The source.
        dir: PathBuf,
        /// Its format.
        stored: NumberFormat,
    },
    /// The files could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// Packs a checkpoint: what it loads as, written to files that are mapped at every start.
///
/// # Errors
/// Whatever the error, nothing is left on the disk and an existing `out` is as it was. Free space is checked before
/// anything is written.
pub fn convert(request: &ConvertRequest<'_>) -> Result<ConvertReport, ConvertError> {
    convert_with_space(request, REAL_SPACE)
}

/// As [`convert`], with another free space.
fn convert_with_space(request: &ConvertRequest<'_>, free_space: FreeSpace<'_>) -> Result<ConvertReport, ConvertError> {
    let ConvertRequest { source, format, .. } = *request;
    if let Some(stored) = source.packed_format() {
        let dir = source.dir().to_owned();
        return Err(ConvertError::Packed { dir, stored });
    }
    let tensors = packed_tensors(source.config(), format);
    let count = tensors.len();
    let metadata = PackedMetadata {
        format,
        expert_header_hash: source.expert_header_hash(),
        dense_header_hash: source.dense_header_hash(),
        router_hash: source.router_hash(),
    };
    let plan = PackedPlan::new(tensors, &metadata, request.max_shard_bytes);
    let files = [taken_over(source)?, own_files(request)].concat();
    let file_bytes: u64 = files.iter().map(|(_, content)| content.len() as u64).sum();
    check_room(request.out, plan.file_bytes() + file_bytes, free_space)?;

    let staging = Staging::create(request.out)?;
    for (name, content) in &files {
        staging.write(name, content)?;
    }
    let hashes = Mutex::new(empty_hashes(source));
    let writing = Writing {
        progress: request.progress,
        interrupted: request.interrupted,
    };
    plan.write(&staging, &writing, &|tensor| make(source, format, tensor, &hashes))?;
    stop_if_interrupted(request.interrupted)?;
    staging.publish(request.out)?;
    Ok(ConvertReport {
        dir: request.out.to_owned(),
        format,
        tensors: count,
        weight_bytes: plan.data_bytes,
        shards: plan.num_files(),
    })
}

fn empty_hashes(source: &Checkpoint) -> Vec<u8> {
    let config = source.config();
    let of_layer = |moe: &moerun_types::MoeConfig| moe.num_experts * num_units(moe.intermediate) * HASH_BYTES;
    vec![0; config.moe.as_ref().map_or(0, of_layer) * config.moe_layers().len()]
}

/// What one tensor holds. The hashes of an expert are taken while its elements are at hand.
fn make(
    source: &Checkpoint,
    format: NumberFormat,
    tensor: &PackedTensor,
    hashes: &Mutex<Vec<u8>>,
) -> Result<Vec<Piece>, ConvertError> {
    let config = source.config();
    let all_hashes = || hashes.lock().unwrap_or_else(PoisonError::into_inner);
    match tensor.content {
        Content::Dense(role) => {
            let (_, shape) = source.dense.get(&role).ok_or(WeightsError::NoTensor { role })?;
            if let [Part::Vector { len }] = dense_parts(config, role, shape, format)[..] {
                let values = source.vector(role)?;
                assert_eq!(values.len(), len, "values of {role:?}");
                return Ok(vec![Piece::of_values(&values)]);
            }
            let matrices = source.load_matrices(role, format)?;
            Ok(matrices.into_iter().map(Piece::Matrix).collect())
        }
        Content::Expert { layer, expert, index } => {
            let Some(moe) = &config.moe else {
                return Err(WeightsError::NoExpert { layer, expert }.into());
            };
            let units = source.expert_unit_hashes(layer, expert)?;
            let bytes = units.as_flattened();
            all_hashes()[index * bytes.len()..][..bytes.len()].copy_from_slice(bytes);
            let FeedForward {
                gate_proj,
                up_proj,
                down_proj,
                gate_bias,
                up_bias,
                down_bias,
                activation: _,
            } = source.load_expert(layer, expert, format, 0..moe.intermediate)?;
            let matrices = [gate_proj, up_proj, down_proj].map(Piece::Matrix);
            let biases = [gate_bias, up_bias, down_bias].into_iter().flatten();
            Ok(matrices
                .into_iter()
                .chain(biases.map(|bias| Piece::of_values(&bias)))
                .collect())
        }
        Content::Hashes { .. } => Ok(vec![Piece::Bytes(std::mem::take(&mut *all_hashes()))]),
    }
}

type NamedFile = (String, Vec<u8>);

fn own_files(request: &ConvertRequest<'_>) -> Vec<NamedFile> {
    let owned = |(name, text): &(String, String)| (name.clone(), text.clone().into_bytes());
    request.files.iter().map(owned).collect()
}

/// The files of the source that are no weights: config, tokenizer, chat template, licence. Of a GGUF file the config that
/// its metadata says.
fn taken_over(source: &Checkpoint) -> Result<Vec<NamedFile>, ConvertError> {
    let dir = source.dir();
    if dir.is_file() {
        let config = gguf::config_json(&GgufFile::open(dir)?)?;
        return Ok(vec![("config.json".to_owned(), config.into_bytes())]);
    }
    let directory = Directory::open(dir)?;
    let io_error = |source: io::Error| WeightsError::Io {
        path: dir.to_owned(),
        source,
    };
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(io_error)? {
        // A name that is not UTF-8 is none of a checkpoint.
        if let Ok(name) = entry.map_err(io_error)?.file_name().into_string()
            && is_taken_over(&name)
        {
            names.push(name);
        }
    }
    names.sort_unstable();
    let mut files = Vec::new();
    for name in names {
        // A directory of such a name is none of ours, and a link that leads out of the checkpoint is an error.
        if dir.join(&name).is_dir() {
            continue;
        }
        if let Found::File(path) = directory.find(&name)? {
            let path_error = |source| WeightsError::Io {
                path: path.clone(),
                source,
            };
            let found = path.metadata().map_err(path_error)?.len();
            if found > MAX_TEXT_BYTES {
                return Err(WeightsError::TooLong {
                    path: path.clone(),
                    found,
                    limit: MAX_TEXT_BYTES,
                }
                .into());
            }
            files.push((name, fs::read(&path).map_err(path_error)?));
        }
    }
    Ok(files)
}

fn is_taken_over(name: &str) -> bool {
    let texts = [".json", ".jinja", ".txt", ".model", ".tiktoken", ".md"];
    let is_text = texts.iter().any(|ending| name.ends_with(ending));
    !name.starts_with('.') && !name.ends_with(".index.json") && (is_text || name.starts_with("LICENSE"))
}

#[cfg(test)]
mod tests;
