//! Two ways down: drain, which finishes what was begun, and stop, which does not.

use std::{
    fs, io,
    io::Read,
    path::PathBuf,
    process,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::Exit;

/// How long a process may take to end after [`Shutdown::stop`] before it is ended.
const STOP_GRACE: Duration = Duration::from_secs(1);

/// Tells every part of a process that it should end. Clones share one state.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    drain: CancellationToken,
    stop: CancellationToken,
    /// Whether the process has begun what a drain would finish.
    begun: Arc<AtomicBool>,
    /// Set by a second signal.
    cut_short: Arc<OnceLock<Exit>>,
    /// Files and empty folders that the process must not leave behind.
    leftovers: Arc<Mutex<Vec<PathBuf>>>,
}

impl Shutdown {
    /// A shutdown that nothing triggers but its own methods.
    pub fn new() -> Self {
        Self::default()
    }

    /// A shutdown that the first SIGTERM or SIGINT drains and the second stops; a process that has not ended a second
    /// after that is ended with 143 or 130, which is also what [`Shutdown::exit`] says from then on. Before
    /// [`Shutdown::begin`] the first signal ends the process so: it may take minutes to load, and nobody waits for it.
    pub fn on_signals() -> io::Result<Self> {
        let shutdown = Self::new();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (mut terminate, mut interrupt) = {
            let _inside = runtime.enter();
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?)
        };
        let watched = shutdown.clone();
        thread::Builder::new()
            .name("moerun-signals".to_owned())
            .spawn(move || {
                runtime.block_on(async {
                    let first = tokio::select! {
                        _ = terminate.recv() => Exit::Terminated,
                        _ = interrupt.recv() => Exit::Interrupted,
                    };
                    watched.end_unless_begun(first);
                    tracing::info!("{}: draining; a second signal stops at once", first.signal());
                    watched.drain();
                    let second = tokio::select! {
                        _ = terminate.recv() => Exit::Terminated,
                        _ = interrupt.recv() => Exit::Interrupted,
                    };
                    tracing::warn!("{}: stopping at once", second.signal());
                    watched.cut_short.get_or_init(|| second);
                    watched.stop();
                    tokio::time::sleep(STOP_GRACE).await;
                    watched.end_process(second);
                });
            })?;
        Ok(shutdown)
    }

    /// Drains when standard input ends, or ends the process if it has not begun. A parent that keeps the other end open
    /// takes its children with it, however it dies.
    pub fn drain_with_parent(&self) -> io::Result<()> {
        let shutdown = self.clone();
        thread::Builder::new().name("moerun-parent".to_owned()).spawn(move || {
            wait_for_end_of(io::stdin());
            shutdown.end_unless_begun(Exit::Success);
            tracing::debug!("standard input ended: draining");
            shutdown.drain();
        })?;
        Ok(())
    }

    /// From now on there is something to finish: the process takes requests, or writes what it would have to remove.
    pub fn begin(&self) {
        self.begun.store(true, Ordering::SeqCst);
    }

    fn end_unless_begun(&self, exit: Exit) {
        if !self.begun.load(Ordering::SeqCst) {
            self.end_process(exit);
        }
    }

    fn end_process(&self, exit: Exit) -> ! {
        self.remove_leftovers();
        process::exit(exit as i32)
    }

    /// Has `path` removed when the process is ended here, where nothing is dropped, or by [`Shutdown::remove_leftovers`]: a
    /// socket, or a folder if it is empty by then.
    pub fn remove_at_end(&self, path: PathBuf) {
        self.leftovers().push(path);
    }

    /// Removes what was named to [`Shutdown::remove_at_end`], the last first, so that a folder comes after its files. What is
    /// gone already is no error, and neither is a folder that others still use.
    pub fn remove_leftovers(&self) {
        for path in std::mem::take(&mut *self.leftovers()).iter().rev() {
            let _ = match fs::symlink_metadata(path) {
                Ok(facts) if facts.is_dir() => fs::remove_dir(path),
                Ok(_) => fs::remove_file(path),
                Err(error) => Err(error),
            };
        }
    }

    fn leftovers(&self) -> std::sync::MutexGuard<'_, Vec<PathBuf>> {
        self.leftovers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How the process should end: well, unless a second signal cut its drain short.
    pub fn exit(&self) -> Exit {
        self.cut_short.get().copied().unwrap_or(Exit::Success)
    }

    /// Asks for an orderly end: nothing new is begun, what was begun is finished.
    pub fn drain(&self) {
        self.drain.cancel();
    }

    /// Asks for an end now.
    pub fn stop(&self) {
        self.drain.cancel();
        self.stop.cancel();
    }

    /// Whether an end has been asked for, orderly or not.
    pub fn is_draining(&self) -> bool {
        self.drain.is_cancelled()
    }

    /// Whether an end now has been asked for.
    pub fn is_stopping(&self) -> bool {
        self.stop.is_cancelled()
    }

    /// Waits until an end is asked for, orderly or not.
    pub async fn draining(&self) {
        self.drain.cancelled().await;
    }

    /// Waits until an end now is asked for.
    pub async fn stopping(&self) {
        self.stop.cancelled().await;
    }
}

/// Returns when `input` has ended, whatever is read before.
fn wait_for_end_of(mut input: impl Read) {
    let mut ignored = [0; 256];
    loop {
        match input.read(&mut ignored) {
            Ok(0) => break,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draining_is_not_stopping_but_stopping_is_draining() {
        let shutdown = Shutdown::new();
        let clone = shutdown.clone();
        assert!(!clone.is_draining());
        shutdown.drain();
        assert!(clone.is_draining() && !clone.is_stopping());
        let at_once = Shutdown::new();
        at_once.stop();
        assert!(at_once.is_draining() && at_once.is_stopping());
    }

    #[test]
    fn the_end_of_a_pipe_is_waited_for() {
        let (reader, mut writer) = io::pipe().unwrap();
        let waiting = thread::spawn(move || wait_for_end_of(reader));
        io::Write::write_all(&mut writer, &[7; 1000]).unwrap();
        assert!(!waiting.is_finished());
        drop(writer);
        waiting.join().unwrap();
    }

    #[test]
    fn leftovers_go_last_first_and_a_folder_in_use_stays() {
        let folder = std::env::temp_dir().join(format!("moerun-leftovers-{}", process::id()));
        fs::create_dir(&folder).unwrap();
        let (ours, others) = (folder.join("ours"), folder.join("others"));
        fs::write(&ours, "").unwrap();
        fs::write(&others, "").unwrap();
        for last in [false, true] {
            let shutdown = Shutdown::new();
            shutdown.remove_at_end(folder.clone());
            shutdown.remove_at_end(if last { others.clone() } else { ours.clone() });
            shutdown.remove_leftovers();
            assert_eq!((ours.exists(), others.exists(), folder.exists()), (false, !last, !last));
        }
    }

    #[test]
    fn a_process_ends_well_unless_its_drain_was_cut_short() {
        let shutdown = Shutdown::new();
        let clone = shutdown.clone();
        shutdown.stop();
        assert_eq!(clone.exit(), Exit::Success);
        shutdown.cut_short.get_or_init(|| Exit::Terminated);
        assert_eq!(clone.exit(), Exit::Terminated);
    }
}
