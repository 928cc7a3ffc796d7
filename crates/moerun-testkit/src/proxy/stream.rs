//! TCP and Unix streams as one.

use std::{io, path::PathBuf};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
};

/// Where to listen or to connect.
#[derive(Debug, Clone)]
pub(super) enum Place {
    /// `host:port`.
    Tcp(String),
    /// A socket's path.
    Unix(PathBuf),
}

impl Place {
    /// `unix:/path`, or else `host:port`.
    pub(super) fn parse(text: &str) -> Self {
        match text.strip_prefix("unix:") {
            Some(path) => Place::Unix(path.into()),
            None => Place::Tcp(text.to_owned()),
        }
    }

    pub(super) async fn connect(&self) -> io::Result<Stream> {
        match self {
            Place::Tcp(address) => {
                let stream = TcpStream::connect(address).await?;
                stream.set_nodelay(true)?;
                Ok(Stream::Tcp(stream))
            }
            Place::Unix(path) => UnixStream::connect(path).await.map(Stream::Unix),
        }
    }
}

/// Takes connections; a socket's file is removed with it.
pub(super) enum Acceptor {
    Tcp(TcpListener),
    Unix { listener: UnixListener, _file: SocketFile },
}

/// An address that is taken, and by whom it will be served.
pub(super) enum Bound {
    Tcp(std::net::TcpListener),
    Unix(std::os::unix::net::UnixListener, SocketFile),
}

/// Removed when dropped.
pub(super) struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0); // gone already: fine
    }
}

impl Bound {
    /// Takes the address. Belongs to no runtime, so that one may be running here or not.
    pub(super) fn new(place: &Place) -> io::Result<Self> {
        match place {
            Place::Tcp(address) => {
                let listener = std::net::TcpListener::bind(address)?;
                listener.set_nonblocking(true)?;
                Ok(Bound::Tcp(listener))
            }
            Place::Unix(path) => {
                let listener = std::os::unix::net::UnixListener::bind(path)?;
                listener.set_nonblocking(true)?;
                Ok(Bound::Unix(listener, SocketFile(path.clone())))
            }
        }
    }

    pub(super) fn address(&self) -> io::Result<String> {
        match self {
            Bound::Tcp(listener) => Ok(listener.local_addr()?.to_string()),
            Bound::Unix(_, file) => Ok(format!("unix:{}", file.0.display())),
        }
    }

    /// Hands it to the runtime that this is called in.
    pub(super) fn listen(self) -> io::Result<Acceptor> {
        match self {
            Bound::Tcp(listener) => TcpListener::from_std(listener).map(Acceptor::Tcp),
            Bound::Unix(listener, file) => {
                UnixListener::from_std(listener).map(|listener| Acceptor::Unix { listener, _file: file })
            }
        }
    }
}

impl Acceptor {
    pub(super) async fn accept(&self) -> io::Result<Stream> {
        match self {
            Acceptor::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                Ok(Stream::Tcp(stream))
            }
            Acceptor::Unix { listener, .. } => Ok(Stream::Unix(listener.accept().await?.0)),
        }
    }
}

pub(super) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

pub(super) type Reader<'a> = Box<dyn AsyncRead + Send + Unpin + 'a>;
pub(super) type Writer<'a> = Box<dyn AsyncWrite + Send + Unpin + 'a>;

impl Stream {
    pub(super) fn split(&mut self) -> (Reader<'_>, Writer<'_>) {
        match self {
            Stream::Tcp(stream) => {
                let (reader, writer) = stream.split();
                (Box::new(reader), Box::new(writer))
            }
            Stream::Unix(stream) => {
                let (reader, writer) = stream.split();
                (Box::new(reader), Box::new(writer))
            }
        }
    }

    /// Closes it so that the other side sees a reset and not an end; a Unix socket knows no difference.
    pub(super) fn reset(self) {
        if let Stream::Tcp(stream) = &self {
            let _ = stream.set_zero_linger(); // else it is an ordinary end
        }
    }
}
