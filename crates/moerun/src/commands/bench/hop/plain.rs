//! The reference: a process that gives back what it reads from a plain, blocking socket.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::TcpStream,
    os::unix::net::UnixStream,
    process::{Child, Command, Stdio, id},
};

use anyhow::{Context, ensure};
use moerun_process::{Address, Listener};

use crate::commands::bench::pin;

/// A connection of either kind.
trait Connection: Read + Write {}

impl Connection for TcpStream {}
impl Connection for UnixStream {}

/// The other process' side: listens on `address`, takes one connection, reads a length of 4 bytes, and gives back messages of
/// that length until the connection ends.
pub(super) fn serve(address: &str) -> anyhow::Result<()> {
    let address = Address::parse(address).map_err(anyhow::Error::msg)?;
    let listener = Listener::bind(&address).with_context(|| format!("listen on {address}"))?;
    crate::commands::print_ready(listener.address()?, None)?;
    let mut connection: Box<dyn Connection> = match &listener {
        Listener::Tcp(listener) => {
            let (stream, _) = listener.accept()?;
            stream.set_nodelay(true)?;
            Box::new(stream)
        }
        Listener::Unix(listener, _) => Box::new(listener.accept()?.0),
    };
    let mut length = [0; 4];
    connection.read_exact(&mut length)?;
    let mut message = vec![0; u32::from_le_bytes(length) as usize];
    while connection.read_exact(&mut message).is_ok() {
        connection.write_all(&message)?;
    }
    Ok(())
}

/// This process' side.
pub(super) struct PlainPeer {
    child: Child,
    connection: Box<dyn Connection>,
    /// Length that the other side has been told.
    told: usize,
    message: Vec<u8>,
}

impl PlainPeer {
    /// Starts the other process and connects to it.
    pub(super) fn start(address: &Address) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("the path of this binary")?;
        let mut child = Command::new(program)
            .args(["bench", "hop", "--echo-on", &address.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("start the echo process")?;
        let connection = child
            .stdout
            .take()
            .context("the echo process' output")
            .and_then(connect)
            .inspect_err(|_| end(&mut child))?;
        Ok(Self {
            child,
            connection,
            told: 0,
            message: Vec::new(),
        })
    }

    /// Binds both processes to cores.
    pub(super) fn bind(&mut self, ours: &[usize], theirs: &[usize]) -> io::Result<()> {
        pin::bind(id(), ours)?;
        pin::bind(self.child.id(), theirs)
    }

    /// Sends `size` bytes, the same in every call, and reads them back.
    pub(super) fn round_trip(&mut self, size: usize) -> anyhow::Result<()> {
        if self.told != size {
            ensure!(self.told == 0, "a peer is told one length");
            self.connection.write_all(&u32::try_from(size)?.to_le_bytes())?;
            self.told = size;
            self.message = vec![0x5a; size];
        }
        self.connection.write_all(&self.message)?;
        self.connection.read_exact(&mut self.message)?;
        Ok(())
    }
}

fn connect(stdout: impl Read) -> anyhow::Result<Box<dyn Connection>> {
    let mut ready = String::new();
    BufReader::new(stdout).read_line(&mut ready)?;
    let address = ready
        .trim()
        .strip_prefix("ready grpc=")
        .context("the echo process gave no address")?;
    Ok(match Address::parse(address).map_err(anyhow::Error::msg)? {
        Address::Tcp(address) => {
            let stream = TcpStream::connect(address)?;
            stream.set_nodelay(true)?;
            Box::new(stream)
        }
        Address::Unix(path) => Box::new(UnixStream::connect(path)?),
    })
}

fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

impl Drop for PlainPeer {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}
