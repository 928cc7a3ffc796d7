//! The runtime that moves activations: one thread of its own, apart from the doors for clients, and any thread that waits
//! for an answer.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    thread,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use tokio::{
    runtime::{Builder, Handle, Runtime},
    sync::Notify,
    task::yield_now,
};
use tokio_util::sync::CancellationToken;

/// How long blocking tasks may hold up the end of the runtime.
const END_GRACE: Duration = Duration::from_secs(1);
/// While callers drive the runtime, its own thread looks in this often, so that pings and reconnections go on while they
/// compute.
const LOOK_IN: Duration = Duration::from_millis(10);
/// It drives again when no caller has for this long.
const TAKE_BACK: Duration = Duration::from_millis(20);

/// A single-threaded tokio runtime on a named thread; it ends when this is dropped, and its tasks with it.
///
/// A second runtime thread costs 10 to 20 % more latency a hop and a third more CPU, hence `current_thread`. To wake a
/// sleeping thread costs more still, so a caller that has nothing to do but wait may drive the runtime itself
/// ([`DataPlane::drive`]): it then writes and reads the sockets, and nobody is woken.
#[derive(Debug)]
pub struct DataPlane {
    runtime: Option<Arc<Runtime>>,
    handle: Handle,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    end: CancellationToken,
    started: Instant,
    /// Sends the own thread out of the runtime.
    wanted: Notify,
    /// Whether callers drive, or have done so lately: the own thread is out of the runtime, or about to be.
    lent: AtomicBool,
    /// Whether the own thread is asked to drive again at once.
    wanted_back: AtomicBool,
    /// Callers inside [`DataPlane::drive`].
    inside: AtomicUsize,
    /// When the last of them left, in microseconds from `started`.
    left_micros: AtomicU64,
}

impl DataPlane {
    /// Starts the thread.
    pub fn start(name: &str) -> io::Result<Self> {
        let runtime = Arc::new(Builder::new_current_thread().enable_all().build()?);
        let handle = runtime.handle().clone();
        let shared = Arc::new(Shared {
            end: CancellationToken::new(),
            started: Instant::now(),
            wanted: Notify::new(),
            lent: AtomicBool::new(false),
            wanted_back: AtomicBool::new(false),
            inside: AtomicUsize::new(0),
            left_micros: AtomicU64::new(0),
        });
        let (own_runtime, own_shared) = (Arc::clone(&runtime), Arc::clone(&shared));
        let thread = thread::Builder::new().name(name.to_owned()).spawn(move || {
            own_shared.run(&own_runtime);
            end(own_runtime);
        })?;
        Ok(Self {
            runtime: Some(runtime),
            handle,
            shared,
            thread: Some(thread),
        })
    }

    /// Spawns onto the runtime, and blocks on it from threads that are not its own.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Blocks on `future`, and drives the runtime, sockets and tasks included, on the calling thread meanwhile. Must not be
    /// called from inside an async runtime.
    ///
    /// The first call in a while wakes the own thread to make it give way; the following ones wake nobody.
    pub fn drive<F: Future>(&self, future: F) -> F::Output {
        let runtime = self.runtime.as_ref().expect("there until this is dropped");
        let _inside = Inside::enter(&self.shared);
        if !self.shared.lent.swap(true, SeqCst) {
            self.shared.wanted.notify_one();
        }
        runtime.block_on(future)
    }

    /// Makes the own thread drive at once: for what is to go on while the caller computes.
    pub fn hand_back(&self) {
        if self.shared.lent.load(SeqCst)
            && !self.shared.wanted_back.swap(true, SeqCst)
            && let Some(thread) = &self.thread
        {
            thread.thread().unpark();
        }
    }
}

impl Shared {
    /// The own thread's life.
    fn run(&self, runtime: &Runtime) {
        loop {
            let lent = runtime.block_on(async {
                tokio::select! {
                    biased;
                    () = self.end.cancelled() => false,
                    () = self.wanted.notified() => true,
                }
            });
            if !lent {
                return;
            }
            while !self.end.is_cancelled() && !self.is_mine_again() {
                thread::park_timeout(LOOK_IN);
                if self.inside.load(SeqCst) == 0 {
                    // A turn without waiting: what has come is read, timers that are due fire.
                    runtime.block_on(async {
                        yield_now().await;
                        yield_now().await;
                    });
                }
            }
            // Only now: a caller that comes earlier finds it lent, and drives until it leaves; a later one notifies.
            self.wanted_back.store(false, SeqCst);
            self.lent.store(false, SeqCst);
        }
    }

    fn is_mine_again(&self) -> bool {
        let left = Duration::from_micros(self.left_micros.load(SeqCst));
        self.wanted_back.load(SeqCst)
            || (self.inside.load(SeqCst) == 0 && self.started.elapsed().saturating_sub(left) >= TAKE_BACK)
    }
}

/// A caller inside [`DataPlane::drive`].
struct Inside<'a>(&'a Shared);

impl<'a> Inside<'a> {
    fn enter(shared: &'a Shared) -> Self {
        shared.inside.fetch_add(1, SeqCst);
        Self(shared)
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        let now = u64::try_from(self.0.started.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.0.left_micros.store(now, SeqCst);
        self.0.inside.fetch_sub(1, SeqCst);
    }
}

/// Whoever lets go last ends the runtime.
fn end(runtime: Arc<Runtime>) {
    if let Some(runtime) = Arc::into_inner(runtime) {
        runtime.shutdown_timeout(END_GRACE);
    }
}

impl Drop for DataPlane {
    fn drop(&mut self) {
        self.shared.end.cancel();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != thread::current().id()
        {
            thread.thread().unpark();
            if thread.join().is_err() {
                tracing::error!("the data plane's thread panicked");
            }
        }
        if let Some(runtime) = self.runtime.take() {
            end(runtime);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use tokio::time::sleep;

    use super::*;

    fn name() -> Option<String> {
        thread::current().name().map(str::to_owned)
    }

    #[test]
    fn tasks_run_on_the_named_thread_and_end_with_it() {
        let plane = DataPlane::start("moerun-test").unwrap();
        let name = plane.handle().spawn(async { name() });
        assert_eq!(plane.handle().block_on(name).unwrap().as_deref(), Some("moerun-test"));
        let endless = plane.handle().spawn(std::future::pending::<()>());
        drop(plane);
        assert!(endless.is_finished());
    }

    #[test]
    fn a_caller_that_drives_runs_the_tasks_and_their_timers_itself() {
        let plane = DataPlane::start("moerun-test").unwrap();
        let here = thread::current().id();
        for _ in 0..3 {
            let task = plane.handle().spawn(async { thread::current().id() });
            plane.drive(async {});
            thread::sleep(Duration::from_millis(5)); // by now the own thread has made room
            let (ran_by, late) = plane.drive(async {
                let task = tokio::spawn(async { thread::current().id() });
                sleep(Duration::from_millis(1)).await;
                let late = tokio::time::timeout(Duration::from_millis(1), std::future::pending::<()>()).await;
                (task.await.unwrap(), late.is_err())
            });
            assert_eq!(ran_by, here);
            assert!(late);
            plane.handle().block_on(task).unwrap();
        }
        let endless = plane.handle().spawn(std::future::pending::<()>());
        drop(plane);
        assert!(endless.is_finished());
    }

    #[test]
    fn tasks_go_on_while_a_caller_that_has_driven_computes_and_the_own_thread_comes_back() {
        let plane = DataPlane::start("moerun-test").unwrap();
        for hand_back in [false, true] {
            plane.drive(async { sleep(Duration::from_millis(2)).await });
            if hand_back {
                plane.hand_back();
            }
            let (told, hears) = mpsc::channel();
            plane.handle().spawn(async move {
                for _ in 0..5 {
                    sleep(Duration::from_millis(1)).await;
                    told.send(name()).unwrap();
                }
            });
            for _ in 0..5 {
                // Nobody drives here: the own thread does, first by looking in.
                let by = hears.recv_timeout(Duration::from_secs(10)).unwrap();
                assert_eq!(by.as_deref(), Some("moerun-test"));
            }
        }
    }

    #[test]
    fn several_callers_drive_one_after_another_or_wait_for_each_other() {
        let plane = DataPlane::start("moerun-test").unwrap();
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for turn in 0..200 {
                        let value = plane.drive(async {
                            yield_now().await;
                            tokio::spawn(async move { turn }).await.unwrap()
                        });
                        assert_eq!(value, turn);
                        if turn % 50 == 0 {
                            plane.hand_back();
                        }
                    }
                });
            }
        });
    }
}
