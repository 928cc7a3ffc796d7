//! A directory that becomes visible whole or not at all.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use super::SynthesizeError;

/// `OUT.partial`, removed when dropped unless it was published.
pub(super) struct Staging {
    path: PathBuf,
    published: bool,
}

/// An error if anything is at `out`, be it a dangling link.
pub(super) fn refuse_existing(out: &Path) -> Result<(), SynthesizeError> {
    match fs::symlink_metadata(out) {
        Ok(_) => Err(SynthesizeError::Exists { path: out.to_owned() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(SynthesizeError::io(out)(error)),
    }
}

/// The directory that `out` will be in.
pub(super) fn parent(out: &Path) -> Result<&Path, SynthesizeError> {
    match (out.parent(), out.file_name()) {
        (Some(parent), Some(_)) if parent.as_os_str().is_empty() => Ok(Path::new(".")),
        (Some(parent), Some(_)) => Ok(parent),
        _ => Err(SynthesizeError::OutPath { path: out.to_owned() }),
    }
}

impl Staging {
    /// Makes the directory; what an earlier run left there is replaced.
    pub(super) fn create(out: &Path) -> Result<Self, SynthesizeError> {
        let mut name: OsString = out.as_os_str().to_owned();
        name.push(".partial");
        let path = PathBuf::from(name);
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(SynthesizeError::io(&path)(error)),
            _ => {}
        }
        fs::create_dir(&path).map_err(SynthesizeError::io(&path))?;
        Ok(Staging { path, published: false })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a whole file, down to the disk.
    pub(super) fn write(&self, name: &str, text: &str) -> Result<(), SynthesizeError> {
        let path = self.path.join(name);
        let write = || {
            let mut file = File::create_new(&path)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()
        };
        write().map_err(SynthesizeError::io(&path))
    }

    /// Gives the directory its name.
    pub(super) fn publish(mut self, out: &Path) -> Result<(), SynthesizeError> {
        sync_directory(&self.path)?;
        // A rename would silently replace an empty directory that someone made meanwhile.
        refuse_existing(out)?;
        fs::rename(&self.path, out).map_err(SynthesizeError::io(out))?;
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

/// Makes names in a directory durable.
fn sync_directory(path: &Path) -> Result<(), SynthesizeError> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(SynthesizeError::io(path))
}
