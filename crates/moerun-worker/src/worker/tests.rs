use std::{
    sync::{Mutex, Weak, mpsc as std_mpsc},
    time::{Duration, Instant},
};

use moerun_kernels::Activations;
use moerun_model::ExpertError;
use moerun_proto::{
    ExecuteFailure, ExecuteWork, PROTOCOL_VERSION, decode_response, encode_request,
    v1::{self, expert_service_client::ExpertServiceClient},
};
use moerun_routing::{Assignment, PartialSums, ShardSpec};
use moerun_types::{BlockRange, CombineMode, ExpertId, LayerId, NumberFormat};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Code, Streaming,
    transport::{Channel, Endpoint},
};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use super::*;

const HIDDEN: usize = 2;
/// Experts whose run is something else than a sum.
const PANICS: u16 = 1;
const WAITS: u16 = 2;
const BAD_TERM: u16 = 3;

fn limits() -> ModelLimits {
    ModelLimits {
        hidden: HIDDEN,
        num_experts: 4,
        top_k: 1,
        num_blocks: 1,
        moe_layers: vec![true],
        numerics: Numerics {
            format: NumberFormat::F32,
            combine: CombineMode::Exact,
            combine_block: 8,
        },
        max_rows: 8,
    }
}

fn identity() -> WorkerIdentity {
    WorkerIdentity {
        protocol_version: PROTOCOL_VERSION,
        build: String::new(),
        config_hash: "c".to_owned(),
        expert_header_hash: None,
        dense_header_hash: None,
        router_hash: None,
        numerics_id: limits().numerics.id(),
        held: Vec::new(),
    }
}

fn options(max_queue: usize) -> ServeOptions {
    ServeOptions {
        listen: "127.0.0.1:0".to_owned(),
        protection: ServerProtection::default(),
        admin_addr: None,
        threads: 1,
        max_queue,
        drain_timeout: Duration::from_secs(10),
        inline_rows: 0,
        patience: Duration::ZERO,
    }
}

/// Lets one request that waits go on, and tells when one begins to.
struct Gate {
    go: std_mpsc::Sender<()>,
    begun: std_mpsc::Receiver<()>,
    /// Weak: a worker ends when nobody holds its queue any more.
    loaded: Weak<OnceLock<Loaded>>,
    /// Rows of each run so far.
    runs: Arc<Mutex<Vec<usize>>>,
}

impl Gate {
    fn open(&self) {
        self.go.send(()).unwrap();
    }

    fn await_one(&self) {
        self.begun
            .recv_timeout(Duration::from_secs(10))
            .expect("a request that waits");
    }

    /// Returns when this many requests are queued or begun.
    fn await_outstanding(&self, wanted: usize) {
        let until = Instant::now() + Duration::from_secs(10);
        let outstanding = || {
            let loaded = self.loaded.upgrade()?;
            Some(loaded.get()?.compute.outstanding())
        };
        while outstanding() != Some(wanted) {
            assert!(Instant::now() < until, "{:?} requests, not {wanted}", outstanding());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// A worker whose experts answer with ones.
fn worker(max_queue: usize) -> (Worker, Gate) {
    worker_with(options(max_queue))
}

fn worker_with(options: ServeOptions) -> (Worker, Gate) {
    let (go, may_go) = std_mpsc::channel();
    let (begins, begun) = std_mpsc::channel();
    let runs = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&runs);
    let run: RunExperts = Box::new(move |work: &ExecuteWork| {
        noted.lock().unwrap().push(work.activations.rows());
        let mut experts = work.assignments.iter().map(|assignment| assignment.expert.0);
        match experts.find(|&expert| expert != 0).unwrap_or(0) {
            PANICS => panic!("expert {PANICS} burns"),
            BAD_TERM => Err(ExpertError::Term {
                layer: work.layer,
                expert: ExpertId(BAD_TERM),
                block: Some(0),
                term: f32::NAN,
                limit: 1.0,
            }),
            expert => {
                if expert == WAITS {
                    let _ = begins.send(());
                    may_go
                        .recv_timeout(Duration::from_secs(10))
                        .expect("the test lets every waiting request go on");
                }
                let rows = work.activations.rows();
                Ok(PartialSums::Exact {
                    hidden: HIDDEN,
                    sums: vec![1; rows * HIDDEN],
                })
            }
        }
    });
    let listening = Listening::start(options, Shutdown::new()).unwrap();
    let loaded = Arc::downgrade(&listening.loaded);
    (
        listening.serve_with(run, limits(), &identity()).unwrap(),
        Gate {
            go,
            begun,
            loaded,
            runs,
        },
    )
}

fn request(request_id: u64, expert: u16) -> v1::ExecuteRequest {
    let rows = Activations::F32 {
        rows: 1,
        cols: HIDDEN,
        data: vec![0.5; HIDDEN],
    };
    let work = Assignment {
        row: 0,
        expert: ExpertId(expert),
        blocks: BlockRange { first: 0, end: 1 },
        weight: 1.0,
    };
    encode_request(request_id, LayerId(0), &rows, &[0], &[work], Duration::from_secs(10))
}

struct Gateway {
    runtime: tokio::runtime::Runtime,
    channel: Channel,
    requests: Option<mpsc::Sender<v1::ExecuteRequest>>,
    replies: Streaming<v1::ExecuteResponse>,
}

impl Gateway {
    fn connect(worker: &Worker) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let address = match worker.address() {
            Address::Tcp(address) => format!("http://{address}"),
            unix @ Address::Unix(_) => unix.to_string(),
        };
        let (requests, receiver) = mpsc::channel(64);
        let (channel, replies) = runtime.block_on(async {
            let channel = Endpoint::from_shared(address).unwrap().connect().await.unwrap();
            let mut client = ExpertServiceClient::new(channel.clone());
            (
                channel,
                client
                    .execute(ReceiverStream::new(receiver))
                    .await
                    .unwrap()
                    .into_inner(),
            )
        });
        Self {
            runtime,
            channel,
            requests: Some(requests),
            replies,
        }
    }

    fn send(&self, request: v1::ExecuteRequest) {
        self.runtime
            .block_on(self.requests.as_ref().unwrap().send(request))
            .unwrap();
    }

    fn receive_raw(&mut self) -> Option<v1::ExecuteResponse> {
        let reply = self.runtime.block_on(async {
            tokio::time::timeout(Duration::from_secs(10), self.replies.message())
                .await
                .expect("an answer in time")
        });
        reply.unwrap()
    }

    fn receive(&mut self) -> Option<(u64, Result<PartialSums, ExecuteFailure>)> {
        let reply = decode_response(&self.receive_raw()?, CombineMode::Exact, 1, HIDDEN).unwrap();
        Some((reply.request_id, reply.outcome))
    }

    fn health(&self, service: &str) -> i32 {
        let mut client = HealthClient::new(self.channel.clone());
        let asked = HealthCheckRequest {
            service: service.to_owned(),
        };
        self.runtime.block_on(client.check(asked)).unwrap().into_inner().status
    }
}

fn sums() -> Result<PartialSums, ExecuteFailure> {
    Ok(PartialSums::Exact {
        hidden: HIDDEN,
        sums: vec![1; HIDDEN],
    })
}

#[test]
fn bad_items_are_answered_and_the_stream_lives_on() {
    let (worker, _gate) = worker(8);
    let mut gateway = Gateway::connect(&worker);
    gateway.send(v1::ExecuteRequest {
        hidden: 99,
        ..request(1, 0)
    });
    let (id, outcome) = gateway.receive().unwrap();
    let Err(ExecuteFailure::Invalid { message }) = outcome else {
        panic!("{outcome:?}")
    };
    assert_eq!((id, message.as_str()), (1, "hidden: wanted 2, found 99"));

    gateway.send(request(2, PANICS));
    let (id, outcome) = gateway.receive().unwrap();
    let Err(ExecuteFailure::Internal { message }) = outcome else {
        panic!("{outcome:?}")
    };
    assert_eq!((id, message.as_str()), (2, "panic: expert 1 burns"));

    gateway.send(request(3, BAD_TERM));
    let (id, outcome) = gateway.receive().unwrap();
    let Err(ExecuteFailure::TermOutOfRange {
        layer, expert, block, ..
    }) = outcome
    else {
        panic!("{outcome:?}")
    };
    assert_eq!((id, layer, expert, block), (3, LayerId(0), ExpertId(BAD_TERM), Some(0)));

    gateway.send(request(4, 0));
    assert_eq!(gateway.receive(), Some((4, sums())));
}

#[test]
fn a_full_queue_is_said_to_be_full() {
    let (worker, gate) = worker(1);
    let mut gateways = [(); 3].map(|()| Gateway::connect(&worker));
    gateways[0].send(request(1, WAITS));
    gate.await_one();
    // The second is queued; whichever comes after it is refused, out of turn.
    gateways[1].send(request(2, WAITS));
    gate.await_outstanding(2);
    gateways[2].send(request(3, WAITS));
    assert_eq!(gateways[2].receive(), Some((3, Err(ExecuteFailure::Overloaded))));
    for (id, gateway) in (1..).zip(&mut gateways[..2]) {
        gate.open();
        assert_eq!(gateway.receive(), Some((id, sums())));
    }
}

#[test]
fn requests_that_wait_for_one_layer_are_run_together_and_fail_alone() {
    for (expert_of_last, runs) in [
        (0, vec![1, 3]),
        (BAD_TERM, vec![1, 3, 1, 1, 1]),
        (PANICS, vec![1, 3, 1, 1, 1]),
    ] {
        let (worker, gate) = worker(8);
        let mut gateways = [(); 3].map(|()| Gateway::connect(&worker));
        gateways[0].send(request(1, WAITS));
        gate.await_one();
        for (id, gateway) in (2..).zip(&gateways) {
            gateway.send(request(id, if id == 4 { expert_of_last } else { 0 }));
        }
        gate.await_outstanding(4);
        gate.open();
        assert_eq!(gateways[0].receive(), Some((1, sums())));
        assert_eq!(gateways[0].receive(), Some((2, sums())));
        assert_eq!(gateways[1].receive(), Some((3, sums())));
        let (id, outcome) = gateways[2].receive().unwrap();
        assert_eq!((id, outcome.is_ok()), (4, expert_of_last == 0), "{outcome:?}");
        assert_eq!(*gate.runs.lock().unwrap(), runs);
    }
}

#[test]
fn one_gateway_is_held_back_and_never_overfills_the_queue() {
    for max_queue in [1, 2] {
        let (worker, gate) = worker(max_queue);
        let mut gateway = Gateway::connect(&worker);
        for id in 1..=20 {
            gateway.send(request(id, WAITS));
            gate.open();
        }
        for id in 1..=20 {
            assert_eq!(gateway.receive(), Some((id, sums())), "queue of {max_queue}");
        }
    }
}

#[test]
fn a_message_beyond_the_limit_is_refused_by_name_and_ends_its_stream_alone() {
    let (worker, _gate) = worker(8);
    let (mut liar, mut other) = (Gateway::connect(&worker), Gateway::connect(&worker));
    liar.send(v1::ExecuteRequest {
        hidden_states: vec![0; moerun_proto::MAX_MESSAGE_BYTES + 1].into(),
        ..request(1, 0)
    });
    let status = liar.runtime.block_on(liar.replies.message()).unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange, "{status:?}");
    other.send(request(2, 0));
    assert_eq!(other.receive(), Some((2, sums())));
}

#[test]
fn a_request_whose_deadline_passed_in_the_queue_is_not_computed() {
    let (worker, gate) = worker(8);
    let mut gateway = Gateway::connect(&worker);
    gateway.send(request(1, WAITS));
    gateway.send(v1::ExecuteRequest {
        deadline_micros: 1,
        ..request(2, PANICS)
    });
    gate.open();
    assert_eq!(gateway.receive(), Some((1, sums())));
    assert_eq!(gateway.receive(), Some((2, Err(ExecuteFailure::DeadlineExceeded))));
}

#[test]
fn a_gateway_that_has_said_all_still_gets_its_answers() {
    let (worker, gate) = worker(8);
    let mut gateway = Gateway::connect(&worker);
    gateway.send(request(1, WAITS));
    gateway.send(request(2, 0));
    gateway.requests = None;
    gate.open();
    assert_eq!(gateway.receive(), Some((1, sums())));
    assert_eq!(gateway.receive(), Some((2, sums())));
    assert_eq!(gateway.receive(), None);
}

#[test]
fn work_of_a_gateway_that_is_gone_is_not_computed() {
    let (worker, gate) = worker(8);
    let gateway = Gateway::connect(&worker);
    for id in 1..=5 {
        gateway.send(request(id, WAITS));
    }
    gate.await_one();
    drop(gateway);
    let mut next = Gateway::connect(&worker);
    // Answered by the thread that has seen the other connection end before it accepted this one.
    next.send(v1::ExecuteRequest {
        rows: 9,
        ..request(1, 0)
    });
    assert!(matches!(next.receive(), Some((1, Err(ExecuteFailure::Invalid { .. })))));
    next.send(request(2, 0));
    gate.open();
    // The gate opens once: had the other four been computed, they would have waited at it.
    assert_eq!(next.receive(), Some((2, sums())));
}

#[test]
fn a_drain_finishes_what_is_queued_and_refuses_the_rest() {
    let (worker, gate) = worker(8);
    let mut gateway = Gateway::connect(&worker);
    assert_eq!((gateway.health(""), gateway.health("moerun.v1.ExpertService")), (1, 1));
    gateway.send(request(1, WAITS));
    gateway.send(request(2, 0));
    gateway.send(v1::ExecuteRequest {
        rows: 9,
        ..request(3, 0)
    });
    // Answered out of turn, so the two before it have been queued.
    assert!(matches!(
        gateway.receive(),
        Some((3, Err(ExecuteFailure::Invalid { .. })))
    ));
    worker.shutdown().drain();
    gateway.send(request(4, 0));
    assert_eq!(gateway.receive(), Some((4, Err(ExecuteFailure::Draining))));
    assert_eq!((gateway.health(""), gateway.health("moerun.v1.ExpertService")), (2, 2));
    gate.open();
    assert_eq!(gateway.receive(), Some((1, sums())));
    assert_eq!(gateway.receive(), Some((2, sums())));
    assert_eq!(gateway.receive(), None);
    let address = worker.address().to_string();
    worker.wait().unwrap();
    assert!(std::net::TcpStream::connect(address).is_err(), "the port is free again");
}

#[test]
fn nothing_is_answered_before_the_experts_are_loaded() {
    let listening = Listening::start(options(1), Shutdown::new()).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let address = format!("http://{}", listening.address);
        let channel = Channel::from_shared(address).unwrap().connect().await.unwrap();
        let mut health = HealthClient::new(channel.clone());
        let status = health
            .check(HealthCheckRequest { service: String::new() })
            .await
            .unwrap();
        assert_eq!(status.into_inner().status, 2);
        let mut client = ExpertServiceClient::new(channel);
        let asked = v1::HandshakeRequest {
            protocol_version: PROTOCOL_VERSION,
        };
        assert_eq!(client.handshake(asked).await.unwrap_err().code(), Code::Unavailable);
        let other = v1::HandshakeRequest { protocol_version: 2000 };
        let refused = client.handshake(other).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition);
        let wanted = format!("protocol version: wanted major of {PROTOCOL_VERSION}, found 2000");
        assert_eq!(refused.message(), wanted);
    });
}

#[test]
fn small_requests_are_run_where_they_are_read_with_the_same_answers() {
    let (worker, gate) = worker_with(ServeOptions {
        inline_rows: 1,
        patience: Duration::from_micros(50),
        ..options(4)
    });
    let mut gateway = Gateway::connect(&worker);
    for id in 1..=20 {
        gateway.send(request(id, 0));
        assert_eq!(gateway.receive(), Some((id, sums())));
    }
    gateway.send(request(21, PANICS));
    assert!(matches!(
        gateway.receive(),
        Some((21, Err(ExecuteFailure::Internal { .. })))
    ));
    gateway.send(request(22, BAD_TERM));
    assert!(matches!(
        gateway.receive(),
        Some((22, Err(ExecuteFailure::TermOutOfRange { .. })))
    ));
    // While one runs, the thread that reads is busy; the next is taken up afterwards.
    gateway.send(request(23, WAITS));
    gate.await_one();
    gateway.send(request(24, 0));
    gate.open();
    assert_eq!(gateway.receive(), Some((23, sums())));
    assert_eq!(gateway.receive(), Some((24, sums())));
    worker.shutdown().drain();
    assert_eq!(gateway.receive(), None);
    worker.wait().unwrap();
}

#[test]
fn an_echo_has_the_bytes_that_were_sent_over_a_unix_socket_too() {
    let folder = moerun_process::SocketFolder::create().unwrap();
    for listen in ["127.0.0.1:0".to_owned(), folder.address(0).to_string()] {
        let (worker, _gate) = worker_with(ServeOptions { listen, ..options(1) });
        let mut gateway = Gateway::connect(&worker);
        for length in [1, 4096, 3 << 20] {
            let echo: Vec<u8> = (0..length).map(|index| (index % 251) as u8).collect();
            gateway.send(v1::ExecuteRequest {
                request_id: 7,
                echo: echo.clone().into(),
                ..Default::default()
            });
            let response = gateway.receive_raw().unwrap();
            assert_eq!((response.request_id, response.status()), (7, v1::ExecuteStatus::Ok));
            assert!(response.echo == echo);
        }
    }
}

#[test]
fn a_taken_address_is_named() {
    let (worker, _gate) = worker(1);
    let taken = ServeOptions {
        listen: worker.address().to_string(),
        ..options(1)
    };
    let error = Listening::start(taken, Shutdown::new()).err().unwrap();
    assert!(
        error
            .to_string()
            .starts_with(&format!("listen on {}: ", worker.address())),
        "{error}"
    );
}

fn golden(family: &str) -> std::path::PathBuf {
    std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden")).join(family)
}

#[test]
fn what_makes_no_sense_is_refused_before_anything_is_loaded() {
    let config = |family: &str, shard| WorkerConfig::new(golden(family), "127.0.0.1:0", shard);
    let refused = |config: WorkerConfig| Worker::start(&config, Shutdown::new()).unwrap_err().to_string();
    let dense = refused(config("llama", ShardSpec::All));
    assert_eq!(dense, "the model has no experts, so no worker can hold any");
    let no_threads = WorkerConfig {
        threads: 0,
        ..config("mixtral", ShardSpec::All)
    };
    assert_eq!(refused(no_threads), "threads: wanted at least 1, found 0");
    let no_block = WorkerConfig {
        combine_block: Some(0),
        ..config("mixtral", ShardSpec::All)
    };
    assert_eq!(
        refused(no_block),
        "a combine block of 0 columns with f32 weights: wanted a positive multiple of 1"
    );
    let short_block = WorkerConfig {
        weights: Some(NumberFormat::Int8),
        combine_block: Some(8),
        ..config("mixtral", ShardSpec::All)
    };
    assert_eq!(
        refused(short_block),
        "a combine block of 8 columns with int8 weights: wanted a positive multiple of 32"
    );
    let beyond = refused(config("mixtral", ShardSpec::parse_experts("0:99").unwrap()));
    assert!(beyond.contains("99"), "{beyond}");
    let nowhere = refused(config("no-such-model", ShardSpec::All));
    assert!(nowhere.contains("no-such-model"), "{nowhere}");
}

#[test]
fn reflection_lists_what_is_served() {
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };
    let (worker, _gate) = worker(1);
    let gateway = Gateway::connect(&worker);
    let asked = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut client = ServerReflectionClient::new(gateway.channel.clone());
    let answer = gateway.runtime.block_on(async {
        let asked = tokio_stream::iter([asked]);
        client
            .server_reflection_info(asked)
            .await
            .unwrap()
            .into_inner()
            .message()
            .await
            .unwrap()
            .unwrap()
    });
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else {
        panic!("{answer:?}")
    };
    let names: Vec<_> = list.service.iter().map(|service| service.name.as_str()).collect();
    assert_eq!(
        names,
        [
            "moerun.v1.ExpertService",
            "moerun.v1.PlacementService",
            "grpc.health.v1.Health"
        ]
    );
}

#[test]
fn a_request_with_a_checksum_gets_an_answer_with_one_and_a_corrupted_one_is_refused() {
    let (worker, _gate) = worker(8);
    let mut gateway = Gateway::connect(&worker);
    gateway.send(request(1, 0));
    let plain = gateway.receive_raw().unwrap();
    assert_eq!(
        (plain.status, plain.checksum),
        (v1::ExecuteStatus::Ok.into(), None),
        "an older gateway"
    );
    let mut sealed = request(2, 0);
    moerun_proto::seal_request(&mut sealed);
    gateway.send(sealed.clone());
    assert!(moerun_proto::answer_is_intact(&gateway.receive_raw().unwrap()));
    let mut rows = sealed.hidden_states.to_vec();
    rows[0] ^= 0x40;
    sealed.hidden_states = rows.into();
    sealed.request_id = 3;
    gateway.send(sealed);
    let refused = gateway.receive_raw().unwrap();
    assert_eq!(refused.status, i32::from(v1::ExecuteStatus::Corrupted));
    assert!(moerun_proto::answer_is_intact(&refused));
}
