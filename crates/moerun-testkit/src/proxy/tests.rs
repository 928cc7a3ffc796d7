use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::net::{UnixListener, UnixStream},
    time::Instant,
};

use super::*;

/// A server that sends back what it gets, on each connection.
fn echo_server() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            thread::spawn(move || io::copy(&mut stream.try_clone().unwrap(), &mut &stream));
        }
    });
    address
}

fn proxied() -> (FaultProxy, TcpStream) {
    let proxy = FaultProxy::start("127.0.0.1:0", &echo_server()).unwrap();
    let stream = TcpStream::connect(proxy.address()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    (proxy, stream)
}

fn round_trip(stream: &mut TcpStream, bytes: &[u8]) -> io::Result<Vec<u8>> {
    stream.write_all(bytes)?;
    let mut back = vec![0; bytes.len()];
    stream.read_exact(&mut back)?;
    Ok(back)
}

fn to_client(flow: Flow) -> Faults {
    Faults {
        to_client: flow,
        ..Faults::default()
    }
}

#[test]
fn without_faults_nothing_is_changed() {
    let (proxy, mut stream) = proxied();
    let bytes: Vec<u8> = (0..200_000u32).map(|at| at as u8).collect();
    let mut writer = stream.try_clone().unwrap();
    let sent = bytes.clone();
    let writing = thread::spawn(move || {
        writer.write_all(&sent).unwrap();
        writer.shutdown(std::net::Shutdown::Write).unwrap();
    });
    let mut back = Vec::new();
    stream.read_to_end(&mut back).unwrap(); // the end of one side goes through too
    writing.join().unwrap();
    assert!(back == bytes);
    let counts = proxy.counts();
    assert_eq!(
        (counts.connections, counts.bytes_to_server, counts.bytes_to_client),
        (1, 200_000, 200_000)
    );
    assert_eq!(
        (counts.flipped, counts.held, counts.resets, counts.refused),
        (0, 0, 0, 0)
    );
}

#[test]
fn flipped_bits_are_counted() {
    let (proxy, mut stream) = proxied();
    proxy.set(to_client(Flow {
        corrupt: Some(Corrupt {
            one_in: 100,
            seed: 1,
            within: Within::Anything,
        }),
        ..Flow::default()
    }));
    let back = round_trip(&mut stream, &[0; 10_000]).unwrap();
    let wrong = back.iter().filter(|&&byte| byte != 0).count() as u64;
    assert!(wrong > 50, "{wrong}");
    assert_eq!(proxy.counts().flipped, wrong);
    proxy.clear();
    assert_eq!(round_trip(&mut stream, &[0; 10_000]).unwrap(), [0; 10_000]);
}

#[test]
fn a_delay_is_in_both_directions_what_was_asked_for() {
    let (proxy, mut stream) = proxied();
    let flow = Flow {
        delay: Duration::from_millis(30),
        ..Flow::default()
    };
    proxy.set(Faults {
        to_server: flow.clone(),
        to_client: flow,
        refuse: false,
    });
    let begun = Instant::now();
    round_trip(&mut stream, b"x").unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(60), "{:?}", begun.elapsed());
    assert_eq!(proxy.counts().held, 2);
}

#[test]
fn a_dripping_connection_takes_its_time() {
    let (proxy, mut stream) = proxied();
    proxy.set(to_client(Flow {
        bytes_per_second: Some(1000),
        ..Flow::default()
    }));
    let begun = Instant::now();
    round_trip(&mut stream, &[7; 200]).unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(190), "{:?}", begun.elapsed());
}

#[test]
fn a_stalled_or_cut_connection_goes_on_when_that_is_over() {
    let (proxy, mut stream) = proxied();
    for flow in [
        Flow {
            stall_after: Some(3),
            ..Flow::default()
        },
        Flow {
            cut: true,
            ..Flow::default()
        },
    ] {
        let passes = flow.stall_after.unwrap_or(0);
        proxy.set(to_client(flow));
        let before = proxy.counts();
        stream.write_all(b"abcdef").unwrap();
        while proxy.counts().held == before.held {
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(proxy.counts().bytes_to_client - before.bytes_to_client, passes);
        proxy.clear();
        let mut back = [0; 6];
        stream.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"abcdef");
    }
}

#[test]
fn a_reset_inside_a_message_is_seen_as_one() {
    let (proxy, mut stream) = proxied();
    proxy.set(to_client(Flow {
        reset_after: Some(3),
        ..Flow::default()
    }));
    let error = round_trip(&mut stream, b"abcdef").unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}");
    assert_eq!(proxy.counts().resets, 1);
    assert!(proxy.counts().bytes_to_client <= 3);
}

#[test]
fn connections_can_be_refused_and_those_there_are_be_reset() {
    let (proxy, mut stream) = proxied();
    round_trip(&mut stream, b"abc").unwrap();
    proxy.reset_connections();
    assert!(round_trip(&mut stream, b"abc").is_err());
    proxy.set(Faults {
        refuse: true,
        ..Faults::default()
    });
    let mut refused = TcpStream::connect(proxy.address()).unwrap();
    assert!(round_trip(&mut refused, b"abc").is_err());
    assert_eq!((proxy.counts().resets, proxy.counts().refused), (1, 1));
    proxy.clear();
    let mut stream = TcpStream::connect(proxy.address()).unwrap();
    assert_eq!(round_trip(&mut stream, b"abc").unwrap(), b"abc");
}

#[test]
fn unix_sockets_are_carried_too_and_the_file_goes_with_the_proxy() {
    let folder = tempfile::TempDir::new().unwrap();
    let (server, front) = (folder.path().join("server"), folder.path().join("front"));
    let listener = UnixListener::bind(&server).unwrap();
    thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        io::copy(&mut stream.try_clone().unwrap(), &mut &stream)
    });
    let place = |path: &std::path::Path| format!("unix:{}", path.display());
    let proxy = FaultProxy::start(&place(&front), &place(&server)).unwrap();
    assert_eq!(proxy.address(), place(&front));
    let mut stream = UnixStream::connect(&front).unwrap();
    stream.write_all(b"abc").unwrap();
    let mut back = [0; 3];
    stream.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"abc");
    drop(proxy);
    assert!(!front.exists());
}
