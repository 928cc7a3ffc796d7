//! A process under test: started, killed, paused, started again; its log lines kept with their times.

use std::{
    io::{self, BufRead, BufReader, Read},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use crate::{LoadError, LogLine, RunClock};

/// How long a process may take to be ready.
const READY_TIMEOUT: Duration = Duration::from_secs(120);
/// How long one may take to end when it is told to.
const END_TIMEOUT: Duration = Duration::from_secs(60);

/// Log lines of all processes, in the order in which they were read.
#[derive(Debug, Clone, Default)]
pub(super) struct Logs(Arc<Mutex<Vec<LogLine>>>);

impl Logs {
    fn push(&self, line: LogLine) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(line);
    }

    /// All so far.
    pub(super) fn take(&self) -> Vec<LogLine> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What to start.
#[derive(Debug, Clone)]
pub(super) struct Program {
    /// Name in the history.
    pub(super) name: String,
    pub(super) path: PathBuf,
    pub(super) environment: Vec<(String, String)>,
    pub(super) args: Vec<String>,
    pub(super) clock: RunClock,
    pub(super) logs: Logs,
}

/// A process that runs, or did; killed when dropped. Its standard input is held open: it ends when this process does.
#[derive(Debug)]
pub(super) struct Process {
    program: Program,
    child: Child,
    address: String,
}

impl Process {
    /// Starts it and waits for its ready line. Blocks.
    pub(super) fn start(program: Program) -> Result<Self, LoadError> {
        let failed = |reason: String| LoadError::process(&program.name, reason);
        let mut child = Command::new(&program.path)
            .args(&program.args)
            .envs(program.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| failed(format!("{}: {error}", program.path.display())))?;
        let (lines, first) = mpsc::sync_channel(1);
        read_lines(child.stdout.take(), move |line| {
            let _ = lines.try_send(line); // only the first one matters
        });
        let (logs, name, clock) = (program.logs.clone(), program.name.clone(), program.clock);
        read_lines(child.stderr.take(), move |line| {
            logs.push(LogLine {
                at: clock.now(),
                process: name.clone(),
                line,
            });
        });
        let ready = first.recv_timeout(READY_TIMEOUT).unwrap_or_default();
        let Some(address) = ready.strip_prefix("ready grpc=") else {
            let _ = child.kill();
            let _ = child.wait();
            let said = program.logs.take().pop().map(|log| log.line).unwrap_or_default();
            return Err(failed(format!("no ready line within {READY_TIMEOUT:?}: {said}")));
        };
        Ok(Self {
            address: address.trim().to_owned(),
            program,
            child,
        })
    }

    /// Where it listens.
    pub(super) fn address(&self) -> &str {
        &self.address
    }

    /// Name in the history.
    pub(super) fn name(&self) -> &str {
        &self.program.name
    }

    /// Ends it as `kill -9` does.
    pub(super) fn kill(&mut self) {
        let _ = self.child.kill(); // it may have ended by itself
        let _ = self.child.wait();
    }

    /// Its process id.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends it as SIGTERM does; an error if it does not end, or not well. Blocks.
    pub(super) fn terminate(&mut self) -> Result<(), LoadError> {
        let failed = |reason: String| LoadError::process(&self.program.name, reason);
        signal(self.child.id(), Signal::TERM).map_err(|error| failed(error.to_string()))?;
        let until = Instant::now() + END_TIMEOUT;
        loop {
            match self.child.try_wait().map_err(|error| failed(error.to_string()))? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => return Err(failed(format!("ended with {status} when it was told to"))),
                None if Instant::now() > until => return Err(failed(format!("did not end in {END_TIMEOUT:?}"))),
                None => thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// What starts it again on the address that it had.
    pub(super) fn program(&self) -> Program {
        let mut program = self.program.clone();
        if let Some(at) = program.args.iter().position(|arg| arg == "--listen") {
            program.args[at + 1].clone_from(&self.address);
        }
        program
    }

    /// Stops it for `pause`, then lets it go on, even if this process is gone by then. Returns at once.
    pub(super) fn pause(&self, pause: Duration) -> Result<Child, LoadError> {
        let script = "kill -STOP \"$0\" && sleep \"$1\"; kill -CONT \"$0\"";
        Command::new("sh")
            .args([
                "-c",
                script,
                &self.child.id().to_string(),
                &pause.as_secs_f64().to_string(),
            ])
            .stdin(Stdio::null())
            .spawn()
            .map_err(|error| LoadError::process(&self.program.name, error))
    }
}

/// Stops a process most of the time until it is dropped: it gets one part in so many of the time.
pub(super) struct Throttle {
    pid: u32,
    end: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
    /// Lets the process go on when this one is gone, however that happens.
    _watch: Child,
}

impl Throttle {
    /// Of each `slowness` milliseconds the process runs for one.
    pub(super) fn start(process: &Process, slowness: u32) -> Result<Self, LoadError> {
        let pid = process.pid();
        let watch = Command::new("sh")
            .args(["-c", "cat >/dev/null; kill -CONT \"$0\"", &pid.to_string()])
            .stdin(Stdio::piped())
            .spawn()
            .map_err(|error| LoadError::process(process.name(), error))?;
        let end = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&end);
        let thread = thread::spawn(move || {
            // It may end meanwhile: then there is nothing to stop.
            while !ended.load(Relaxed) {
                let _ = signal(pid, Signal::STOP);
                thread::sleep(Duration::from_millis(u64::from(slowness - 1)));
                let _ = signal(pid, Signal::CONT);
                thread::sleep(Duration::from_millis(1));
            }
        });
        Ok(Self {
            pid,
            end,
            thread: Some(thread),
            _watch: watch,
        })
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.end.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = signal(self.pid, Signal::CONT);
        drop(self._watch.stdin.take());
        let _ = self._watch.wait();
    }
}

fn signal(pid: u32, signal: Signal) -> io::Result<()> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    Ok(kill_process(pid, signal)?)
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The thread ends with the stream, which ends with the process.
fn read_lines(stream: Option<impl Read + Send + 'static>, mut take: impl FnMut(String) + Send + 'static) {
    let Some(stream) = stream else { return };
    thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            take(line);
        }
    });
}
