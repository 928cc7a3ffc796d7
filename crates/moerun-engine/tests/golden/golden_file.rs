//! What an independent implementation computed: the tensors of a `golden.safetensors`.

use std::{fs, path::Path};

use safetensors::{Dtype, SafeTensors};

/// The bytes of a `golden.safetensors`.
pub(crate) struct GoldenFile {
    bytes: Vec<u8>,
}

/// One tensor, row-major.
pub(crate) struct GoldenTensor<T> {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Vec<T>,
}

impl GoldenFile {
    pub(crate) fn open(family_dir: &Path) -> Self {
        let path = family_dir.join("golden.safetensors");
        GoldenFile {
            bytes: fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())),
        }
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.tensors().names().into_iter().map(str::to_owned).collect()
    }

    pub(crate) fn f32(&self, name: &str) -> GoldenTensor<f32> {
        self.tensor(name, Dtype::F32, f32::from_le_bytes)
    }

    pub(crate) fn i64(&self, name: &str) -> GoldenTensor<i64> {
        self.tensor(name, Dtype::I64, i64::from_le_bytes)
    }

    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).expect("golden.safetensors is well formed")
    }

    fn tensor<T, const N: usize>(&self, name: &str, dtype: Dtype, read: fn([u8; N]) -> T) -> GoldenTensor<T> {
        let tensors = self.tensors();
        let view = tensors.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(view.dtype(), dtype, "{name}");
        let values = view
            .data()
            .chunks_exact(N)
            .map(|bytes| read(bytes.try_into().expect("N bytes")))
            .collect();
        GoldenTensor {
            name: name.to_owned(),
            shape: view.shape().to_vec(),
            values,
        }
    }
}

impl<T> GoldenTensor<T> {
    /// The last dimension at `[sequence, position]` of a tensor `[batch, length, width]`.
    pub(crate) fn row(&self, sequence: usize, position: usize) -> &[T] {
        let [_, length, width] = self.shape[..] else {
            panic!("{} has shape {:?}", self.name, self.shape)
        };
        &self.values[(sequence * length + position) * width..][..width]
    }
}
