//! A directory that becomes visible whole or not at all.

use std::{
    fs::{self, File, TryLockError},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use crate::space::available_bytes;

/// Why no checkpoint was written; nothing of it is left.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// Something is where the checkpoint shall be.
    #[error("{path} exists already; nothing was changed")]
    Exists {
        /// What exists.
        path: PathBuf,
    },
    /// Another process writes the same checkpoint.
    #[error("{path}: another process is writing it; nothing was changed")]
    Busy {
        /// Where it writes.
        path: PathBuf,
    },
    /// The path names no directory that could be made.
    #[error("{path}: wanted the path of a new directory")]
    OutPath {
        /// The path.
        path: PathBuf,
    },
    /// The disk is too full.
    #[error("{path}: {needed_bytes} bytes are needed, {available_bytes} are free")]
    NoSpace {
        /// Where the checkpoint would be.
        path: PathBuf,
        /// What it would take.
        needed_bytes: u64,
        /// What there is.
        available_bytes: u64,
    },
    /// A file could not be written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The work was told to stop.
    #[error("interrupted; nothing was kept")]
    Interrupted,
}

impl WriteError {
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| WriteError::Io {
            path: path.to_owned(),
            source,
        }
    }
}

/// Free space of the file system of a directory; tests have less of it.
pub(crate) type FreeSpace<'a> = &'a dyn Fn(&Path) -> io::Result<u64>;

/// The free space that there is.
pub(crate) const REAL_SPACE: FreeSpace<'static> = &|dir| available_bytes(dir);

/// A file system spends some blocks on directories and metadata too.
const SPARE_BYTES: u64 = 1 << 20;

/// An error if `out` exists, or could not be made with `bytes` of files.
pub(crate) fn check_room(out: &Path, bytes: u64, free_space: FreeSpace<'_>) -> Result<(), WriteError> {
    refuse_existing(out)?;
    let parent = parent(out)?;
    let needed_bytes = bytes.saturating_add(SPARE_BYTES);
    let available_bytes = free_space(parent).map_err(WriteError::io(parent))?;
    if available_bytes < needed_bytes {
        return Err(WriteError::NoSpace {
            path: out.to_owned(),
            needed_bytes,
            available_bytes,
        });
    }
    Ok(())
}

/// An error if the flag says so.
pub(crate) fn stop_if_interrupted(interrupted: Option<&AtomicBool>) -> Result<(), WriteError> {
    match interrupted {
        Some(flag) if flag.load(Ordering::Relaxed) => Err(WriteError::Interrupted),
        _ => Ok(()),
    }
}

/// `OUT.partial`, removed when dropped unless it was published.
pub(crate) struct Staging {
    path: PathBuf,
    /// Locked while the process writes: what is locked is at work, what is not was left behind.
    _lock: File,
    published: bool,
}

/// An error if anything is at `out`, be it a dangling link.
fn refuse_existing(out: &Path) -> Result<(), WriteError> {
    match fs::symlink_metadata(out) {
        Ok(_) => Err(WriteError::Exists { path: out.to_owned() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(WriteError::io(out)(error)),
    }
}

/// The directory that `out` will be in.
fn parent(out: &Path) -> Result<&Path, WriteError> {
    match (out.parent(), out.file_name()) {
        (Some(parent), Some(_)) if parent.as_os_str().is_empty() => Ok(Path::new(".")),
        (Some(parent), Some(_)) => Ok(parent),
        _ => Err(WriteError::OutPath { path: out.to_owned() }),
    }
}

impl Staging {
    /// Makes the directory; what an earlier run left there is replaced.
    ///
    /// # Errors
    /// Among others if another process is at work there, or `out` has no name of its own.
    pub(crate) fn create(out: &Path) -> Result<Self, WriteError> {
        // Not appended to the path as it is: a slash at its end would make it a file within.
        let Some(name) = out.file_name() else {
            return Err(WriteError::OutPath { path: out.to_owned() });
        };
        let mut name = name.to_owned();
        name.push(".partial");
        let path = parent(out)?.join(name);
        match lock(&path) {
            // Held until the rest is gone.
            Ok(_rest) => fs::remove_dir_all(&path).map_err(WriteError::io(&path))?,
            Err(WriteError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        fs::create_dir(&path).map_err(WriteError::io(&path))?;
        Ok(Staging {
            _lock: lock(&path)?,
            path,
            published: false,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a whole file, down to the disk.
    pub(crate) fn write(&self, name: &str, content: &[u8]) -> Result<(), WriteError> {
        let path = self.path.join(name);
        let write = || {
            let mut file = File::create_new(&path)?;
            file.write_all(content)?;
            file.sync_all()
        };
        write().map_err(WriteError::io(&path))
    }

    /// Gives the directory its name.
    pub(crate) fn publish(mut self, out: &Path) -> Result<(), WriteError> {
        sync_directory(&self.path)?;
        // A rename would silently replace an empty directory that someone made meanwhile.
        refuse_existing(out)?;
        fs::rename(&self.path, out).map_err(WriteError::io(out))?;
        self.published = true;
        sync_directory(parent(out)?)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.published
            && let Err(error) = fs::remove_dir_all(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "could not remove a partial checkpoint");
        }
    }
}

/// Locks a directory; the system unlocks it when the process ends, however it does.
fn lock(path: &Path) -> Result<File, WriteError> {
    // Asked first: opening a pipe waits for whoever writes to it.
    if !fs::symlink_metadata(path).map_err(WriteError::io(path))?.is_dir() {
        return Err(WriteError::io(path)(io::ErrorKind::NotADirectory.into()));
    }
    let directory = File::open(path).map_err(WriteError::io(path))?;
    match directory.try_lock() {
        Ok(()) => Ok(directory),
        // Some network file systems have no locks.
        Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => Ok(directory),
        Err(TryLockError::WouldBlock) => Err(WriteError::Busy { path: path.to_owned() }),
        Err(TryLockError::Error(error)) => Err(WriteError::io(path)(error)),
    }
}

/// Makes names in a directory durable.
fn sync_directory(path: &Path) -> Result<(), WriteError> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(WriteError::io(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slash_at_the_end_of_a_path_changes_nothing() {
        let root = tempfile::tempdir().unwrap();
        let out = PathBuf::from(format!("{}/out//", root.path().display()));
        check_room(&out, 0, &|_| Ok(u64::MAX)).unwrap();
        let staging = Staging::create(&out).unwrap();
        assert_eq!(staging.path(), root.path().join("out.partial"));
        staging.write("name", b"content").unwrap();
        staging.publish(&out).unwrap();
        assert_eq!(fs::read(root.path().join("out/name")).unwrap(), b"content");
        assert!(!root.path().join("out.partial").exists());
        assert!(matches!(refuse_existing(&out), Err(WriteError::Exists { .. })));
    }

    #[test]
    fn what_another_writes_is_left_alone_and_what_it_left_is_replaced() {
        let root = tempfile::tempdir().unwrap();
        let out = root.path().join("out");
        let first = Staging::create(&out).unwrap();
        first.write("name", b"first").unwrap();
        let error = Staging::create(&out).map(|_| ()).unwrap_err();
        assert!(
            matches!(&error, WriteError::Busy { path } if path == first.path()),
            "{error}"
        );
        first.publish(&out).unwrap();
        assert_eq!(fs::read(out.join("name")).unwrap(), b"first");

        let partial = root.path().join("out.partial");
        fs::create_dir(&partial).unwrap();
        fs::write(partial.join("name"), "rest").unwrap();
        let second = Staging::create(&out).unwrap();
        assert!(fs::read_dir(second.path()).unwrap().next().is_none());
        drop(second);
        fs::write(&partial, "no directory").unwrap();
        let error = Staging::create(&out).map(|_| ()).unwrap_err();
        assert!(
            matches!(&error, WriteError::Io { source, .. } if source.kind() == io::ErrorKind::NotADirectory),
            "{error}"
        );
    }
}
