//! Worker processes on this machine, started and stopped with this one.

use std::{
    io::{self, BufRead, BufReader},
    path::PathBuf,
    process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, RecvTimeoutError, SyncSender},
    },
    thread,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

/// Between looks at a process that should end.
const POLL: Duration = Duration::from_millis(10);
/// What a worker prints before its address once it is ready.
const READY: &str = "ready grpc=";

/// Which processes to start.
#[derive(Debug, Clone)]
pub struct LocalWorkersConfig {
    /// The executable.
    pub program: PathBuf,
    /// Arguments of each worker. They must make it listen on a free port of loopback, print `ready grpc=ADDRESS` on
    /// standard output when it is ready, and drain when its standard input ends.
    pub arguments: Vec<Vec<String>>,
    /// How long they may take to be ready.
    pub ready_timeout: Duration,
    /// How long they may take to end before they are killed.
    pub stop_grace: Duration,
}

/// Why local workers did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LocalWorkersError {
    /// The process could not be started.
    #[error("start worker process {index} ({}): {source}", program.display())]
    Spawn {
        /// Which, from 0.
        index: usize,
        /// The executable.
        program: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The process ended before it was ready; its own words are on standard error.
    #[error("worker process {index} ended before it was ready: {status}")]
    Ended {
        /// Which, from 0.
        index: usize,
        /// How it ended.
        status: String,
    },
    /// The process said nothing in time.
    #[error("worker process {index} was not ready within {waited:?}")]
    NotReady {
        /// Which, from 0.
        index: usize,
        /// What was allowed.
        waited: Duration,
    },
}

/// Running worker processes. Dropping this stops them; should this process be killed instead, the end of their standard
/// input tells them.
#[derive(Debug)]
pub struct LocalWorkers {
    addresses: Vec<String>,
    processes: Vec<Process>,
    stopping: Arc<AtomicBool>,
    stop_grace: Duration,
}

#[derive(Debug)]
struct Process {
    child: Arc<Mutex<Child>>,
    stdin: Option<ChildStdin>,
    watcher: Option<thread::JoinHandle<()>>,
}

impl LocalWorkers {
    /// Starts all, then waits until all are ready; if one fails, the others are stopped.
    pub fn start(config: LocalWorkersConfig) -> Result<Self, LocalWorkersError> {
        let begun = Instant::now();
        let mut workers = Self {
            addresses: Vec::new(),
            processes: Vec::new(),
            stopping: Arc::new(AtomicBool::new(false)),
            stop_grace: config.stop_grace,
        };
        let mut ready = Vec::with_capacity(config.arguments.len());
        for (index, arguments) in config.arguments.iter().enumerate() {
            let (said_ready, waits) = mpsc::sync_channel(1);
            let program = config.program.clone();
            workers
                .spawn(index, &config.program, arguments, said_ready)
                .map_err(|source| LocalWorkersError::Spawn { index, program, source })?;
            ready.push(waits);
        }
        for (index, ready) in ready.iter().enumerate() {
            let address = match ready.recv_timeout(config.ready_timeout.saturating_sub(begun.elapsed())) {
                Ok(address) => address,
                Err(RecvTimeoutError::Timeout) => {
                    return Err(LocalWorkersError::NotReady {
                        index,
                        waited: config.ready_timeout,
                    });
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let status = workers
                        .status(index)
                        .map_or_else(|| "its output ended".to_owned(), |it| it.to_string());
                    return Err(LocalWorkersError::Ended { index, status });
                }
            };
            workers.addresses.push(address);
        }
        Ok(workers)
    }

    /// Their addresses, in the order of the arguments.
    pub fn addresses(&self) -> &[String] {
        &self.addresses
    }

    /// Ids of their processes, in the order of the arguments.
    pub fn process_ids(&self) -> Vec<u32> {
        self.processes.iter().map(|process| process.child.lock().id()).collect()
    }

    /// Asks all to drain, waits for them, and kills what has not ended after the grace period. Dropping does the same.
    pub fn stop(self) {
        drop(self);
    }

    fn spawn(
        &mut self,
        index: usize,
        program: &PathBuf,
        arguments: &[String],
        ready: SyncSender<String>,
    ) -> io::Result<()> {
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        // A process group of its own: Ctrl-C on the terminal is for the gateway, which still needs them to drain.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let mut child = command.spawn()?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let child = Arc::new(Mutex::new(child));
        self.processes.push(Process {
            child: Arc::clone(&child),
            stdin,
            watcher: None,
        });
        let stopping = Arc::clone(&self.stopping);
        let watcher = thread::Builder::new()
            .name(format!("moerun-child-{index}"))
            .spawn(move || watch(index, stdout, ready, &child, &stopping))?;
        if let Some(process) = self.processes.last_mut() {
            process.watcher = Some(watcher);
        }
        Ok(())
    }

    /// How a process ended, if it does so about now.
    fn status(&self, index: usize) -> Option<ExitStatus> {
        let until = Instant::now() + Duration::from_secs(1);
        wait_until(&self.processes.get(index)?.child, until)
    }
}

impl Drop for LocalWorkers {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Relaxed);
        for process in &mut self.processes {
            process.stdin = None;
        }
        let until = Instant::now() + self.stop_grace;
        for (index, process) in self.processes.iter_mut().enumerate() {
            if wait_until(&process.child, until).is_none() {
                tracing::warn!(
                    "worker process {index} did not end within {:?}: killed",
                    self.stop_grace
                );
                let mut child = process.child.lock();
                if let Err(error) = child.kill().and_then(|()| child.wait().map(drop)) {
                    tracing::error!("worker process {index} cannot be killed: {error}");
                    continue;
                }
            }
            if let Some(watcher) = process.watcher.take()
                && watcher.join().is_err()
            {
                tracing::error!("the watcher of worker process {index} panicked");
            }
        }
    }
}

/// Reads a worker's standard output: its ready line, and its end.
fn watch(
    index: usize,
    stdout: Option<ChildStdout>,
    ready: SyncSender<String>,
    child: &Mutex<Child>,
    stopping: &AtomicBool,
) {
    let mut ready = Some(ready);
    for line in stdout
        .into_iter()
        .flat_map(|stdout| BufReader::new(stdout).lines())
        .map_while(Result::ok)
    {
        match line.strip_prefix(READY) {
            Some(address) => {
                // Room for one; a second ready line has nobody to tell.
                if let Some(ready) = ready.take() {
                    let _ = ready.try_send(address.trim().to_owned());
                }
            }
            None => tracing::info!("worker process {index}: {line}"),
        }
    }
    drop(ready);
    if !stopping.load(Ordering::Relaxed) {
        match wait_until(child, Instant::now() + Duration::from_secs(1)) {
            Some(status) => tracing::error!("worker process {index} ended: {status}"),
            None => tracing::warn!("worker process {index} closed its standard output"),
        }
    }
}

/// Polls, so that the lock is free in between and a process can be killed.
fn wait_until(child: &Mutex<Child>, until: Instant) -> Option<ExitStatus> {
    loop {
        match child.lock().try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) => {}
            Err(error) => {
                tracing::error!("wait for a worker process: {error}");
                return None;
            }
        }
        if Instant::now() >= until {
            return None;
        }
        thread::sleep(POLL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(scripts: &[&str]) -> LocalWorkersConfig {
        LocalWorkersConfig {
            program: "/bin/sh".into(),
            arguments: scripts
                .iter()
                .map(|script| vec!["-c".to_owned(), (*script).to_owned()])
                .collect(),
            ready_timeout: Duration::from_secs(5),
            stop_grace: Duration::from_millis(500),
        }
    }

    fn is_alive(process_id: u32) -> bool {
        std::path::Path::new(&format!("/proc/{process_id}")).exists()
    }

    #[test]
    fn ready_lines_give_addresses_and_the_end_of_input_ends_them() {
        let script = |port: u32| format!("echo hello; echo ready grpc=127.0.0.1:{port}; read -r line");
        let workers = LocalWorkers::start(shell(&[&script(1), &script(2)])).unwrap();
        assert_eq!(workers.addresses(), ["127.0.0.1:1", "127.0.0.1:2"]);
        let ids = workers.process_ids();
        assert!(ids.iter().all(|&id| is_alive(id)));
        let begun = Instant::now();
        workers.stop();
        assert!(begun.elapsed() < Duration::from_millis(500), "nobody had to be killed");
        assert!(!ids.iter().any(|&id| is_alive(id)));
    }

    #[test]
    fn a_worker_that_dies_before_it_is_ready_is_named() {
        let error = LocalWorkers::start(shell(&["echo ready grpc=a:1; read -r line", "exit 3"])).unwrap_err();
        assert_eq!(
            error.to_string(),
            "worker process 1 ended before it was ready: exit status: 3"
        );
    }

    #[test]
    fn a_worker_that_never_gets_ready_is_named_and_killed() {
        let mut config = shell(&["trap '' TERM; exec sleep 60"]);
        config.ready_timeout = Duration::from_millis(100);
        let error = LocalWorkers::start(config).unwrap_err();
        assert_eq!(error.to_string(), "worker process 0 was not ready within 100ms");
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let config = LocalWorkersConfig {
            program: "/nowhere/moerun".into(),
            ..shell(&["exit 0"])
        };
        let error = LocalWorkers::start(config).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("start worker process 0 (/nowhere/moerun): "),
            "{error}"
        );
    }
}
