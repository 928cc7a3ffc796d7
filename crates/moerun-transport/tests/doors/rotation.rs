//! Certificates that change while connections are open.

use std::{fs, sync::Arc};

use futures::StreamExt;
use moerun_testkit::{Authority, Validity};
use moerun_transport::{ClientProtection, ConnectionLimits, Refusal, ServerProtection};
use tokio::time::timeout;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::door::{Door, PATIENCE, Setting, check, dial, knock};

#[tokio::test]
async fn a_running_stream_outlives_a_rotation_and_new_handshakes_use_the_new_certificates() {
    let setting = Setting::new();
    let worker = setting.authority.issue("worker", &["127.0.0.1"], Validity::Now);
    let gateway = setting.authority.issue("gateway", &["gateway"], Validity::Now);
    let server = Arc::new(setting.server(worker.clone(), &[]));
    let client = Arc::new(setting.client(Some(gateway.clone()), &[]));
    let door = Door::open(ServerProtection::Tls(Arc::clone(&server)), ConnectionLimits::default()).await;
    let address = door.address.to_string();
    let (_, channel) = dial(&address, ClientProtection::Tls(Arc::clone(&client))).await;
    let channel = channel.unwrap();
    let watching = HealthClient::new(channel.clone())
        .watch(HealthCheckRequest::default())
        .await
        .unwrap();
    let mut watching = watching.into_inner();
    watching.next().await.unwrap().unwrap();

    // Another authority altogether, at the worker first: between the two steps the ends do not know each other.
    let folder = tempfile::tempdir().unwrap();
    let next = Authority::create(folder.path());
    let replace = |(cert, key): &(std::path::PathBuf, std::path::PathBuf), (new_cert, new_key)| {
        fs::copy::<std::path::PathBuf, _>(new_cert, cert).unwrap();
        fs::copy::<std::path::PathBuf, _>(new_key, key).unwrap();
    };
    replace(&worker, next.issue("worker", &["127.0.0.1"], Validity::Now));
    server.look();
    assert_eq!(server.reloads(), 1);
    let refusal = knock(&address, ClientProtection::Tls(Arc::clone(&client)))
        .await
        .refusal();
    assert_eq!(refusal, Refusal::UnknownAuthority);
    replace(&gateway, next.issue("gateway", &["gateway"], Validity::Now));
    fs::copy(next.ca(), setting.authority.ca()).unwrap();
    for _ in 0..2 {
        server.look();
        client.look();
    }
    assert_eq!((server.reloads(), client.reloads()), (2, 1));
    knock(&address, ClientProtection::Tls(Arc::clone(&client))).await.ok();

    // The old connection has noticed nothing: its stream is open, and it takes calls.
    check(channel).await.unwrap();
    assert!(
        timeout(std::time::Duration::from_millis(1), watching.next())
            .await
            .is_err(),
        "the stream ended"
    );
}

#[tokio::test]
async fn a_broken_or_expired_file_leaves_the_old_certificates_in_use() {
    let setting = Setting::new();
    let worker = setting.authority.issue("worker", &["127.0.0.1"], Validity::Now);
    let gateway = setting.authority.issue("gateway", &["gateway"], Validity::Now);
    let server = Arc::new(setting.server(worker.clone(), &[]));
    let client = Arc::new(setting.client(Some(gateway), &[]));
    let door = Door::open(ServerProtection::Tls(Arc::clone(&server)), ConnectionLimits::default()).await;
    let address = door.address.to_string();
    let good = fs::read(&worker.0).unwrap();
    let expired = setting.authority.issue("expired", &["127.0.0.1"], Validity::Past);
    for (cert, key) in [
        (b"-----BEGIN CERTIFICATE-----\nAAAA".to_vec(), None),
        (Vec::new(), None),
        (fs::read(&expired.0).unwrap(), Some(fs::read(&expired.1).unwrap())),
    ] {
        fs::write(&worker.0, cert).unwrap();
        if let Some(key) = key {
            fs::write(&worker.1, key).unwrap();
        }
        server.look();
        assert_eq!(server.reloads(), 0);
        timeout(PATIENCE, knock(&address, ClientProtection::Tls(Arc::clone(&client))))
            .await
            .unwrap()
            .ok();
    }
    // The certificate alone, without its key, is half a rotation.
    fs::write(&worker.0, good).unwrap();
    server.look();
    assert_eq!(server.reloads(), 0);
    setting.authority.issue("worker", &["127.0.0.1"], Validity::Now);
    server.look();
    assert_eq!(server.reloads(), 1);
    knock(&address, ClientProtection::Tls(client)).await.ok();
}
