//! What can go wrong while a checkpoint is read or written by the testkit.

use std::path::{Path, PathBuf};

/// Why the testkit could not read, compute or write.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TestkitError {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is not JSON.
    #[error("{path}: {source}")]
    Json {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        source: serde_json::Error,
    },
    /// A file is not safetensors.
    #[error("{path}: {source}")]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What the reader said.
        source: safetensors::SafeTensorError,
    },
    /// A config field is absent or of another kind.
    #[error("config.json: field {field} is {found}, wanted {wanted}")]
    Field {
        /// The field.
        field: String,
        /// What it should be.
        wanted: &'static str,
        /// What it is.
        found: String,
    },
    /// A tensor is not in the checkpoint.
    #[error("tensor {name} is not in the checkpoint")]
    MissingTensor {
        /// Its name.
        name: String,
    },
    /// A tensor has another shape than the config says.
    #[error("tensor {name} has shape {found:?}, wanted {wanted:?}")]
    Shape {
        /// Its name.
        name: String,
        /// Shape on disk.
        found: Vec<usize>,
        /// Shape asked for.
        wanted: Vec<usize>,
    },
    /// No seed gave a checkpoint whose decisions are safe.
    #[error("none of {tries} seeds from {first} on keeps a routing margin of {margin}")]
    NoSafeSeed {
        /// First seed tried.
        first: u64,
        /// Seeds tried.
        tries: u64,
        /// Margin asked for.
        margin: f64,
    },
    /// Something that the testkit does not know.
    #[error("unknown {what} {name:?}")]
    Unknown {
        /// Kind of thing.
        what: &'static str,
        /// What it is called.
        name: String,
    },
}

impl TestkitError {
    /// Names the file that an I/O error is about; for `map_err`.
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| TestkitError::Io {
            path: path.to_path_buf(),
            source,
        }
    }
}
