//! GGUF files as llama.cpp writes them: metadata, and tensors that may be quantised in blocks.
//!
//! The reader is safe code over a mapped file. No number of the file is trusted: counts are checked against caps and
//! against the bytes that are left before anything is allocated, sizes are multiplied with overflow checks, and every
//! tensor's data lies within the file, aligned and apart from the others, before a tensor is handed out.

mod config;
mod cursor;
mod metadata;
mod names;
mod tensors;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use memmap2::Mmap;

pub(crate) use config::config_json;
pub use metadata::GgufMetadata;
pub(crate) use names::{Arrangement, named_tensors};
pub(crate) use tensors::GgufTensor;

use crate::{WeightsError, directory};

/// First bytes of every GGUF file.
const MAGIC: [u8; 4] = *b"GGUF";

/// A mapped file with its parsed header.
#[derive(Debug)]
pub(crate) struct GgufFile {
    pub(crate) path: PathBuf,
    pub(crate) metadata: GgufMetadata,
    pub(crate) tensors: Vec<GgufTensor>,
    pub(crate) map: Mmap,
}

impl GgufFile {
    /// Maps a file and reads its header; no tensor data is touched.
    pub(crate) fn open(path: &Path) -> Result<Self, WeightsError> {
        let map = map(path)?;
        let (metadata, tensors) = parse(path, &map)?;
        Ok(GgufFile {
            path: path.to_owned(),
            metadata,
            tensors,
            map,
        })
    }
}

impl GgufMetadata {
    /// Reads and checks the header of a GGUF file.
    ///
    /// # Errors
    /// Whatever is wrong with the file is named with what was wanted and what was found.
    pub fn read(path: &Path) -> Result<Self, WeightsError> {
        let map = map(path)?;
        parse(path, &map).map(|(metadata, _)| metadata)
    }
}

/// Only a regular file is mapped, so that opening it cannot block.
fn map(path: &Path) -> Result<Mmap, WeightsError> {
    let target = path
        .canonicalize()
        .map_err(|source| directory::io_error(path, source))?;
    let found = target.metadata().map_err(|source| directory::io_error(path, source))?;
    if !found.is_file() {
        return Err(WeightsError::NotAFile { path: path.to_owned() });
    }
    directory::map(&target).map(|(map, _)| map)
}

/// The header of `file`, which is at `path`; every tensor's data is within the file.
fn parse(path: &Path, file: &[u8]) -> Result<(GgufMetadata, Vec<GgufTensor>), WeightsError> {
    let mut cursor = cursor::Cursor::new(path, file);
    let magic = cursor.array("the magic number")?;
    if magic != MAGIC {
        return Err(cursor.refuse("the magic number", "GGUF", format!("{magic:02x?}")));
    }
    let version = cursor.u32("the version")?;
    if !matches!(version, 2 | 3) {
        let found = match version.swap_bytes() {
            2 | 3 => "a big-endian file".to_owned(),
            _ => version.to_string(),
        };
        return Err(cursor.refuse("the version", "2 or 3", found));
    }
    let num_tensors = cursor.count("the number of tensors", tensors::MAX_TENSORS, tensors::MIN_INFO_BYTES)?;
    let num_entries = cursor.count(
        "the number of metadata entries",
        metadata::MAX_ENTRIES,
        metadata::MIN_ENTRY_BYTES,
    )?;
    let metadata = GgufMetadata::parse(&mut cursor, num_entries)?;
    let tensors = tensors::parse(&mut cursor, num_tensors, &metadata)?;
    Ok((metadata, tensors))
}
