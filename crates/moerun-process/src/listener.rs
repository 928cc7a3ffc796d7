//! Taking an address, TCP or Unix, so that it is free again afterwards.

use std::{
    fs, io,
    net::TcpListener,
    os::unix::{
        fs::{FileTypeExt, MetadataExt},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
};

use crate::Address;

/// A socket that listens.
#[derive(Debug)]
pub enum Listener {
    /// On a port.
    Tcp(TcpListener),
    /// On a path; the file is removed when its [`SocketFile`] is dropped.
    Unix(UnixListener, SocketFile),
}

impl Listener {
    /// Takes `address`. A socket file that nobody listens on (its process was killed) is replaced; anything else at that
    /// path is an error that names it. Who may connect is decided by the folder's and the file's permissions.
    pub fn bind(address: &Address) -> io::Result<Self> {
        match address {
            Address::Tcp(text) => TcpListener::bind(text).map(Listener::Tcp),
            Address::Unix(path) => {
                let listener = match UnixListener::bind(path) {
                    Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                        remove_stale(path)?;
                        UnixListener::bind(path)?
                    }
                    bound => bound?,
                };
                Ok(Listener::Unix(listener, SocketFile::of(path)?))
            }
        }
    }

    /// Where it listens, with the port that was found for port 0.
    pub fn address(&self) -> io::Result<Address> {
        match self {
            Listener::Tcp(listener) => Ok(Address::Tcp(listener.local_addr()?.to_string())),
            Listener::Unix(_, file) => Ok(Address::Unix(file.path.clone())),
        }
    }
}

/// Takes the port of an admin service, which asks nobody who they are: only on the loopback interface.
pub fn bind_admin(address: &str) -> io::Result<TcpListener> {
    let refused = |reason: String| io::Error::new(io::ErrorKind::InvalidInput, reason);
    match Address::parse(address).map_err(refused)? {
        wanted @ Address::Tcp(_) if wanted.is_on_this_host() => TcpListener::bind(address),
        _ => Err(refused("wanted host:port on the loopback interface".to_owned())),
    }
}

/// The file of a socket that this process made; removed when dropped, if it is still the same.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        let facts = fs::symlink_metadata(path)?;
        Ok(Self {
            path: path.to_owned(),
            identity: (facts.dev(), facts.ino()),
        })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let same = fs::symlink_metadata(&self.path).is_ok_and(|facts| (facts.dev(), facts.ino()) == self.identity);
        if same && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!("the socket {} is left behind: {error}", self.path.display());
        }
    }
}

/// Removes a socket on which nobody listens.
fn remove_stale(path: &Path) -> io::Result<()> {
    let found = fs::symlink_metadata(path)?.file_type();
    if !found.is_socket() {
        let what = if found.is_dir() {
            "a folder"
        } else if found.is_symlink() {
            "a symbolic link"
        } else {
            "a file"
        };
        let message = format!("wanted a socket or nothing at that path, found {what}");
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, message));
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            "another process listens on that socket",
        )),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("moerun-listener-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir(&folder).unwrap();
        folder
    }

    fn unix(path: &Path) -> Address {
        Address::unix(path).unwrap()
    }

    #[test]
    fn a_socket_is_taken_once_and_its_file_goes_with_it() {
        let folder = folder("once");
        let path = folder.join("s");
        let listener = Listener::bind(&unix(&path)).unwrap();
        assert_eq!(listener.address().unwrap(), unix(&path));
        let error = Listener::bind(&unix(&path)).unwrap_err();
        assert_eq!(error.to_string(), "another process listens on that socket");
        UnixStream::connect(&path).unwrap();
        drop(listener);
        assert!(!path.exists());
        fs::remove_dir(&folder).unwrap();
    }

    #[test]
    fn a_socket_that_nobody_listens_on_is_replaced_and_an_old_owner_does_not_remove_the_new_one() {
        let folder = folder("stale");
        let path = folder.join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "std leaves the file, as a killed process does");
        let first = Listener::bind(&unix(&path)).unwrap();
        fs::rename(&path, folder.join("moved")).unwrap();
        let second = Listener::bind(&unix(&path)).unwrap();
        drop(first);
        UnixStream::connect(&path).unwrap();
        drop(second);
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn what_is_no_socket_is_left_alone_and_named() {
        let folder = folder("other");
        let path = folder.join("file");
        fs::write(&path, "precious").unwrap();
        let error = Listener::bind(&unix(&path)).unwrap_err().to_string();
        assert_eq!(error, "wanted a socket or nothing at that path, found a file");
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        let error = Listener::bind(&unix(&folder)).unwrap_err().to_string();
        assert_eq!(error, "wanted a socket or nothing at that path, found a folder");
        assert!(Listener::bind(&unix(&folder.join("no/such"))).is_err());
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_folder_that_may_not_be_written_is_an_error() {
        let folder = folder("closed");
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o500)).unwrap();
        // Root may write anywhere, so there is nothing to see.
        if fs::write(folder.join("probe"), "").is_err() {
            let error = Listener::bind(&unix(&folder.join("s"))).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        }
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).unwrap();
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn port_0_becomes_the_port_that_was_found() {
        let listener = Listener::bind(&Address::parse("127.0.0.1:0").unwrap()).unwrap();
        let address = listener.address().unwrap().to_string();
        assert!(
            address.starts_with("127.0.0.1:") && !address.ends_with(":0"),
            "{address}"
        );
    }
}
