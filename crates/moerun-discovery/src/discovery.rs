//! All sources of a gateway together: [`Discovery`].

use std::{net::SocketAddr, sync::Arc, time::Duration};

use moerun_process::Listener;
use moerun_transport::{ClientProtection, ServerProtection};
use parking_lot::Mutex;
use tokio::{
    runtime::Handle,
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    DiscoveryError, SourceSpec,
    dns::Resolver,
    known::{Change, Known},
    registry::Registry,
    source::{Reports, Said},
};

/// Reports that wait to be taken.
const REPORTS_QUEUE: usize = 16;
/// How long a registered worker is known without a word of it.
pub(crate) const LEASE: Duration = Duration::from_secs(3);

/// Where to look for workers.
#[derive(Debug, Default)]
pub struct DiscoveryConfig {
    /// Workers that are known beforehand, and stay.
    pub fixed: Vec<String>,
    /// Places to look; each keeps its own last known list, and all lists together are the workers.
    pub sources: Vec<SourceSpec>,
    /// Where workers may register.
    pub registry: Option<RegistryDoor>,
    /// How often names are looked up.
    pub interval: Duration,
    /// Who is asked for names; `None` = whom the system asks (`/etc/resolv.conf`).
    pub dns_server: Option<SocketAddr>,
    /// How connections to etcd are protected.
    pub protection: ClientProtection,
    /// What this process is called in elections, for people.
    pub name: String,
}

/// Where workers register.
#[derive(Debug)]
pub struct RegistryDoor {
    /// Takes their connections.
    pub listener: Listener,
    /// Who may register, and how connections are protected.
    pub protection: ServerProtection,
}

/// A source, in figures.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceStats {
    /// As it was given; `registry` for workers that register.
    pub source: String,
    /// Workers that it is believed to have.
    pub workers: usize,
    /// Why the list is the last known one and not what it says now, if that is so.
    pub failing: Option<String>,
    /// Lists that it named.
    pub answers: u64,
    /// Times that it failed to name one.
    pub errors: u64,
    /// Times that its list changed.
    pub changes: u64,
}

/// Looks for workers until it is dropped. The list that it hands on holds what each source named last; what a source fails
/// to say takes nobody off it.
#[derive(Debug)]
pub struct Discovery {
    workers: watch::Receiver<Vec<String>>,
    stats: Arc<Mutex<Vec<SourceStats>>>,
    #[cfg(feature = "etcd")]
    coordination: Option<crate::etcd::Coordination>,
    _end: DropGuard,
}

impl Discovery {
    /// Starts looking, on `runtime`. An error if the settings make no sense; that nobody answers is none.
    pub fn start(config: DiscoveryConfig, runtime: &Handle) -> Result<Self, DiscoveryError> {
        let end = CancellationToken::new();
        let (queue, reports) = mpsc::channel(REPORTS_QUEUE);
        let mut sources = Vec::new();
        let spawn = |work| {
            runtime.spawn(end.clone().run_until_cancelled_owned(work));
        };
        let _inside = runtime.enter();
        #[cfg(feature = "etcd")]
        let mut coordination = None;
        for spec in config.sources {
            let to = Reports::new(sources.len(), queue.clone());
            let settle = match &spec {
                SourceSpec::Dns { .. } | SourceSpec::Srv { .. } => {
                    let resolver = Resolver::new(config.dns_server)?;
                    let looking = resolver.watch(spec.clone(), config.interval, to);
                    spawn(Box::pin(looking) as Work);
                    config.interval
                }
                #[cfg(feature = "etcd")]
                SourceSpec::Etcd(etcd) => {
                    let etcd = crate::etcd::Etcd::new(etcd.clone(), config.protection.clone());
                    // The first one that is named is that of the plan.
                    if coordination.is_none() {
                        let (found, work) = crate::etcd::Coordination::begin(etcd.clone(), config.name.clone());
                        work.into_iter().for_each(&spawn);
                        coordination = Some(found);
                    }
                    spawn(Box::pin(crate::etcd::watch_members(etcd, to)) as Work);
                    crate::etcd::MEMBER_LEASE
                }
                #[cfg(not(feature = "etcd"))]
                SourceSpec::Etcd(_) => {
                    return Err(DiscoveryError::NotBuilt {
                        text: spec.to_string(),
                        feature: "etcd",
                    });
                }
            };
            sources.push((spec.to_string(), Known::new(settle)));
        }
        if let Some(door) = config.registry {
            let to = Reports::new(sources.len(), queue);
            let registry = Registry::open(door, LEASE)?;
            spawn(Box::pin(registry.serve(to)) as Work);
            sources.push(("registry".to_owned(), Known::new(LEASE)));
        }
        let (workers, told) = watch::channel(config.fixed.clone());
        let stats = Arc::new(Mutex::new(sources.iter().map(figures).collect()));
        let bookkeeping = Bookkeeping {
            fixed: config.fixed,
            sources,
            stats: Arc::clone(&stats),
            workers,
        };
        spawn(Box::pin(bookkeeping.keep(reports)) as Work);
        Ok(Self {
            workers: told,
            stats,
            #[cfg(feature = "etcd")]
            coordination,
            _end: end.drop_guard(),
        })
    }

    /// The workers, as they change: those known beforehand, then all others, sorted.
    pub fn workers(&self) -> watch::Receiver<Vec<String>> {
        self.workers.clone()
    }

    /// What gateways agree on over etcd, where that is a source.
    #[cfg(feature = "etcd")]
    pub fn coordination(&self) -> Option<&crate::etcd::Coordination> {
        self.coordination.as_ref()
    }

    /// Each source, in figures.
    pub fn stats(&self) -> Vec<SourceStats> {
        self.stats.lock().clone()
    }
}

/// What goes on until the discovery is dropped.
pub(crate) type Work = std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;

fn figures((source, known): &(String, Known)) -> SourceStats {
    SourceStats {
        source: source.clone(),
        workers: known.workers().len(),
        failing: known.counts.failing.as_ref().map(ToString::to_string),
        answers: known.counts.answers,
        errors: known.counts.errors,
        changes: known.counts.changes,
    }
}

/// Owns what is known.
struct Bookkeeping {
    fixed: Vec<String>,
    sources: Vec<(String, Known)>,
    stats: Arc<Mutex<Vec<SourceStats>>>,
    workers: watch::Sender<Vec<String>>,
}

impl Bookkeeping {
    async fn keep(mut self, mut reports: mpsc::Receiver<(usize, Said)>) {
        loop {
            let settles_at = self.sources.iter().filter_map(|(_, known)| known.settles_at()).min();
            let settled = async {
                match settles_at {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                report = reports.recv() => match report {
                    Some((source, said)) => self.hear(source, said),
                    None => return self.stay().await,
                },
                () = settled => {
                    let now = Instant::now();
                    for (source, known) in &mut self.sources {
                        if known.settles_at().is_some_and(|at| at <= now) && known.settle(now) {
                            tracing::info!(source, workers = known.workers().len(), "workers have changed");
                        }
                    }
                    self.publish();
                }
            }
        }
    }

    fn hear(&mut self, source: usize, said: Said) {
        let (name, known) = &mut self.sources[source];
        match known.hear(Instant::now(), said) {
            Change::None => {}
            Change::Workers => tracing::info!(source = name, workers = known.workers().len(), "workers have changed"),
            Change::Answers => tracing::info!(source = name, "the source answers again"),
            Change::Fails => {
                let reason = known
                    .counts
                    .failing
                    .as_ref()
                    .map(ToString::to_string)
                    .unwrap_or_default();
                let kept = known.workers().len();
                tracing::warn!(
                    source = name,
                    kept,
                    "the source fails, its last known workers stay: {reason}"
                );
            }
        }
        self.publish();
    }

    fn publish(&self) {
        *self.stats.lock() = self.sources.iter().map(figures).collect();
        let mut found: Vec<&String> = self.sources.iter().flat_map(|(_, known)| known.workers()).collect();
        found.sort();
        found.dedup();
        found.retain(|worker| !self.fixed.contains(worker));
        let all: Vec<String> = self.fixed.iter().chain(found).cloned().collect();
        self.workers.send_if_modified(|workers| {
            let differs = *workers != all;
            *workers = all;
            differs
        });
    }

    /// Without sources the list never changes, but it is there.
    async fn stay(self) {
        self.workers.closed().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lists_of_several_sources_are_one_and_stay_when_a_source_fails() {
        let (queue, reports) = mpsc::channel(4);
        let (workers, mut told) = watch::channel(vec!["z:1".to_owned()]);
        let stats = Arc::new(Mutex::new(Vec::new()));
        let bookkeeping = Bookkeeping {
            fixed: vec!["z:1".to_owned()],
            sources: ["one", "two"]
                .map(|name| (name.to_owned(), Known::new(Duration::ZERO)))
                .into(),
            stats: Arc::clone(&stats),
            workers,
        };
        let keeping = tokio::spawn(bookkeeping.keep(reports));
        let list = |text: &str| Ok(text.split(' ').map(str::to_owned).collect());
        queue.send((0, list("b:1 a:1"))).await.unwrap();
        queue.send((1, list("b:1 c:1 z:1"))).await.unwrap();
        told.wait_for(|it| it.len() == 4).await.unwrap();
        assert_eq!(*told.borrow(), ["z:1", "a:1", "b:1", "c:1"]);
        queue.send((0, Err(DiscoveryError::Nobody))).await.unwrap();
        queue.send((1, list("c:1"))).await.unwrap();
        queue.send((1, list("c:1 d:1"))).await.unwrap();
        told.wait_for(|it| it.contains(&"d:1".to_owned())).await.unwrap();
        assert_eq!(*told.borrow(), ["z:1", "a:1", "b:1", "c:1", "d:1"]);
        let stats = stats.lock().clone();
        assert_eq!((stats[0].errors, stats[0].workers, stats[1].changes), (1, 2, 3));
        assert!(stats[0].failing.is_some() && stats[1].failing.is_none());
        drop((queue, told));
        keeping.await.unwrap();
    }
}
