//! What is made from files, and made again when they change.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use parking_lot::{Mutex, RwLock};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::TransportError;

/// How often files are looked at. By content, not by time: a mounted secret is a chain of links that changes under it.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Certificates and lists of keys are kilobytes; more is some other file.
const MAX_FILE_BYTES: u64 = 4 << 20;

type Build<T> = Box<dyn Fn(&[Vec<u8>]) -> Result<T, TransportError> + Send>;

/// What is made from files. They are looked at every two seconds, and at once on SIGHUP; when one has changed it is made
/// again. If that fails, what there was stays in use and an error is logged, once for each change.
#[derive(Debug)]
pub struct Watched<T> {
    shared: Arc<Shared<T>>,
    _end: DropGuard,
}

struct Shared<T> {
    what: &'static str,
    paths: Vec<PathBuf>,
    current: RwLock<Arc<T>>,
    reloads: AtomicU64,
    looking: Mutex<Looking<T>>,
}

struct Looking<T> {
    build: Build<T>,
    /// What the files held, or why they could not be read, the last time something came of it.
    seen: Result<Vec<Vec<u8>>, String>,
}

impl<T> std::fmt::Debug for Shared<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Neither keys nor contents.
        f.debug_struct("Shared")
            .field("paths", &self.paths)
            .finish_non_exhaustive()
    }
}

impl<T: Send + Sync + 'static> Watched<T> {
    /// Reads `paths` and makes `what` of their contents, in that order; watches them until this is dropped.
    pub fn start(
        what: &'static str,
        paths: Vec<PathBuf>,
        build: impl Fn(&[Vec<u8>]) -> Result<T, TransportError> + Send + 'static,
    ) -> Result<Self, TransportError> {
        let contents = read_all(&paths)?;
        let shared = Arc::new(Shared {
            what,
            paths,
            current: RwLock::new(Arc::new(build(&contents)?)),
            reloads: AtomicU64::new(0),
            looking: Mutex::new(Looking {
                build: Box::new(build),
                seen: Ok(contents),
            }),
        });
        let end = CancellationToken::new();
        watch(Arc::clone(&shared), end.clone()).map_err(|source| TransportError::Watch { what, source })?;
        Ok(Self {
            shared,
            _end: end.drop_guard(),
        })
    }

    /// What there is now. A connection that keeps it does not notice a change.
    pub fn current(&self) -> Arc<T> {
        Arc::clone(&self.shared.current.read())
    }

    /// How often it has been made again.
    pub fn reloads(&self) -> u64 {
        self.shared.reloads.load(Relaxed)
    }

    /// Looks at the files now.
    pub fn look(&self) {
        self.shared.look();
    }
}

impl<T> Shared<T> {
    fn look(&self) {
        let mut looking = self.looking.lock();
        let found = read_all(&self.paths).map_err(|error| error.to_string());
        if found == looking.seen {
            return;
        }
        let made = match &found {
            Ok(contents) => (looking.build)(contents).map_err(|error| error.to_string()),
            Err(error) => Err(error.clone()),
        };
        match made {
            Ok(made) => {
                *self.current.write() = Arc::new(made);
                self.reloads.fetch_add(1, Relaxed);
                tracing::info!("{} read again: new connections use what changed", self.what);
            }
            Err(error) => tracing::error!("{} changed, and the old stays in use: {error}", self.what),
        }
        looking.seen = found;
    }
}

fn watch<T: Send + Sync + 'static>(shared: Arc<Shared<T>>, end: CancellationToken) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut hangup = {
        let _inside = runtime.enter();
        signal(SignalKind::hangup())?
    };
    thread::Builder::new().name("moerun-watch".to_owned()).spawn(move || {
        runtime.block_on(async {
            loop {
                tokio::select! {
                    () = end.cancelled() => return,
                    _ = hangup.recv() => {}
                    () = tokio::time::sleep(LOOK_EVERY) => {}
                }
                shared.look();
            }
        });
    })?;
    Ok(())
}

fn read_all(paths: &[PathBuf]) -> Result<Vec<Vec<u8>>, TransportError> {
    paths.iter().map(|path| read(path)).collect()
}

fn read(path: &Path) -> Result<Vec<u8>, TransportError> {
    let failed = |source| TransportError::Read {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(TransportError::Content {
            path: path.to_owned(),
            reason: "wanted a file".to_owned(),
        });
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(TransportError::Content {
            path: path.to_owned(),
            reason: format!("wanted at most {MAX_FILE_BYTES} bytes, found more"),
        });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn number(path: &Path) -> Result<Watched<u32>, TransportError> {
        let owned = path.to_owned();
        Watched::start("a number", vec![path.to_owned()], move |contents| {
            let text = String::from_utf8_lossy(&contents[0]).into_owned();
            text.trim().parse().map_err(|_| TransportError::Content {
                path: owned.clone(),
                reason: format!("wanted a number, found {text:?}"),
            })
        })
    }

    #[test]
    fn a_change_is_taken_and_a_broken_one_keeps_what_there_was() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("n");
        assert!(matches!(number(&path), Err(TransportError::Read { .. })));
        fs::write(&path, "1").unwrap();
        let watched = number(&path).unwrap();
        let held = watched.current();
        for (text, wanted, reloads) in [("2", 2, 1), ("x", 2, 1), ("2", 2, 2), ("3", 3, 3), ("3", 3, 3)] {
            fs::write(&path, text).unwrap();
            watched.look();
            assert_eq!((*watched.current(), watched.reloads()), (wanted, reloads), "{text}");
        }
        fs::remove_file(&path).unwrap();
        watched.look();
        assert_eq!(*watched.current(), 3);
        fs::write(&path, "4").unwrap();
        watched.look();
        assert_eq!((*held, *watched.current()), (1, 4));
    }

    #[test]
    fn what_is_no_file_or_far_too_large_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let error = number(folder.path()).unwrap_err().to_string();
        assert!(error.contains("wanted a file"), "{error}");
        let path = folder.path().join("large");
        File::create(&path).unwrap().set_len(MAX_FILE_BYTES + 1).unwrap();
        let error = number(&path).unwrap_err().to_string();
        assert!(error.contains("at most 4194304 bytes"), "{error}");
        assert!(number(Path::new("/dev/zero")).is_err());
    }
}
