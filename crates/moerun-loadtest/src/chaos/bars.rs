//! What single faults cost, each under so many streams with two holders an expert, beside what is promised.

use std::{fmt, sync::Arc, time::Duration};

use moerun_proto::v1::{self, admin_service_client::AdminServiceClient, get_stats_response::Role};
use tokio::{
    task::spawn_blocking,
    time::{Instant, sleep},
};

use super::{
    ChaosConfig, Undisturbed,
    cluster::Cluster,
    process::Throttle,
    streams::{Streams, gaps_in},
    undisturbed, warm_up,
};
use crate::{GrpcTarget, History, LoadError, Micros, Outcome, RunClock, RunFigures, Window};

/// Holders of each expert.
const HOLDERS: usize = 2;
/// After the first answers, and after a fault: what is measured then is steady.
const SETTLE: Duration = Duration::from_secs(1);
/// How long a process stays stopped.
const STOPPED: Duration = Duration::from_secs(5);
/// How much less time a slow process gets.
const SLOWNESS: u32 = 10;
/// Between two looks at the figures of a process.
const LOOK: Duration = Duration::from_millis(10);
/// How long a state of the cluster is waited for.
const PATIENCE: Duration = Duration::from_secs(30);

/// What one fault cost.
#[derive(Debug, Clone)]
pub struct Figure {
    /// Row of the fault matrix.
    pub row: u32,
    /// What was done.
    pub fault: &'static str,
    /// Requests.
    pub requests: usize,
    /// Those that did not finish.
    pub failed: usize,
    /// Those with another token than the undisturbed run.
    pub differing: usize,
    /// What else was measured: name, value, what is promised, and whether that is kept.
    pub measured: Vec<(&'static str, String, &'static str, bool)>,
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Figure {
            row,
            fault,
            requests,
            failed,
            differing,
            measured,
        } = self;
        write!(
            f,
            "row {row}: {fault}: {requests} requests, {failed} failed (bar: 0), {differing} with another token (bar: 0)"
        )?;
        measured.iter().try_for_each(|(name, value, bar, kept)| {
            write!(
                f,
                "; {name} {value} (bar: {bar}{})",
                if *kept { "" } else { ", MISSED" }
            )
        })
    }
}

/// Measures all of them, one cluster of three workers after another.
pub async fn figures(config: ChaosConfig, streams: usize) -> Result<Vec<Figure>, LoadError> {
    let config = ChaosConfig {
        workers: 3,
        holders: HOLDERS,
        faults: Vec::new(),
        ..config
    };
    config.check()?;
    if streams == 0 {
        return Err(LoadError::Setting {
            setting: "figures",
            wanted: "at least 1 stream".to_owned(),
            found: "0".to_owned(),
        });
    }
    std::fs::create_dir_all(&config.report).map_err(LoadError::file(&config.report))?;
    let clock = RunClock::start();
    let bench = Bench {
        given: undisturbed(&config, clock).await?,
        config,
        streams,
        clock,
    };
    Ok(vec![
        bench.killed().await?,
        bench.stopped().await?,
        bench.slow().await?,
        bench.restarted().await?,
        bench.joined().await?,
    ])
}

struct Bench {
    config: ChaosConfig,
    given: Undisturbed,
    streams: usize,
    clock: RunClock,
}

/// A cluster with streams on it.
struct Loaded {
    cluster: Cluster,
    streams: Streams,
    admin: Admin,
}

impl Bench {
    /// Starts these workers, a gateway that knows of `more` addresses too, and the streams.
    async fn load(&self, workers: &[usize], more: &[&str]) -> Result<Loaded, LoadError> {
        let cluster = Cluster::start_with(&self.config, self.given.num_experts, self.clock, workers, more).await?;
        let address = cluster.gateway_address().to_owned();
        let target = Arc::new(GrpcTarget::new(&address, 4)?);
        warm_up(&target, &self.given.cases, &address).await?;
        let given = (&self.given.cases[..], &self.given.references[..]);
        let streams = Streams::start(&target, given, self.streams, self.clock);
        sleep(SETTLE).await;
        Ok(Loaded {
            streams,
            admin: Admin::connect(&address).await?,
            cluster,
        })
    }

    /// Lets a stretch of time pass, as long as the configuration says.
    async fn stretch(&self) -> (Micros, Micros) {
        let from = self.clock.now();
        sleep(self.config.duration).await;
        (from, self.clock.now())
    }

    async fn killed(&self) -> Result<Figure, LoadError> {
        let mut loaded = self.load(&[0, 1, 2], &[]).await?;
        self.stretch().await;
        let killed = self.clock.now();
        loaded.cluster.process(1)?.kill();
        sleep(SETTLE).await;
        let settled = self.clock.now();
        let after = self.stretch().await;
        let history = loaded.streams.history().await;
        drop(loaded.cluster);
        let gap = gaps_in(&history, (killed, settled)).max_ms;

        let two = self.load(&[0, 2], &[]).await?;
        let alone = self.stretch().await;
        let undisturbed = two.streams.history().await;
        let with = Window::of(&history, after).tokens_per_second;
        let without = Window::of(&undisturbed, alone).tokens_per_second;
        let share = with / without.max(f64::MIN_POSITIVE);
        Ok(self.figure(1, "kill -9 of one of three workers", &history).with([
            ("longest gap", format!("{gap:.0} ms"), "250 ms", gap <= 250.0),
            (
                "then tokens/s",
                format!(
                    "{:.1} % of the {without:.0} of a cluster of the other two",
                    share * 100.0
                ),
                "98 %",
                share >= 0.98,
            ),
        ]))
    }

    async fn stopped(&self) -> Result<Figure, LoadError> {
        let mut loaded = self.load(&[0, 1, 2], &[]).await?;
        let before = loaded.admin.worker(loaded.cluster.known_as(1)).await?;
        let (stopped, begun) = (self.clock.now(), Instant::now());
        let mut pausing = loaded.cluster.process(1)?.pause(STOPPED)?;
        let address = loaded.cluster.known_as(1).to_owned();
        let out = |link: &v1::WorkerLink| link.suspicions > before.suspicions || !link.up;
        loaded.admin.wait_for(&address, out).await?;
        let suspect_after = begun.elapsed();
        loaded.admin.wait_for(&address, |link| !link.up).await?;
        let down_after = begun.elapsed();
        let ended = spawn_blocking(move || pausing.wait()).await;
        ended
            .map_err(|error| LoadError::process("pause", error))?
            .map_err(|error| LoadError::process("pause", error))?;
        let resumed = self.clock.now();
        loaded.admin.wait_for(&address, |link| link.up).await?;
        let history = loaded.streams.history().await;
        let gap = gaps_in(&history, (stopped, resumed)).max_ms;
        let seconds = Duration::from_secs(3);
        Ok(self.figure(3, "a stopped worker", &history).with([
            (
                "asked no more after",
                format!("{} ms", suspect_after.as_millis()),
                "3 s",
                suspect_after <= seconds,
            ),
            (
                "connection ended after",
                format!("{} ms", down_after.as_millis()),
                "3 s",
                down_after <= seconds,
            ),
            ("longest gap", format!("{gap:.0} ms"), "1 s", gap <= 1000.0),
        ]))
    }

    async fn slow(&self) -> Result<Figure, LoadError> {
        let mut loaded = self.load(&[0, 1, 2], &[]).await?;
        let undisturbed = self.stretch().await;
        let before = loaded.admin.gateway().await?;
        let throttle = Throttle::start(loaded.cluster.process(1)?, SLOWNESS)?;
        let slowed = self.stretch().await;
        let after = loaded.admin.gateway().await?;
        drop(throttle);
        let slow = loaded.cluster.known_as(1).to_owned();
        let history = loaded.streams.history().await;
        let p99 = |stretch| gaps_in(&history, stretch).p99_ms;
        let times = p99(slowed) / p99(undisturbed).max(f64::MIN_POSITIVE);
        let calls = (after.calls - before.calls).max(1) as f64;
        let extra = (after.hedges + after.retries - before.hedges - before.retries) as f64 / calls;
        let calls_to = |stats: &v1::GatewayStats| {
            let link = stats.workers.iter().find(|link| link.address == slow);
            link.map_or(0, |link| link.calls)
        };
        let share = (calls_to(&after) - calls_to(&before)) as f64 / calls;
        Ok(self.figure(4, "a worker with a tenth of its time", &history).with([
            (
                "p99 time per token",
                format!("{times:.2} times the {:.1} ms before", p99(undisturbed)),
                "1.3 times",
                times <= 1.3,
            ),
            ("extra calls", format!("{:.1} %", extra * 100.0), "5 %", extra <= 0.05),
            (
                "share of calls to it",
                format!("{:.1} %", share * 100.0),
                "15 %",
                share <= 0.15,
            ),
        ]))
    }

    async fn restarted(&self) -> Result<Figure, LoadError> {
        let mut loaded = self.load(&[0, 1, 2], &[]).await?;
        let begun = Instant::now();
        let from = self.clock.now();
        for place in 0..3 {
            let address = loaded.cluster.known_as(place).to_owned();
            let before = loaded.admin.worker(&address).await?.disconnections;
            loaded.cluster.restart(place).await?;
            loaded
                .admin
                .wait_for(&address, |link| link.up && link.disconnections > before)
                .await?;
        }
        let took = begun.elapsed();
        let to = self.clock.now();
        let history = loaded.streams.history().await;
        let gap = gaps_in(&history, (from, to)).max_ms;
        Ok(self
            .figure(12, "every worker restarted, one after another", &history)
            .with([
                ("longest gap", format!("{gap:.0} ms"), "none", true),
                ("all three", format!("{:.1} s", took.as_secs_f64()), "none", true),
            ]))
    }

    async fn joined(&self) -> Result<Figure, LoadError> {
        let listen = free_address()?;
        let mut loaded = self.load(&[0, 1], &[&listen]).await?;
        loaded
            .cluster
            .join(&self.config, self.given.num_experts, 2, &listen)
            .await?;
        let ready = Instant::now();
        // One call is the known input of its admission, which the gateway does not count.
        loaded.admin.wait_for(&listen, |link| link.calls > 0).await?;
        let asked_after = ready.elapsed();
        let (_, worker) = Admin::connect(&listen).await?.until_executed(2).await?;
        let worked_after = ready.elapsed();
        let history = loaded.streams.history().await;
        Ok(self.figure(29, "a worker joins", &history).with([
            (
                "asked",
                format!("{} ms after it was ready", asked_after.as_millis()),
                "2 s",
                asked_after.as_secs() < 2,
            ),
            (
                "first useful work",
                format!(
                    "{} ms after it was ready ({} calls by then)",
                    worked_after.as_millis(),
                    worker
                ),
                "2 s",
                worked_after.as_secs() < 2,
            ),
        ]))
    }

    fn figure(&self, row: u32, fault: &'static str, history: &History) -> Figure {
        let figures = RunFigures::of(history);
        Figure {
            row,
            fault,
            requests: figures.requests,
            failed: history.requests.iter().filter(|request| !finished(request)).count(),
            differing: figures.differing,
            measured: Vec::new(),
        }
    }
}

impl Figure {
    fn with<const N: usize>(self, measured: [(&'static str, String, &'static str, bool); N]) -> Self {
        Self {
            measured: measured.into(),
            ..self
        }
    }
}

fn finished(request: &crate::RequestRecord) -> bool {
    matches!(request.terminals.as_slice(), [terminal] if matches!(terminal.outcome, Outcome::Finished(_)))
}

/// A loopback address that was free a moment ago.
fn free_address() -> Result<String, LoadError> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0");
    let address = listener.and_then(|listener| listener.local_addr());
    Ok(address
        .map_err(|error| LoadError::process("a free port", error))?
        .to_string())
}

/// The admin service of one process.
struct Admin {
    address: String,
    client: AdminServiceClient<tonic::transport::Channel>,
}

impl Admin {
    async fn connect(address: &str) -> Result<Self, LoadError> {
        let client = AdminServiceClient::connect(format!("http://{address}")).await;
        Ok(Self {
            client: client.map_err(|error| LoadError::server(address, error))?,
            address: address.to_owned(),
        })
    }

    async fn role(&mut self) -> Result<Role, LoadError> {
        let asked = self.client.get_stats(v1::GetStatsRequest {}).await;
        let response = asked.map_err(|status| LoadError::server(&self.address, status))?;
        let role = response.into_inner().role;
        role.ok_or_else(|| LoadError::server(&self.address, "figures of no known role"))
    }

    async fn gateway(&mut self) -> Result<v1::GatewayStats, LoadError> {
        match self.role().await? {
            Role::Gateway(gateway) => Ok(gateway),
            Role::Worker(_) => Err(LoadError::server(&self.address, "not a gateway")),
        }
    }

    async fn worker(&mut self, address: &str) -> Result<v1::WorkerLink, LoadError> {
        let links = self.gateway().await?.workers;
        let link = links.into_iter().find(|link| link.address == address);
        link.ok_or_else(|| LoadError::server(&self.address, format!("knows no worker {address}")))
    }

    /// Waits until the gateway sees that worker so.
    async fn wait_for(&mut self, address: &str, so: impl Fn(&v1::WorkerLink) -> bool) -> Result<(), LoadError> {
        let until = Instant::now() + PATIENCE;
        loop {
            let link = self.worker(address).await?;
            if so(&link) {
                return Ok(());
            }
            if Instant::now() > until {
                return Err(LoadError::server(
                    &self.address,
                    format!("{address} stays so: {link:?}"),
                ));
            }
            sleep(LOOK).await;
        }
    }

    /// Waits until this worker has executed so many requests; returns how many it has.
    async fn until_executed(mut self, least: u64) -> Result<(Self, u64), LoadError> {
        let until = Instant::now() + PATIENCE;
        loop {
            let Role::Worker(worker) = self.role().await? else {
                return Err(LoadError::server(&self.address, "not a worker"));
            };
            if worker.requests_executed >= least {
                return Ok((self, worker.requests_executed));
            }
            if Instant::now() > until {
                let executed = worker.requests_executed;
                return Err(LoadError::server(
                    &self.address,
                    format!("{executed} requests in {PATIENCE:?}"),
                ));
            }
            sleep(LOOK).await;
        }
    }
}
