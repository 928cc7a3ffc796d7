//! What can go wrong with a run itself, as opposed to what it finds.

use std::{io, path::PathBuf};

/// Why a load or chaos run could not be made, or its history not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// A setting makes no sense.
    #[error("{setting}: wanted {wanted}, found {found}")]
    Setting {
        /// The setting.
        setting: &'static str,
        /// What it should be.
        wanted: String,
        /// What it is.
        found: String,
    },
    /// A file or folder could not be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A line of a history is none.
    #[error("{path} line {line}: {reason}")]
    Line {
        /// The file.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// A process under test could not be started, or not be sent a signal.
    #[error("{process}: {reason}")]
    Process {
        /// Which one.
        process: String,
        /// What happened.
        reason: String,
    },
    /// A server did not answer as it should before anything was broken.
    #[error("{address}: {reason}")]
    Server {
        /// Where it is.
        address: String,
        /// What happened.
        reason: String,
    },
}

impl LoadError {
    /// Names the file that an I/O error is about; for `map_err`.
    pub(crate) fn file(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| LoadError::File { path, source }
    }

    pub(crate) fn process(process: impl Into<String>, reason: impl ToString) -> Self {
        LoadError::Process {
            process: process.into(),
            reason: reason.to_string(),
        }
    }

    pub(crate) fn server(address: impl Into<String>, reason: impl ToString) -> Self {
        LoadError::Server {
            address: address.into(),
            reason: reason.to_string(),
        }
    }
}
