//! Workers and gateways started by hand: what each must hold, what is refused, what happens when workers die.

use std::{fs, path::Path, time::Duration};

use moerun_proto::v1::{
    self, GenerateRequest, HandshakeRequest, HeldSlice, SamplingParams, expert_service_client::ExpertServiceClient,
    generate_request::Prompt, inference_service_client::InferenceServiceClient,
};
use moerun_testkit::copy_without_experts;
use moerun_tests::{Golden, Server, golden_dir, moe_families, run, run_client};
use tempfile::TempDir;
use tonic::Code;

fn path(dir: &Path) -> &str {
    dir.to_str().expect("a plain path")
}

fn worker(model: &Path, extra: &[&str]) -> Server {
    Server::start(
        &[
            &["worker", "--model", path(model), "--listen", "127.0.0.1:0"][..],
            extra,
        ]
        .concat(),
    )
}

/// Arguments of a gateway over `workers`.
fn gateway_args(model: &Path, workers: &[Server], extra: &[&str]) -> Vec<String> {
    let mut args: Vec<String> = ["gateway", "--model", path(model), "--grpc-addr", "127.0.0.1:0"]
        .map(str::to_owned)
        .to_vec();
    for worker in workers {
        args.extend(["--worker".to_owned(), worker.addr.clone()]);
    }
    args.extend(extra.iter().map(|&arg| arg.to_owned()));
    args
}

async fn held(worker: &Server) -> Vec<HeldSlice> {
    let mut client = ExpertServiceClient::connect(format!("http://{}", worker.addr))
        .await
        .expect("the worker listens");
    let request = HandshakeRequest {
        protocol_version: moerun_proto::PROTOCOL_VERSION,
    };
    client.handshake(request).await.expect("a handshake").into_inner().held
}

async fn generate(addr: &str, prompt: &[u32], max_tokens: u32) -> Result<Vec<u32>, tonic::Status> {
    let mut client = InferenceServiceClient::connect(format!("http://{addr}"))
        .await
        .expect("the gateway listens");
    let request = GenerateRequest {
        prompt: Some(Prompt::TokenIds(v1::TokenIds { ids: prompt.to_vec() })),
        max_tokens,
        ignore_eos: true,
        sampling: Some(SamplingParams {
            temperature: Some(0.0),
            ..SamplingParams::default()
        }),
        ..GenerateRequest::default()
    };
    let mut stream = client.generate(request).await?.into_inner();
    let mut ids = Vec::new();
    while let Some(response) = stream.message().await? {
        ids.extend(response.token_ids);
    }
    Ok(ids)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_without_expert_tensors_serves_from_workers_that_hold_slices_of_the_same_experts() {
    for family in moe_families() {
        let golden = Golden::read(family);
        let folder = TempDir::new().expect("a temporary folder");
        let stripped = folder.path().join("stripped");
        copy_without_experts(&golden.dir, &stripped).expect("a copy");
        let blocks = ["--combine-block", "8"];
        let workers: Vec<Server> = (0..3)
            .map(|index| {
                worker(
                    &golden.dir,
                    &[&["--shard", &format!("slice:{index}/3")][..], &blocks].concat(),
                )
            })
            .collect();
        let mut holders = 0;
        for worker in &workers {
            holders += usize::from(held(worker).await.iter().any(|slice| {
                (slice.layer, slice.expert) == (golden.json["moe_layers"][0].as_u64().expect("a layer") as u32, 0)
                    && slice.end_block > slice.first_block
            }));
        }
        assert!(
            holders >= 2,
            "{family}: only {holders} workers hold a slice of expert 0"
        );
        let gateway = Server::start(&gateway_args(&stripped, &workers, &blocks));
        let found = generate(&gateway.addr, &golden.prompts()[0], 24)
            .await
            .expect("generated");
        assert_eq!(found, golden.greedy()[0], "{family}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killing_all_workers_gives_a_typed_error_and_a_restarted_worker_serves_again() {
    let golden = Golden::read("qwen3_moe");
    let folder = TempDir::new().expect("a temporary folder");
    let stripped = folder.path().join("stripped");
    copy_without_experts(&golden.dir, &stripped).expect("a copy");
    let mut workers = vec![
        worker(&golden.dir, &["--shard", "0/2"]),
        worker(&golden.dir, &["--shard", "1/2"]),
    ];
    let gateway = Server::start(&gateway_args(&stripped, &workers, &[]));
    let prompt = golden.prompts()[0].clone();
    assert_eq!(
        generate(&gateway.addr, &prompt, 24).await.expect("generated"),
        golden.greedy()[0]
    );
    workers.iter_mut().for_each(Server::kill);
    let asked = tokio::time::timeout(Duration::from_secs(20), generate(&gateway.addr, &prompt, 24)).await;
    let status = asked.expect("an answer in time").expect_err("no expert is left");
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert!(
        workers.iter().any(|worker| status.message().contains(&worker.addr)),
        "{status:?}"
    );
    let again: Vec<Server> = workers
        .iter()
        .enumerate()
        .map(|(index, old)| {
            Server::start(&[
                "worker",
                "--model",
                path(&golden.dir),
                "--listen",
                &old.addr,
                "--shard",
                &format!("{index}/2"),
            ])
        })
        .collect();
    let mut found = generate(&gateway.addr, &prompt, 24).await;
    for _ in 0..100 {
        if found.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        found = generate(&gateway.addr, &prompt, 24).await;
    }
    assert_eq!(
        found.expect("served again"),
        golden.greedy()[0],
        "{} workers",
        again.len()
    );
}

#[test]
fn a_worker_of_another_model_is_refused_with_both_values() {
    let golden = golden_dir("qwen3_moe");
    let other = worker(&golden_dir("olmoe"), &[]);
    let finished = Server::try_start(&gateway_args(&golden, &[other], &[])).expect_err("another family is refused");
    let error = finished.failed(1);
    assert!(error.contains("config"), "{error}");

    // The same config and shapes, other numbers: only content tells them apart.
    let folder = TempDir::new().expect("a temporary folder");
    let twin = folder.path().join("twin");
    moerun_testkit::copy_perturbed(&golden, &twin, "model.layers.0.mlp.gate.weight").expect("a copy");
    let twin_worker = worker(&twin, &[]);
    let error = Server::try_start(&gateway_args(&golden, &[twin_worker], &[]))
        .expect_err("refused")
        .failed(1);
    assert!(error.contains("router"), "{error}");

    let numerics = worker(&golden, &["--weights", "bf16"]);
    let error = Server::try_start(&gateway_args(&golden, &[numerics], &[]))
        .expect_err("refused")
        .failed(1);
    assert!(error.contains("bf16") && error.contains("f32"), "{error}");
}

#[test]
fn holders_of_one_expert_must_agree_on_its_content() {
    let golden = golden_dir("qwen3_moe");
    let folder = TempDir::new().expect("a temporary folder");
    let stripped = folder.path().join("stripped");
    copy_without_experts(&golden, &stripped).expect("a copy");
    let twin = folder.path().join("twin");
    moerun_testkit::copy_perturbed(&golden, &twin, "model.layers.1.mlp.experts.5.up_proj.weight").expect("a copy");
    let workers = [worker(&golden, &[]), worker(&twin, &[])];
    let error = Server::try_start(&gateway_args(&stripped, &workers, &[]))
        .expect_err("refused")
        .failed(1);
    assert!(error.contains("layer 1") && error.contains("expert 5"), "{error}");
}

#[test]
fn a_missing_expert_or_slice_is_named() {
    let golden = golden_dir("qwen3_moe");
    let workers = [worker(&golden, &["--experts", "0:*,1:0-6"])];
    // It has the experts on its own disk, but is not to compute them.
    let error = Server::try_start(&gateway_args(&golden, &workers, &["--on-expert-loss", "fail"]))
        .expect_err("refused")
        .failed(1);
    assert!(error.contains("layer 1 expert 7"), "{error}");
    let workers = [worker(&golden, &["--experts", "*:*:0-1", "--combine-block", "8"])];
    let args = gateway_args(&golden, &workers, &["--combine-block", "8", "--on-expert-loss", "fail"]);
    let error = Server::try_start(&args).expect_err("refused").failed(1);
    assert!(error.contains("layer 0 expert 0 blocks 2..3"), "{error}");
}

#[test]
fn whole_experts_and_slices_may_be_mixed() {
    let golden = Golden::read("deepseek_v3");
    let blocks = ["--combine-block", "8"];
    let workers = [
        worker(&golden.dir, &[&["--experts", "1:0-3,2:*:0-0"][..], &blocks].concat()),
        worker(
            &golden.dir,
            &[&["--experts", "1:4-7:0-1,2:*:1-2"][..], &blocks].concat(),
        ),
        worker(&golden.dir, &[&["--experts", "1:2-7:2-2"][..], &blocks].concat()),
    ];
    let gateway = Server::start(&gateway_args(&golden.dir, &workers, &blocks));
    run_client("foreign_client.py", &[&gateway.addr, path(&golden.dir)]);
}

#[test]
fn worker_processes_of_serve_end_with_it_even_when_it_is_killed() {
    let dir = golden_dir("mixtral");
    let mut server = Server::start(&[
        "serve",
        "--model",
        path(&dir),
        "--workers",
        "3",
        "--grpc-addr",
        "127.0.0.1:0",
    ]);
    let children = children_of(server.pid());
    assert_eq!(children.len(), 3, "three workers");
    server.kill();
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while children.iter().any(|&pid| is_running(pid)) {
        assert!(
            std::time::Instant::now() < deadline,
            "workers outlive their gateway: {children:?}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn children_of(parent: u32) -> Vec<u32> {
    fs::read_dir("/proc")
        .expect("/proc")
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|&pid: &u32| parent_of(pid) == Some(parent))
        .collect()
}

fn parent_of(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

fn is_running(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')')
        .and_then(|(_, rest)| rest.split_whitespace().next())
        .is_some_and(|state| state != "Z")
}

/// A worker on the socket `path`.
fn worker_on(model: &Path, socket: &Path, extra: &[&str]) -> Server {
    let listen = format!("unix:{}", path(socket));
    Server::start(&[&["worker", "--model", path(model), "--listen", &listen][..], extra].concat())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_on_unix_sockets_give_the_same_tokens_and_take_their_sockets_with_them() {
    let golden = Golden::read("qwen3_moe");
    let folder = TempDir::new().expect("a temporary folder");
    let sockets = [folder.path().join("a.sock"), folder.path().join("b.sock")];
    let mut workers = [0, 1].map(|index| worker_on(&golden.dir, &sockets[index], &["--shard", &format!("{index}/2")]));
    assert_eq!(workers[0].addr, format!("unix:{}", path(&sockets[0])));
    for spin in ["on", "off"] {
        let gateway = Server::start(&gateway_args(&golden.dir, &workers, &["--spin", spin]));
        let found = generate(&gateway.addr, &golden.prompts()[0], 24)
            .await
            .expect("generated");
        assert_eq!(found, golden.greedy()[0], "spin {spin}");
    }
    // A killed worker leaves its socket; the next one takes it over.
    workers[0].kill();
    assert!(sockets[0].exists());
    workers[0] = worker_on(&golden.dir, &sockets[0], &["--shard", "0/2"]);
    let gateway = Server::start(&gateway_args(&golden.dir, &workers, &[]));
    let found = generate(&gateway.addr, &golden.prompts()[0], 24)
        .await
        .expect("generated");
    assert_eq!(found, golden.greedy()[0]);
    drop(gateway);
    for worker in &mut workers {
        worker.terminate();
        assert_eq!(worker.wait(Duration::from_secs(10)), Some(0));
    }
    assert!(sockets.iter().all(|socket| !socket.exists()));
}

#[test]
fn an_address_that_cannot_be_a_socket_is_refused_in_words() {
    let golden = Golden::read("qwen3_moe");
    let folder = TempDir::new().expect("a temporary folder");
    let file = folder.path().join("file");
    fs::write(&file, "precious").expect("written");
    let long = folder.path().join("a".repeat(120));
    let taken = folder.path().join("taken");
    let _worker = worker_on(&golden.dir, &taken, &[]);
    for (socket, words) in [
        (&file, "wanted a socket or nothing at that path, found a file"),
        (&long, "wanted a path of at most 107 bytes"),
        (&taken, "another process listens on that socket"),
    ] {
        let listen = format!("unix:{}", path(socket));
        let error = run(&["worker", "--model", path(&golden.dir), "--listen", &listen]).failed(1);
        assert!(error.contains(words) && error.contains(path(socket)), "{error}");
    }
    assert_eq!(fs::read(&file).expect("still there"), b"precious");
    let missing = format!("unix:{}", path(&long));
    let error = run(&["gateway", "--model", path(&golden.dir), "--worker", &missing]).failed(1);
    assert!(error.contains("wanted a path of at most"), "{error}");
}

#[test]
fn started_workers_leave_no_socket_behind_however_their_parent_ends() {
    let golden = Golden::read("qwen3_moe");
    let folder = TempDir::new().expect("a temporary folder");
    let runtime = ("XDG_RUNTIME_DIR", path(folder.path()));
    let args = [
        "serve",
        "--model",
        path(&golden.dir),
        "--workers",
        "2",
        "--grpc-addr",
        "127.0.0.1:0",
    ];
    let left = || fs::read_dir(folder.path()).expect("readable").count();
    for kill in [false, true] {
        let mut server = Server::start_with(&[runtime], &args);
        assert_eq!(left(), 1, "one folder of sockets");
        if kill {
            server.kill();
        } else {
            server.terminate();
            assert_eq!(server.wait(Duration::from_secs(10)), Some(0));
            assert_eq!(left(), 0, "the parent removes the folder before it ends");
        }
        let until = std::time::Instant::now() + Duration::from_secs(10);
        while left() > 0 && std::time::Instant::now() < until {
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(left(), 0, "killed: {kill}");
    }
}
