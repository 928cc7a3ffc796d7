//! A real etcd server on loopback.

use std::{
    fs,
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::free_port;

/// Where Debian's package `etcd-server` has it.
const PROGRAM: &str = "/usr/bin/etcd";

/// An etcd server of one member, with its data in a folder; killed when dropped.
#[derive(Debug)]
pub struct EtcdServer {
    child: Option<Child>,
    folder: PathBuf,
    /// `HOST:PORT` for clients.
    pub address: String,
    peer: String,
}

impl EtcdServer {
    /// Starts one with its data in `folder`, or says that the host has none.
    pub fn start(folder: &Path) -> Option<Self> {
        if !Path::new(PROGRAM).exists() {
            eprintln!("SKIPPED: no {PROGRAM} (Debian's package etcd-server)");
            return None;
        }
        let [address, peer] = [(); 2].map(|()| format!("127.0.0.1:{}", free_port()));
        let mut server = Self {
            child: None,
            folder: folder.to_owned(),
            address,
            peer,
        };
        server.restart();
        Some(server)
    }

    /// Starts it again on its data, and waits until it takes connections.
    pub fn restart(&mut self) {
        self.kill();
        let (client, peer) = (format!("http://{}", self.address), format!("http://{}", self.peer));
        let log = fs::File::create(self.folder.join("log")).expect("a writable folder");
        let data = self.folder.join("data");
        let child = Command::new(PROGRAM)
            .arg("--data-dir")
            .arg(&data)
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}"), "--unsafe-no-fsync"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn();
        self.child = Some(child.expect("etcd starts"));
        let deadline = Instant::now() + Duration::from_secs(30);
        while TcpStream::connect(&self.address).is_err() {
            assert!(Instant::now() < deadline, "etcd does not listen on {}", self.address);
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Kills it, as a crash would.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for EtcdServer {
    fn drop(&mut self) {
        self.kill();
    }
}
