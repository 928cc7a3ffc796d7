//! Reads the tensors outside the experts, packs them and counts the bytes.

use std::ops::Range;

use moerun_kernels::{PackError, PackedMatrix};
use moerun_types::{LayerId, ModelConfig, NumberFormat};
use moerun_weights::{Checkpoint, LayerTensor, MatrixSource, MemoryNeed, TensorRole};

use crate::{ModelError, linear::Linear, pack};

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

    /// A matrix `[out, in]` in the format of dense matrices.
    pub(crate) fn matrix(&mut self, role: TensorRole) -> Result<PackedMatrix, ModelError> {
        self.matrix_as(self.format.for_dense(), role)
    }

    /// The embedding or the head, `[vocab, hidden]`.
    pub(crate) fn vocabulary_matrix(&mut self, role: TensorRole) -> Result<PackedMatrix, ModelError> {
        self.matrix_as(self.format.for_vocabulary(), role)
    }

    /// A matrix `[out, in]` in a format of its own.
    pub(crate) fn matrix_as(&mut self, format: NumberFormat, role: TensorRole) -> Result<PackedMatrix, ModelError> {
        let source = self.checkpoint.matrix(role)?;
        let packed =
            pack::rows(format, &source, 0..source.rows()).map_err(|source| ModelError::Pack { role, source })?;
        self.count(packed.bytes());
        Ok(packed)
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

    /// A matrix that is cut before it is packed.
    pub(crate) fn cut_matrix(&mut self, tensor: LayerTensor) -> Result<CutMatrix<'_, 'a>, ModelError> {
        let role = TensorRole::Layer(self.layer, tensor);
        Ok(CutMatrix {
            source: self.loader.checkpoint.matrix(role)?,
            role,
            loader: self.loader,
        })
    }

    /// A matrix that stays f32 whatever the model's format: what decides between experts.
    pub(crate) fn matrix_f32(&mut self, tensor: LayerTensor) -> Result<PackedMatrix, ModelError> {
        self.loader
            .matrix_as(NumberFormat::F32, TensorRole::Layer(self.layer, tensor))
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

/// A stored matrix whose rows are packed in several parts, in the format of dense matrices.
pub(crate) struct CutMatrix<'l, 'a> {
    loader: &'l mut Loader<'a>,
    role: TensorRole,
    source: MatrixSource<'a>,
}

impl CutMatrix<'_, '_> {
    /// Some of the rows: `[rows, cols]`.
    pub(crate) fn rows(&mut self, rows: Range<usize>) -> Result<PackedMatrix, ModelError> {
        let packed = pack::rows(self.loader.format.for_dense(), &self.source, rows);
        self.counted(packed)
    }

    /// Some of the rows, transposed: `[cols, rows]`.
    pub(crate) fn transposed(&mut self, rows: Range<usize>) -> Result<PackedMatrix, ModelError> {
        let packed = pack::transposed(self.loader.format.for_dense(), &self.source, rows);
        self.counted(packed)
    }

    fn counted(&mut self, packed: Result<PackedMatrix, PackError>) -> Result<PackedMatrix, ModelError> {
        let role = self.role;
        let packed = packed.map_err(|source| ModelError::Pack { role, source })?;
        self.loader.count(packed.bytes());
        Ok(packed)
    }
}
