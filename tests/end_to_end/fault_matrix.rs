//! What holds when things break, row by row of the fault matrix. Each row prints its figure, and adds it to the file
//! `fault-matrix.txt` of the target folder, so that all stand in one place; a row that this host cannot run says what it
//! lacks.

mod chaos;
mod clock;
mod degraded;
mod discovery;
mod disk;
mod gateway_faults;
mod identity;
mod links;
mod live;
mod lost_worker;
mod memory;
mod not_finite;
mod planted;

use std::{
    fs::OpenOptions,
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use moerun_loadtest::{
    Case, Entry, GrpcTarget, History, Limits, Outcome, Reference, RequestRecord, RunClock, RunInfo, Verdict, Workload,
    check, send,
};
use moerun_proto::v1::{self, admin_service_client::AdminServiceClient, get_stats_response::Role};
use moerun_tests::{Golden, Server};
use tokio::{sync::mpsc, task::JoinHandle};

/// Where the figures of all rows are gathered.
fn figures_file() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("fault-matrix.txt")
}

/// Prints a row's figure, and keeps it.
fn figure(row: u32, text: impl AsRef<str>) {
    let line = format!("row {row}: {}\n", text.as_ref());
    eprint!("{line}");
    let file = OpenOptions::new().create(true).append(true).open(figures_file());
    let kept = file.and_then(|mut file| file.write_all(line.as_bytes())); // one call: rows run side by side
    kept.expect("the target folder is writable");
}

/// Says that this host cannot run a row, and why.
fn skipped(row: u32, lacks: &str) {
    figure(row, format!("SKIPPED, this host lacks {lacks}"));
}

fn path(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

fn worker(model: &Path, extra: &[&str]) -> Server {
    Server::start(&[&["worker", "--model", path(model), "--listen", "127.0.0.1:0"], extra].concat())
}

fn gateway(model: &Path, workers: &[&str]) -> Server {
    Server::start(&gateway_args(model, workers))
}

fn gateway_args(model: &Path, workers: &[&str]) -> Vec<String> {
    let mut args = vec!["gateway", "--model", path(model), "--grpc-addr", "127.0.0.1:0"];
    for worker in workers {
        args.extend(["--worker", worker]);
    }
    args.into_iter().map(str::to_owned).collect()
}

/// Figures of a process.
async fn stats(address: &str) -> v1::GetStatsResponse {
    let client = AdminServiceClient::connect(format!("http://{address}")).await;
    let asked = client.expect("it listens").get_stats(v1::GetStatsRequest {}).await;
    asked.expect("it answers").into_inner()
}

/// Figures of a worker.
async fn worker_stats(address: &str) -> (v1::ProcessStats, v1::WorkerStats) {
    let response = stats(address).await;
    match (response.process, response.role) {
        (Some(process), Some(Role::Worker(worker))) => (process, worker),
        other => panic!("not the figures of a worker: {other:?}"),
    }
}

/// The golden prompts and what follows them.
fn golden_cases(golden: &Golden) -> (Vec<Case>, Vec<Reference>) {
    let greedy = golden.greedy();
    let cases = golden.prompts().into_iter().zip(&greedy).map(|(prompt, tokens)| Case {
        prompt,
        max_tokens: tokens.len() as u32,
    });
    let references = greedy.iter().enumerate().map(|(case, tokens)| Reference {
        case,
        tokens: tokens.clone(),
    });
    (cases.collect(), references.collect())
}

/// A load under way on a gateway: golden prompts, `per_second` requests for `seconds`.
struct Load {
    clock: RunClock,
    references: Vec<Reference>,
    sending: JoinHandle<()>,
    records: mpsc::Receiver<Entry>,
    deadline: Duration,
}

impl Load {
    fn start(address: &str, golden: &Golden, per_second: u32, seconds: u32) -> Self {
        let (cases, references) = golden_cases(golden);
        let deadline = Duration::from_secs(10);
        let workload = Workload {
            sends: (0..per_second * seconds)
                .map(|index| {
                    (
                        Duration::from_secs(1) * index / per_second,
                        index as usize % cases.len(),
                    )
                })
                .collect(),
            cases,
            deadline,
            max_outstanding: 4096,
        };
        let target = Arc::new(GrpcTarget::new(address, 2).expect("an address"));
        let clock = RunClock::start();
        let (sender, records) = mpsc::channel(4096);
        let sending = tokio::spawn(send(workload, target, clock, sender));
        Self {
            clock,
            references,
            sending,
            records,
            deadline,
        }
    }

    /// Waits for all to end.
    async fn history(mut self) -> History {
        self.sending.await.expect("sending does not panic");
        let mut history = History {
            run: RunInfo {
                deadline: self.deadline.as_micros() as u64,
                ..RunInfo::default()
            },
            references: self.references,
            ..History::default()
        };
        while let Some(entry) = self.records.recv().await {
            history.push(entry);
        }
        history.requests.sort_by_key(|request| request.id);
        history
    }
}

/// I1 and I2: whatever else happened, no wrong token and one end for each.
#[track_caller]
fn assert_exact(history: &History) {
    let verdicts = check(history, &Limits::default());
    let broken: Vec<String> = verdicts[..2]
        .iter()
        .filter(|it| !it.holds())
        .map(Verdict::to_string)
        .collect();
    assert!(broken.is_empty(), "{}", broken.join("\n"));
    assert!(verdicts[0].checked > 0);
}

fn finished(request: &RequestRecord) -> bool {
    matches!(request.terminals.as_slice(), [terminal] if matches!(terminal.outcome, Outcome::Finished(_)))
}
