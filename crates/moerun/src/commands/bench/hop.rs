//! `moerun bench hop`: a round trip over the stream that experts are asked on, beside a plain socket's.

mod plain;

use std::{
    io::{self, Write},
    path::Path,
    process,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use bytes::Bytes;
use moerun_dispatch::{LocalWorkers, LocalWorkersConfig, RemoteConfig, RemoteExperts};
use moerun_process::{Address, LogFormat, SocketFolder, Spin, init_telemetry};
use moerun_types::{CombineMode, NumberFormat, Numerics};
use moerun_weights::{Checkpoint, Needs, SynthesizeRequest, synthesize};
use serde_json::json;

use self::plain::PlainPeer;
use super::{header, pin, print_json, spread::quantile};
use crate::{
    cli::BenchHopArgs,
    commands::table::{Table, share},
};

/// A model of which nothing is asked but to be there.
const MODEL: &str = r#"{"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 512,
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": true}"#;
/// How long a child may take to be there.
const START: Duration = Duration::from_secs(60);
/// Round trips that are not counted.
const WARM_UP: usize = 50;
/// Bytes moved in one case: small messages are sent more often.
const CASE_BYTES: usize = 96 << 20;

/// Runs the command.
pub(super) fn run(args: &BenchHopArgs) -> anyhow::Result<()> {
    if let Some(address) = &args.echo_on {
        return plain::serve(address);
    }
    init_telemetry(LogFormat::Text, None, "warn")?;
    for &size in &args.bytes {
        ensure!(
            (1..=8 << 20).contains(&size),
            "--bytes: wanted 1 to {}, found {size}",
            8 << 20
        );
    }
    let cores = pin::cores().context("cores")?;
    let mut placements = vec![Placement::SameCore];
    if cores.len() > 1 {
        placements.insert(0, Placement::DifferentCores);
    }
    let folder = SocketFolder::create().context("a folder for sockets")?;
    let model = folder.path().join("model");
    synthesize(&SynthesizeRequest::new(MODEL, &model))?;
    let mut cases = Vec::new();
    for placement in placements {
        let theirs = placement.their_core(&cores);
        // On one core whoever spins keeps the other from running.
        let spin = match placement {
            Placement::DifferentCores => args.spin != Spin::Off,
            Placement::SameCore => args.spin == Spin::On,
        };
        for (transport, address) in [
            ("tcp", Address::Tcp("127.0.0.1:0".to_owned())),
            ("unix", Address::Unix(folder.path().join("hop"))),
        ] {
            for &size in &args.bytes {
                let mut peer = PlainPeer::start(&address)?;
                peer.bind(&cores[..1], &[theirs])?;
                let plain = measure(size, || peer.round_trip(size))?;
                drop(peer);
                cases.push(Case {
                    placement,
                    transport,
                    size,
                    kind: "plain",
                    spin: false,
                    micros: plain,
                });
            }
            let stream = Stream::start(&model, &address, spin)?;
            stream.bind(&cores[..1], &[theirs])?;
            for &size in &args.bytes {
                let payload = Bytes::from(vec![0x5a; size]);
                stream.check(&payload)?;
                let micros = measure(size, || stream.round_trip(&payload))?;
                cases.push(Case {
                    placement,
                    transport,
                    size,
                    kind: "stream",
                    spin,
                    micros,
                });
            }
        }
    }
    pin::bind(process::id(), &cores)?;
    report(args, &cases)
}

/// Where the two processes run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Placement {
    DifferentCores,
    SameCore,
}

impl Placement {
    fn their_core(self, cores: &[usize]) -> usize {
        match self {
            Placement::DifferentCores => cores[1],
            Placement::SameCore => cores[0],
        }
    }

    fn name(self) -> &'static str {
        match self {
            Placement::DifferentCores => "different",
            Placement::SameCore => "same",
        }
    }
}

/// Round trips of one kind.
struct Case {
    placement: Placement,
    transport: &'static str,
    size: usize,
    kind: &'static str,
    spin: bool,
    /// Ascending.
    micros: Vec<f64>,
}

impl Case {
    fn p50(&self) -> f64 {
        quantile(&self.micros, 0.5)
    }
}

/// Times round trips, in microseconds, ascending.
fn measure(size: usize, mut round_trip: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<Vec<f64>> {
    let trips = (CASE_BYTES / size).clamp(100, 4000);
    let mut micros = Vec::with_capacity(trips);
    for trip in 0..WARM_UP + trips {
        let begun = Instant::now();
        round_trip()?;
        if trip >= WARM_UP {
            micros.push(begun.elapsed().as_secs_f64() * 1e6);
        }
    }
    micros.sort_by(f64::total_cmp);
    Ok(micros)
}

/// A worker process and the stream to it.
struct Stream {
    remote: RemoteExperts,
    worker: LocalWorkers,
}

impl Stream {
    fn start(model: &Path, address: &Address, spin: bool) -> anyhow::Result<Self> {
        let numerics = Numerics {
            format: NumberFormat::Bf16,
            combine: CombineMode::Exact,
            combine_block: 64,
        };
        let spin = if spin { Spin::On } else { Spin::Off };
        let arguments = [
            "worker",
            "--listen",
            &address.to_string(),
            "--combine-block",
            "64",
            "--spin",
            &spin.to_string(),
        ]
        .map(str::to_owned)
        .into_iter()
        .chain(["--threads", "1", "--log-level", "warn", "--exit-with-parent", "--model"].map(str::to_owned))
        .chain([model.to_str().context("a path in UTF-8")?.to_owned()])
        .collect();
        let worker = LocalWorkers::start(LocalWorkersConfig {
            program: std::env::current_exe().context("the path of this binary")?,
            arguments: vec![arguments],
            ready_timeout: START,
            stop_grace: Duration::from_secs(5),
        })?;
        let config = RemoteConfig {
            patience: spin.patience(1, 1),
            ..RemoteConfig::new(worker.addresses().to_vec())
        };
        let checkpoint = Arc::new(Checkpoint::open(model, Needs::All)?);
        Ok(Self {
            remote: RemoteExperts::connect(config, checkpoint, numerics)?,
            worker,
        })
    }

    fn bind(&self, ours: &[usize], theirs: &[usize]) -> io::Result<()> {
        pin::bind(process::id(), ours)?;
        self.worker
            .process_ids()
            .into_iter()
            .try_for_each(|pid| pin::bind(pid, theirs))
    }

    /// That what comes back is what was sent.
    fn check(&self, payload: &Bytes) -> anyhow::Result<()> {
        let back = self.remote.echo(0, payload.clone())?;
        ensure!(back == *payload, "the worker sent back {} bytes of its own", back.len());
        Ok(())
    }

    fn round_trip(&self, payload: &Bytes) -> anyhow::Result<()> {
        self.remote.echo(0, payload.clone())?;
        Ok(())
    }
}

fn report(args: &BenchHopArgs, cases: &[Case]) -> anyhow::Result<()> {
    // What a stream is measured by: plain TCP of the same bytes on the same cores.
    let reference = |case: &Case| {
        let found = cases.iter().find(|other| {
            (other.kind, other.transport, other.placement, other.size) == ("plain", "tcp", case.placement, case.size)
        })?;
        Some(case.p50() / found.p50())
    };
    if args.json {
        let mut json = header(1);
        let cases: Vec<_> = cases
            .iter()
            .map(|case| {
                json!({
                    "cores": case.placement.name(),
                    "transport": case.transport,
                    "kind": case.kind,
                    "bytes": case.size,
                    "spin": case.spin,
                    "round_trips": case.micros.len(),
                    "p50_micros": case.p50(),
                    "p99_micros": quantile(&case.micros, 0.99),
                    "p50_over_plain_tcp": reference(case),
                })
            })
            .collect();
        json.insert("hop".to_owned(), cases.into());
        print_json(json)?;
        return Ok(());
    }
    let mut table = Table::new(&[
        "round trip",
        "cores",
        "bytes",
        "spin",
        "p50 µs",
        "p99 µs",
        "over plain TCP",
    ]);
    for case in cases {
        table.row(vec![
            format!("{} {}", case.transport, case.kind),
            case.placement.name().to_owned(),
            case.size.to_string(),
            if case.spin { "on" } else { "off" }.to_owned(),
            format!("{:.1}", case.p50()),
            format!("{:.1}", quantile(&case.micros, 0.99)),
            share(reference(case)),
        ]);
    }
    write!(io::stdout().lock(), "{table}")?;
    Ok(())
}
