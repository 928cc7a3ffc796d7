//! Carries one connection's bytes, both ways.

use std::{
    io,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::{mpsc, watch},
    time::{Instant, sleep, sleep_until},
};

use super::{
    Counters, Flow, InForce,
    corruption::Corruption,
    stream::{Reader, Stream, Writer},
};

const PIECE: usize = 16 << 10;
/// Pieces that may be on their way while they are delayed: enough for 50 ms at 80 MB/s and more.
const ON_THEIR_WAY: usize = 256;
/// How often a dripping connection writes.
const DRIP: Duration = Duration::from_millis(20);

/// Why a direction ended before both sides had closed it.
struct Broken;

impl From<io::Error> for Broken {
    fn from(_: io::Error) -> Self {
        Broken
    }
}

/// Until both sides have closed it, one breaks off, or it is reset.
pub(super) async fn carry(
    mut client: Stream,
    mut server: Stream,
    number: u64,
    faults: watch::Receiver<InForce>,
    mut reset: watch::Receiver<u64>,
    counters: &Counters,
) {
    let broken = {
        let (from_client, to_client) = client.split();
        let (from_server, to_server) = server.split();
        let requests = Direction {
            flow: |in_force| &in_force.faults.to_server,
            corruption: Corruption::of_client(2 * number),
            delivered: &counters.bytes_to_server,
            faults: faults.clone(),
            counters,
        };
        let answers = Direction {
            flow: |in_force| &in_force.faults.to_client,
            corruption: Corruption::of_server(2 * number + 1),
            delivered: &counters.bytes_to_client,
            faults,
            counters,
        };
        tokio::select! {
            carried = async { tokio::try_join!(requests.run(from_client, to_server), answers.run(from_server, to_client)) } => carried.is_err(),
            _ = reset.changed() => true,
        }
    };
    if broken {
        counters.resets.fetch_add(1, Relaxed);
        client.reset();
        server.reset();
    }
}

struct Direction<'a> {
    flow: fn(&InForce) -> &Flow,
    corruption: Corruption,
    delivered: &'a AtomicU64,
    faults: watch::Receiver<InForce>,
    counters: &'a Counters,
}

impl Direction<'_> {
    async fn run(self, reader: Reader<'_>, writer: Writer<'_>) -> Result<(), Broken> {
        let Direction {
            flow,
            corruption,
            delivered,
            faults,
            counters,
        } = self;
        let (pieces, on_their_way) = mpsc::channel(ON_THEIR_WAY);
        let reading = read(reader, flow, corruption, faults.clone(), counters, pieces);
        let writing = Writing {
            flow,
            faults,
            counters,
            delivered,
            generation: 0,
            since_set: 0,
        };
        tokio::try_join!(reading, writing.run(writer, on_their_way)).map(drop)
    }
}

/// Bytes, and not before when they are written.
type Piece = (Instant, Vec<u8>);

async fn read(
    mut reader: Reader<'_>,
    flow: fn(&InForce) -> &Flow,
    mut corruption: Corruption,
    faults: watch::Receiver<InForce>,
    counters: &Counters,
    pieces: mpsc::Sender<Piece>,
) -> Result<(), Broken> {
    let mut buffer = vec![0; PIECE];
    loop {
        let length = reader.read(&mut buffer).await?;
        if length == 0 {
            return Ok(());
        }
        let mut piece = buffer[..length].to_vec();
        let (corrupt, delay) = {
            let in_force = faults.borrow();
            (flow(&in_force).corrupt, flow(&in_force).delay)
        };
        counters
            .flipped
            .fetch_add(corruption.apply(corrupt, &mut piece), Relaxed);
        if !delay.is_zero() {
            counters.held.fetch_add(1, Relaxed);
        }
        pieces.send((Instant::now() + delay, piece)).await.map_err(|_| Broken)?;
    }
}

struct Writing<'a> {
    flow: fn(&InForce) -> &Flow,
    faults: watch::Receiver<InForce>,
    counters: &'a Counters,
    delivered: &'a AtomicU64,
    generation: u64,
    /// Bytes written since the faults in force were set.
    since_set: u64,
}

impl Writing<'_> {
    async fn run(mut self, mut writer: Writer<'_>, mut pieces: mpsc::Receiver<Piece>) -> Result<(), Broken> {
        while let Some((due, piece)) = pieces.recv().await {
            sleep_until(due).await;
            let mut rest = piece.as_slice();
            while !rest.is_empty() {
                let now = self.next(rest.len()).await?;
                self.since_set += now as u64;
                self.delivered.fetch_add(now as u64, Relaxed); // before whoever reads them can look
                writer.write_all(&rest[..now]).await?;
                rest = &rest[now..];
            }
        }
        self.wait_while_cut().await;
        writer.shutdown().await?;
        Ok(())
    }

    /// How many of the next `length` bytes may be written now; waits until it is at least one.
    async fn next(&mut self, length: usize) -> Result<usize, Broken> {
        loop {
            self.wait_while_cut().await;
            let flow = self.flow();
            let mut most = length as u64;
            if let Some(after) = flow.reset_after {
                most = most.min(after.saturating_sub(self.since_set));
                if most == 0 {
                    return Err(Broken);
                }
            }
            if let Some(after) = flow.stall_after {
                most = most.min(after.saturating_sub(self.since_set));
                if most == 0 {
                    self.counters.held.fetch_add(1, Relaxed);
                    self.changed().await;
                    continue;
                }
            }
            if let Some(rate) = flow.bytes_per_second {
                self.counters.held.fetch_add(1, Relaxed);
                sleep(DRIP).await;
                most = most.min((rate as f64 * DRIP.as_secs_f64()).ceil() as u64).max(1);
            }
            return Ok(usize::try_from(most).unwrap_or(length).min(length));
        }
    }

    async fn wait_while_cut(&mut self) {
        let mut told = false;
        while self.flow().cut {
            if !told {
                told = true;
                self.counters.held.fetch_add(1, Relaxed);
            }
            self.changed().await;
        }
    }

    /// What is in force; counting begins anew where it was set since the last look.
    fn flow(&mut self) -> Flow {
        let in_force = self.faults.borrow_and_update();
        if in_force.generation != self.generation {
            self.generation = in_force.generation;
            self.since_set = 0;
        }
        (self.flow)(&in_force).clone()
    }

    async fn changed(&mut self) {
        if self.faults.changed().await.is_err() {
            std::future::pending::<()>().await; // the proxy ends, and with it this
        }
    }
}
