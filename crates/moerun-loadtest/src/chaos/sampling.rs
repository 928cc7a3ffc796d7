//! Figures of all processes, taken at their admin services.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use moerun_proto::v1::{self, admin_service_client::AdminServiceClient, get_stats_response::Role};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout},
};
use tonic::transport::{Channel, Endpoint};

use crate::{Entry, LoadError, Phase, RunClock, Sample, check::UNDER_WAY};

/// A process that is stopped does not answer; nobody waits long for it.
const PATIENCE: Duration = Duration::from_millis(400);

/// Asks each process for its figures.
#[derive(Debug, Clone)]
pub(super) struct Sampler {
    doors: Arc<[Door]>,
    clock: RunClock,
}

#[derive(Debug)]
struct Door {
    process: String,
    client: AdminServiceClient<Channel>,
}

impl Sampler {
    /// Of processes by name and `host:port`.
    pub(super) fn new(doors: Vec<(String, String)>, clock: RunClock) -> Result<Self, LoadError> {
        let door = |(process, address): (String, String)| {
            let endpoint = Endpoint::from_shared(format!("http://{address}"))
                .map_err(|error| LoadError::server(&address, error))?
                .connect_timeout(PATIENCE);
            Ok(Door {
                process,
                client: AdminServiceClient::new(endpoint.connect_lazy()),
            })
        };
        let doors = doors.into_iter().map(door).collect::<Result<_, LoadError>>()?;
        Ok(Self { doors, clock })
    }

    /// Takes samples until it is dropped.
    pub(super) async fn run(self, every: Duration, entries: mpsc::Sender<Entry>) {
        loop {
            for door in self.doors.iter() {
                if let Some(sample) = self.take(door, Phase::Load).await {
                    let _ = entries.send(Entry::Sample(sample)).await; // nobody wants it: fine
                }
            }
            sleep(every).await;
        }
    }

    /// Waits until nothing is under way in any process, for at most `patience`, and notes how they are then.
    pub(super) async fn settle(&self, phase: Phase, patience: Duration, entries: &mpsc::Sender<Entry>) {
        let until = Instant::now() + patience;
        for door in self.doors.iter() {
            let mut last = None;
            loop {
                last = self.take(door, phase).await.or(last);
                if last.as_ref().is_some_and(is_quiet) || Instant::now() >= until {
                    break;
                }
                sleep(Duration::from_millis(50)).await;
            }
            if let Some(sample) = last {
                let _ = entries.send(Entry::Sample(sample)).await; // nobody wants it: fine
            }
        }
    }

    /// How many requests a worker has answered, if it answers us.
    pub(super) async fn executed(&self, process: &str) -> Option<u64> {
        let door = self.doors.iter().find(|door| door.process == process)?;
        let sample = self.take(door, Phase::Load).await?;
        sample.figures.get("requests_executed").copied()
    }

    async fn take(&self, door: &Door, phase: Phase) -> Option<Sample> {
        let mut client = door.client.clone();
        let asked = timeout(PATIENCE, client.get_stats(v1::GetStatsRequest {})).await;
        let response = asked.ok()?.ok()?.into_inner();
        let own = response.process?;
        let mut sample = Sample {
            at: self.clock.now(),
            process: door.process.clone(),
            pid: own.pid,
            phase,
            figures: figures([
                ("resident_bytes", own.resident_bytes),
                ("open_files", own.open_files),
                ("threads", own.threads),
                ("async_tasks", own.async_tasks),
                ("panics", own.panics),
            ]),
            ..Sample::default()
        };
        match response.role? {
            Role::Gateway(gateway) => {
                let ended = gateway.answers_finished + gateway.answers_failed + gateway.answers_cancelled;
                sample.figures.extend(figures([
                    // The engine's own gauges are as of its last step, and say nothing of one that does not end.
                    ("answers_under_way", gateway.answers_begun.saturating_sub(ended)),
                    ("running_requests", gateway.running_requests),
                    ("waiting_requests", gateway.waiting_requests),
                    ("kv_pages_used", gateway.kv_pages_used),
                    ("kv_pages_cached", gateway.kv_pages_cached),
                    ("answers_begun", gateway.answers_begun),
                    ("answers_finished", gateway.answers_finished),
                    ("answers_failed", gateway.answers_failed),
                    ("answers_cancelled", gateway.answers_cancelled),
                    ("answers_degraded", gateway.answers_degraded),
                    ("calls", gateway.calls),
                    ("retries", gateway.retries),
                    ("hedges", gateway.hedges),
                    ("local_assignments", gateway.local_assignments),
                ]));
                // A lost hedge says little: busy hosts lose some while nothing is broken.
                let troubles = |link: &v1::WorkerLink| {
                    link.disconnections + link.canary_failures + link.failed_calls.saturating_sub(link.lost_to_hedge)
                };
                let counted = gateway
                    .workers
                    .iter()
                    .map(|link| (link.address.clone(), troubles(link)));
                sample.troubles = counted.collect();
                sample.links = gateway
                    .workers
                    .iter()
                    .map(|link| (link.address.clone(), link.up))
                    .collect();
            }
            Role::Worker(worker) => {
                sample.figures.extend(figures([
                    ("streams", worker.streams),
                    ("outstanding_requests", worker.outstanding_requests),
                    ("requests_executed", worker.requests_executed),
                    ("requests_failed", worker.requests_failed),
                ]));
            }
        }
        Some(sample)
    }
}

fn figures<const N: usize>(named: [(&str, u64); N]) -> BTreeMap<String, u64> {
    named.map(|(name, value)| (name.to_owned(), value)).into()
}

fn is_quiet(sample: &Sample) -> bool {
    UNDER_WAY
        .iter()
        .all(|name| sample.figures.get(*name).copied().unwrap_or(0) == 0)
}
