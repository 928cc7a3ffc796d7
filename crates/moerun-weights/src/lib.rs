//! Checkpoint on disk → named, shape-checked arrays; which tensors a process needs; hashes; sizes.
//!
//! [`Checkpoint::open`] reads `config.json` and the headers of the safetensors files, maps the files, and checks every
//! tensor against the config; after that a name, shape or type cannot be wrong, and data is read where it lies.

mod available_memory;
mod blocks;
mod checkpoint;
mod convert;
mod dense_tensors;
mod directory;
mod elements;
mod entries;
mod error;
mod expected;
mod expert;
mod expert_tensors;
mod generation_config;
mod gguf;
mod hashes;
mod header;
mod index;
mod load;
mod memory;
mod packed;
mod shapes;
mod space;
mod staging;
mod store;
mod synthesize;
mod tensor;
mod tensor_names;
mod transfer;
mod verify;

pub use available_memory::available_memory_bytes;
pub use blocks::BlockType;
pub use checkpoint::{Checkpoint, Needs};
pub use convert::{ConvertError, ConvertReport, ConvertRequest, convert};
pub use error::WeightsError;
pub use expected::{ExpectedTensor, ExpectedTypes, ModelPart, expected_tensors};
pub use expert::ExpertSource;
pub use generation_config::GenerationConfig;
pub use gguf::GgufMetadata;
pub use load::Load;
pub use memory::{MemoryNeed, ParameterCounts};
pub use shapes::{SHAPES, Shape};
pub use staging::WriteError;
pub use synthesize::{
    DEFAULT_SHARD_BYTES, SynthesizeError, SynthesizeProgress, SynthesizeReport, SynthesizeRequest, synthesize,
};
pub use tensor::{Dtype, MatrixForm, MatrixSource, ROW_BLOCK, RowBlock, RowBlockFormat, RowBlocks};
pub use tensor_names::{LayerTensor, TensorRole};
pub use transfer::{ExpertExport, ExpertTensorName, ReceivedExpert};
