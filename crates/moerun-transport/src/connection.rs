//! A connection that a door has taken.

use std::{
    io::{self, IoSlice},
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
    sync::OwnedSemaphorePermit,
    time::{Sleep, sleep},
};
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use crate::{Identity, Refusal};

/// Bytes with which a client of HTTP/2 begins.
const PREFACE_BYTES: usize = 24;
/// First byte of a TLS client's first record.
const TLS_HANDSHAKE: u8 = 0x16;

/// Who is at the other end; an extension of every request.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PeerInfo {
    /// Its address; `None` on a Unix socket.
    pub address: Option<SocketAddr>,
    /// Who its certificate says it is; empty without one.
    pub identities: Vec<Identity>,
}

/// A connection that a door has taken. It counts against the door's limit until it is dropped, and ends if the client has
/// not said the first words of HTTP/2 in time.
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
    peer: PeerInfo,
    greeting: Option<Greeting>,
    _permit: OwnedSemaphorePermit,
}

#[derive(Debug)]
pub(crate) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// What a client still has to say, and by when.
#[derive(Debug)]
struct Greeting {
    bytes_left: usize,
    deadline: Pin<Box<Sleep>>,
}

impl Connection {
    pub(crate) fn new(stream: Stream, peer: PeerInfo, patience: Duration, permit: OwnedSemaphorePermit) -> Self {
        Self {
            stream,
            peer,
            greeting: Some(Greeting {
                bytes_left: PREFACE_BYTES,
                deadline: Box::pin(sleep(patience)),
            }),
            _permit: permit,
        }
    }

    /// The address, as it stands in a log line.
    fn peer_name(&self) -> String {
        self.peer
            .address
            .map_or_else(|| "a Unix socket".to_owned(), |it| it.to_string())
    }

    fn poll_greeting(&mut self, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = self.stream.poll_read(context, buffer);
        let Some(greeting) = &mut self.greeting else {
            return polled;
        };
        if polled.is_pending() {
            ready!(greeting.deadline.as_mut().poll(context));
            let late = "the client did not say the first words of HTTP/2 in time";
            tracing::debug!(peer = self.peer_name(), "{late}");
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, late)));
        }
        let read = &buffer.filled()[before..];
        let is_first = greeting.bytes_left == PREFACE_BYTES;
        greeting.bytes_left = greeting.bytes_left.saturating_sub(read.len());
        if greeting.bytes_left == 0 {
            self.greeting = None;
        }
        if is_first && read.first() == Some(&TLS_HANDSHAKE) && !matches!(self.stream, Stream::Tls(_)) {
            tracing::warn!(
                peer = self.peer_name(),
                "refused: it speaks TLS, and this door is plaintext (--tls-cert would change that)"
            );
            return Poll::Ready(Err(Refusal::Handshake("TLS on a plaintext door".to_owned()).into_io()));
        }
        polled
    }
}

impl Stream {
    fn poll_read(&mut self, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self {
            Stream::Tcp(stream) => Pin::new(stream).poll_read(context, buffer),
            Stream::Unix(stream) => Pin::new(stream).poll_read(context, buffer),
            Stream::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.greeting {
            None => self.stream.poll_read(context, buffer),
            Some(_) => self.poll_greeting(context, buffer),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Stream::Tcp(stream) => Pin::new(stream).poll_write(context, bytes),
            Stream::Unix(stream) => Pin::new(stream).poll_write(context, bytes),
            Stream::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Stream::Tcp(stream) => Pin::new(stream).poll_write_vectored(context, slices),
            Stream::Unix(stream) => Pin::new(stream).poll_write_vectored(context, slices),
            Stream::Tls(stream) => Pin::new(stream).poll_write_vectored(context, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            Stream::Tcp(stream) => stream.is_write_vectored(),
            Stream::Unix(stream) => stream.is_write_vectored(),
            Stream::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Tcp(stream) => Pin::new(stream).poll_flush(context),
            Stream::Unix(stream) => Pin::new(stream).poll_flush(context),
            Stream::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Tcp(stream) => Pin::new(stream).poll_shutdown(context),
            Stream::Unix(stream) => Pin::new(stream).poll_shutdown(context),
            Stream::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = PeerInfo;

    fn connect_info(&self) -> PeerInfo {
        self.peer.clone()
    }
}
