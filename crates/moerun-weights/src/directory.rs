//! Files of a checkpoint directory, opened so that none can lead out of it.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use memmap2::Mmap;

use crate::WeightsError;

/// A checkpoint directory, and where its files may really be.
#[derive(Debug)]
pub(crate) struct Directory {
    path: PathBuf,
    /// The directory itself and, in the cache of the Hub's own client, the `blobs` that its snapshots link to.
    roots: Vec<PathBuf>,
}

/// What a name in the directory turned out to be.
pub(crate) enum Found {
    /// Nothing of that name.
    Nothing,
    /// A regular file; the path is without links.
    File(PathBuf),
}

impl Directory {
    pub(crate) fn open(path: &Path) -> Result<Self, WeightsError> {
        let real = path.canonicalize().map_err(|source| io_error(path, source))?;
        let blobs = real
            .parent()
            .filter(|parent| parent.file_name().is_some_and(|name| name == "snapshots"))
            .and_then(Path::parent)
            .map(|repository| repository.join("blobs"));
        Ok(Directory {
            path: path.to_owned(),
            roots: std::iter::once(real).chain(blobs).collect(),
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Looks up a plain file name. A link may not leave the directory; only regular files are files, so that opening
    /// one cannot block.
    pub(crate) fn find(&self, name: &str) -> Result<Found, WeightsError> {
        let path = self.path.join(name);
        if let Err(error) = path.symlink_metadata() {
            return match error.kind() {
                std::io::ErrorKind::NotFound => Ok(Found::Nothing),
                _ => Err(io_error(&path, error)),
            };
        }
        let target = path.canonicalize().map_err(|source| io_error(&path, source))?;
        if !self.roots.iter().any(|root| target.starts_with(root)) {
            return Err(WeightsError::LeavesDirectory { path, target });
        }
        match target.metadata() {
            Ok(metadata) if metadata.is_file() => Ok(Found::File(target)),
            Ok(_) => Err(WeightsError::NotAFile { path }),
            Err(source) => Err(io_error(&path, source)),
        }
    }

    /// The text of a file of at most `limit` bytes, or `None` if there is no such file.
    pub(crate) fn read_text(&self, name: &str, limit: u64) -> Result<Option<String>, WeightsError> {
        let Found::File(target) = self.find(name)? else {
            return Ok(None);
        };
        let path = self.path.join(name);
        let file = File::open(target).map_err(|source| io_error(&path, source))?;
        let found = file.metadata().map_err(|source| io_error(&path, source))?.len();
        if found > limit {
            return Err(WeightsError::TooLong { path, found, limit });
        }
        let mut text = String::new();
        file.take(limit)
            .read_to_string(&mut text)
            .map_err(|source| io_error(&path, source))?;
        Ok(Some(text))
    }

    /// A file whose weights would be pickled, if there is one.
    pub(crate) fn find_pickle(&self) -> Option<PathBuf> {
        let mut pickles: Vec<PathBuf> = std::fs::read_dir(&self.path)
            .ok()?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| {
                let extension = path.extension().and_then(|extension| extension.to_str());
                matches!(extension, Some("bin" | "pt" | "pth" | "ckpt" | "pkl"))
            })
            .collect();
        pickles.sort();
        pickles.into_iter().next()
    }
}

/// Maps a file read-only; the file as well, to be read.
pub(crate) fn map(path: &Path) -> Result<(Mmap, File), WeightsError> {
    let file = File::open(path).map_err(|source| io_error(path, source))?;
    // SAFETY: the mapping is read-only and private to this process' view of a regular file. Nothing here writes to it;
    // if someone else truncates the file while it is mapped, reading the lost pages ends the process (SIGBUS), which is
    // the documented condition for serving from a mapped checkpoint: do not change it underneath.
    #[allow(unsafe_code)]
    let map = unsafe { Mmap::map(&file) };
    let map = map.map_err(|source| io_error(path, source))?;
    Ok((map, file))
}

pub(crate) fn io_error(path: &Path, source: std::io::Error) -> WeightsError {
    WeightsError::Io {
        path: path.to_owned(),
        source,
    }
}
