//! A door: takes connections up to a limit, shakes hands with each in its own time, and hands over those that are good.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use moerun_process::{Listener, SocketFile};
use parking_lot::Mutex;
use rustls::ServerConfig;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tokio_stream::Stream as Incomers;

use crate::{Connection, Identity, PeerInfo, Refusal, ServerProtection, connection::Stream};

/// Connections that are ready and that the server has not taken yet.
const READY_QUEUE: usize = 16;
/// When the system has no more descriptors, how long to wait for one to become free.
const PAUSE_WHEN_FULL: Duration = Duration::from_millis(100);
/// How long, and for how many bytes, a client that was turned away may go on talking.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: u64 = 64 << 10;
/// A refusal that is the same as the last is logged this much later at the earliest.
const SAME_REFUSAL: Duration = Duration::from_secs(1);
/// Kind of the HTTP/2 frame that a client is turned away with. Alone: a client that had our SETTINGS before it would take
/// itself for connected, and come back at once and without end.
const GOAWAY: u8 = 7;
/// Codes of RFC 9113.
const ENHANCE_YOUR_CALM: u8 = 0xb;
const INADEQUATE_SECURITY: u8 = 0xc;
/// Its first words.
const PREFACE_START: &[u8; 3] = b"PRI";

/// Limits of a door.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// Most connections at a time, those that still shake hands included; one more is turned away.
    pub max_connections: usize,
    /// How long a client may take over its handshake, and then over the first words of HTTP/2.
    pub handshake_timeout: Duration,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        ConnectionLimits {
            max_connections: 1024,
            handshake_timeout: Duration::from_secs(10),
        }
    }
}

/// The connections of a door, as a tonic server takes them. Dropping it closes the door.
#[derive(Debug)]
pub struct Incoming {
    ready: mpsc::Receiver<io::Result<Connection>>,
    _accepting: JoinSet<()>,
}

impl Incoming {
    /// Opens the door; must be called inside the runtime that serves it. The file of a Unix socket is the caller's to keep.
    pub fn open(
        listener: Listener,
        protection: ServerProtection,
        limits: ConnectionLimits,
    ) -> io::Result<(Self, Option<SocketFile>)> {
        let (listener, file) = match listener {
            Listener::Tcp(listener) => {
                listener.set_nonblocking(true)?;
                (Socket::Tcp(tokio::net::TcpListener::from_std(listener)?), None)
            }
            Listener::Unix(listener, file) => {
                listener.set_nonblocking(true)?;
                (Socket::Unix(tokio::net::UnixListener::from_std(listener)?), Some(file))
            }
        };
        let (queue, ready) = mpsc::channel(READY_QUEUE);
        let door = Door {
            protection,
            limits,
            places: Arc::new(Semaphore::new(limits.max_connections.min(Semaphore::MAX_PERMITS))),
            queue,
            refusals: Arc::default(),
        };
        let mut accepting = JoinSet::new();
        accepting.spawn(door.accept_from(listener));
        let incoming = Self {
            ready,
            _accepting: accepting,
        };
        Ok((incoming, file))
    }
}

impl Incomers for Incoming {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.ready.poll_recv(context)
    }
}

enum Socket {
    Tcp(tokio::net::TcpListener),
    Unix(tokio::net::UnixListener),
}

enum Accepted {
    Tcp(TcpStream, PeerInfo),
    Unix(UnixStream),
}

impl Socket {
    async fn accept(&self) -> io::Result<Accepted> {
        match self {
            Socket::Tcp(listener) => {
                let (stream, address) = listener.accept().await?;
                // Without it a hop can take 40 ms. It fails on a connection that is broken already, which shows soon enough.
                let _ = stream.set_nodelay(true);
                let peer = PeerInfo {
                    address: Some(address),
                    identities: Vec::new(),
                };
                Ok(Accepted::Tcp(stream, peer))
            }
            Socket::Unix(listener) => Ok(Accepted::Unix(listener.accept().await?.0)),
        }
    }
}

#[derive(Clone)]
struct Door {
    protection: ServerProtection,
    limits: ConnectionLimits,
    places: Arc<Semaphore>,
    queue: mpsc::Sender<io::Result<Connection>>,
    refusals: Arc<RefusalLog>,
}

impl Door {
    async fn accept_from(self, socket: Socket) {
        let mut welcoming = JoinSet::new();
        let mut turning_away = false;
        loop {
            let accepted = tokio::select! {
                accepted = socket.accept() => accepted,
                Some(_) = welcoming.join_next() => continue,
                () = self.queue.closed() => return,
            };
            let accepted = match accepted {
                Ok(accepted) => accepted,
                Err(error) if is_of_one_connection(&error) => continue,
                Err(error) => {
                    tracing::error!("no connection can be taken: {error}");
                    sleep(PAUSE_WHEN_FULL).await;
                    continue;
                }
            };
            match Arc::clone(&self.places).try_acquire_owned() {
                Ok(place) => {
                    turning_away = false;
                    welcoming.spawn(self.clone().welcome(accepted, place));
                }
                Err(_) => {
                    // Once, not for each: a flood is what this is against.
                    if !turning_away {
                        tracing::warn!(
                            max_connections = self.limits.max_connections,
                            "all connections are in use: more are turned away"
                        );
                    }
                    turning_away = true;
                    self.turn_away_at_once(accepted);
                }
            }
        }
    }

    async fn welcome(self, accepted: Accepted, place: OwnedSemaphorePermit) {
        let patience = self.limits.handshake_timeout;
        let (stream, peer) = match (accepted, self.protection.tls()) {
            (Accepted::Unix(stream), _) => (Stream::Unix(stream), PeerInfo::default()),
            (Accepted::Tcp(stream, peer), None) => (Stream::Tcp(stream), peer),
            (Accepted::Tcp(stream, mut peer), Some(tls)) => {
                let address = peer.address;
                match timeout(patience, shake_hands(stream, tls.config(), address, &self.refusals)).await {
                    Ok(Some((stream, identities))) => {
                        peer.identities = identities;
                        (stream, peer)
                    }
                    Ok(None) => return,
                    Err(_) => return tracing::debug!(peer = ?address, "no TLS handshake within {patience:?}"),
                }
            }
        };
        // The server may be gone by now.
        let _ = self
            .queue
            .send(Ok(Connection::new(stream, peer, patience, place)))
            .await;
    }

    fn turn_away_at_once(&self, accepted: Accepted) {
        let farewell = goaway(ENHANCE_YOUR_CALM, "too many connections");
        // What the socket does not take at once is not worth waiting for. A TLS client is merely hung up on.
        if let (Accepted::Tcp(stream, _), None) = (&accepted, self.protection.tls()) {
            let _ = stream.try_write(&farewell);
        } else if let Accepted::Unix(stream) = &accepted {
            let _ = stream.try_write(&farewell);
        }
    }
}

/// The handshake with a client, or nothing if it is turned away: then the reason is in the log before the client has it.
async fn shake_hands(
    mut stream: TcpStream,
    config: Arc<ServerConfig>,
    peer: Option<SocketAddr>,
    log: &RefusalLog,
) -> Option<(Stream, Vec<Identity>)> {
    let mut first = [0; PREFACE_START.len()];
    match stream.peek(&mut first).await {
        Ok(0) => return None, // a probe that connects and hangs up is no event
        Ok(_) if first.starts_with(&PREFACE_START[..1]) => {
            log_refusal(log, peer, &Refusal::PeerIsPlain.into_io());
            let farewell = goaway(INADEQUATE_SECURITY, "this port speaks TLS only");
            if stream.write_all(&farewell).await.is_ok() {
                linger(stream).await;
            }
            return None;
        }
        Ok(_) => {}
        Err(error) => {
            log_refusal(log, peer, &error);
            return None;
        }
    }
    match TlsAcceptor::from(config).accept(stream).into_fallible().await {
        Ok(stream) => {
            let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
            let identities = shown.map(Identity::of).unwrap_or_default();
            Some((Stream::Tls(Box::new(stream)), identities))
        }
        Err((error, stream)) => {
            log_refusal(log, peer, &error);
            linger(stream).await;
            None
        }
    }
}

/// Ends what we say and reads on until the client has ended too, for a while. A socket that is closed with something unread
/// is reset, and the reset can overtake the words that say why.
async fn linger(mut stream: TcpStream) {
    let reading = async {
        stream.shutdown().await?;
        tokio::io::copy(&mut (&mut stream).take(LINGER_BYTES), &mut tokio::io::sink()).await
    };
    let _ = timeout(LINGER, reading).await;
}

/// When refusals were last logged, so that a client which tries again at once, without end, does not fill the log.
#[derive(Debug, Default)]
struct RefusalLog {
    last: Mutex<Option<(Refusal, Instant)>>,
}

impl RefusalLog {
    /// Whether this one is another than the last, or that is a while ago.
    fn is_news(&self, refusal: &Refusal) -> bool {
        let mut last = self.last.lock();
        let known = last
            .as_ref()
            .is_some_and(|(known, at)| known == refusal && at.elapsed() < SAME_REFUSAL);
        if !known {
            *last = Some((refusal.clone(), Instant::now()));
        }
        !known
    }
}

fn log_refusal(log: &RefusalLog, peer: Option<SocketAddr>, error: &io::Error) {
    let peer = peer.map_or_else(|| "unknown".to_owned(), |it| it.to_string());
    match Refusal::of(error) {
        Some(refusal) if log.is_news(&refusal) => tracing::warn!(peer, "refused: {refusal}"),
        Some(refusal) => tracing::debug!(peer, "refused: {refusal}"),
        None => tracing::debug!(peer, "handshake: {error}"),
    }
}

/// Whether an error of `accept` is about one connection that broke before it was taken.
fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted
    )
}

fn goaway(code: u8, text: &str) -> Vec<u8> {
    let length = u8::try_from(8 + text.len()).expect("texts here are short");
    let mut frame = vec![0, 0, length, GOAWAY, 0, 0, 0, 0, 0];
    frame.extend([0, 0, 0, 0, 0, 0, 0, code]); // no stream was begun
    frame.extend(text.as_bytes());
    frame
}

/// Whether the first bytes from a server are those with which ours turns plaintext away.
pub(crate) fn wants_tls(first: &[u8]) -> bool {
    let frame = goaway(INADEQUATE_SECURITY, "");
    // All but the length, which counts the text.
    first.len() >= frame.len() && first[3..frame.len()] == frame[3..]
}
