//! Who may connect to the processes of a cluster: plaintext, certificates and their rotation, API keys, clocks.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use moerun_process::Address;
use moerun_proto::v1::{
    self, GenerateRequest, SamplingParams, generate_request::Prompt, inference_service_client::InferenceServiceClient,
};
use moerun_tests::{Finished, Golden, Server, run, run_client, run_with};
use moerun_transport::{AllowList, ClientFiles, ClientProtection, ClientTls, Dial};
use tempfile::TempDir;
use tonic::transport::Channel;

/// Where Debian has the library that fakes clocks.
const FAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1";

fn text(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

/// An authority, and certificates of a gateway and two workers, as operators make them.
struct Certificates {
    folder: TempDir,
}

impl Certificates {
    fn make() -> Self {
        let certificates = Self {
            folder: tempfile::tempdir().expect("a folder"),
        };
        certificates.run(&[]).ok();
        certificates
    }

    fn run(&self, extra: &[&str]) -> Finished {
        let args = ["certs", "--out", text(self.folder.path())];
        let workers = ["--worker", "worker-0=127.0.0.1", "--worker", "worker-1=127.0.0.1"];
        run(&[&args[..], &workers, extra].concat())
    }

    fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join(file)
    }

    /// Flags of a process that is `name`.
    fn flags(&self, name: &str) -> Vec<String> {
        let file = |ending: &str| self.path(&format!("{name}.{ending}")).display().to_string();
        let ca = self.path("ca.pem").display().to_string();
        ["--tls-cert", &file("pem"), "--tls-key", &file("key"), "--tls-ca", &ca]
            .map(str::to_owned)
            .to_vec()
    }

    /// Flags of the gateway's door.
    fn door(&self) -> Vec<String> {
        let (cert, key) = (self.path("gateway.pem"), self.path("gateway.key"));
        ["--grpc-tls-cert", text(&cert), "--grpc-tls-key", text(&key)]
            .map(str::to_owned)
            .to_vec()
    }

    fn client(&self) -> ClientProtection {
        let files = ClientFiles {
            ca: self.path("ca.pem"),
            own: None,
        };
        ClientProtection::Tls(Arc::new(
            ClientTls::load(files, AllowList::default()).expect("good files"),
        ))
    }
}

fn worker_args(golden: &Golden, shard: &str, extra: &[String]) -> Vec<String> {
    let args = [
        "worker",
        "--model",
        text(&golden.dir),
        "--listen",
        "127.0.0.1:0",
        "--shard",
        shard,
    ];
    args.iter()
        .map(|&it| it.to_owned())
        .chain(extra.iter().cloned())
        .collect()
}

fn gateway_args(golden: &Golden, workers: &[&Server], extra: &[String]) -> Vec<String> {
    let mut args: Vec<String> = ["gateway", "--model", text(&golden.dir), "--grpc-addr", "127.0.0.1:0"]
        .map(str::to_owned)
        .to_vec();
    for worker in workers {
        args.extend(["--worker".to_owned(), worker.addr.clone()]);
    }
    args.extend(extra.iter().cloned());
    args
}

async fn connect(address: &str, protection: &ClientProtection) -> Channel {
    let address = Address::parse(address).expect("an address");
    let endpoint = Dial::endpoint(&address, protection).expect("an address");
    let dial = Dial::new(address, protection.clone());
    endpoint.connect_with_connector(dial).await.expect("the door is open")
}

async fn generate(channel: Channel, prompt: &[u32], max_tokens: u32) -> Result<Vec<u32>, tonic::Status> {
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
    let mut stream = InferenceServiceClient::new(channel)
        .generate(request)
        .await?
        .into_inner();
    let mut ids = Vec::new();
    while let Some(response) = stream.message().await? {
        ids.extend(response.token_ids);
    }
    Ok(ids)
}

#[test]
fn plaintext_is_refused_beyond_this_host_with_what_to_do() {
    let golden = Golden::read("mixtral");
    let model = text(&golden.dir);
    for (args, flag) in [
        (["worker", "--model", model, "--listen", "0.0.0.0:0"], "--tls-cert"),
        (["worker", "--model", model, "--listen", "[::]:0"], "--tls-cert"),
        (
            ["serve", "--model", model, "--grpc-addr", "0.0.0.0:0"],
            "--grpc-tls-cert",
        ),
    ] {
        let error = run(&args).failed(2);
        assert!(
            error.contains("can be reached from other hosts") && error.contains(flag),
            "{error}"
        );
        assert!(error.contains("--insecure"), "{error}");
    }
    let insecure = Server::start(&["worker", "--model", model, "--listen", "0.0.0.0:0", "--insecure"]);
    insecure.wait_for_log("--insecure: what workers send and get");
    let error = run(&[
        "gateway",
        "--model",
        model,
        "--grpc-addr",
        "127.0.0.1:0",
        "--worker",
        "192.0.2.1:1",
    ])
    .failed(1);
    assert!(
        error.contains("192.0.2.1") && error.contains("--tls-ca") && error.contains("--insecure"),
        "{error}"
    );
    // A key is not sent in the open either.
    let variables = [("MOERUN_API_KEY", "moerun-secret")];
    let error = run_with(&variables, &["generate", "--connect", "192.0.2.1:1", "--prompt", "x"]).failed(1);
    assert!(
        error.contains("--tls-ca") && !error.contains("moerun-secret"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_with_certificates_gives_the_golden_tokens_and_turns_strangers_away() {
    let golden = Golden::read("mixtral");
    let certificates = Certificates::make();
    let allow = |name: &str| ["--allow-peer".to_owned(), format!("spiffe://moerun/gateway/{name}")];
    let start = |name: &str, shard: &str, allowed: &str| {
        let extra = [certificates.flags(name), allow(allowed).to_vec()].concat();
        Server::start(&worker_args(&golden, shard, &extra))
    };
    let workers = [start("worker-0", "0/2", "gateway"), start("worker-1", "1/2", "gateway")];
    let both: Vec<&Server> = workers.iter().collect();
    let extra = [certificates.flags("gateway"), certificates.door()].concat();
    let gateway = Server::start(&gateway_args(&golden, &both, &extra));
    gateway.wait_for_log("no API keys are wanted");
    let channel = connect(&gateway.addr, &certificates.client()).await;
    let (prompts, wanted) = (golden.prompts(), golden.greedy());
    assert_eq!(generate(channel, &prompts[0], 24).await.expect("an answer"), wanted[0]);

    // Somebody else's certificates, however good: each side says why.
    let strangers = Certificates::make();
    let error = run(&gateway_args(&golden, &both, &strangers.flags("gateway"))).failed(1);
    assert!(
        error.contains("signed by none of our authorities (--tls-ca)"),
        "{error}"
    );
    // Ours, but of a worker: its authority is known there, it is not.
    let error = run(&gateway_args(&golden, &both, &certificates.flags("worker-1"))).failed(1);
    assert!(
        error.contains("refuses this end's certificate") && error.contains("--allow-peer"),
        "{error}"
    );
    workers[0].wait_for_log("which --allow-peer does not name: wanted one of: spiffe://moerun/gateway/gateway");
    // Plaintext to TLS, and TLS to plaintext.
    let error = run(&gateway_args(&golden, &both, &[])).failed(1);
    assert!(error.contains("it wants TLS, and this end speaks plaintext"), "{error}");
    workers[0].wait_for_log("it speaks plaintext, and TLS is wanted here");
    let plain = Server::start(&worker_args(&golden, "0/1", &[]));
    let error = run(&gateway_args(&golden, &[&plain], &certificates.flags("gateway"))).failed(1);
    assert!(error.contains("it speaks plaintext, and TLS is wanted here"), "{error}");
    plain.wait_for_log("it speaks TLS, and this door is plaintext");
    // A gateway that expects somebody else.
    let extra = [certificates.flags("gateway"), allow("other").to_vec()].concat();
    let error = run(&gateway_args(&golden, &both, &extra)).failed(1);
    assert!(error.contains("spiffe://moerun/worker/worker-"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rotating_all_certificates_under_load_drops_no_stream() {
    let golden = Golden::read("qwen3_moe");
    let certificates = Certificates::make();
    let workers = [("worker-0", "0/2"), ("worker-1", "1/2")]
        .map(|(name, shard)| Server::start(&worker_args(&golden, shard, &certificates.flags(name))));
    let both: Vec<&Server> = workers.iter().collect();
    let extra = [certificates.flags("gateway"), certificates.door()].concat();
    let mut gateway = Server::start(&gateway_args(&golden, &both, &extra));
    let (prompts, wanted) = (golden.prompts(), golden.greedy());
    let client = certificates.client();
    let (done, finished) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let mut streams = tokio::task::JoinSet::new();
    for index in 0..6 {
        let (prompt, wanted) = (
            prompts[index % prompts.len()].clone(),
            wanted[index % prompts.len()].clone(),
        );
        // Half keep their connection, half make one for each request.
        let kept = connect(&gateway.addr, &client).await;
        let (address, client) = (gateway.addr.clone(), client.clone());
        let (done, finished) = (Arc::clone(&done), Arc::clone(&finished));
        streams.spawn(async move {
            while !done.load(SeqCst) {
                let channel = if index % 2 == 0 {
                    kept.clone()
                } else {
                    connect(&address, &client).await
                };
                assert_eq!(
                    generate(channel, &prompt, 24).await.expect("no stream is dropped"),
                    wanted
                );
                finished.fetch_add(1, SeqCst);
            }
        });
    }
    for turn in 1..=3 {
        certificates.run(&["--renew"]).ok();
        for server in [&workers[0], &workers[1], &gateway] {
            server.hang_up();
            server.wait_for_log("TLS certificates read again");
        }
        let (before, target) = (finished.load(SeqCst), 6 * turn);
        tokio::time::timeout(Duration::from_secs(60), async {
            while finished.load(SeqCst) < before + target {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .expect("streams go on");
    }
    done.store(true, SeqCst);
    while let Some(stream) = streams.join_next().await {
        stream.expect("no stream failed");
    }
    println!(
        "{} streams, 3 rotations of 3 certificates, 0 dropped",
        finished.load(SeqCst)
    );
    // A broken file is said, and the door stays open with what it had.
    fs::write(certificates.path("gateway.pem"), "nonsense").expect("our folder");
    gateway.hang_up();
    gateway.wait_for_log("the old stays in use");
    let channel = connect(&gateway.addr, &client).await;
    assert_eq!(generate(channel, &prompts[0], 24).await.expect("an answer"), wanted[0]);
    let log = gateway.finish();
    assert!(!log.contains("worker is gone"), "{log}");
}

#[test]
fn a_foreign_client_needs_tls_and_a_key_and_keys_change_while_it_serves() {
    let golden = Golden::read("mixtral");
    let certificates = Certificates::make();
    let new_key = |name: &str| {
        let lines = run(&["key", "new", name]).ok();
        let mut lines = lines.lines().map(str::to_owned);
        (lines.next().expect("the key"), lines.next().expect("its line"))
    };
    let ((first, first_line), (second, second_line)) = (new_key("team-a"), new_key("team-a"));
    let (third, third_line) = new_key("from-the-environment");
    let keys = certificates.path("keys");
    fs::write(&keys, &first_line).expect("our folder");
    let args = [
        "serve",
        "--model",
        text(&golden.dir),
        "--grpc-addr",
        "127.0.0.1:0",
        "--api-keys",
        text(&keys),
    ];
    let args: Vec<String> = args
        .iter()
        .map(|&it| it.to_owned())
        .chain(certificates.door())
        .collect();
    let mut server = Server::start_with(&[("MOERUN_API_KEY_LIST", &third_line), ("MOERUN_LOG", "trace")], &args);
    let ca = certificates.path("ca.pem");
    let client = |good: &str, bad: &str| {
        run_client(
            "secure_client.py",
            &[&server.addr, text(&ca), text(&golden.dir), good, bad],
        )
    };
    client(&first, &second);
    client(&third, &second);
    fs::write(&keys, &second_line).expect("our folder");
    server.hang_up();
    server.wait_for_log("API keys read again");
    client(&second, &first);

    let generate = |variables: &[(&str, &str)], extra: &[&str]| {
        let args = [
            "generate",
            "--connect",
            &server.addr,
            "--prompt-ids",
            "1,2,3",
            "--max-tokens",
            "2",
        ];
        run_with(variables, &[&args[..], extra].concat())
    };
    let with_ca = ["--tls-ca", text(&ca)];
    generate(&[("MOERUN_API_KEY", &second)], &with_ca).ok();
    let error = generate(&[("MOERUN_API_KEY", &first)], &with_ca).failed(1);
    assert!(
        error.contains("the API key is not known here (Unauthenticated)"),
        "{error}"
    );
    let error = generate(&[], &with_ca).failed(1);
    assert!(error.contains("wanted an API key"), "{error}");
    let error = generate(&[("MOERUN_API_KEY", &second)], &[]).failed(1);
    assert!(error.contains("it wants TLS"), "{error}");
    let log = server.finish();
    for key in [&first, &second, &third] {
        assert!(!log.contains(key.as_str()), "a key is in the log");
    }
    assert!(
        log.contains("a call is refused: the API key is not known here"),
        "the log is that of all levels"
    );
}

#[test]
fn certs_adds_to_its_authority_and_replaces_nothing_unasked() {
    let certificates = Certificates::make();
    let ca = fs::read(certificates.path("ca.pem")).expect("the authority");
    let error = certificates.run(&[]).failed(1);
    assert!(error.contains("worker-0.pem: is there already; --renew"), "{error}");
    let out = text(certificates.folder.path()).to_owned();
    run(&["certs", "--out", &out, "--worker", "worker-2=worker-2.moerun,10.0.0.2"]).ok();
    assert_eq!(fs::read(certificates.path("ca.pem")).expect("the authority"), ca);
    for key in ["ca.key", "worker-2.key"] {
        use std::os::unix::fs::PermissionsExt;
        let mode = fs::metadata(certificates.path(key))
            .expect("a key")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600, "{key}");
    }
    for bad in ["../x", "ca", "a/b", "", "a=\u{e9}"] {
        let error = run(&["certs", "--out", &out, "--worker", bad]).failed(2);
        assert!(error.contains("--worker"), "{bad}: {error}");
    }
    let other = Certificates::make();
    fs::copy(other.path("ca.pem"), certificates.path("ca.pem")).expect("our folder");
    let error = run(&["certs", "--out", &out, "--worker", "worker-3"]).failed(1);
    assert!(error.contains("found another"), "{error}");
}

/// Deadlines travel as durations, and are kept by monotonic clocks; certificates are judged by the wall clock, and say so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_clock_disturbs_no_deadline_and_is_named_where_it_matters() {
    if !Path::new(FAKETIME).exists() {
        println!("SKIPPED: {FAKETIME} is not there (Debian: libfaketime)");
        return;
    }
    let golden = Golden::read("mixtral");
    let certificates = Certificates::make();
    let skewed = |by: &'static str| {
        [
            ("LD_PRELOAD", FAKETIME),
            ("FAKETIME", by),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
        ]
    };
    // Certificates are good from an hour ago, so that clocks may differ a little.
    for (by, shard) in [("+1h", "0/1"), ("-50m", "0/1")] {
        let args = worker_args(&golden, shard, &certificates.flags("worker-0"));
        let worker = Server::start_with(&skewed(by), &args);
        let gateway = Server::start(&gateway_args(&golden, &[&worker], &certificates.flags("gateway")));
        let channel = connect(&gateway.addr, &ClientProtection::LoopbackOnly).await;
        for (prompt, wanted) in golden.prompts().iter().zip(golden.greedy()) {
            assert_eq!(generate(channel.clone(), prompt, 24).await.expect("an answer"), wanted);
        }
    }
    let worker = Server::start(&worker_args(&golden, "0/1", &certificates.flags("worker-0")));
    for (by, word) in [("+400d", "expired"), ("-2d", "becomes valid in")] {
        let error = run_with(
            &skewed(by),
            &gateway_args(&golden, &[&worker], &certificates.flags("gateway")),
        )
        .failed(1);
        assert!(
            error.contains(word) && error.contains("by this host's clock"),
            "{by}: {error}"
        );
    }
    // A worker whose own certificate is good for ten years finds the gateway's out of time, and both say so.
    certificates.run(&["--renew", "--days", "3650"]).ok();
    let lasting = tempfile::tempdir().expect("a folder");
    for file in ["worker-0.pem", "worker-0.key", "ca.pem"] {
        fs::copy(certificates.path(file), lasting.path().join(file)).expect("our folder");
    }
    certificates.run(&["--renew"]).ok();
    let lasting = Certificates { folder: lasting };
    let args = worker_args(&golden, "0/1", &lasting.flags("worker-0"));
    let late = Server::start_with(&skewed("+400d"), &args);
    let error = run(&gateway_args(&golden, &[&late], &certificates.flags("gateway"))).failed(1);
    assert!(
        error.contains("it has expired or is not valid yet, by the clock there"),
        "{error}"
    );
    late.wait_for_log("its certificate has expired, 35 days ago by this host's clock");
    // A client without a certificate of its own finds the server's out of time.
    let ca = certificates.path("ca.pem");
    let door = Server::start(
        &[
            &["serve", "--model", text(&golden.dir), "--grpc-addr", "127.0.0.1:0"].map(str::to_owned)[..],
            &certificates.door(),
        ]
        .concat(),
    );
    let ask = [
        "generate",
        "--connect",
        &door.addr,
        "--prompt-ids",
        "1",
        "--tls-ca",
        text(&ca),
    ];
    let error = run_with(&skewed("+400d"), &ask).failed(1);
    assert!(
        error.contains("its certificate has expired") && error.contains("by this host's clock"),
        "{error}"
    );
    let error = run_with(&skewed("-2d"), &ask).failed(1);
    assert!(error.contains("is not valid yet"), "{error}");
}
