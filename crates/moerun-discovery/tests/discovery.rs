//! Sources against real sockets: a name server whose records change and that fails, workers that register.
// A test's own helpers may fail as loudly as a test.
#![allow(clippy::unwrap_used)]

use std::{
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use moerun_discovery::{
    Discovery, DiscoveryConfig, RegisterAt, Registration, RegistrationConfig, RegistryDoor, SourceStats,
};
use moerun_process::{Address, Listener, Shutdown};
use moerun_testkit::{Mood, NameServer, Record};
use moerun_transport::{ClientProtection, ServerProtection};
use tokio::runtime::Handle;

const BOUND: Duration = Duration::from_secs(30);

fn local(last: u8) -> Record {
    Record::A(Ipv4Addr::new(127, 0, 0, last))
}

fn names(source: &str, server: &NameServer) -> Discovery {
    let config = DiscoveryConfig {
        sources: vec![source.parse().unwrap()],
        interval: Duration::from_millis(50),
        dns_server: Some(server.address()),
        ..DiscoveryConfig::default()
    };
    Discovery::start(config, &Handle::current()).unwrap()
}

async fn until(discovery: &Discovery, wanted: &[&str]) {
    let mut workers = discovery.workers();
    let found = tokio::time::timeout(BOUND, workers.wait_for(|it| it == wanted)).await;
    assert!(found.is_ok(), "wanted {wanted:?}: {:?}", discovery.stats());
}

async fn until_stats(discovery: &Discovery, holds: impl Fn(&SourceStats) -> bool) -> SourceStats {
    let until = Instant::now() + BOUND;
    loop {
        let stats = discovery.stats().remove(0);
        if holds(&stats) {
            return stats;
        }
        assert!(Instant::now() < until, "{stats:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn the_addresses_of_a_name_are_followed_and_stay_when_nobody_answers() {
    let server = NameServer::start();
    let discovery = names("dns:workers.test:7001", &server);
    let waiting = until_stats(&discovery, |it| it.errors > 0).await;
    assert!(waiting.workers == 0 && waiting.failing.is_some(), "{waiting:?}");
    server.set("workers.test", &[local(2), local(1)]);
    until(&discovery, &["127.0.0.1:7001", "127.0.0.2:7001"]).await;
    server.set("workers.test", &[local(2), local(3)]);
    until(&discovery, &["127.0.0.2:7001", "127.0.0.3:7001"]).await;

    for mood in [Mood::NoSuchName, Mood::Fails, Mood::Silent] {
        let (before, asked) = (discovery.stats().remove(0).errors, server.asked());
        server.be(mood);
        let failing = until_stats(&discovery, |it| it.errors > before).await;
        assert!(
            server.asked() > asked && failing.failing.is_some(),
            "{mood:?}: {failing:?}"
        );
        assert_eq!(
            *discovery.workers().borrow(),
            ["127.0.0.2:7001", "127.0.0.3:7001"],
            "{mood:?}"
        );
    }
    server.be(Mood::Answers);
    server.set("workers.test", &[local(4)]);
    until(&discovery, &["127.0.0.4:7001"]).await;
    assert_eq!(until_stats(&discovery, |it| it.failing.is_none()).await.workers, 1);
}

#[tokio::test]
async fn host_and_port_of_each_record_are_workers() {
    let server = NameServer::start();
    let records = [("w1.test", 7002), ("w0.test", 7001)].map(|(host, port)| Record::Srv(host.to_owned(), port));
    server.set("_grpc._tcp.workers.test", &records);
    let discovery = names("srv:_grpc._tcp.workers.test", &server);
    until(&discovery, &["w0.test:7001", "w1.test:7002"]).await;
}

/// A registry on `address`.
fn registry(address: &str) -> (Discovery, Address) {
    let listener = Listener::bind(&Address::parse(address).unwrap()).unwrap();
    let bound = listener.address().unwrap();
    let config = DiscoveryConfig {
        registry: Some(RegistryDoor {
            listener,
            protection: ServerProtection::LoopbackOnly,
        }),
        fixed: vec!["fixed:1".to_owned()],
        ..DiscoveryConfig::default()
    };
    (Discovery::start(config, &Handle::current()).unwrap(), bound)
}

fn register(at: &Address, address: &str) -> (Registration, Shutdown) {
    let shutdown = Shutdown::new();
    let config = RegistrationConfig {
        at: vec![RegisterAt::Gateway(at.clone())],
        address: address.to_owned(),
        protection: ClientProtection::LoopbackOnly,
    };
    (Registration::start(config, shutdown.clone()).unwrap(), shutdown)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_register_leave_and_are_found_by_the_next_gateway() {
    let (first, at) = registry("127.0.0.1:0");
    let (one, end_one) = register(&at, "127.0.0.1:7001");
    let (two, end_two) = register(&at, "127.0.0.1:7002");
    until(&first, &["fixed:1", "127.0.0.1:7001", "127.0.0.1:7002"]).await;
    end_one.drain();
    one.wait();
    until(&first, &["fixed:1", "127.0.0.1:7002"]).await;
    drop(first);

    // Its successor, on the same port, knows nobody; the worker tells it.
    let until_free = Instant::now() + BOUND;
    while Listener::bind(&at).is_err() {
        assert!(Instant::now() < until_free, "the port is not given back");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let (second, _) = registry(&at.to_string());
    until(&second, &["fixed:1", "127.0.0.1:7002"]).await;
    // The last one is kept although it left: an empty list helps nobody.
    end_two.drain();
    two.wait();
    let stats = until_stats(&second, |it| it.failing.is_some()).await;
    assert_eq!(stats.workers, 1, "{stats:?}");
}

#[test]
fn an_address_that_nobody_can_dial_is_refused() {
    let config = RegistrationConfig {
        at: Vec::new(),
        address: "0:0".to_owned(),
        protection: ClientProtection::LoopbackOnly,
    };
    let error = Registration::start(config, Shutdown::new()).unwrap_err().to_string();
    assert!(error.contains("\"0:0\": wanted a port above 0"), "{error}");
}
