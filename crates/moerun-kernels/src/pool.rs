//! The fork-join pool that computes: a fixed set of threads that spin while work is in flight, then park.

use std::{
    any::Any,
    cell::{Cell, UnsafeCell},
    fmt,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crate::{
    denormals::{FlushDenormals, flush_denormals},
    disjoint::Disjoint,
    workspace::IdleMemory,
};

/// How long an idle thread looks for work before it parks: longer than the gap between two sections of one layer.
const SPIN: Duration = Duration::from_micros(50);
/// Of that, how long it keeps its core; afterwards it looks again each time the system has nobody else to run.
const KEEP_CORE: Duration = Duration::from_micros(10);
/// Multiply-adds below which waking other threads costs more than they save.
const MIN_PARALLEL_WORK: usize = 1 << 16;

thread_local! {
    /// Whether this thread is inside a task.
    static IN_TASK: Cell<bool> = const { Cell::new(false) };
}

/// A fixed set of computing threads; the caller is one of them.
pub struct CpuPool {
    shared: Arc<Shared>,
    /// Held by the one caller whose job the workers see.
    caller: Mutex<()>,
    workers: Vec<JoinHandle<()>>,
    /// Memory of calls that have ended, for those that come.
    pub(crate) idle_memory: IdleMemory,
}

impl CpuPool {
    /// A pool in which `threads` threads compute, the caller of [`CpuPool::run`] included (so `threads - 1` are
    /// spawned; 0 counts as 1). Every computing thread flushes denormals; the caller does while it is inside `run`.
    ///
    /// # Panics
    /// If the system refuses to start a thread.
    pub fn new(threads: usize) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let shared = Arc::new(Shared::new(if threads > cores { Duration::ZERO } else { KEEP_CORE }));
        let workers = (1..threads)
            .map(|index| {
                let shared = Arc::clone(&shared);
                let thread = std::thread::Builder::new().name(format!("compute-{index}"));
                thread
                    .spawn(move || shared.work())
                    .expect("the system can start a thread")
            })
            .collect();
        Self {
            shared,
            caller: Mutex::new(()),
            workers,
            idle_memory: IdleMemory::default(),
        }
    }

    /// Threads that compute, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task(0) … task(tasks - 1)`, each once, on all threads; returns when all are done.
    ///
    /// Which thread runs which task is not defined, so a task's result must not depend on it. A panic in a task is
    /// passed on to the caller after all tasks have ended (of several, that of the lowest task). Calls from several
    /// threads are served one after another; a call from inside a task runs serially.
    pub fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let _flush = FlushDenormals::enter();
        let first_panic = if self.workers.is_empty() || tasks <= 1 || IN_TASK.get() {
            run_serially(tasks, task)
        } else {
            let _caller = lock(&self.caller);
            self.shared.run(tasks, task)
        };
        if let Some((_, payload)) = first_panic {
            resume_unwind(payload);
        }
    }

    /// Calls `task` with each of `items`, in parallel as [`CpuPool::run`] does.
    pub fn for_each<T: Send>(&self, items: &mut [T], task: impl Fn(&mut T) + Sync) {
        let tasks = items.len();
        let items = Disjoint::new(items);
        self.run(tasks, &|index| {
            // SAFETY: each index is one task's.
            let item = unsafe { items.part(index..index + 1) };
            task(&mut item[0]);
        });
    }

    /// [`CpuPool::run`], on the calling thread alone if all tasks together are less than `work` multiply-adds worth
    /// sharing.
    pub(crate) fn run_sized(&self, tasks: usize, work: usize, task: &(dyn Fn(usize) + Sync)) {
        if work >= MIN_PARALLEL_WORK {
            self.run(tasks, task);
            return;
        }
        let _flush = FlushDenormals::enter();
        if let Some((_, payload)) = run_serially(tasks, task) {
            resume_unwind(payload);
        }
    }
}

impl Drop for CpuPool {
    fn drop(&mut self) {
        self.shared.closed.store(true, SeqCst);
        self.shared.idle.wake_all();
        for worker in self.workers.drain(..) {
            // A worker catches what its tasks throw, so there is nothing to pass on.
            let _ = worker.join();
        }
    }
}

impl fmt::Debug for CpuPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CpuPool")
            .field("threads", &self.threads())
            .finish_non_exhaustive()
    }
}

/// The lowest task that panicked, and what it threw.
type FirstPanic = Option<(usize, Box<dyn Any + Send>)>;

fn run_serially(tasks: usize, task: &(dyn Fn(usize) + Sync)) -> FirstPanic {
    let mut first_panic = None;
    for index in 0..tasks {
        if let Err(payload) = run_task(task, index) {
            first_panic.get_or_insert((index, payload));
        }
    }
    first_panic
}

fn run_task(task: &(dyn Fn(usize) + Sync), index: usize) -> std::thread::Result<()> {
    let outer = IN_TASK.replace(true);
    let result = catch_unwind(AssertUnwindSafe(|| task(index)));
    IN_TASK.set(outer);
    result
}

/// What all threads see. A cache line each for the two counters that every thread writes.
struct Shared {
    unclaimed: OwnLine<AtomicUsize>,
    unfinished: OwnLine<AtomicUsize>,
    job: UnsafeCell<Option<Job>>,
    first_panic: Mutex<FirstPanic>,
    closed: AtomicBool,
    idle: Parking,
    joining: Parking,
    keep_core: Duration,
}

#[repr(align(128))]
struct OwnLine<T>(T);

#[derive(Clone, Copy)]
struct Job {
    tasks: usize,
    task: *const (dyn Fn(usize) + Sync),
}

// SAFETY: `job` is written only by the one caller, while no task is unfinished, and read only by a thread that has
// claimed a task and not yet finished it; the claim reads what the writer's store to `unclaimed` released. The task
// behind the pointer is `Sync`.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    fn new(keep_core: Duration) -> Self {
        Self {
            unclaimed: OwnLine(AtomicUsize::new(0)),
            unfinished: OwnLine(AtomicUsize::new(0)),
            job: UnsafeCell::new(None),
            first_panic: Mutex::new(None),
            closed: AtomicBool::new(false),
            idle: Parking::default(),
            joining: Parking::default(),
            keep_core,
        }
    }

    /// The caller's side; one caller at a time.
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) -> FirstPanic {
        // SAFETY: only the lifetime changes; the pointer is used only by claimed tasks, and this function does not
        // return before all tasks are finished.
        let task: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(task) };
        // SAFETY: the last job's tasks are all finished, so nobody reads it.
        unsafe { *self.job.get() = Some(Job { tasks, task }) };
        self.unfinished.0.store(tasks, SeqCst);
        self.unclaimed.0.store(tasks, SeqCst);
        self.idle.wake(tasks - 1);
        while self.run_one() {}
        let finished = || self.unfinished.0.load(SeqCst) == 0;
        if !self.spin_until(finished) {
            self.joining.wait_until(finished);
        }
        lock(&self.first_panic).take()
    }

    /// A worker's side.
    fn work(&self) {
        flush_denormals();
        let called = || self.unclaimed.0.load(SeqCst) > 0 || self.closed.load(SeqCst);
        while !self.closed.load(SeqCst) {
            while self.run_one() {}
            if !self.spin_until(called) {
                self.idle.wait_until(called);
            }
        }
    }

    /// Claims a task and runs it; false if none is left.
    fn run_one(&self) -> bool {
        let claim = self
            .unclaimed
            .0
            .fetch_update(SeqCst, SeqCst, |unclaimed| unclaimed.checked_sub(1));
        let Ok(unclaimed) = claim else {
            return false;
        };
        // SAFETY: a claimed task is unfinished, so the job is not being written. A claim by a thread that was late
        // for one job and came in time for the next is a claim on the next: the job is read after it.
        let Job { tasks, task } =
            unsafe { *self.job.get() }.expect("a job was stored before its tasks could be claimed");
        let index = tasks - unclaimed;
        // SAFETY: the caller keeps the task alive until all are finished, and this one is not.
        if let Err(payload) = run_task(unsafe { &*task }, index) {
            let mut first_panic = lock(&self.first_panic);
            if first_panic.as_ref().is_none_or(|&(first, _)| index < first) {
                *first_panic = Some((index, payload));
            }
        }
        if self.unfinished.0.fetch_sub(1, SeqCst) == 1 {
            self.joining.wake_all();
        }
        true
    }

    /// Waits for a short while without parking; whether `ready` became true.
    fn spin_until(&self, ready: impl Fn() -> bool) -> bool {
        let start = Instant::now();
        loop {
            for _ in 0..32 {
                if ready() {
                    return true;
                }
                std::hint::spin_loop();
            }
            let elapsed = start.elapsed();
            if elapsed >= SPIN {
                return false;
            }
            if elapsed >= self.keep_core {
                std::thread::yield_now();
            }
        }
    }
}

/// Where threads sleep until something is true. Whoever makes it true does so with a `SeqCst` store and then wakes:
/// either it sees the sleeper, or the sleeper, who announces itself before it looks, sees the store.
#[derive(Default)]
struct Parking {
    sleepers: AtomicUsize,
    lock: Mutex<()>,
    condvar: Condvar,
}

impl Parking {
    fn wait_until(&self, ready: impl Fn() -> bool) {
        let mut guard = lock(&self.lock);
        self.sleepers.fetch_add(1, SeqCst);
        while !ready() {
            guard = self.condvar.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, SeqCst);
    }

    fn wake(&self, count: usize) {
        let sleepers = self.sleepers.load(SeqCst);
        if sleepers == 0 {
            return;
        }
        drop(lock(&self.lock)); // a sleeper that has announced itself is now waiting, or has looked again
        if count >= sleepers {
            self.condvar.notify_all();
        } else {
            (0..count).for_each(|_| self.condvar.notify_one());
        }
    }

    fn wake_all(&self) {
        self.wake(usize::MAX);
    }
}

/// No state guarded here can be left half changed, so a poisoned lock is as good as any.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, sync::Barrier};

    use super::*;

    fn message(payload: Box<dyn Any + Send>) -> String {
        *payload.downcast::<String>().expect("a formatted panic")
    }

    #[test]
    fn every_task_runs_once_for_any_number_of_threads_and_tasks() {
        for threads in [0, 1, 2, 3, 5] {
            let pool = CpuPool::new(threads);
            assert_eq!(pool.threads(), threads.max(1));
            for tasks in [0, 1, 2, 3, 7, 100, 1000] {
                for _ in 0..20 {
                    let runs: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                    pool.run(tasks, &|index| {
                        runs[index].fetch_add(1, SeqCst);
                    });
                    assert!(
                        runs.iter().all(|runs| runs.load(SeqCst) == 1),
                        "{threads} threads, {tasks} tasks"
                    );
                }
            }
        }
    }

    #[test]
    fn each_item_is_given_to_one_task() {
        for threads in [1, 3] {
            let mut items: Vec<usize> = (0..100).collect();
            CpuPool::new(threads).for_each(&mut items, |item| *item += 1000);
            assert!(items.into_iter().eq(1000..1100));
        }
    }

    #[test]
    fn tasks_run_at_the_same_time() {
        let pool = CpuPool::new(3);
        let all_here = Barrier::new(3);
        let threads = Mutex::new(HashSet::new());
        pool.run(3, &|_| {
            all_here.wait();
            lock(&threads).insert(std::thread::current().id());
        });
        assert_eq!(lock(&threads).len(), 3);
    }

    #[test]
    fn parked_threads_wake_for_the_next_job() {
        let pool = CpuPool::new(2);
        for _ in 0..5 {
            while pool.shared.idle.sleepers.load(SeqCst) == 0 {
                std::thread::yield_now();
            }
            let both_here = Barrier::new(2);
            pool.run(2, &|_| {
                both_here.wait();
            });
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_after_all_tasks_and_the_pool_stays_usable() {
        for threads in [1, 2, 3] {
            let pool = CpuPool::new(threads);
            for round in 0..20 {
                let finished = AtomicUsize::new(0);
                let result = catch_unwind(AssertUnwindSafe(|| {
                    pool.run(50, &|index| {
                        if index % 10 == 3 {
                            panic!("task {index} failed");
                        }
                        finished.fetch_add(1, SeqCst);
                    });
                }));
                assert_eq!(
                    message(result.expect_err("a task panicked")),
                    "task 3 failed",
                    "round {round}"
                );
                assert_eq!(finished.load(SeqCst), 45);
            }
            let sum = AtomicUsize::new(0);
            pool.run(10, &|index| {
                sum.fetch_add(index, SeqCst);
            });
            assert_eq!(sum.load(SeqCst), 45);
        }
    }

    #[test]
    fn a_call_from_inside_a_task_runs_serially_on_that_thread() {
        let pool = CpuPool::new(3);
        let sum = AtomicUsize::new(0);
        pool.run(8, &|outer| {
            let thread = std::thread::current().id();
            pool.run(8, &|inner| {
                assert_eq!(std::thread::current().id(), thread);
                sum.fetch_add(outer * 8 + inner, SeqCst);
            });
        });
        assert_eq!(sum.load(SeqCst), 63 * 64 / 2);
    }

    #[test]
    fn callers_on_several_threads_are_served_one_after_another() {
        let pool = CpuPool::new(2);
        let inside = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let own = AtomicUsize::new(0);
                        pool.run(5, &|index| {
                            assert!(inside.fetch_add(1, SeqCst) < 2, "two jobs at once");
                            own.fetch_add(index, SeqCst);
                            inside.fetch_sub(1, SeqCst);
                        });
                        assert_eq!(own.load(SeqCst), 10);
                    }
                });
            }
        });
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn every_computing_thread_flushes_denormals_and_the_caller_only_inside() {
        use crate::denormals::tests::flushes;
        let pool = CpuPool::new(2);
        let both_here = Barrier::new(2);
        pool.run(2, &|_| {
            both_here.wait();
            assert!(flushes());
        });
        pool.run_sized(1, 0, &|_| assert!(flushes()));
        assert!(!flushes());
    }
}
