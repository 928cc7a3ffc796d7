//! A proxy between two processes that does to their bytes what bad networks and broken machines do.
//!
//! It forwards TCP or Unix streams and can be told at any time, for each direction: to flip bits, to delay, to drip, to
//! stall or to reset after a number of bytes, to let nothing through; and to refuse connections. It counts what it did,
//! so that a test can tell a fault that happened from one that was only asked for.

mod carry;
mod corruption;
mod stream;

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use tokio::{
    sync::{oneshot, watch},
    task::JoinSet,
};

use stream::{Acceptor, Bound, Place};

/// What is done to the bytes of both directions, and to new connections.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Faults {
    /// To what clients send.
    pub to_server: Flow,
    /// To what the server sends.
    pub to_client: Flow,
    /// New connections are closed at once.
    pub refuse: bool,
}

/// What is done to the bytes of one direction; counts of bytes begin when the faults are set, for each connection.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Flow {
    /// Bits are flipped.
    pub corrupt: Option<Corrupt>,
    /// Every byte comes this much later; the rate stays.
    pub delay: Duration,
    /// At most this many bytes a second, in small pieces.
    pub bytes_per_second: Option<u64>,
    /// Nothing more goes through after this many bytes, and the connection stays open.
    pub stall_after: Option<u64>,
    /// The connection is reset after this many bytes.
    pub reset_after: Option<u64>,
    /// Nothing goes through, and the connection stays open; what was sent meanwhile comes when this is over.
    pub cut: bool,
}

/// How bits are flipped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Corrupt {
    /// Of this many bytes one is hit, on average.
    pub one_in: u64,
    /// Decides which; mixed with the number of the connection.
    pub seed: u64,
    /// Where.
    pub within: Within,
}

/// Which bytes may be hit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Within {
    /// All.
    Anything,
    /// Contents of HTTP/2 DATA frames: messages, while the connection itself stays sound.
    DataFrames,
}

/// What a proxy has done since it started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ProxyCounts {
    /// Connections made.
    pub connections: u64,
    /// Connections refused, or whose server could not be reached.
    pub refused: u64,
    /// Bytes delivered to servers.
    pub bytes_to_server: u64,
    /// Bytes delivered to clients.
    pub bytes_to_client: u64,
    /// Bytes of which a bit was flipped.
    pub flipped: u64,
    /// Pieces that were held up: delayed, dripped, stalled or cut.
    pub held: u64,
    /// Connections reset.
    pub resets: u64,
}

#[derive(Debug, Default)]
struct Counters {
    connections: AtomicU64,
    refused: AtomicU64,
    bytes_to_server: AtomicU64,
    bytes_to_client: AtomicU64,
    flipped: AtomicU64,
    held: AtomicU64,
    resets: AtomicU64,
}

/// The faults in force and how often they were set.
#[derive(Debug, Clone, Default)]
struct InForce {
    faults: Faults,
    generation: u64,
}

/// A proxy on a thread of its own; it and its connections end when this is dropped.
#[derive(Debug)]
pub struct FaultProxy {
    address: String,
    in_force: watch::Sender<InForce>,
    resets: watch::Sender<u64>,
    counters: Arc<Counters>,
    end: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl FaultProxy {
    /// Listens on `listen` and forwards to `upstream`, each `host:port` or `unix:/path`; port 0 takes a free one.
    pub fn start(listen: &str, upstream: &str) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let bound = Bound::new(&Place::parse(listen))?;
        let address = bound.address()?;
        let (in_force, faults) = watch::channel(InForce::default());
        let (resets, reset) = watch::channel(0);
        let counters = Arc::new(Counters::default());
        let (end, ended) = oneshot::channel();
        let server = Server {
            upstream: Place::parse(upstream),
            faults,
            reset,
            counters: Arc::clone(&counters),
        };
        let thread = thread::Builder::new().name("fault-proxy".to_owned()).spawn(move || {
            runtime.block_on(async {
                let acceptor = match bound.listen() {
                    Ok(acceptor) => acceptor,
                    Err(error) => return eprintln!("the fault proxy cannot listen: {error}"),
                };
                tokio::select! {
                    () = server.run(acceptor) => {}
                    _ = ended => {}
                }
            });
        })?;
        Ok(Self {
            address,
            in_force,
            resets,
            counters,
            end: Some(end),
            thread: Some(thread),
        })
    }

    /// Where it listens, in the form of `listen`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// From now on these faults, for connections that are open too.
    pub fn set(&self, faults: Faults) {
        self.in_force.send_modify(|in_force| {
            in_force.faults = faults;
            in_force.generation += 1;
        });
    }

    /// From now on no faults.
    pub fn clear(&self) {
        self.set(Faults::default());
    }

    /// Resets all connections that are open now.
    pub fn reset_connections(&self) {
        self.resets.send_modify(|resets| *resets += 1);
    }

    /// What it has done.
    pub fn counts(&self) -> ProxyCounts {
        let Counters {
            connections,
            refused,
            bytes_to_server,
            bytes_to_client,
            flipped,
            held,
            resets,
        } = &*self.counters;
        ProxyCounts {
            connections: connections.load(Relaxed),
            refused: refused.load(Relaxed),
            bytes_to_server: bytes_to_server.load(Relaxed),
            bytes_to_client: bytes_to_client.load(Relaxed),
            flipped: flipped.load(Relaxed),
            held: held.load(Relaxed),
            resets: resets.load(Relaxed),
        }
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // a panic there has been printed
        }
    }
}

struct Server {
    upstream: Place,
    faults: watch::Receiver<InForce>,
    reset: watch::Receiver<u64>,
    counters: Arc<Counters>,
}

impl Server {
    async fn run(self, acceptor: Acceptor) {
        let mut connections = JoinSet::new();
        for number in 0.. {
            let Ok(client) = acceptor.accept().await else {
                tokio::time::sleep(Duration::from_millis(10)).await; // out of descriptors, say
                continue;
            };
            while connections.try_join_next().is_some() {}
            if self.faults.borrow().faults.refuse {
                self.counters.refused.fetch_add(1, Relaxed);
                client.reset();
                continue;
            }
            let (upstream, counters) = (self.upstream.clone(), Arc::clone(&self.counters));
            let mut reset = self.reset.clone();
            reset.mark_unchanged();
            let faults = self.faults.clone();
            connections.spawn(async move {
                let Ok(server) = upstream.connect().await else {
                    counters.refused.fetch_add(1, Relaxed);
                    return client.reset();
                };
                counters.connections.fetch_add(1, Relaxed);
                carry::carry(client, server, number, faults, reset, &counters).await;
            });
        }
    }
}

#[cfg(test)]
mod tests;
