//! Rows 17 and 18: a worker that says it is something else, and one that speaks another version.

use std::pin::Pin;

use moerun_loadtest::GrpcTarget;
use moerun_proto::{
    PROTOCOL_VERSION,
    v1::{
        self, HandshakeRequest, HandshakeResponse,
        expert_service_client::ExpertServiceClient,
        expert_service_server::{ExpertService, ExpertServiceServer},
    },
};
use moerun_tests::{Golden, Server};
use tokio_stream::{Stream, StreamExt};
use tonic::{
    Code, Request, Response, Status, Streaming,
    transport::{Channel, Server as GrpcServer, server::TcpIncoming},
};

use super::{figure, gateway_args, golden_cases, worker};

/// What a doctored worker says otherwise.
type Change = fn(&mut HandshakeResponse);

/// A worker before a real one, which says something else about itself.
struct Doctored {
    worker: ExpertServiceClient<Channel>,
    change: Change,
}

#[tonic::async_trait]
impl ExpertService for Doctored {
    type ExecuteStream = Pin<Box<dyn Stream<Item = Result<v1::ExecuteResponse, Status>> + Send>>;

    async fn handshake(&self, request: Request<HandshakeRequest>) -> Result<Response<HandshakeResponse>, Status> {
        let mut response = self.worker.clone().handshake(request.into_inner()).await?.into_inner();
        (self.change)(&mut response);
        Ok(Response::new(response))
    }

    async fn execute(
        &self,
        requests: Request<Streaming<v1::ExecuteRequest>>,
    ) -> Result<Response<Self::ExecuteStream>, Status> {
        let requests = requests.into_inner().map_while(Result::ok);
        let replies = self.worker.clone().execute(requests).await?;
        Ok(Response::new(Box::pin(replies.into_inner())))
    }
}

/// Puts a doctored worker before the one at `address`; returns its own address.
async fn doctor(address: &str, change: Change) -> String {
    let worker = ExpertServiceClient::connect(format!("http://{address}"))
        .await
        .expect("it listens");
    let incoming = TcpIncoming::bind("127.0.0.1:0".parse().expect("an address")).expect("loopback");
    let doctored = incoming.local_addr().expect("bound").to_string();
    let service = ExpertServiceServer::new(Doctored { worker, change });
    tokio::spawn(GrpcServer::builder().add_service(service).serve_with_incoming(incoming));
    doctored
}

async fn try_gateway(golden: &Golden, worker: &str) -> Result<Server, moerun_tests::Finished> {
    let args = gateway_args(&golden.dir, &[worker]);
    tokio::task::spawn_blocking(move || Server::try_start(&args))
        .await
        .expect("no panic")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_17_no_worker_with_another_hash_is_admitted() {
    let golden = Golden::read("qwen3_moe");
    let honest = worker(&golden.dir, &[]);
    let lies: [(&str, Change); 6] = [
        ("config", |it| it.config_hash = flip(&it.config_hash)),
        ("expert", |it| it.expert_header_hash = flip(&it.expert_header_hash)),
        ("tensor", |it| it.dense_header_hash = flip(&it.dense_header_hash)),
        ("router", |it| it.router_hash = flip(&it.router_hash)),
        ("numerics", |it| it.numerics_id = it.numerics_id.replace("f32", "bf16")),
        // The gateway has the experts too, and compares one of them.
        ("content", |it| {
            for held in &mut it.held {
                let flipped: Vec<u8> = held.block_hashes.iter().map(|byte| !byte).collect();
                held.block_hashes = flipped.into();
            }
        }),
    ];
    for (what, lie) in lies {
        let doctored = doctor(&honest.addr, lie).await;
        let error = match try_gateway(&golden, &doctored).await {
            Ok(_) => panic!("a worker with another {what} was admitted"),
            Err(finished) => finished.failed(1),
        };
        assert!(error.contains(&doctored), "{what}: {error}");
    }
    figure(
        17,
        format!(
            "{} ways to be another model, 0 admitted; each message names the worker and both values",
            lies.len()
        ),
    );
}

fn flip(hash: &str) -> String {
    let first = if hash.starts_with('0') { "1" } else { "0" };
    format!("{first}{}", hash.get(1..).unwrap_or_default())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_18_the_same_major_works_and_another_is_refused_with_both_versions() {
    let golden = Golden::read("qwen3_moe");
    let honest = worker(&golden.dir, &[]);
    let (cases, references) = golden_cases(&golden);
    let versions: [(Change, bool); 4] = [
        (|it| it.protocol_version = PROTOCOL_VERSION + 1, true),
        (|it| it.protocol_version = PROTOCOL_VERSION / 1000 * 1000, true),
        (|it| it.protocol_version = PROTOCOL_VERSION + 1000, false),
        (|it| it.protocol_version = PROTOCOL_VERSION - 1000, false),
    ];
    for (change, works) in versions {
        let doctored = doctor(&honest.addr, change).await;
        let mut changed = HandshakeResponse::default();
        change(&mut changed);
        let version = changed.protocol_version;
        match try_gateway(&golden, &doctored).await {
            Ok(gateway) => {
                assert!(works, "version {version} was admitted");
                let target = GrpcTarget::new(&gateway.addr, 1).expect("an address");
                let tokens = target.tokens(&cases[0]).await.expect("an answer");
                assert_eq!(tokens, references[0].tokens, "version {version}");
            }
            Err(finished) => {
                let error = finished.failed(1);
                assert!(!works, "version {version}: {error}");
                let both = [PROTOCOL_VERSION, version].map(|it| it.to_string());
                assert!(both.iter().all(|it| error.contains(it)), "{error}");
            }
        }
    }
    // The other way round: a gateway of another major asks a worker.
    let mut client = ExpertServiceClient::connect(format!("http://{}", honest.addr))
        .await
        .expect("it listens");
    for (asked, works) in [(PROTOCOL_VERSION + 1, true), (PROTOCOL_VERSION + 1000, false)] {
        let answer = client
            .handshake(HandshakeRequest {
                protocol_version: asked,
            })
            .await;
        match answer {
            Ok(_) => assert!(works),
            Err(status) => {
                assert!(!works && status.code() == Code::FailedPrecondition, "{status:?}");
                assert!(status.message().contains(&asked.to_string()), "{status:?}");
            }
        }
    }
    figure(
        18,
        "versions of the same major work both ways, 3 of another major refused with both versions named",
    );
}
