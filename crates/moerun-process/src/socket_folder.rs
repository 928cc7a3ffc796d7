//! A private folder for the sockets of worker processes on this machine.

use std::{
    env, fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicUsize, Ordering},
};

use crate::Address;

/// Longest name of a socket in the folder.
const LONGEST_NAME: &str = "worker-99";

/// A folder that only this user may enter, named after this process; removed with what is in it when dropped.
///
/// Should this process be killed, the workers remove their sockets, and the last of them the folder, when their standard
/// input ends.
#[derive(Debug)]
pub struct SocketFolder {
    path: PathBuf,
}

impl SocketFolder {
    /// Creates it under `XDG_RUNTIME_DIR`, else the folder for temporary files, else `/tmp`: the first that can have it and
    /// whose path is short enough for a socket.
    pub fn create() -> io::Result<Self> {
        let runtime = env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
        let candidates = runtime.into_iter().chain([env::temp_dir(), PathBuf::from("/tmp")]);
        Self::create_in(candidates)
    }

    fn create_in(candidates: impl IntoIterator<Item = PathBuf>) -> io::Result<Self> {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let mut failed = io::Error::new(io::ErrorKind::NotFound, "no folder for sockets");
        for parent in candidates {
            let name = format!("moerun-{}-{}", process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
            let path = parent.join(name);
            if let Err(reason) = Address::unix(&path.join(LONGEST_NAME)) {
                failed = io::Error::new(io::ErrorKind::InvalidInput, format!("{}: {reason}", path.display()));
                continue;
            }
            match fs::DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(Self { path }),
                Err(error) => failed = io::Error::new(error.kind(), format!("{}: {error}", path.display())),
            }
        }
        Err(failed)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The address of worker `index`'s socket, below 100.
    pub fn address(&self, index: usize) -> Address {
        Address::Unix(self.path.join(format!("worker-{index}")))
    }
}

impl Drop for SocketFolder {
    fn drop(&mut self) {
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!("the folder {} is left behind: {error}", self.path.display());
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn it_is_private_and_goes_with_its_content() {
        let folder = SocketFolder::create().unwrap();
        let path = folder.path().to_owned();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        assert_ne!(SocketFolder::create().unwrap().path(), path);
        fs::write(path.join("worker-0"), "").unwrap();
        drop(folder);
        assert!(!path.exists());
    }

    #[test]
    fn a_folder_that_cannot_be_made_or_has_too_long_a_path_is_passed_over() {
        let long = env::temp_dir().join("a".repeat(120));
        let chosen = SocketFolder::create_in([PathBuf::from("/no/such"), long.clone(), env::temp_dir()]).unwrap();
        assert_eq!(chosen.path().parent(), Some(env::temp_dir().as_path()));
        let error = SocketFolder::create_in([long]).unwrap_err().to_string();
        assert!(error.contains("wanted a path of at most"), "{error}");
    }
}
