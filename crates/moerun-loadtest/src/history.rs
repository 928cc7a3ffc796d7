//! What happened in a run, as JSON lines: one object a line, told apart by `kind`. Times are microseconds since the run
//! began, on one monotonic clock.
//!
//! | `kind` | what | fields |
//! | --- | --- | --- |
//! | `run` | the run, once | `version` 1, `seed`, `deadline`, `baseline` and `end` of the sending |
//! | `reference` | what a case gives where nothing is broken | `case`, `tokens` |
//! | `request` | one request | `id`, `case`, `intended`, `sent`, `tokens` as `[id, at]`, `terminals`, `reported_tokens`, `degraded_from`, `closed` |
//! | `fault` | something that was broken | `id`, `action`, `target`, `names`, `begin`, `end`, `evidence`, `must_show` |
//! | `sample` | figures of one process | `at`, `process`, `pid`, `phase`, `figures`, `links`, `troubles` |
//! | `log` | a line of its log | `at`, `process`, `line` |

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufRead, BufReader, BufWriter, Write},
    path::Path,
};

use serde::{Deserialize, Serialize};

use crate::LoadError;

/// Microseconds since the run began.
pub type Micros = u64;

/// Version of the form of histories.
const VERSION: u32 = 1;

/// One line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Entry {
    /// The run.
    Run(RunInfo),
    /// What a case gives where nothing is broken.
    Reference(Reference),
    /// One request.
    Request(RequestRecord),
    /// Something that was broken.
    Fault(FaultRecord),
    /// Figures of one process.
    Sample(Sample),
    /// A line of its log.
    Log(LogLine),
}

/// The run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RunInfo {
    /// Form of the history: 1.
    pub version: u32,
    /// Replays the run's schedule.
    pub seed: u64,
    /// How long a request may take, from when it is sent.
    pub deadline: Micros,
    /// From and to: sending, while nothing was broken yet.
    pub baseline: (Micros, Micros),
    /// When the last request was to be sent.
    pub end: Micros,
}

/// What a case gives where nothing is broken.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reference {
    /// The case.
    pub case: usize,
    /// Its tokens.
    pub tokens: Vec<u32>,
}

/// One request.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RequestRecord {
    /// Its number in the run.
    pub id: u64,
    /// What it asked.
    pub case: usize,
    /// When it was to be sent.
    pub intended: Micros,
    /// When it was.
    pub sent: Micros,
    /// Tokens that came, and when.
    pub tokens: Vec<(u32, Micros)>,
    /// All that said it has ended: exactly one, where all is well.
    pub terminals: Vec<Terminal>,
    /// How many tokens the server says it sent.
    pub reported_tokens: Option<u64>,
    /// Tokens that had come before the server first said that an expert was left out; `None` if it never did.
    #[serde(default)]
    pub degraded_from: Option<usize>,
    /// When its stream ended or the client stopped listening.
    pub closed: Micros,
}

/// What said that a request has ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Terminal {
    /// When.
    pub at: Micros,
    /// How.
    pub outcome: Outcome,
}

/// How a request ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// With a finish reason.
    Finished(String),
    /// In an error of the server.
    Error {
        /// Status code.
        code: String,
        /// Reason out of the error's details; empty if it has none.
        reason: String,
        /// What it says.
        message: String,
    },
    /// The connection to the server ended: there was nobody to say more.
    Disconnected(String),
    /// It was never sent: the client had too many under way.
    NotSent,
}

/// Something that was broken.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct FaultRecord {
    /// Its number in the run.
    pub id: u64,
    /// What was done, in words.
    pub action: String,
    /// To which process.
    pub target: String,
    /// What log lines and figures may call the target.
    pub names: Vec<String>,
    /// From when.
    pub begin: Micros,
    /// Until when; from then on everything is to be as before.
    pub end: Micros,
    /// Counters that moved because it hit live traffic.
    pub evidence: Vec<Evidence>,
    /// Whether it lasts long enough to be seen in figures and logs.
    pub must_show: bool,
}

/// A counter before and after a fault.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    /// Which one.
    pub counter: String,
    /// Before the fault.
    pub before: u64,
    /// After it.
    pub after: u64,
}

impl FaultRecord {
    /// Whether a counter proves that it hit live traffic; a fault counts only then.
    pub fn hit(&self) -> bool {
        self.evidence.iter().any(|evidence| evidence.after > evidence.before)
    }
}

/// Where in the run a sample was taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Before the load, everything warm and idle.
    Baseline,
    /// Under load.
    #[default]
    Load,
    /// After the load, when everything has had time to end.
    Final,
}

/// Figures of one process.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// When.
    pub at: Micros,
    /// Which process.
    pub process: String,
    /// Its process id: another one has been started anew.
    pub pid: u32,
    /// Where in the run.
    pub phase: Phase,
    /// Gauges and counters by name.
    pub figures: BTreeMap<String, u64>,
    /// Of a gateway: whether each worker is up, by address.
    pub links: BTreeMap<String, bool>,
    /// Of a gateway: troubles with each worker since the start, by its address: connections that ended, calls that failed
    /// (but for lost hedges), known inputs answered wrongly.
    pub troubles: BTreeMap<String, u64>,
}

/// A line of a process' log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LogLine {
    /// When it was read.
    pub at: Micros,
    /// Which process.
    pub process: String,
    /// The line.
    pub line: String,
}

/// All that happened in a run.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct History {
    /// The run.
    pub run: RunInfo,
    /// What cases give.
    pub references: Vec<Reference>,
    /// All requests.
    pub requests: Vec<RequestRecord>,
    /// All faults.
    pub faults: Vec<FaultRecord>,
    /// All figures, in the order in which they were taken.
    pub samples: Vec<Sample>,
    /// All log lines.
    pub logs: Vec<LogLine>,
}

impl History {
    /// Adds a line.
    pub fn push(&mut self, entry: Entry) {
        match entry {
            Entry::Run(run) => self.run = run,
            Entry::Reference(reference) => self.references.push(reference),
            Entry::Request(request) => self.requests.push(request),
            Entry::Fault(fault) => self.faults.push(fault),
            Entry::Sample(sample) => self.samples.push(sample),
            Entry::Log(log) => self.logs.push(log),
        }
    }

    /// Writes it as JSON lines.
    pub fn write(&self, path: &Path) -> Result<(), LoadError> {
        let failed = LoadError::file(path);
        let write = || {
            let mut file = BufWriter::new(File::create(path)?);
            let run = RunInfo {
                version: VERSION,
                ..self.run.clone()
            };
            let mut line = |entry: Entry| {
                serde_json::to_writer(&mut file, &entry)?;
                file.write_all(b"\n")
            };
            line(Entry::Run(run))?;
            for reference in &self.references {
                line(Entry::Reference(reference.clone()))?;
            }
            for fault in &self.faults {
                line(Entry::Fault(fault.clone()))?;
            }
            for request in &self.requests {
                line(Entry::Request(request.clone()))?;
            }
            for sample in &self.samples {
                line(Entry::Sample(sample.clone()))?;
            }
            for log in &self.logs {
                line(Entry::Log(log.clone()))?;
            }
            file.flush()
        };
        write().map_err(failed)
    }

    /// Reads what [`History::write`] wrote.
    pub fn read(path: &Path) -> Result<Self, LoadError> {
        let file = File::open(path).map_err(LoadError::file(path))?;
        let mut history = History::default();
        for (index, line) in BufReader::new(file).lines().enumerate() {
            let line = line.map_err(LoadError::file(path))?;
            let wrong = |reason: String| LoadError::Line {
                path: path.to_owned(),
                line: index + 1,
                reason,
            };
            let entry: Entry = serde_json::from_str(&line).map_err(|error| wrong(error.to_string()))?;
            if let Entry::Run(run) = &entry
                && run.version != VERSION
            {
                return Err(wrong(format!("version: wanted {VERSION}, found {}", run.version)));
            }
            history.push(entry);
        }
        Ok(history)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_history_is_read_as_it_was_written() {
        let folder = std::env::temp_dir().join(format!("moerun-history-{}", std::process::id()));
        let history = crate::check::tests::healthy();
        history.write(&folder).unwrap();
        let read = History::read(&folder).unwrap();
        let _ = std::fs::remove_file(&folder);
        assert_eq!(read.requests, history.requests);
        assert_eq!(read.faults, history.faults);
        assert_eq!(read.samples, history.samples);
        assert_eq!(read.logs, history.logs);
        assert_eq!(read.references, history.references);
    }
}
