//! Clients that misuse HTTP/2: their connection ends or costs nothing, and others are served meanwhile.

use std::time::Duration;

use moerun_proto::v1;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tonic::{Code, Request};

use crate::harness::{Golden, Served, start};

const PATIENCE: Duration = Duration::from_secs(30);
/// What every client says first: the preface, and SETTINGS without a setting.
const GREETING: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00";
/// `POST http://a/` in HPACK.
const HEADERS: &[u8] = &[0x83, 0x86, 0x84, 0x41, 1, b'a'];
const GOAWAY: u8 = 7;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// Sends `flood`, and returns the kinds of the frames that came back before the connection ended. A server that has hung up
/// is not told the rest.
async fn misuse(served: &Served, flood: Vec<u8>) -> Vec<u8> {
    let stream = TcpStream::connect(&served.address).await.unwrap();
    let (mut reader, mut writer) = stream.into_split();
    let writing = tokio::spawn(async move {
        let _ = writer.write_all(&[GREETING, &flood].concat()).await;
        writer
    });
    let mut said = Vec::new();
    // A reset ends it too.
    let _ = timeout(PATIENCE, reader.read_to_end(&mut said))
        .await
        .expect("the server hangs up");
    drop(writing.await);
    let mut kinds = Vec::new();
    while said.len() >= 9 {
        let length = usize::from(said[0]) << 16 | usize::from(said[1]) << 8 | usize::from(said[2]);
        kinds.push(said[3]);
        said.drain(..said.len().min(9 + length));
    }
    kinds
}

async fn is_served(served: &Served) {
    let asking = async { served.inference().list_models(v1::ListModelsRequest {}).await };
    timeout(PATIENCE, asking)
        .await
        .expect("no hang")
        .expect("others are served");
}

#[tokio::test]
async fn headers_without_end_close_the_connection() {
    let served = start(&Golden::open("mixtral").dir).await;
    let mut flood = frame(1, 0, 1, HEADERS); // HEADERS that go on
    for index in 0..20_000_u32 {
        // A literal field, never indexed: its name is one byte, its value sixty.
        let value = format!("{index:060}");
        let field = [&[0x10, 1, b'x', 60], value.as_bytes()].concat();
        flood.extend(frame(9, 0, 1, &field));
    }
    let kinds = misuse(&served, flood).await;
    assert!(kinds.contains(&GOAWAY), "{kinds:?}");
    is_served(&served).await;
}

#[tokio::test]
async fn streams_that_are_opened_and_reset_at_once_close_the_connection() {
    let served = start(&Golden::open("mixtral").dir).await;
    let mut flood = Vec::new();
    for index in 0..50_000_u32 {
        let stream = 2 * index + 1;
        flood.extend(frame(1, 4, stream, HEADERS));
        flood.extend(frame(3, 0, stream, &8_u32.to_be_bytes()));
    }
    let kinds = misuse(&served, flood).await;
    assert!(kinds.contains(&GOAWAY), "{kinds:?}");
    is_served(&served).await;
}

#[tokio::test]
async fn pings_and_settings_without_end_leave_others_served() {
    let served = start(&Golden::open("mixtral").dir).await;
    let stream = TcpStream::connect(&served.address).await.unwrap();
    let (mut reader, mut writer) = stream.into_split();
    writer.write_all(GREETING).await.unwrap();
    let ping = frame(6, 0, 0, &[7; 8]);
    let settings = frame(4, 0, 0, &[0, 3, 0, 0, 0, 9]);
    let flood = [ping.repeat(100), settings.repeat(100)].concat().repeat(100);
    let flooding = tokio::spawn(async move { writer.write_all(&flood).await.map(|()| writer) });
    // Nothing is read: what the server would answer with has to wait, and so has the flood.
    for _ in 0..20 {
        is_served(&served).await;
    }
    let mut some = [0; 64];
    let read = timeout(PATIENCE, reader.read(&mut some))
        .await
        .expect("no hang")
        .unwrap_or(0);
    assert!(read > 0, "the server answers or says goodbye");
    drop(reader);
    flooding.abort();
    is_served(&served).await;
}

#[tokio::test]
async fn large_headers_are_refused_and_the_connection_lives() {
    let served = start(&Golden::open("mixtral").dir).await;
    let mut request = Request::new(v1::ListModelsRequest {});
    let value = "x".repeat(20 << 10).parse().unwrap();
    request.metadata_mut().insert("x-large", value);
    let asking = async { served.inference().list_models(request).await };
    let status = timeout(PATIENCE, asking).await.expect("no hang").unwrap_err();
    assert_ne!(status.code(), Code::Ok, "{status}");
    is_served(&served).await;
}
