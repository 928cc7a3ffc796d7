//! Two ways down: drain, which finishes what was begun, and stop, which does not.

use std::{io, io::Read, process, thread, time::Duration};

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
}

impl Shutdown {
    /// A shutdown that nothing triggers but its own methods.
    pub fn new() -> Self {
        Self::default()
    }

    /// A shutdown that the first SIGTERM or SIGINT drains and the second stops; a process that has not ended a second
    /// after that is ended with 143 or 130.
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
                let second = runtime.block_on(async {
                    tokio::select! {
                        _ = terminate.recv() => tracing::info!("SIGTERM: draining; a second one stops at once"),
                        _ = interrupt.recv() => tracing::info!("SIGINT: draining; a second one stops at once"),
                    }
                    watched.drain();
                    tokio::select! {
                        _ = terminate.recv() => Exit::Terminated,
                        _ = interrupt.recv() => Exit::Interrupted,
                    }
                });
                tracing::warn!("second signal: stopping at once");
                watched.stop();
                runtime.block_on(tokio::time::sleep(STOP_GRACE));
                process::exit(second as i32);
            })?;
        Ok(shutdown)
    }

    /// Drains when standard input ends. A parent that keeps the other end open takes its children with it, however it
    /// dies.
    pub fn drain_with_parent(&self) -> io::Result<()> {
        let shutdown = self.clone();
        thread::Builder::new().name("moerun-parent".to_owned()).spawn(move || {
            shutdown.drain_at_end_of(io::stdin());
        })?;
        Ok(())
    }

    fn drain_at_end_of(&self, mut input: impl Read) {
        let mut ignored = [0; 256];
        loop {
            match input.read(&mut ignored) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        tracing::debug!("standard input ended: draining");
        self.drain();
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
    fn the_end_of_the_parents_pipe_drains() {
        let (reader, writer) = io::pipe().unwrap();
        let shutdown = Shutdown::new();
        let watched = shutdown.clone();
        let watcher = thread::spawn(move || watched.drain_at_end_of(reader));
        assert!(!shutdown.is_draining());
        drop(writer);
        watcher.join().unwrap();
        assert!(shutdown.is_draining());
    }
}
