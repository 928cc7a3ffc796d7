//! Where a worker is reached: `host:port`, or `unix:/path` for one on the same host.

use std::{
    fmt,
    net::IpAddr,
    path::{Path, PathBuf},
};

/// What an address of a Unix socket begins with.
const UNIX: &str = "unix:";
/// Longest path that the system takes for a socket, in bytes: the least of the systems we know, without the final zero.
const MAX_SOCKET_PATH: usize = if cfg!(target_os = "linux") { 107 } else { 103 };

/// Where a worker is reached.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Address {
    /// `host:port`.
    Tcp(String),
    /// `unix:` and the path of a socket.
    Unix(PathBuf),
}

impl Address {
    /// Parses `host:port` or `unix:PATH`; a host is not looked up, and port 0 is a port. The error says what was wanted.
    pub fn parse(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix(UNIX) {
            // gRPC's own spelling with an authority that is empty.
            let path = path.strip_prefix("//").unwrap_or(path);
            return Self::unix(Path::new(path));
        }
        let port = text
            .rsplit_once(':')
            .and_then(|(host, port)| (!host.is_empty()).then_some(port));
        match port.map(str::parse::<u16>) {
            Some(Ok(_)) => Ok(Address::Tcp(text.to_owned())),
            _ => Err("wanted host:port or unix:/path".to_owned()),
        }
    }

    /// The socket at `path`, if the system can have one there.
    pub fn unix(path: &Path) -> Result<Self, String> {
        let length = path.as_os_str().len();
        match length {
            0 => Err("wanted a path after unix:, found none".to_owned()),
            _ if length > MAX_SOCKET_PATH => Err(format!(
                "wanted a path of at most {MAX_SOCKET_PATH} bytes, which is all that the system takes for a socket, found \
                 {length}"
            )),
            _ => Ok(Address::Unix(path.to_owned())),
        }
    }

    /// Whether only processes of this host can be there: a Unix socket, or the loopback interface.
    pub fn is_on_this_host(&self) -> bool {
        match self {
            Address::Unix(_) => true,
            Address::Tcp(text) => {
                let host = text.rsplit_once(':').map_or("", |(host, _)| host);
                let host = host
                    .strip_prefix('[')
                    .and_then(|it| it.strip_suffix(']'))
                    .unwrap_or(host);
                host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
            }
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp(text) => f.write_str(text),
            Address::Unix(path) => write!(f, "{UNIX}{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_are_read_and_written_alike() {
        for text in [
            "127.0.0.1:0",
            "worker-0.workers:50061",
            "[::1]:50061",
            "unix:/run/a.sock",
            "unix:a.sock",
        ] {
            assert_eq!(Address::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(Address::parse("unix:///a").unwrap(), Address::Unix("/a".into()));
    }

    #[test]
    fn what_is_no_address_is_refused_in_words() {
        for bad in ["", "127.0.0.1", ":50061", "host:70000", "host:x"] {
            assert_eq!(
                Address::parse(bad).unwrap_err(),
                "wanted host:port or unix:/path",
                "{bad:?}"
            );
        }
        assert!(Address::parse("unix:").unwrap_err().contains("found none"));
        let long = format!("unix:/{}", "a".repeat(MAX_SOCKET_PATH));
        let error = Address::parse(&long).unwrap_err();
        assert!(error.contains(&format!("found {}", MAX_SOCKET_PATH + 1)), "{error}");
        Address::parse(&long[..long.len() - 1]).unwrap();
    }

    #[test]
    fn loopback_and_unix_sockets_are_on_this_host() {
        for here in ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "localhost:1", "unix:/a"] {
            assert!(Address::parse(here).unwrap().is_on_this_host(), "{here}");
        }
        for elsewhere in ["10.0.0.2:1", "worker:1", "[2001:db8::1]:1"] {
            assert!(!Address::parse(elsewhere).unwrap().is_on_this_host(), "{elsewhere}");
        }
    }
}
