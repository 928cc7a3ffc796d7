//! Workers, proxies before them, a gateway: and what is done to them.

use std::time::Duration;

use moerun_testkit::{Corrupt, FaultProxy, Faults, Flow, Within};
use tokio::{sync::mpsc, task::spawn_blocking, time::sleep};

use super::{
    ChaosConfig,
    faults::{FaultKind, Planned},
    process::{Logs, Process, Program},
    sampling::Sampler,
};
use crate::{Entry, Evidence, FaultRecord, LoadError, LogLine, Micros, RunClock};

/// How much later everything of a slow worker comes.
const SLOWED_BY: Duration = Duration::from_millis(20);
/// Of this many bytes of messages one is hit, while they are corrupted.
const CORRUPT_ONE_IN: u64 = 2000;
/// Before a process is hit: how long its traffic is watched for proof that there is some.
const WATCH: Duration = Duration::from_millis(300);

/// A worker, and how the gateway reaches it.
#[derive(Debug)]
struct Member {
    process: Option<Process>,
    name: String,
    proxy: Option<FaultProxy>,
    /// Its own address.
    address: String,
    /// The address that the gateway knows.
    known_as: String,
}

/// All processes of a run.
#[derive(Debug)]
pub(super) struct Cluster {
    gateway: Process,
    members: Vec<Member>,
    clock: RunClock,
    logs: Logs,
}

impl Cluster {
    /// Starts workers and gateway, and waits until they are ready.
    pub(super) async fn start(config: &ChaosConfig, num_experts: usize, clock: RunClock) -> Result<Self, LoadError> {
        let all: Vec<usize> = (0..config.workers).collect();
        Self::start_with(config, num_experts, clock, &all, &[]).await
    }

    /// Starts these of the workers, and a gateway that knows of them and of `more` addresses, and waits until they are ready.
    pub(super) async fn start_with(
        config: &ChaosConfig,
        num_experts: usize,
        clock: RunClock,
        workers: &[usize],
        more: &[&str],
    ) -> Result<Self, LoadError> {
        let logs = Logs::default();
        let with_proxies = config.faults.iter().any(|fault| fault.needs_proxy());
        let mut members = Vec::with_capacity(config.workers);
        for &index in workers {
            let args = [
                "--listen",
                "127.0.0.1:0",
                "--experts",
                &experts(index, num_experts, config),
                "--exit-with-parent",
            ];
            let program = program(config, "worker", &args, &format!("worker-{index}"), clock, &logs);
            let process = start(program).await?;
            let address = process.address().to_owned();
            let proxy = match with_proxies {
                true => Some(
                    FaultProxy::start("127.0.0.1:0", &address)
                        .map_err(|error| LoadError::process(format!("proxy of worker-{index}"), error))?,
                ),
                false => None,
            };
            let known_as = proxy.as_ref().map_or(address.as_str(), FaultProxy::address).to_owned();
            members.push(Member {
                name: process.name().to_owned(),
                process: Some(process),
                proxy,
                address,
                known_as,
            });
        }
        let mut args = vec!["--grpc-addr", "127.0.0.1:0", "--exit-with-parent"];
        for member in &members {
            args.extend(["--worker", &member.known_as]);
        }
        for address in more {
            args.extend(["--worker", address]);
        }
        let gateway = start(program(config, "gateway", &args, "gateway", clock, &logs)).await?;
        Ok(Self {
            gateway,
            members,
            clock,
            logs,
        })
    }

    /// Starts a worker of this cluster that listens on `listen`, which its gateway may know already.
    pub(super) async fn join(
        &mut self,
        config: &ChaosConfig,
        num_experts: usize,
        index: usize,
        listen: &str,
    ) -> Result<(), LoadError> {
        let held = experts(index, num_experts, config);
        let args = ["--listen", listen, "--experts", &held, "--exit-with-parent"];
        let name = format!("worker-{index}");
        let process = start(program(config, "worker", &args, &name, self.clock, &self.logs)).await?;
        self.members.push(Member {
            name,
            address: process.address().to_owned(),
            known_as: process.address().to_owned(),
            process: Some(process),
            proxy: None,
        });
        Ok(())
    }

    /// The process of a worker, by its place among those that were started.
    pub(super) fn process(&mut self, place: usize) -> Result<&mut Process, LoadError> {
        let member = &mut self.members[place];
        let gone = || LoadError::process(&member.name, "gone");
        member.process.as_mut().ok_or_else(gone)
    }

    /// Ends a worker as SIGTERM does, waits for that, and starts it again on its address.
    pub(super) async fn restart(&mut self, place: usize) -> Result<(), LoadError> {
        let member = &mut self.members[place];
        let Some(mut process) = member.process.take() else {
            return Err(LoadError::process(&member.name, "gone"));
        };
        let ended = spawn_blocking(move || process.terminate().map(|()| process.program())).await;
        let program = ended.map_err(|error| LoadError::process(&member.name, error))??;
        member.process = Some(start(program).await?);
        Ok(())
    }

    /// How the gateway calls a worker.
    pub(super) fn known_as(&self, place: usize) -> &str {
        &self.members[place].known_as
    }

    /// One process with all experts of its own: what it answers is right.
    pub(super) fn alone(config: &ChaosConfig, clock: RunClock) -> Result<Process, LoadError> {
        let logs = Logs::default();
        let mut alone = program(
            config,
            "serve",
            &["--grpc-addr", "127.0.0.1:0"],
            "reference",
            clock,
            &logs,
        );
        // What is planted in the processes under test is not planted in what they are compared with.
        alone.environment.clear();
        Process::start(alone)
    }

    /// Where the gateway listens.
    pub(super) fn gateway_address(&self) -> &str {
        self.gateway.address()
    }

    /// Names of all processes and where each tells its figures.
    pub(super) fn doors(&self) -> Vec<(String, String)> {
        let workers = self
            .members
            .iter()
            .map(|member| (member.name.clone(), member.address.clone()));
        std::iter::once(("gateway".to_owned(), self.gateway.address().to_owned()))
            .chain(workers)
            .collect()
    }

    /// One fault after another, as long as there are some and `last_begin` has not come.
    pub(super) async fn break_things(
        &mut self,
        planned: impl Iterator<Item = Planned>,
        last_begin: Micros,
        sampler: &Sampler,
        entries: &mpsc::Sender<Entry>,
    ) -> Result<(), LoadError> {
        for (id, fault) in (0..).zip(planned) {
            if self.clock.now() >= last_begin {
                break;
            }
            let mut record = self.break_one(&fault, sampler).await?;
            record.id = id;
            let _ = entries.send(Entry::Fault(record)).await; // nobody wants it: fine
            if self.clock.now() + crate::clock::micros(fault.then) >= last_begin {
                break;
            }
            sleep(fault.then).await;
        }
        Ok(())
    }

    async fn break_one(&mut self, fault: &Planned, sampler: &Sampler) -> Result<FaultRecord, LoadError> {
        let clock = self.clock;
        let member = &mut self.members[fault.worker];
        let executed = format!("{}.requests_executed", member.name);
        let mut evidence = Vec::new();
        let mut prove = |counter: String, before: u64, after: u64| {
            evidence.push(Evidence { counter, before, after });
        };
        let begin;
        match fault.kind {
            FaultKind::Kill | FaultKind::Stop => {
                let before = sampler.executed(&member.name).await;
                sleep(WATCH).await;
                let after = sampler.executed(&member.name).await;
                if let (Some(before), Some(after)) = (before, after) {
                    prove(executed, before, after);
                }
                begin = clock.now();
                if fault.kind == FaultKind::Stop {
                    let process = member
                        .process
                        .as_ref()
                        .ok_or_else(|| LoadError::process(&member.name, "gone"))?;
                    let mut pausing = process.pause(fault.lasts)?;
                    let ended = spawn_blocking(move || pausing.wait()).await;
                    ended
                        .map_err(|error| LoadError::process(&member.name, error))?
                        .map_err(|error| LoadError::process(&member.name, error))?;
                } else if let Some(mut process) = member.process.take() {
                    process.kill();
                    let program = process.program();
                    drop(process);
                    sleep(fault.lasts).await;
                    member.process = Some(start(program).await?);
                }
            }
            FaultKind::Slow | FaultKind::Partition | FaultKind::OneWay | FaultKind::Reset | FaultKind::Corrupt => {
                let proxy = member
                    .proxy
                    .as_ref()
                    .ok_or_else(|| LoadError::process(&member.name, "it has no proxy"))?;
                let before = proxy.counts();
                begin = clock.now();
                match proxy_faults(fault) {
                    None => {
                        proxy.reset_connections();
                        sleep(fault.lasts).await;
                    }
                    Some(faults) => {
                        proxy.set(faults);
                        sleep(fault.lasts).await;
                        proxy.clear();
                    }
                }
                let after = proxy.counts();
                let of = |what: &str| format!("{}.proxy.{what}", member.name);
                match fault.kind {
                    FaultKind::Corrupt => prove(of("flipped"), before.flipped, after.flipped),
                    FaultKind::Reset => prove(of("resets"), before.resets, after.resets),
                    _ => prove(of("held"), before.held, after.held),
                }
            }
        }
        Ok(FaultRecord {
            id: 0,
            action: fault.kind.to_string(),
            target: member.name.clone(),
            names: vec![member.known_as.clone(), member.name.clone()],
            begin,
            end: clock.now(),
            evidence,
            must_show: fault.must_show(),
        })
    }

    /// Ends all processes; returns their log lines.
    pub(super) fn stop(self) -> Vec<LogLine> {
        let Self {
            gateway, members, logs, ..
        } = self;
        drop(gateway);
        drop(members);
        logs.take()
    }
}

/// What the proxy of a worker does; `None` = it resets what is open.
fn proxy_faults(fault: &Planned) -> Option<Faults> {
    let cut = Flow {
        cut: true,
        ..Flow::default()
    };
    let faults = match fault.kind {
        FaultKind::Slow => Faults {
            to_client: Flow {
                delay: SLOWED_BY,
                ..Flow::default()
            },
            ..Faults::default()
        },
        FaultKind::Partition => Faults {
            to_server: cut.clone(),
            to_client: cut,
            refuse: false,
        },
        FaultKind::OneWay => Faults {
            to_client: cut,
            ..Faults::default()
        },
        FaultKind::Corrupt => Faults {
            to_client: Flow {
                corrupt: Some(Corrupt {
                    one_in: CORRUPT_ONE_IN,
                    seed: fault.seed,
                    within: Within::DataFrames,
                }),
                ..Flow::default()
            },
            ..Faults::default()
        },
        FaultKind::Reset | FaultKind::Kill | FaultKind::Stop => return None,
    };
    Some(faults)
}

/// Experts e with (e + r) mod workers = index for one of the holders r, in every layer: neighbours share them.
fn experts(index: usize, num_experts: usize, config: &ChaosConfig) -> String {
    let held: Vec<String> = (0..num_experts)
        .filter(|expert| (0..config.holders).any(|replica| (expert + replica) % config.workers == index))
        .map(|expert| format!("*:{expert}"))
        .collect();
    held.join(",")
}

fn program(config: &ChaosConfig, command: &str, args: &[&str], name: &str, clock: RunClock, logs: &Logs) -> Program {
    let model = config.model.display().to_string();
    let all = [&[command, "--model", &model], args].concat();
    Program {
        name: name.to_owned(),
        path: config.program.clone(),
        environment: config.environment.clone(),
        args: all.into_iter().map(str::to_owned).collect(),
        clock,
        logs: logs.clone(),
    }
}

async fn start(program: Program) -> Result<Process, LoadError> {
    let name = program.name.clone();
    let starting = spawn_blocking(move || Process::start(program)).await;
    starting.map_err(|error| LoadError::process(name, error))?
}
