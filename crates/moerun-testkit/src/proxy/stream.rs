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
    Unix(UnixListener, PathBuf),
}

impl Acceptor {
    pub(super) async fn bind(place: &Place) -> io::Result<Self> {
        match place {
            Place::Tcp(address) => TcpListener::bind(address).await.map(Acceptor::Tcp),
            Place::Unix(path) => UnixListener::bind(path).map(|listener| Acceptor::Unix(listener, path.clone())),
        }
    }

    pub(super) fn address(&self) -> io::Result<String> {
        match self {
            Acceptor::Tcp(listener) => Ok(listener.local_addr()?.to_string()),
            Acceptor::Unix(_, path) => Ok(format!("unix:{}", path.display())),
        }
    }

    pub(super) async fn accept(&self) -> io::Result<Stream> {
        match self {
            Acceptor::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                Ok(Stream::Tcp(stream))
            }
            Acceptor::Unix(listener, _) => Ok(Stream::Unix(listener.accept().await?.0)),
        }
    }
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        if let Acceptor::Unix(_, path) = self {
            let _ = std::fs::remove_file(path);
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
