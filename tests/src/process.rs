//! Starting `moerun`, waiting for it, and never leaving a process behind.

use std::{
    io::{BufRead, BufReader, Read},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Mutex, OnceLock, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

/// How long a command of a test may take before it is killed.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(120);

/// Features of the binary under test.
const FEATURES: &[&str] = if cfg!(feature = "etcd") {
    &["--features", "moerun/etcd"]
} else {
    &[]
};

/// The binary under test, built once per run in the profile of the tests themselves.
pub fn moerun() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| build("moerun", FEATURES))
}

/// The binary in which violations of the invariants can be planted. It shares all but a few crates with [`moerun`].
pub fn moerun_planted() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| build("moerun-planted", &["--features", "moerun/planted-violations"]))
}

fn build(binary: &str, more: &[&str]) -> PathBuf {
    let tests = std::env::current_exe().expect("a test has a path");
    let profile_dir = tests.ancestors().nth(2).expect("target/PROFILE/deps/TEST").to_owned();
    let mut build = Command::new(env!("CARGO"));
    build
        .args(["build", "--quiet", "--workspace", "--bin", binary])
        .args(more)
        .current_dir(env!("CARGO_MANIFEST_DIR"));
    if profile_dir.ends_with("release") {
        build.arg("--release");
    }
    assert!(
        build.status().expect("cargo starts").success(),
        "the binary does not build"
    );
    profile_dir.join(binary)
}

/// What a command left.
#[derive(Debug)]
pub struct Finished {
    /// Exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Finished {
    /// Standard output of a command that must have succeeded.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        self.stdout
    }

    /// Standard error of a command that must have failed with `code`, and must not have panicked.
    #[track_caller]
    pub fn failed(self, code: i32) -> String {
        assert_eq!(
            self.code,
            Some(code),
            "stdout: {}\nstderr: {}",
            self.stdout,
            self.stderr
        );
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        self.stderr
    }
}

/// Runs `moerun` with `args` to its end.
pub fn run<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> Finished {
    run_for(args, COMMAND_TIMEOUT)
}

/// Runs `moerun` with `args` to its end, or kills it (and the test) after `timeout`.
pub fn run_for<S: AsRef<std::ffi::OsStr>>(args: &[S], timeout: Duration) -> Finished {
    run_in(&[], args, timeout)
}

/// Runs `moerun` with `args` and more `variables` in its environment.
pub fn run_with<S: AsRef<std::ffi::OsStr>>(variables: &[(&str, &str)], args: &[S]) -> Finished {
    run_in(variables, args, COMMAND_TIMEOUT)
}

fn run_in<S: AsRef<std::ffi::OsStr>>(variables: &[(&str, &str)], args: &[S], timeout: Duration) -> Finished {
    let mut child = Command::new(moerun())
        .args(args)
        .envs(variables.iter().copied())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    let stdout = collect(child.stdout.take().expect("piped"));
    let stderr = collect(child.stderr.take().expect("piped"));
    let deadline = Instant::now() + timeout;
    let status = loop {
        if let Some(status) = child.try_wait().expect("a child of ours") {
            break status;
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            let shown: Vec<_> = args
                .iter()
                .map(|arg| arg.as_ref().to_string_lossy().into_owned())
                .collect();
            panic!(
                "moerun {} did not end within {timeout:?}: {}",
                shown.join(" "),
                join(stderr)
            );
        }
        thread::sleep(Duration::from_millis(5));
    };
    Finished {
        code: status.code(),
        stdout: join(stdout),
        stderr: join(stderr),
    }
}

fn collect(mut stream: impl Read + Send + 'static) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        bytes
    })
}

fn join(thread: thread::JoinHandle<Vec<u8>>) -> String {
    String::from_utf8_lossy(&thread.join().expect("reading does not panic")).into_owned()
}

/// A serving `moerun` process; killed when dropped.
#[derive(Debug)]
pub struct Server {
    child: Child,
    /// Kept open: a process started with `--exit-with-parent` would end without it.
    _stdin: ChildStdin,
    /// The address of its `ready grpc=…` line.
    pub addr: String,
    /// The address of its health door, if it has one.
    pub health: Option<String>,
    stdout: Lines,
    stderr: Lines,
    /// What [`Server::wait_for_log`] has passed over.
    passed: Mutex<Vec<String>>,
}

impl Server {
    /// Starts `moerun` with `args` and waits for its ready line.
    #[track_caller]
    pub fn start<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> Server {
        Server::start_with(&[], args)
    }

    /// Starts `moerun` with `args` and more `variables` in its environment, and waits for its ready line.
    #[track_caller]
    pub fn start_with<S: AsRef<std::ffi::OsStr>>(variables: &[(&str, &str)], args: &[S]) -> Server {
        match Server::await_ready(spawn(variables, args)) {
            Ok(server) => server,
            Err(finished) => panic!("no ready line, exit code {:?}: {}", finished.code, finished.stderr),
        }
    }

    /// Starts `moerun` with `args` and waits for nothing: its address is not known.
    pub fn spawn<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> Server {
        let (child, stdin, stdout, stderr) = spawn(&[], args);
        Server {
            child,
            _stdin: stdin,
            addr: "an address not waited for".to_owned(),
            health: None,
            stdout,
            stderr,
            passed: Mutex::default(),
        }
    }

    /// Starts `moerun` with `args`; if it ends without a ready line, says what it left.
    pub fn try_start<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> Result<Server, Finished> {
        Server::await_ready(spawn(&[], args))
    }

    fn await_ready((mut child, stdin, stdout, stderr): Spawned) -> Result<Server, Finished> {
        let first = stdout.recv_timeout(COMMAND_TIMEOUT);
        match first.ok().as_deref().and_then(|line| line.strip_prefix("ready grpc=")) {
            Some(doors) => {
                let (addr, health) = match doors.split_once(" health=") {
                    Some((addr, health)) => (addr, Some(health.trim().to_owned())),
                    None => (doors, None),
                };
                Ok(Server {
                    child,
                    _stdin: stdin,
                    addr: addr.trim().to_owned(),
                    health,
                    stdout,
                    stderr,
                    passed: Mutex::default(),
                })
            }
            None => {
                let deadline = Instant::now() + Duration::from_secs(5);
                let mut status = None;
                while status.is_none() && Instant::now() < deadline {
                    status = child.try_wait().expect("a child of ours");
                    thread::sleep(Duration::from_millis(5));
                }
                let _ = child.kill();
                let _ = child.wait();
                let stderr = stderr.iter().collect::<Vec<_>>().join("\n");
                Err(Finished {
                    code: status.and_then(|status| status.code()),
                    stdout: String::new(),
                    stderr,
                })
            }
        }
    }

    /// Waits for the ready line of a process that [`Server::spawn`] started.
    #[track_caller]
    pub fn wait_until_ready(&mut self) {
        let line = self.stdout.recv_timeout(COMMAND_TIMEOUT).unwrap_or_default();
        let Some(doors) = line.strip_prefix("ready grpc=") else {
            panic!("no ready line: {line:?}\n{}", self.log());
        };
        self.addr = doors.split(" health=").next().unwrap_or_default().trim().to_owned();
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Kills the process as `kill -9` does, and reaps it.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Sends SIGTERM.
    pub fn terminate(&self) {
        let sent = Command::new("kill")
            .args(["-TERM", &self.child.id().to_string()])
            .status();
        assert!(sent.expect("kill starts").success());
    }

    /// Waits for the process to end by itself.
    #[track_caller]
    pub fn wait(&mut self, timeout: Duration) -> Option<i32> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.child.try_wait().expect("a child of ours") {
                return status.code();
            }
            assert!(Instant::now() < deadline, "the process did not end within {timeout:?}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for a log line with `words`.
    #[track_caller]
    pub fn wait_for_log(&self, words: &str) {
        let deadline = Instant::now() + COMMAND_TIMEOUT;
        let mut seen = self.passed.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match self
                .stderr
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            {
                Ok(line) => {
                    let found = line.contains(words);
                    seen.push(line);
                    if found {
                        return;
                    }
                }
                Err(_) => panic!("no log line with {words:?}: {}", seen.join("\n")),
            }
        }
    }

    /// Stops the process where it is (SIGSTOP), or lets it go on (SIGCONT).
    pub fn pause(&self, paused: bool) {
        let signal = if paused { "-STOP" } else { "-CONT" };
        let sent = Command::new("kill")
            .args([signal, &self.child.id().to_string()])
            .status();
        assert!(sent.expect("kill starts").success());
    }

    /// Sends SIGHUP: files are looked at.
    pub fn hang_up(&self) {
        let sent = Command::new("kill")
            .args(["-HUP", &self.child.id().to_string()])
            .status();
        assert!(sent.expect("kill starts").success());
    }

    /// Ends the process as SIGTERM does, and returns all that it wrote since it was ready.
    #[track_caller]
    pub fn finish(&mut self) -> String {
        self.terminate();
        self.wait(Duration::from_secs(60));
        // Both channels end with the process.
        let passed = std::mem::take(self.passed.get_mut().unwrap_or_else(PoisonError::into_inner));
        let lines: Vec<String> = passed
            .into_iter()
            .chain(self.stdout.iter())
            .chain(self.stderr.iter())
            .collect();
        lines.join("\n")
    }

    /// Log lines so far.
    pub fn log(&self) -> String {
        self.stderr.try_iter().collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
        if thread::panicking() {
            eprintln!("log of the server at {}:\n{}", self.addr, self.log());
        }
    }
}

type Lines = mpsc::Receiver<String>;

type Spawned = (Child, ChildStdin, Lines, Lines);

/// A process with its standard input, and the lines of its standard output and error.
fn spawn<S: AsRef<std::ffi::OsStr>>(variables: &[(&str, &str)], args: &[S]) -> Spawned {
    let mut child = Command::new(moerun())
        .args(args)
        .envs(variables.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    let stdin = child.stdin.take().expect("piped");
    let stdout = lines(child.stdout.take().expect("piped"));
    let stderr = lines(child.stderr.take().expect("piped"));
    (child, stdin, stdout, stderr)
}

fn lines(stream: impl Read + Send + 'static) -> Lines {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    receiver
}

/// A loopback port that was free a moment ago, for addresses nobody must be listening on.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .expect("loopback")
        .port()
}
