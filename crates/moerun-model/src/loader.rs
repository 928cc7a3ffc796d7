//! Reads the tensors outside the experts, packed or mapped, and counts the bytes.

use moerun_kernels::PackedMatrix;
use moerun_types::{LayerId, ModelConfig, NumberFormat};
use moerun_weights::{Checkpoint, LayerTensor, MemoryNeed, TensorRole};

use crate::{ModelError, linear::Linear};

/// A checkpoint being read, and how far that is.
pub(crate) struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    /// Of the experts that the model is run with.
    format: NumberFormat,
    progress: &'a mut dyn FnMut(u64, u64),
    done_bytes: u64,
    total_bytes: u64,
}

impl<'a> Loader<'a> {
    pub(crate) fn new(checkpoint: &'a Checkpoint, format: NumberFormat, progress: &'a mut dyn FnMut(u64, u64)) -> Self {
        let total_bytes = MemoryNeed::of(checkpoint.config(), format).gateway_bytes;
        Loader {
            checkpoint,
            format,
            progress,
            done_bytes: 0,
            total_bytes,
        }
    }

    pub(crate) fn config(&self) -> &'a ModelConfig {
        self.checkpoint.config()
    }

    /// A matrix `[out, in]`, in the format that its role has in this model.
    pub(crate) fn matrix(&mut self, role: TensorRole) -> Result<PackedMatrix, ModelError> {
        let [matrix] = <[_; 1]>::try_from(self.matrices(role)?).expect("a role that is one matrix");
        Ok(matrix)
    }

    /// The matrices that a stored one is cut into, in their order.
    fn matrices(&mut self, role: TensorRole) -> Result<Vec<PackedMatrix>, ModelError> {
        let matrices = self.checkpoint.load_matrices(role, self.format)?;
        self.count(matrices.iter().map(PackedMatrix::bytes).sum());
        Ok(matrices)
    }

    /// A vector in f32.
    pub(crate) fn vector(&mut self, role: TensorRole) -> Result<Vec<f32>, ModelError> {
        let values = self.checkpoint.vector(role)?;
        self.count(values.len() * size_of::<f32>());
        Ok(values)
    }

    /// A vector that the config says is there or not.
    pub(crate) fn vector_if(&mut self, wanted: bool, role: TensorRole) -> Result<Option<Vec<f32>>, ModelError> {
        wanted.then(|| self.vector(role)).transpose()
    }

    /// The tensors of one layer.
    pub(crate) fn layer(&mut self, layer: LayerId) -> LayerLoader<'_, 'a> {
        LayerLoader { loader: self, layer }
    }

    /// Reports that everything has been read.
    pub(crate) fn finish(self) {
        (self.progress)(self.total_bytes, self.total_bytes);
    }

    fn count(&mut self, bytes: usize) {
        self.done_bytes += bytes as u64;
        (self.progress)(self.done_bytes.min(self.total_bytes), self.total_bytes);
    }
}

/// The tensors of one layer of a checkpoint.
pub(crate) struct LayerLoader<'l, 'a> {
    loader: &'l mut Loader<'a>,
    layer: LayerId,
}

impl<'a> LayerLoader<'_, 'a> {
    pub(crate) fn config(&self) -> &'a ModelConfig {
        self.loader.config()
    }

    pub(crate) fn matrix(&mut self, tensor: LayerTensor) -> Result<PackedMatrix, ModelError> {
        self.loader.matrix(TensorRole::Layer(self.layer, tensor))
    }

    /// The matrices that a stored one is cut into, in their order.
    pub(crate) fn matrices(&mut self, tensor: LayerTensor) -> Result<Vec<PackedMatrix>, ModelError> {
        self.loader.matrices(TensorRole::Layer(self.layer, tensor))
    }

    pub(crate) fn vector(&mut self, tensor: LayerTensor) -> Result<Vec<f32>, ModelError> {
        self.loader.vector(TensorRole::Layer(self.layer, tensor))
    }

    pub(crate) fn vector_if(&mut self, wanted: bool, tensor: LayerTensor) -> Result<Option<Vec<f32>>, ModelError> {
        self.loader.vector_if(wanted, TensorRole::Layer(self.layer, tensor))
    }

    /// A matrix and, where there is one, its bias.
    pub(crate) fn linear(&mut self, weight: LayerTensor, bias: Option<LayerTensor>) -> Result<Linear, ModelError> {
        let weight = self.matrix(weight)?;
        let bias = bias.map(|bias| self.vector(bias)).transpose()?;
        Ok(Linear { weight, bias })
    }
}
