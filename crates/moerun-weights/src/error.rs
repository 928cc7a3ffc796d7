//! Why a checkpoint was refused.

use std::path::PathBuf;

use moerun_types::{ExpertId, LayerId};

use crate::{Dtype, TensorRole};

/// Why a checkpoint was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// A file could not be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// An expert that another process sent is none of this model.
    #[error("an expert that was sent: wanted {wanted}, found {found}")]
    Received {
        /// What was wanted.
        wanted: String,
        /// What came.
        found: String,
    },
    /// The config was refused.
    #[error(transparent)]
    Config(#[from] moerun_types::ConfigError),
    /// `generation_config.json` is no JSON object.
    #[error("generation_config.json: {reason}")]
    GenerationJson {
        /// What is wrong with it.
        reason: String,
    },
    /// A field of `generation_config.json` is of the wrong type or out of range.
    #[error("generation_config.json: {field}: wanted {wanted}, found {found}")]
    GenerationField {
        /// The field.
        field: &'static str,
        /// What it should hold.
        wanted: String,
        /// What it holds.
        found: String,
    },
    /// The directory holds no weights.
    #[error("{dir}: wanted model.safetensors, packed.safetensors, or the index of either, found none")]
    NoWeights {
        /// The directory.
        dir: PathBuf,
    },
    /// Weights are stored as pickle, which can run code when it is read.
    #[error("{path}: wanted safetensors, found a pickle or zip file, which is never read; convert the checkpoint")]
    Pickle {
        /// The file.
        path: PathBuf,
    },
    /// A shard's name is not a plain file name.
    #[error("shard {name:?} of the index: wanted a plain file name ending in .safetensors")]
    ShardName {
        /// What the index says.
        name: String,
    },
    /// A file is a link to somewhere outside the checkpoint.
    #[error("{path} links to {target}, outside the checkpoint's directory")]
    LeavesDirectory {
        /// The file.
        path: PathBuf,
        /// Where it leads.
        target: PathBuf,
    },
    /// A file is a directory, a pipe or a device.
    #[error("{path}: wanted a regular file")]
    NotAFile {
        /// The file.
        path: PathBuf,
    },
    /// A file is longer than anything of its kind.
    #[error("{path}: wanted at most {limit} bytes, found {found}")]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Its length.
        found: u64,
        /// The bound.
        limit: u64,
    },
    /// The index is no JSON of the right form.
    #[error("{path}: {reason}")]
    Index {
        /// The index.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The index names a shard that is not there.
    #[error("shard {shard:?}, which should hold tensor {tensor}, is not there")]
    MissingShard {
        /// File name.
        shard: String,
        /// The first tensor that should be in it.
        tensor: String,
    },
    /// The index and a shard disagree on where a tensor is.
    #[error("tensor {tensor}: the index says {wanted}, but it is in {found}")]
    Misplaced {
        /// The tensor.
        tensor: String,
        /// Where the index says it is.
        wanted: String,
        /// Where it is.
        found: String,
    },
    /// A file is shorter than its header says.
    #[error("{path} is truncated: wanted {wanted} bytes, found {found}")]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes that its header asks for.
        wanted: u64,
        /// Its length.
        found: u64,
    },
    /// The header of a safetensors file is too long to be one.
    #[error("{path}: wanted a header of at most {limit} bytes, found one of {found}")]
    HeaderTooLong {
        /// The file.
        path: PathBuf,
        /// Length that the file says.
        found: u64,
        /// The bound.
        limit: u64,
    },
    /// The header of a safetensors file is not of the form.
    #[error("{path}: header: {reason}")]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// One tensor's entry in a header is impossible.
    #[error("{path}: tensor {tensor}: wanted {wanted}, found {found}")]
    HeaderTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What would be possible.
        wanted: String,
        /// What the header says.
        found: String,
    },
    /// Something in a GGUF file is not as it must be.
    #[error("{path}: {what}: wanted {wanted}, found {found}")]
    Gguf {
        /// The file.
        path: PathBuf,
        /// The key, the tensor or the part of the header.
        what: String,
        /// What would be possible.
        wanted: String,
        /// What there is.
        found: String,
    },
    /// Two tensors of one name.
    #[error("tensor {tensor} is twice in the checkpoint: in {first} and in {second}")]
    Duplicate {
        /// The tensor.
        tensor: String,
        /// The first shard.
        first: String,
        /// The other one.
        second: String,
    },
    /// A tensor that the config asks for is not there.
    #[error("tensor {tensor} is missing: wanted {wanted:?}, found {found}")]
    Missing {
        /// The tensor.
        tensor: String,
        /// Its shape.
        wanted: Vec<usize>,
        /// Nothing, or the tensor of the most similar name that should not be there.
        found: String,
    },
    /// A tensor has another shape than the config says.
    #[error("tensor {tensor}: wanted shape {wanted:?}, found {found:?}")]
    Shape {
        /// The tensor.
        tensor: String,
        /// Shape by the config.
        wanted: Vec<usize>,
        /// Shape on disk.
        found: Vec<usize>,
    },
    /// A tensor has a type that it may not have.
    #[error("tensor {tensor}: wanted type {wanted}, found {found}")]
    Type {
        /// The tensor.
        tensor: String,
        /// Types that it may have.
        wanted: &'static str,
        /// Type on disk.
        found: String,
    },
    /// A tensor that the config does not ask for and that is no known extra of the family.
    #[error("tensor {tensor} in {shard} is unexpected: wanted nothing of that name, found {dtype} {shape:?}")]
    Unexpected {
        /// The tensor.
        tensor: String,
        /// File name.
        shard: String,
        /// Its type.
        dtype: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// Something was asked for that this model or checkpoint does not have.
    #[error("{role:?} is not in this checkpoint")]
    NoTensor {
        /// What was asked for.
        role: TensorRole,
    },
    /// A vector was asked for as a matrix or the other way round.
    #[error("{role:?}: wanted {wanted}, found shape {found:?}")]
    Rank {
        /// What was asked for.
        role: TensorRole,
        /// Matrix or vector.
        wanted: &'static str,
        /// Its shape.
        found: Vec<usize>,
    },
    /// An expert was asked for that this checkpoint does not have, or not whole.
    #[error("layer {layer} expert {expert} is not in this checkpoint")]
    NoExpert {
        /// Model layer.
        layer: LayerId,
        /// Expert.
        expert: ExpertId,
    },
    /// A packed checkpoint says of itself what cannot be.
    #[error("{path}: {what}: wanted {wanted}, found {found}")]
    Packed {
        /// The file.
        path: PathBuf,
        /// Which entry of its header.
        what: String,
        /// What would be possible.
        wanted: String,
        /// What there is.
        found: String,
    },
    /// A tensor of a packed checkpoint cannot be used where it is mapped.
    #[error("tensor {tensor}: wanted data at a multiple of {wanted} bytes of the file, found it at byte {found}")]
    Alignment {
        /// The tensor.
        tensor: String,
        /// The border.
        wanted: u64,
        /// Where it begins.
        found: u64,
    },
    /// A packed matrix cannot be used where it is mapped.
    #[error("{source}")]
    Mapped {
        /// Why.
        source: moerun_kernels::MappedError,
    },
    /// Packed weights are in one number format, and no other can be made of them.
    #[error(
        "{dir} is packed in {stored}, not in {wanted}: run it with --weights {stored}, or convert the original again with \
         --weights {wanted}"
    )]
    PackedFormat {
        /// The directory.
        dir: PathBuf,
        /// How it is packed.
        stored: moerun_types::NumberFormat,
        /// What was asked for.
        wanted: moerun_types::NumberFormat,
    },
    /// The elements of the original were asked of a packed checkpoint.
    #[error("{dir} is packed in {stored}: it has no elements as they were stored before")]
    IsPacked {
        /// The directory.
        dir: PathBuf,
        /// How it is packed.
        stored: moerun_types::NumberFormat,
    },
    /// Hashes of blocks that a packed checkpoint cannot tell.
    #[error(
        "{dir} is packed and has hashes for combine blocks of a multiple of {unit}, not for {combine_block}: use the \
         original, or another --combine-block"
    )]
    PackedHashes {
        /// The directory.
        dir: PathBuf,
        /// What a block must be a multiple of.
        unit: usize,
        /// What was asked for.
        combine_block: usize,
    },
    /// A tensor has a value that the number format cannot hold.
    #[error("{role:?}: {source}")]
    Pack {
        /// The tensor.
        role: TensorRole,
        /// Why.
        source: moerun_kernels::PackError,
    },
    /// An expert has a value that the number format cannot hold.
    #[error("{matrix} of layer {layer} expert {expert}: {source}")]
    PackExpert {
        /// Model layer.
        layer: LayerId,
        /// Expert.
        expert: ExpertId,
        /// `gate_proj`, `up_proj` or `down_proj`.
        matrix: &'static str,
        /// Why; rows and columns count from the start of the slice that was packed.
        source: moerun_kernels::PackError,
    },
    /// Combine blocks were asked for that an expert does not have.
    #[error("combine blocks {found} of length {combine_block}: wanted blocks below {num_blocks}")]
    Blocks {
        /// What was asked for.
        found: moerun_types::BlockRange,
        /// Length of a block.
        combine_block: usize,
        /// Blocks that there are.
        num_blocks: usize,
    },
}

/// Types that a plain tensor may have, as errors say it.
pub(crate) const PLAIN_TYPES: &str = "F32, F16 or BF16";

impl WeightsError {
    pub(crate) fn wrong_type(tensor: &str, wanted: &'static str, found: impl ToString) -> Self {
        WeightsError::Type {
            tensor: tensor.to_owned(),
            wanted,
            found: found.to_string(),
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
