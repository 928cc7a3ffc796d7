//! Plaintext stays on this host, unless the operator says otherwise.

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpListener, ToSocketAddrs},
};

use moerun_process::{Address, Listener};

use crate::{Protection, TransportError};

/// Whether only processes of this host can reach `ip`; an IPv4 address may be written as IPv6 (`::ffff:127.0.0.1`).
pub fn is_loopback(ip: IpAddr) -> bool {
    ip.to_canonical().is_loopback()
}

/// Takes `address` for a door with `protection`. Where that is [`Protection::LoopbackOnly`], every address that the name
/// stands for must be one of the loopback interface; `remedy` names the flags that would encrypt.
pub fn bind<T>(
    address: &Address,
    protection: &Protection<T>,
    remedy: &'static str,
) -> Result<Listener, TransportError> {
    let failed = |source| TransportError::Listen {
        address: address.to_string(),
        source,
    };
    match (address, protection) {
        (Address::Tcp(text), Protection::LoopbackOnly) => {
            let resolved: Vec<SocketAddr> = text.to_socket_addrs().map_err(failed)?.collect();
            check_all(text, &resolved, remedy)?;
            // What was checked is what is taken: the name is not looked up again.
            TcpListener::bind(&resolved[..]).map(Listener::Tcp).map_err(failed)
        }
        _ => Listener::bind(address).map_err(failed),
    }
}

/// That all addresses a name stands for are of this host alone.
pub(crate) fn check_all(text: &str, resolved: &[SocketAddr], remedy: &'static str) -> Result<(), TransportError> {
    if resolved.is_empty() {
        return Err(TransportError::Listen {
            address: text.to_owned(),
            source: io::Error::new(io::ErrorKind::NotFound, "the name stands for no address"),
        });
    }
    match resolved.iter().find(|it| !is_loopback(it.ip())) {
        Some(open) => Err(TransportError::Plaintext {
            address: text.to_owned(),
            found: open.ip().to_string(),
            remedy,
        }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bind_plain(text: &str, protection: &Protection<()>) -> Result<Listener, TransportError> {
        bind(&Address::parse(text).unwrap(), protection, "--tls-cert and --tls-key")
    }

    #[test]
    fn plaintext_is_taken_on_loopback_and_refused_elsewhere_with_what_to_do() {
        for here in ["127.0.0.1:0", "127.8.9.1:0", "localhost:0", "[::ffff:127.0.0.1]:0"] {
            bind_plain(here, &Protection::LoopbackOnly).unwrap_or_else(|error| panic!("{here}: {error}"));
        }
        for (open, ip) in [
            ("0.0.0.0:0", "0.0.0.0"),
            ("[::]:0", "::"),
            ("[::ffff:0.0.0.0]:0", "::ffff:0.0.0.0"),
            ("192.0.2.7:0", "192.0.2.7"),
        ] {
            let error = bind_plain(open, &Protection::LoopbackOnly).unwrap_err();
            assert!(matches!(error, TransportError::Plaintext { .. }), "{open}: {error}");
            let text = error.to_string();
            for word in [ip, "--insecure", "--tls-cert", "127.0.0.1"] {
                assert!(text.contains(word), "{open}: {text}");
            }
        }
    }

    #[test]
    fn one_open_address_among_those_of_a_name_is_enough_to_refuse_it() {
        let resolved = ["127.0.0.1:1".parse().unwrap(), "192.0.2.1:1".parse().unwrap()];
        let error = check_all("worker:1", &resolved, "TLS").unwrap_err().to_string();
        assert!(error.starts_with("worker:1: 192.0.2.1 can be reached"), "{error}");
        check_all("worker:1", &resolved[..1], "TLS").unwrap();
        assert!(check_all("worker:1", &[], "TLS").is_err());
    }

    #[test]
    fn the_operator_has_the_last_word() {
        bind_plain("0.0.0.0:0", &Protection::Insecure).unwrap();
    }
}
