//! Limits of a door.

use std::time::Duration;

use moerun_transport::{ClientProtection, ConnectionLimits, ServerProtection};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::door::{Door, PATIENCE, check, dial, knock};

fn limits(max_connections: usize, patience: Duration) -> ConnectionLimits {
    ConnectionLimits {
        max_connections,
        handshake_timeout: patience,
    }
}

#[tokio::test]
async fn one_connection_too_many_is_turned_away_and_a_free_place_is_taken_again() {
    let door = Door::open(ServerProtection::LoopbackOnly, limits(1, PATIENCE)).await;
    let address = door.address.to_string();
    let (_, first) = dial(&address, ClientProtection::LoopbackOnly).await;
    let first = first.unwrap();
    check(first.clone()).await.unwrap();
    let outcome = knock(&address, ClientProtection::LoopbackOnly).await;
    assert!(outcome.error.is_some());
    check(first.clone()).await.unwrap();
    drop(first);
    // The server notices in its own time.
    let again = async {
        while knock(&address, ClientProtection::LoopbackOnly).await.error.is_some() {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, again).await.expect("the place becomes free");
}

#[tokio::test]
async fn who_says_nothing_is_hung_up_on() {
    let door = Door::open(ServerProtection::LoopbackOnly, limits(1, Duration::from_millis(50))).await;
    for words in [&b""[..], b"PRI * HTTP/2.0\r\n"] {
        let mut stream = TcpStream::connect(door.address).await.unwrap();
        stream.write_all(words).await.unwrap();
        let mut said = Vec::new();
        let ended = timeout(PATIENCE, stream.read_to_end(&mut said)).await.expect("no hang");
        assert!(ended.is_ok() || said.len() < 100, "{ended:?}");
        let place_is_free = async {
            while knock(&door.address.to_string(), ClientProtection::LoopbackOnly)
                .await
                .error
                .is_some()
            {
                tokio::task::yield_now().await;
            }
        };
        timeout(PATIENCE, place_is_free).await.expect("the place becomes free");
    }
}
