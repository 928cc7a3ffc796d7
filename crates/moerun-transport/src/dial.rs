//! Connections that this process makes.

use std::{
    io::{self, IoSlice},
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use moerun_process::Address;
use parking_lot::Mutex;
use rustls::pki_types::ServerName;
use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream, lookup_host},
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::{
    codegen::{Service, http::Uri},
    transport::Endpoint,
};

use crate::{ClientProtection, Refusal, accept::wants_tls, plaintext::check_all};

/// Sent bytes that stay unacknowledged for as long end the connection: a peer that is cut off is found even by messages.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(2);

/// First byte of a TLS alert, which is what a TLS server answers plaintext with.
const TLS_ALERT: u8 = 0x15;
/// What would make a connection that leaves this host lawful.
const REMEDY: &str = "--tls-ca (with --tls-cert and --tls-key where a certificate is asked for)";

/// Connects to one address, whatever URI it is called with: a connector for `Endpoint::connect_with_connector`. Clones
/// share what they remember. Once it was turned away it dials no more: who wants to try again makes another.
#[derive(Debug, Clone)]
pub struct Dial {
    address: Address,
    protection: ClientProtection,
    refusal: Arc<Mutex<Option<Refusal>>>,
}

impl Dial {
    /// To `address`, protected so.
    pub fn new(address: Address, protection: ClientProtection) -> Self {
        Self {
            address,
            protection,
            refusal: Arc::default(),
        }
    }

    /// What a channel over such a connection is built from. Requests name `https` where TLS is spoken; tonic itself is told
    /// `http`, since the encryption is ours.
    pub fn endpoint(address: &Address, protection: &ClientProtection) -> Result<Endpoint, String> {
        let authority = match address {
            Address::Tcp(authority) => authority,
            Address::Unix(_) => "localhost",
        };
        let endpoint =
            Endpoint::from_shared(format!("http://{authority}")).map_err(|error| format!("{error}: {authority:?}"))?;
        match (address, protection.tls()) {
            (Address::Tcp(_), Some(_)) => {
                let origin = format!("https://{authority}").parse();
                Ok(endpoint.origin(origin.map_err(|error| format!("{error}: {authority:?}"))?))
            }
            _ => Ok(endpoint),
        }
    }

    /// Why it was turned away, by this end or the other, if it was; whoever lost a connection asks here,
    /// since what runs above it passes on no more than words.
    pub fn refusal(&self) -> Option<Refusal> {
        self.refusal.lock().clone()
    }

    async fn connect(self) -> io::Result<Dialed> {
        // Above, a connection that ends at once is made again at once, without end.
        if let Some(refusal) = self.refusal() {
            return Err(refusal.into_io());
        }
        let stream = match &self.address {
            Address::Unix(path) => Stream::Unix(UnixStream::connect(path).await?),
            Address::Tcp(text) => {
                let resolved: Vec<SocketAddr> = lookup_host(text).await?.collect();
                if matches!(self.protection, ClientProtection::LoopbackOnly)
                    && let Err(error) = check_all(text, &resolved, REMEDY)
                {
                    return Err(self.turned_away(Refusal::Plaintext(error.to_string())));
                }
                let stream = TcpStream::connect(&resolved[..]).await?;
                stream.set_nodelay(true)?;
                SockRef::from(&stream).set_tcp_user_timeout(Some(TCP_USER_TIMEOUT))?;
                match self.protection.tls() {
                    None => Stream::Tcp(stream),
                    Some(tls) => {
                        let name = self.server_name(text)?;
                        let connecting = TlsConnector::from(tls.config()).connect(name, stream);
                        let stream = connecting.await.map_err(|error| self.explain(error))?;
                        Stream::Tls(Box::new(stream))
                    }
                }
            }
        };
        Ok(Dialed {
            stream,
            heard: false,
            dial: self,
        })
    }

    fn server_name(&self, text: &str) -> io::Result<ServerName<'static>> {
        let host = text.rsplit_once(':').map_or(text, |(host, _)| host);
        let host = host.trim_start_matches('[').trim_end_matches(']');
        ServerName::try_from(host.to_owned())
            .map_err(|_| self.turned_away(Refusal::Handshake(format!("{host:?} can be no name in a certificate"))))
    }

    /// Remembers a refusal, and makes it the error.
    fn turned_away(&self, refusal: Refusal) -> io::Error {
        *self.refusal.lock() = Some(refusal.clone());
        refusal.into_io()
    }

    fn explain(&self, error: io::Error) -> io::Error {
        match Refusal::of(&error) {
            Some(refusal) => self.turned_away(refusal),
            None => error,
        }
    }
}

impl Service<Uri> for Dial {
    type Response = TokioIo<Dialed>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<TokioIo<Dialed>>> + Send>>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _uri: Uri) -> Self::Future {
        let connecting = self.clone().connect();
        Box::pin(async { connecting.await.map(TokioIo::new) })
    }
}

/// A connection that this process made.
#[derive(Debug)]
pub struct Dialed {
    stream: Stream,
    /// Whether the other end has said anything.
    heard: bool,
    dial: Dial,
}

#[derive(Debug)]
enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl AsyncRead for Dialed {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = match &mut self.stream {
            Stream::Tcp(stream) => Pin::new(stream).poll_read(context, buffer),
            Stream::Unix(stream) => Pin::new(stream).poll_read(context, buffer),
            // With TLS 1.3 our certificate is judged after the handshake: the verdict is the first thing read.
            Stream::Tls(stream) => {
                let polled = Pin::new(stream).poll_read(context, buffer);
                return polled.map_err(|error| self.dial.explain(error));
            }
        };
        if !self.heard && polled.is_ready() {
            self.heard = true;
            let first = &buffer.filled()[before..];
            if first.first() == Some(&TLS_ALERT) || wants_tls(first) {
                return Poll::Ready(Err(self.dial.turned_away(Refusal::PeerWantsTls)));
            }
        }
        polled
    }
}

impl AsyncWrite for Dialed {
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
