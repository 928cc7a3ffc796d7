//! A random-weight checkpoint of a real shape, for benchmarks and load tests without downloads.
//!
//! The files are written into a sibling directory, `OUT.partial`, and get their name only when all of them are on the
//! disk; on any error that directory is removed. Weights are made piece by piece: memory does not grow with the model.

mod config;
mod element;
mod random;
mod shards;
mod space;
mod staging;
mod tokenizer;

use std::{
    io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use moerun_types::{ConfigError, ModelConfig, NumberFormat};

use crate::expected_tensors;
use element::Element;
use shards::{PlannedTensor, ShardPlan, Writing};
use staging::Staging;

/// Largest shard that is written unless a single tensor is larger.
pub const DEFAULT_SHARD_BYTES: u64 = 4 << 30;

/// What is to be made.
#[derive(Clone, Copy)]
pub struct SynthesizeRequest<'a> {
    /// Text of a `config.json`; what it says of number format and quantisation is replaced.
    pub config_json: &'a str,
    /// Layers to make, from the first on; `None` = all.
    pub layers: Option<usize>,
    /// Seed of the weights: one seed, shape and format give one checkpoint, byte for byte.
    pub seed: u64,
    /// How weights are stored: f32 or bf16.
    pub dtype: NumberFormat,
    /// Directory to make; it must not exist, its parent must.
    pub out: &'a Path,
    /// Largest shard; usually [`DEFAULT_SHARD_BYTES`].
    pub max_shard_bytes: u64,
    /// Told of bytes as they are written.
    pub progress: Option<&'a (dyn Fn(SynthesizeProgress) + Sync)>,
    /// Becomes true when the work shall stop with [`SynthesizeError::Interrupted`].
    pub interrupted: Option<&'a AtomicBool>,
}

impl<'a> SynthesizeRequest<'a> {
    /// All layers in bf16 with seed 0.
    pub fn new(config_json: &'a str, out: &'a Path) -> Self {
        SynthesizeRequest {
            config_json,
            layers: None,
            seed: 0,
            dtype: NumberFormat::Bf16,
            out,
            max_shard_bytes: DEFAULT_SHARD_BYTES,
            progress: None,
            interrupted: None,
        }
    }
}

/// How far the writing of weights has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SynthesizeProgress {
    /// Bytes of weights written.
    pub written_bytes: u64,
    /// Bytes of weights in all.
    pub total_bytes: u64,
}

/// What was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SynthesizeReport {
    /// The directory.
    pub dir: PathBuf,
    /// Layers.
    pub layers: usize,
    /// Tensors.
    pub tensors: usize,
    /// Elements of all tensors.
    pub parameters: u64,
    /// Bytes of all tensors.
    pub weight_bytes: u64,
    /// Weight files.
    pub shards: usize,
}

/// Why no checkpoint was made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SynthesizeError {
    /// The config was refused.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Weights of this format are not elements of a tensor.
    #[error("tensors of {found}: wanted f32 or bf16")]
    Format {
        /// What was asked for.
        found: NumberFormat,
    },
    /// More layers were asked for than the shape has, or none.
    #[error("wanted from 1 to {available} layers of this shape, found {wanted}")]
    Layers {
        /// Layers asked for.
        wanted: usize,
        /// Layers of the shape.
        available: usize,
    },
    /// The vocabulary cannot hold a byte-level tokenizer.
    #[error("a byte-level tokenizer for this config needs a vocabulary of at least {wanted}, found {found}")]
    Vocabulary {
        /// Tokens needed.
        wanted: usize,
        /// `vocab_size`.
        found: usize,
    },
    /// Something is where the checkpoint shall be.
    #[error("{path} exists already; nothing was changed")]
    Exists {
        /// What exists.
        path: PathBuf,
    },
    /// The path names no directory that could be made.
    #[error("{path}: wanted the path of a new directory")]
    OutPath {
        /// The path.
        path: PathBuf,
    },
    /// The disk is too full.
    #[error("{path}: {needed_bytes} bytes are needed, {available_bytes} are free")]
    NoSpace {
        /// Where the checkpoint would be.
        path: PathBuf,
        /// What it would take.
        needed_bytes: u64,
        /// What there is.
        available_bytes: u64,
    },
    /// A file could not be written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The work was told to stop.
    #[error("interrupted; nothing was kept")]
    Interrupted,
}

impl SynthesizeError {
    fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| SynthesizeError::Io {
            path: path.to_owned(),
            source,
        }
    }
}

/// Makes a checkpoint: config, tokenizer with chat template, generation config, weights.
///
/// # Errors
/// Whatever the error, nothing is left on the disk and an existing `out` is as it was. Free space is checked before
/// anything is written.
pub fn synthesize(request: &SynthesizeRequest<'_>) -> Result<SynthesizeReport, SynthesizeError> {
    synthesize_with_space(request, space::available_bytes)
}

/// As [`synthesize`], with the free space of a directory told by `available_bytes`.
fn synthesize_with_space(
    request: &SynthesizeRequest<'_>,
    available_bytes: impl FnOnce(&Path) -> io::Result<u64>,
) -> Result<SynthesizeReport, SynthesizeError> {
    let dtype = Element::of(request.dtype)?;
    let (config, config_json) = config::prepare(request.config_json, request.layers, dtype)?;
    let text_files = tokenizer::files(&config)?;
    let plans = shards::split(planned_tensors(&config), dtype, request.max_shard_bytes);
    let weight_bytes: u64 = plans.iter().map(|plan| plan.data_bytes).sum();

    staging::refuse_existing(request.out)?;
    let parent = staging::parent(request.out)?;
    let text_bytes: usize = config_json.len() + text_files.iter().map(|file| file.text.len()).sum::<usize>();
    let header_bytes: usize = plans.iter().map(|plan| plan.header.len()).sum();
    // The index repeats the names of the headers; a file system spends some blocks on directories and metadata too.
    let needed_bytes = weight_bytes + (text_bytes + 2 * header_bytes) as u64 + (1 << 20);
    let available_bytes = available_bytes(parent).map_err(SynthesizeError::io(parent))?;
    if available_bytes < needed_bytes {
        return Err(SynthesizeError::NoSpace {
            path: request.out.to_owned(),
            needed_bytes,
            available_bytes,
        });
    }

    let staging = Staging::create(request.out)?;
    staging.write("config.json", &config_json)?;
    for file in &text_files {
        staging.write(file.name, &file.text)?;
    }
    write_weights(&staging, request, dtype, &plans, weight_bytes)?;
    stop_if_interrupted(request.interrupted)?;
    staging.publish(request.out)?;
    Ok(report(request, dtype, &config, &plans, weight_bytes))
}

fn planned_tensors(config: &ModelConfig) -> Vec<PlannedTensor> {
    expected_tensors(config)
        .into_iter()
        .map(|tensor| PlannedTensor {
            name: tensor.name,
            shape: tensor.shape,
        })
        .collect()
}

fn write_weights(
    staging: &Staging,
    request: &SynthesizeRequest<'_>,
    dtype: Element,
    plans: &[ShardPlan],
    total_bytes: u64,
) -> Result<(), SynthesizeError> {
    let mut before_bytes = 0;
    for plan in plans {
        let progress = |shard_bytes| {
            if let Some(progress) = request.progress {
                progress(SynthesizeProgress {
                    written_bytes: before_bytes + shard_bytes,
                    total_bytes,
                });
            }
        };
        let writing = Writing {
            seed: request.seed,
            dtype,
            progress: &progress,
            interrupted: request.interrupted,
        };
        shards::write(&staging.path().join(&plan.file), plan, &writing)?;
        before_bytes += plan.data_bytes;
    }
    match shards::index(plans) {
        Some(index) => staging.write("model.safetensors.index.json", &index),
        None => Ok(()),
    }
}

fn stop_if_interrupted(interrupted: Option<&AtomicBool>) -> Result<(), SynthesizeError> {
    match interrupted {
        Some(flag) if flag.load(Ordering::Relaxed) => Err(SynthesizeError::Interrupted),
        _ => Ok(()),
    }
}

fn report(
    request: &SynthesizeRequest<'_>,
    dtype: Element,
    config: &ModelConfig,
    plans: &[ShardPlan],
    weight_bytes: u64,
) -> SynthesizeReport {
    SynthesizeReport {
        dir: request.out.to_owned(),
        layers: config.layers.len(),
        tensors: plans.iter().map(|plan| plan.tensors.len()).sum(),
        parameters: weight_bytes / dtype.bytes() as u64,
        weight_bytes,
        shards: plans.len(),
    }
}

#[cfg(test)]
mod tests;
