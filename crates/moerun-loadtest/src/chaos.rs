//! Faults beside a load: real processes, a seeded schedule of what is broken when, a history, a report.
//!
//! Workers and a gateway are started from the binary under test, each worker behind a proxy where one is needed. What the
//! cases give where nothing is broken is asked of another process, which has all experts itself. Then come, beside one
//! open-loop load: a stretch without faults, the faults, one after another with pauses in which everything must have
//! healed, and a last stretch. The history is judged by [`crate::check()`].

mod bars;
mod cluster;
mod faults;
mod process;
mod report;
mod sampling;
mod streams;

use std::{path::PathBuf, str::FromStr, sync::Arc, time::Duration};

use tokio::sync::mpsc;

pub use bars::{Figure, figures};
pub use faults::FaultKind;
pub use report::Report;

use crate::{
    Arrivals, Case, Entry, GrpcTarget, History, Limits, LoadError, Phase, Reference, RunClock, RunInfo, Workload,
    check, clock::micros, send, send_times,
};
use cluster::Cluster;
use faults::Planned;
use sampling::Sampler;

/// Stretch without faults before the first.
const BASELINE: Duration = Duration::from_secs(3);
/// Stretch that is judged after everything had time to heal.
const AFTERWARDS: Duration = Duration::from_secs(3);
/// Between two samples of one process.
const SAMPLE_EVERY: Duration = Duration::from_millis(200);
/// How long everything may take to end after the load.
const SETTLE: Duration = Duration::from_secs(5);
/// Different prompts.
const CASES: usize = 12;
/// Longest prompt, in tokens.
const MAX_PROMPT: usize = 12;

/// What to run.
#[derive(Debug, Clone)]
pub struct ChaosConfig {
    /// The binary under test.
    pub program: PathBuf,
    /// Environment variables of its processes, beside those of this one.
    pub environment: Vec<(String, String)>,
    /// Checkpoint.
    pub model: PathBuf,
    /// Worker processes, at least one.
    pub workers: usize,
    /// Workers that hold each expert, 1 to `workers`.
    pub holders: usize,
    /// How long faults are begun.
    pub duration: Duration,
    /// Requests a second.
    pub rate: f64,
    /// Tokens a request asks for.
    pub max_tokens: u32,
    /// How long a request may take.
    pub deadline: Duration,
    /// Decides faults, prompts and send times.
    pub seed: u64,
    /// What may be broken; nothing = a load alone.
    pub faults: Vec<FaultKind>,
    /// Folder for the report, the history and the logs; made if it is not there.
    pub report: PathBuf,
}

impl ChaosConfig {
    /// Three workers that hold each expert once, a kill and a pause within 20 s, ten requests a second.
    pub fn new(program: impl Into<PathBuf>, model: impl Into<PathBuf>, report: impl Into<PathBuf>) -> Self {
        Self {
            program: program.into(),
            environment: Vec::new(),
            model: model.into(),
            workers: 3,
            holders: 1,
            duration: Duration::from_secs(20),
            rate: 10.0,
            max_tokens: 32,
            deadline: Duration::from_secs(10),
            seed: 0,
            faults: vec![FaultKind::Kill, FaultKind::Stop],
            report: report.into(),
        }
    }

    fn check(&self) -> Result<(), LoadError> {
        let setting = |setting, wanted: String, found: String| LoadError::Setting { setting, wanted, found };
        if !(1..=64).contains(&self.workers) {
            return Err(setting("workers", "1 to 64".to_owned(), self.workers.to_string()));
        }
        if !(1..=self.workers).contains(&self.holders) {
            return Err(setting(
                "holders",
                format!("1 to {}", self.workers),
                self.holders.to_string(),
            ));
        }
        if !(self.rate > 0.0 && self.rate <= 10_000.0) {
            return Err(setting(
                "rate",
                "above 0 and at most 10000".to_owned(),
                self.rate.to_string(),
            ));
        }
        let hours = Duration::from_secs(24 * 3600);
        if self.duration.is_zero() || self.duration > hours {
            return Err(setting(
                "duration",
                "1 s to 24 h".to_owned(),
                format!("{:?}", self.duration),
            ));
        }
        Ok(())
    }
}

/// Reads a list of faults with commas between, or `none`.
pub fn parse_faults(text: &str) -> Result<Vec<FaultKind>, String> {
    if text == "none" {
        return Ok(Vec::new());
    }
    text.split(',').map(|name| FaultKind::from_str(name.trim())).collect()
}

/// Runs it; takes the duration and about half a minute more. The report is written whatever the verdicts are.
pub async fn run(config: ChaosConfig) -> Result<Report, LoadError> {
    config.check()?;
    std::fs::create_dir_all(&config.report).map_err(LoadError::file(&config.report))?;
    let clock = RunClock::start();
    let (entries, mut received) = mpsc::channel(4096);
    let collecting = tokio::spawn(async move {
        let mut history = History::default();
        while let Some(entry) = received.recv().await {
            history.push(entry);
        }
        history
    });
    let (run, cluster_lines) = drive(&config, clock, entries).await?;
    let mut history = collecting.await.map_err(|error| LoadError::process("history", error))?;
    history.run = run;
    history.logs = cluster_lines;
    history.requests.sort_by_key(|request| request.id);
    let verdicts = check(&history, &Limits::default());
    let report = Report::new(&config, &history, verdicts);
    history.write(&config.report.join("history.jsonl"))?;
    report.write(&config.report, &history)?;
    Ok(report)
}

/// All that happens, in its order; the records go to `entries`.
async fn drive(
    config: &ChaosConfig,
    clock: RunClock,
    entries: mpsc::Sender<Entry>,
) -> Result<(RunInfo, Vec<crate::LogLine>), LoadError> {
    let Undisturbed {
        cases,
        references,
        num_experts,
    } = undisturbed(config, clock).await?;
    for reference in references {
        let _ = entries.send(Entry::Reference(reference)).await; // nobody wants it: fine
    }
    if num_experts < config.workers {
        return Err(LoadError::Setting {
            setting: "workers",
            wanted: format!("at most the {num_experts} experts of a layer"),
            found: config.workers.to_string(),
        });
    }
    let mut cluster = Cluster::start(config, num_experts, clock).await?;
    let target = Arc::new(GrpcTarget::new(cluster.gateway_address(), 4)?);
    warm_up(&target, &cases, cluster.gateway_address()).await?;

    let sampler = Sampler::new(cluster.doors(), clock)?;
    sampler.settle(Phase::Baseline, SETTLE, &entries).await;
    let planned = Planned::schedule(config);
    let to_heal = match config.faults.iter().map(|fault| fault.longest()).max() {
        Some(longest) => longest + Limits::default().heals_within + AFTERWARDS,
        None => Duration::ZERO,
    };
    let sending_time = BASELINE + config.duration + to_heal;
    let times = send_times(Arrivals::Poisson, config.rate, sending_time, config.seed);
    let workload = Workload {
        sends: times
            .into_iter()
            .enumerate()
            .map(|(index, at)| (at, index % cases.len()))
            .collect(),
        cases,
        deadline: config.deadline,
        max_outstanding: 4096,
    };
    let begun = clock.now();
    let run = RunInfo {
        version: 1,
        seed: config.seed,
        deadline: micros(config.deadline),
        baseline: (begun, begun + micros(BASELINE)),
        end: begun + micros(sending_time),
    };
    let sending = tokio::spawn(send(workload, target, clock, entries.clone()));
    let sampling = tokio::spawn(sampler.clone().run(SAMPLE_EVERY, entries.clone()));
    tokio::time::sleep(BASELINE).await;
    let last_begin = begun + micros(BASELINE + config.duration);
    let breaking = cluster.break_things(planned, last_begin, &sampler, &entries).await;
    let sent = sending.await;
    sampling.abort();
    let _ = sampling.await; // it was told to end
    breaking?;
    sent.map_err(|error| LoadError::process("sender", error))?;
    sampler.settle(Phase::Final, SETTLE, &entries).await;
    Ok((run, cluster.stop()))
}

/// What a process with all experts of its own says.
struct Undisturbed {
    cases: Vec<Case>,
    references: Vec<Reference>,
    num_experts: usize,
}

async fn undisturbed(config: &ChaosConfig, clock: RunClock) -> Result<Undisturbed, LoadError> {
    let alone = Cluster::alone(config, clock)?;
    let address = alone.address().to_owned();
    let target = GrpcTarget::new(&address, 1)?;
    let failed = |status: tonic::Status| LoadError::server(&address, status);
    let model = target.model().await.map_err(failed)?;
    let room = (model.max_context as usize).saturating_sub(config.max_tokens as usize);
    if room < 2 {
        return Err(LoadError::Setting {
            setting: "max_tokens",
            wanted: format!(
                "at most {}, two less than the context",
                model.max_context.saturating_sub(2)
            ),
            found: config.max_tokens.to_string(),
        });
    }
    let cases = Case::random(
        CASES,
        model.vocab_size,
        MAX_PROMPT.min(room),
        config.max_tokens,
        config.seed,
    );
    let mut references = Vec::with_capacity(cases.len());
    for (case, asked) in cases.iter().enumerate() {
        let tokens = target.tokens(asked).await.map_err(failed)?;
        references.push(Reference { case, tokens });
    }
    Ok(Undisturbed {
        cases,
        references,
        num_experts: model.num_experts as usize,
    })
}

/// Every case once: connections are made and buffers have their size before anything is measured. What is answered is
/// judged under load, not here.
async fn warm_up(target: &GrpcTarget, cases: &[Case], address: &str) -> Result<(), LoadError> {
    for case in cases {
        target
            .tokens(case)
            .await
            .map_err(|status| LoadError::server(address, status))?;
    }
    Ok(())
}
