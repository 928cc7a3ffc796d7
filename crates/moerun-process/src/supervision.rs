//! What supervisors are told of this process: Kubernetes and load balancers by a health door of its own, systemd by its
//! notification socket.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use sd_notify::NotifyState;
use tokio::{runtime::Handle, sync::watch, time::interval};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::Shutdown;

/// Readiness, under the empty name too, which is what probes ask for unless told otherwise.
const READINESS: &str = "readiness";
/// Whether the process has ever been ready: it may load for many minutes, and must not be restarted for that.
const STARTUP: &str = "startup";
/// Whether the process still moves. Apart from readiness: a busy or draining process must not be restarted.
const LIVENESS: &str = "liveness";

/// Between two signs of life of a watched runtime.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// A runtime without a sign of life for this long hangs. Longer than any step, so that load alone never looks like it.
const HANGS_AFTER: Duration = Duration::from_secs(30);

/// The sign to supervisors, for as long as it lives. It has a thread and a runtime of its own, so that it answers however
/// busy the rest of the process is.
#[derive(Debug)]
pub struct Supervision {
    address: Option<SocketAddr>,
    ready: watch::Sender<bool>,
    heart: Arc<Heart>,
}

impl Supervision {
    /// Opens the health door on `health_addr` (`host:port`, port 0 takes a free one), if one is wanted: plain gRPC health
    /// (`grpc.health.v1.Health`), which says nothing but whether the process is well. Services: `startup`, `readiness`
    /// (also the empty name), `liveness`. Until [`Supervision::ready`] only the last is SERVING; from a drain on `startup`
    /// and `liveness` are. Where systemd asks to be notified (`NOTIFY_SOCKET`, `WATCHDOG_USEC`), it is, at the same moments.
    ///
    /// An address that cannot be taken is an error.
    pub fn start(health_addr: Option<&str>, shutdown: &Shutdown) -> io::Result<Self> {
        let listener = health_addr.map(TcpListener::bind).transpose()?;
        let address = listener.as_ref().map(TcpListener::local_addr).transpose()?;
        if let Some(listener) = &listener {
            listener.set_nonblocking(true)?;
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (ready, told) = watch::channel(false);
        let heart = Arc::new(Heart::new());
        let (shutdown, watched) = (shutdown.clone(), Arc::clone(&heart));
        thread::Builder::new()
            .name("moerun-health".to_owned())
            .spawn(move || runtime.block_on(supervise(listener, told, shutdown, &watched)))?;
        Ok(Self { address, ready, heart })
    }

    /// Where the health door listens.
    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// The process takes requests from now on.
    pub fn ready(&self) {
        self.ready.send_replace(true);
    }

    /// Has `runtime` give signs of life: without any for half a minute, `liveness` is NOT_SERVING, and systemd's watchdog
    /// is no longer fed.
    pub fn watch(&self, runtime: &Handle) {
        self.heart.beat();
        let heart = Arc::downgrade(&self.heart);
        runtime.spawn(async move {
            let mut ticks = interval(HEARTBEAT);
            while let Some(heart) = heart.upgrade() {
                heart.beat();
                drop(heart);
                ticks.tick().await;
            }
        });
    }
}

/// When a watched runtime gave its last sign of life.
#[derive(Debug)]
struct Heart {
    begun: Instant,
    /// Milliseconds after `begun`; 0 = nothing is watched.
    last_beat: AtomicU64,
}

impl Heart {
    fn new() -> Self {
        Self {
            begun: Instant::now(),
            last_beat: AtomicU64::new(0),
        }
    }

    fn now_millis(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn beat(&self) {
        self.last_beat.store(self.now_millis().max(1), Ordering::Relaxed);
    }

    fn hangs(&self) -> bool {
        match self.last_beat.load(Ordering::Relaxed) {
            0 => false,
            last => self.now_millis().saturating_sub(last) > HANGS_AFTER.as_millis() as u64,
        }
    }
}

/// Runs until [`Supervision`] is dropped.
async fn supervise(listener: Option<TcpListener>, mut ready: watch::Receiver<bool>, shutdown: Shutdown, heart: &Heart) {
    let (health, service) = tonic_health::server::health_reporter();
    say(&health, &[LIVENESS], ServingStatus::Serving).await;
    say(&health, &["", READINESS, STARTUP], ServingStatus::NotServing).await;
    let serving = async {
        let Some(listener) = listener else {
            return std::future::pending().await;
        };
        let incoming = match tokio::net::TcpListener::from_std(listener) {
            Ok(listener) => TcpListenerStream::new(listener),
            Err(error) => return tracing::error!("the health door does not open: {error}"),
        };
        if let Err(error) = Server::builder()
            .add_service(service)
            .serve_with_incoming(incoming)
            .await
        {
            tracing::error!("the health door has closed: {error}");
        }
    };
    let changes = async {
        if ready.wait_for(|&ready| ready).await.is_err() {
            return;
        }
        say(&health, &["", READINESS, STARTUP], ServingStatus::Serving).await;
        notify(&[NotifyState::Ready]);
        shutdown.draining().await;
        say(&health, &["", READINESS], ServingStatus::NotServing).await;
        notify(&[NotifyState::Stopping]);
        // The sender is dropped with the process's last work.
        let _ = ready.wait_for(|&ready| !ready).await;
    };
    let watchdog = async {
        let period = sd_notify::watchdog_enabled().map_or(HEARTBEAT, |limit| (limit / 3).min(HEARTBEAT));
        let mut ticks = interval(period);
        let mut hung = false;
        loop {
            ticks.tick().await;
            let hangs = heart.hangs();
            if hangs != hung {
                let status = if hangs {
                    ServingStatus::NotServing
                } else {
                    ServingStatus::Serving
                };
                say(&health, &[LIVENESS], status).await;
                tracing::error!("the runtime {}", if hangs { "hangs" } else { "moves again" });
                hung = hangs;
            }
            if !hung {
                notify(&[NotifyState::Watchdog]);
            }
        }
    };
    // A door that has failed is logged, and readiness is still told to systemd.
    let serving = async {
        serving.await;
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = serving => {}
        () = changes => {}
        () = watchdog => {}
    }
}

async fn say(health: &HealthReporter, services: &[&str], status: ServingStatus) {
    for service in services {
        health.set_service_status(*service, status).await;
    }
}

/// Does nothing where no supervisor listens.
fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!("systemd could not be notified: {error}");
    }
}

#[cfg(test)]
mod tests {
    use tonic::transport::Endpoint;
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

    use super::*;

    /// What the door at `address` says of a service, once it says `wanted`; an error after ten seconds.
    async fn said(address: SocketAddr, service: &str, wanted: ServingStatus) {
        let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
        let mut client = HealthClient::new(endpoint.connect().await.unwrap());
        let request = HealthCheckRequest {
            service: service.to_owned(),
        };
        let mut changes = client.watch(request).await.unwrap().into_inner();
        let waiting = async {
            while let Some(response) = changes.message().await.unwrap() {
                if response.status == wanted as i32 {
                    return;
                }
            }
            panic!("{service}: the door closed");
        };
        let waited = tokio::time::timeout(Duration::from_secs(10), waiting).await;
        waited.unwrap_or_else(|_| panic!("{service}: wanted {wanted:?}"));
    }

    #[tokio::test]
    async fn the_door_tells_startup_readiness_and_liveness_apart() {
        let shutdown = Shutdown::new();
        let supervision = Supervision::start(Some("127.0.0.1:0"), &shutdown).unwrap();
        let address = supervision.address().unwrap();
        let say = |status: [ServingStatus; 4]| async move {
            for (service, wanted) in ["", READINESS, STARTUP, LIVENESS].iter().zip(status) {
                said(address, service, wanted).await;
            }
        };
        let (yes, no) = (ServingStatus::Serving, ServingStatus::NotServing);
        say([no, no, no, yes]).await;
        supervision.ready();
        say([yes; 4]).await;
        shutdown.drain();
        say([no, no, yes, yes]).await;
    }

    #[test]
    fn a_runtime_hangs_only_when_it_was_watched_and_is_silent() {
        let mut heart = Heart::new();
        let later = |heart: &mut Heart, by: Duration| heart.begun = heart.begun.checked_sub(by).unwrap();
        later(&mut heart, HANGS_AFTER * 2);
        assert!(!heart.hangs());
        heart.beat();
        assert!(!heart.hangs());
        later(&mut heart, HANGS_AFTER * 2);
        assert!(heart.hangs());
        heart.beat();
        assert!(!heart.hangs());
    }

    #[test]
    fn an_address_in_use_is_an_error() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap().to_string();
        let error = Supervision::start(Some(&address), &Shutdown::new()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        assert!(Supervision::start(None, &Shutdown::new()).unwrap().address().is_none());
    }
}
