//! Where to look for workers, and where workers say that they are there, as operators write it.

use std::{fmt, str::FromStr};

use moerun_process::Address;

use crate::DiscoveryError;

/// Keys of one cluster begin with it unless told otherwise.
const DEFAULT_PREFIX: &str = "moerun";

/// A place to look for workers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceSpec {
    /// `dns:HOST:PORT`: every address of a name, on one port.
    Dns {
        /// The name.
        host: String,
        /// The port of all workers.
        port: u16,
    },
    /// `srv:NAME`: host and port of each record.
    Srv {
        /// The name of the records.
        name: String,
    },
    /// `etcd:HOST:PORT[+HOST:PORT…][/PREFIX]`.
    Etcd(EtcdSpec),
}

/// A place where a worker says that it is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RegisterAt {
    /// A gateway's `--registry-addr`.
    Gateway(Address),
    /// `etcd:HOST:PORT[+HOST:PORT…][/PREFIX]`.
    Etcd(EtcdSpec),
}

/// An etcd cluster, and the part of its keys that is ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdSpec {
    /// `HOST:PORT` of its members; one that answers is enough.
    pub endpoints: Vec<String>,
    /// What all our keys begin with, without slashes at its ends.
    pub prefix: String,
}

impl FromStr for SourceSpec {
    type Err = DiscoveryError;

    fn from_str(text: &str) -> Result<Self, DiscoveryError> {
        let refused = |wanted: &str| DiscoveryError::Spec {
            text: text.to_owned(),
            wanted: wanted.to_owned(),
        };
        match text.split_once(':') {
            Some(("dns", rest)) => {
                let wanted = "wanted dns:HOST:PORT with a port above 0";
                let (host, port) = rest.rsplit_once(':').ok_or_else(|| refused(wanted))?;
                match port.parse() {
                    Ok(port) if port > 0 && is_name(host) => Ok(SourceSpec::Dns {
                        host: host.to_owned(),
                        port,
                    }),
                    _ => Err(refused(wanted)),
                }
            }
            Some(("srv", name)) if is_name(name) => Ok(SourceSpec::Srv { name: name.to_owned() }),
            Some(("srv", _)) => Err(refused("wanted srv:NAME")),
            Some(("etcd", rest)) => EtcdSpec::parse(text, rest).map(SourceSpec::Etcd),
            _ => Err(refused(
                "wanted dns:HOST:PORT, srv:NAME or etcd:HOST:PORT[+HOST:PORT…][/PREFIX]",
            )),
        }
    }
}

impl FromStr for RegisterAt {
    type Err = DiscoveryError;

    fn from_str(text: &str) -> Result<Self, DiscoveryError> {
        if let Some(rest) = text.strip_prefix("etcd:") {
            return EtcdSpec::parse(text, rest).map(RegisterAt::Etcd);
        }
        let refused = |reason: String| DiscoveryError::Spec {
            text: text.to_owned(),
            wanted: format!("{reason} of a gateway's --registry-addr, or etcd:HOST:PORT"),
        };
        match Address::parse(text).map_err(refused)? {
            Address::Tcp(text) if text.ends_with(":0") => Err(refused("wanted a port above 0".to_owned())),
            address => Ok(RegisterAt::Gateway(address)),
        }
    }
}

impl EtcdSpec {
    fn parse(text: &str, rest: &str) -> Result<Self, DiscoveryError> {
        if cfg!(not(feature = "etcd")) {
            return Err(DiscoveryError::NotBuilt {
                text: text.to_owned(),
                feature: "etcd",
            });
        }
        let refused = || DiscoveryError::Spec {
            text: text.to_owned(),
            wanted: "wanted etcd:HOST:PORT[+HOST:PORT…][/PREFIX]".to_owned(),
        };
        let (endpoints, prefix) = rest.split_once('/').unwrap_or((rest, DEFAULT_PREFIX));
        let prefix = prefix.trim_matches('/');
        if prefix.is_empty() || !prefix.bytes().all(|it| it.is_ascii_graphic()) {
            return Err(refused());
        }
        let endpoint = |text: &str| match Address::parse(text) {
            Ok(Address::Tcp(endpoint)) if !endpoint.ends_with(":0") => Ok(endpoint),
            _ => Err(refused()),
        };
        Ok(EtcdSpec {
            endpoints: endpoints.split('+').map(endpoint).collect::<Result<_, _>>()?,
            prefix: prefix.to_owned(),
        })
    }
}

/// Whether it could be a name that is looked up. What is wrong with it beyond that, the resolver says.
fn is_name(text: &str) -> bool {
    let plain = |it: u8| it.is_ascii_alphanumeric() || matches!(it, b'.' | b'-' | b'_');
    !text.is_empty() && text.len() <= 253 && text.bytes().all(plain)
}

impl fmt::Display for SourceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SourceSpec::Dns { host, port } => write!(f, "dns:{host}:{port}"),
            SourceSpec::Srv { name } => write!(f, "srv:{name}"),
            SourceSpec::Etcd(spec) => spec.fmt(f),
        }
    }
}

impl fmt::Display for EtcdSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "etcd:{}/{}", self.endpoints.join("+"), self.prefix)
    }
}

impl fmt::Display for RegisterAt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RegisterAt::Gateway(address) => address.fmt(f),
            RegisterAt::Etcd(spec) => spec.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_read_and_written_alike() {
        for text in ["dns:workers.moerun.svc:50061", "srv:_grpc._tcp.workers"] {
            assert_eq!(text.parse::<SourceSpec>().unwrap().to_string(), text);
        }
        assert_eq!("127.0.0.1:7".parse::<RegisterAt>().unwrap().to_string(), "127.0.0.1:7");
        assert_eq!("unix:/run/r".parse::<RegisterAt>().unwrap().to_string(), "unix:/run/r");
    }

    #[test]
    fn what_is_no_source_is_refused_by_name() {
        for bad in [
            "",
            "workers:50061",
            "dns:",
            "dns:workers",
            "dns:workers:0",
            "dns:a b:1",
            "dns::1",
            "srv:",
            "srv:a/b",
        ] {
            let error = bad.parse::<SourceSpec>().unwrap_err().to_string();
            assert!(error.starts_with(&format!("{bad:?}: wanted ")), "{error}");
        }
        for bad in ["", "gateway", "gateway:0", ":1"] {
            let error = bad.parse::<RegisterAt>().unwrap_err().to_string();
            assert!(error.starts_with(&format!("{bad:?}: wanted ")), "{error}");
        }
    }

    #[cfg(feature = "etcd")]
    #[test]
    fn etcd_has_members_and_a_prefix() {
        let spec: SourceSpec = "etcd:a:2379+b:2379/prod/one/".parse().unwrap();
        assert_eq!(spec.to_string(), "etcd:a:2379+b:2379/prod/one");
        assert_eq!("etcd:a:1".parse::<RegisterAt>().unwrap().to_string(), "etcd:a:1/moerun");
        for bad in ["etcd:", "etcd:a", "etcd:a:0", "etcd:a:1+", "etcd:a:1/", "etcd:a:1/x y"] {
            let error = bad.parse::<SourceSpec>().unwrap_err().to_string();
            assert!(error.contains("wanted etcd:"), "{error}");
        }
    }

    #[cfg(not(feature = "etcd"))]
    #[test]
    fn a_binary_without_etcd_says_so() {
        let error = "etcd:a:2379".parse::<SourceSpec>().unwrap_err().to_string();
        assert!(error.contains("built without the feature etcd"), "{error}");
    }
}
