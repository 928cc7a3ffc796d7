//! A random-weight checkpoint of a real shape, for benchmarks and load tests without downloads.
//!
//! The files are written into a sibling directory, `OUT.partial`, and get their name only when all of them are on the
//! disk; on any error that directory is removed. Weights are made piece by piece: memory does not grow with the model.

mod config;
mod element;
mod packed;
mod random;
mod shards;
mod tokenizer;

use std::{
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
};

use moerun_types::{ConfigError, ModelConfig, NumberFormat};

use crate::{
    ParameterCounts, WriteError, expected_tensors,
    packed::{PackedPlan, Writing as PackedWriting, packed_tensors},
    staging::{FreeSpace, REAL_SPACE, Staging, check_room, stop_if_interrupted},
};
use element::Element;
use shards::{PlannedTensor, ShardPlan, Writing};
use tokenizer::TextFile;

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
    /// How weights are stored: plain tensors in f32 or bf16, a packed checkpoint in the quantised formats.
    pub dtype: NumberFormat,
    /// Directory to make; it must not exist, its parent must.
    pub out: &'a Path,
    /// Largest shard; usually [`DEFAULT_SHARD_BYTES`].
    pub max_shard_bytes: u64,
    /// Told of bytes as they are written.
    pub progress: Option<&'a (dyn Fn(SynthesizeProgress) + Sync)>,
    /// Becomes true when the work shall stop as interrupted.
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
    /// The checkpoint could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// Makes a checkpoint: config, tokenizer with chat template, generation config, weights.
///
/// # Errors
/// Whatever the error, nothing is left on the disk and an existing `out` is as it was. Free space is checked before
/// anything is written.
pub fn synthesize(request: &SynthesizeRequest<'_>) -> Result<SynthesizeReport, SynthesizeError> {
    synthesize_with_space(request, REAL_SPACE)
}

/// As [`synthesize`], with another free space.
fn synthesize_with_space(
    request: &SynthesizeRequest<'_>,
    free_space: FreeSpace<'_>,
) -> Result<SynthesizeReport, SynthesizeError> {
    match Element::of(request.dtype) {
        Some(dtype) => synthesize_plain(request, dtype, free_space),
        None => synthesize_packed(request, free_space),
    }
}

/// Tensors of elements, as models are released.
fn synthesize_plain(
    request: &SynthesizeRequest<'_>,
    dtype: Element,
    free_space: FreeSpace<'_>,
) -> Result<SynthesizeReport, SynthesizeError> {
    let (config, config_json) = config::prepare(request.config_json, request.layers, dtype)?;
    let text_files = tokenizer::files(&config)?;
    let plans = shards::split(planned_tensors(&config), dtype, request.max_shard_bytes);
    let weight_bytes: u64 = plans.iter().map(|plan| plan.data_bytes).sum();
    let header_bytes: usize = plans.iter().map(|plan| plan.header.len()).sum();
    // The index repeats the names of the headers.
    let text_bytes = text_bytes(&config_json, &text_files) + 2 * header_bytes as u64;
    check_room(request.out, weight_bytes + text_bytes, free_space)?;

    let staging = stage(request, &config_json, &text_files)?;
    write_weights(&staging, request, dtype, &plans, weight_bytes)?;
    stop_if_interrupted(request.interrupted)?;
    staging.publish(request.out)?;
    Ok(report(request, dtype, &config, &plans, weight_bytes))
}

/// Blocks of codes, packed as they are held.
fn synthesize_packed(
    request: &SynthesizeRequest<'_>,
    free_space: FreeSpace<'_>,
) -> Result<SynthesizeReport, SynthesizeError> {
    let (seed, format) = (request.seed, request.dtype);
    let (config, config_json) = config::prepare(request.config_json, request.layers, Element::Bf16)?;
    let text_files = tokenizer::files(&config)?;
    let tensors = packed_tensors(&config, format);
    let count = tensors.len();
    let plan = PackedPlan::new(
        tensors,
        &packed::metadata(&config_json, seed, format),
        request.max_shard_bytes,
    );
    let text_bytes = text_bytes(&config_json, &text_files);
    check_room(request.out, plan.file_bytes() + text_bytes, free_space)?;

    let staging = stage(request, &config_json, &text_files)?;
    let progress = |written_bytes, total_bytes| {
        if let Some(progress) = request.progress {
            progress(SynthesizeProgress {
                written_bytes,
                total_bytes,
            });
        }
    };
    let writing = PackedWriting {
        progress: Some(&progress),
        interrupted: request.interrupted,
    };
    plan.write(&staging, &writing, &|tensor| {
        packed::make(&config, format, seed, tensor)
    })?;
    stop_if_interrupted(request.interrupted)?;
    staging.publish(request.out)?;
    Ok(SynthesizeReport {
        dir: request.out.to_owned(),
        layers: config.layers.len(),
        tensors: count,
        parameters: ParameterCounts::of(&config).total,
        weight_bytes: plan.data_bytes,
        shards: plan.num_files(),
    })
}

fn text_bytes(config_json: &str, text_files: &[TextFile]) -> u64 {
    (config_json.len() + text_files.iter().map(|file| file.text.len()).sum::<usize>()) as u64
}

/// The directory with everything but the weights.
fn stage(
    request: &SynthesizeRequest<'_>,
    config_json: &str,
    text_files: &[TextFile],
) -> Result<Staging, SynthesizeError> {
    let staging = Staging::create(request.out)?;
    staging.write("config.json", config_json.as_bytes())?;
    for file in text_files {
        staging.write(file.name, file.text.as_bytes())?;
    }
    Ok(staging)
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
    if let Some(index) = shards::index(plans) {
        staging.write("model.safetensors.index.json", index.as_bytes())?;
    }
    Ok(())
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
