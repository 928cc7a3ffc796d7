//! The command line: what each command takes.

mod admin;
mod plan;

use std::path::PathBuf;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, builder::PossibleValuesParser};
use moerun_process::Spin;
use moerun_types::{CombineMode, NumberFormat};
use moerun_weights::SHAPES;

pub(crate) use self::{
    admin::{AdminArgs, DrainArgs, RebalanceArgs, ResumeArgs, StatusArgs},
    plan::{BenchPlanArgs, PlanArgs},
};
use crate::{
    settings::{ClusterFlags, DiscoveryFlags, DoorFlags, ServingFlags},
    size::ByteSize,
};

/// A distributed mixture-of-experts runtime: a gateway and expert workers, over gRPC, on plain CPUs
#[derive(Debug, Parser)]
#[command(name = "moerun", version, propagate_version = true, arg_required_else_help = true)]
#[command(after_help = "\
Exit codes: 0 done, or drained after a signal; 1 failed; 2 wrong usage or settings; 130 (SIGINT) and 143 (SIGTERM) \
ended by a signal before it was ready, or by a second one while it drained.

Environment: MOERUN_MODEL, MOERUN_MAX_CONTEXT, … set what the flags --model, --max-context, … set, below the flags and \
above the file given with --config; MOERUN_LOG=debug is short for MOERUN_LOG_LEVEL; MOERUN_ISA=portable|avx2|avx512 \
forces a kernel variant.")]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Settings that a command takes, so that one file and one environment serve all commands, but has no use for: its help
/// does not name them.
const UNUSED: [(&str, &[&str]); 4] = [
    (
        "bench",
        &["max_queue", "prefix_cache", "speculate", "served_name", "insecure"],
    ),
    (
        "worker",
        &[
            "kv_memory",
            "kv_format",
            "max_context",
            "max_batch_tokens",
            "prefix_cache",
            "speculate",
            "on_expert_loss",
            "canary_interval",
            "served_name",
        ],
    ),
    ("generate", &["max_queue", "served_name"]),
    (
        "forward",
        &[
            "kv_memory",
            "max_context",
            "max_queue",
            "prefix_cache",
            "speculate",
            "served_name",
            "insecure",
        ],
    ),
];

impl Cli {
    /// The command line of this process; ends the process if it makes no sense or asks for help.
    pub(crate) fn from_process() -> Self {
        Self::from_arg_matches(&command().get_matches()).unwrap_or_else(|error| error.exit())
    }
}

fn command() -> clap::Command {
    let mut command = Cli::command().max_term_width(120);
    for (name, unused) in UNUSED {
        command = command.mut_subcommand(name, |mut subcommand| {
            for argument in unused {
                subcommand = subcommand.mut_arg(argument, |argument| argument.hide(true));
            }
            subcommand
        });
    }
    command
}

/// Commands of the binary.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve a model: a gateway with its experts in this process, or in worker processes that it starts
    Serve(ServeArgs),
    /// Serve a model with experts in workers that already run
    Gateway(GatewayArgs),
    /// Hold experts and run them for gateways
    Worker(WorkerArgs),
    /// Tell how a gateway's workers are, what they hold and how often experts are chosen
    Status(StatusArgs),
    /// Move off a worker what it alone holds, and give it no more calls, so that it can be stopped
    Drain(DrainArgs),
    /// Give a drained worker calls again
    Resume(ResumeArgs),
    /// Plan anew who holds which experts, over the loads that a gateway has seen, and move experts while it serves
    Rebalance(RebalanceArgs),
    /// Ask a health door; exit code 0 if it says that all is well
    Health(HealthArgs),
    /// Check this host, the settings and each link to a worker; exit code 1 if anything is wrong
    Doctor(DoctorArgs),
    /// Continue a prompt and stream the text to the terminal
    Generate(GenerateArgs),
    /// One forward pass over a batch of token ids: logits, and all that happens between, as safetensors
    Forward(ForwardArgs),
    /// Tell what a checkpoint is and what it needs
    Inspect(InspectArgs),
    /// Plan which worker should hold which experts, and tell what to expect
    Plan(PlanArgs),
    /// Pack a checkpoint in one number format, so that it is mapped at every start instead of being read and packed
    Convert(ConvertArgs),
    /// Write a random-weight checkpoint of a real shape, for benchmarks and load tests
    Synthesize(SynthesizeArgs),
    /// Make an authority and certificates for a cluster's first days
    Certs(CertsArgs),
    /// API keys of a gateway's clients
    Key(KeyArgs),
    /// Measure a model, or with `kernels` and `hop` its parts, beside what the machine can do
    Bench(BenchArgs),
    /// Start a gateway and workers, break workers beside a load, and judge what came of it
    Chaos(ChaosArgs),
}

/// `moerun serve`.
#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    pub(crate) serving: ServingFlags,

    /// Worker processes to start on Unix sockets and stop with this one; 0 = experts in this process [default: 0]
    #[arg(long, value_name = "N")]
    pub(crate) workers: Option<usize>,

    /// Address of the gRPC door, HOST:PORT, where port 0 takes a free one, or unix:/PATH [default: 127.0.0.1:50051]
    #[arg(long, value_name = "ADDR")]
    pub(crate) grpc_addr: Option<String>,

    /// Address of the admin service, on the loopback interface [default: beside the gRPC door, if that is on loopback]
    #[arg(long, value_name = "ADDR")]
    pub(crate) admin_addr: Option<String>,

    /// Address of a plain gRPC health door for probes, which knows the services startup, readiness and liveness; HOST:PORT,
    /// where port 0 takes a free one [default: none]
    #[arg(long, value_name = "ADDR")]
    pub(crate) health_addr: Option<String>,

    /// Address of a door for Prometheus, plain HTTP with GET /metrics: figures and addresses of workers, nothing that anybody
    /// said; HOST:PORT, where port 0 takes a free one [default: none]
    #[arg(long, value_name = "ADDR")]
    pub(crate) metrics_addr: Option<String>,

    #[command(flatten)]
    pub(crate) door: DoorFlags,
}

/// `moerun gateway`.
#[derive(Debug, Args)]
pub(crate) struct GatewayArgs {
    #[command(flatten)]
    pub(crate) serving: ServingFlags,

    /// Address of a worker, HOST:PORT or unix:/PATH; once for each
    #[arg(long, value_name = "ADDR")]
    pub(crate) worker: Vec<String>,

    /// Who says which worker holds what: held (each holds what it was told, and experts move only by moerun drain and
    /// rebalance), auto (this gateway plans over the loads that it sees, and moves experts to workers that come with few,
    /// after a loss, and where that gains more than it costs), or a plan, as moerun plan --out wrote it, whose workers are
    /// named by their addresses [default: held]
    #[arg(long, value_name = "held|auto|FILE")]
    pub(crate) placement: Option<String>,

    /// Holders that auto and rebalance see to for every expert [default: as many as every expert has had at once]
    #[arg(long, value_name = "R")]
    pub(crate) placement_replicas: Option<usize>,

    #[command(flatten)]
    pub(crate) discovery: DiscoveryFlags,

    #[command(flatten)]
    pub(crate) cluster: ClusterFlags,

    /// Address of the gRPC door, HOST:PORT, where port 0 takes a free one, or unix:/PATH [default: 127.0.0.1:50051]
    #[arg(long, value_name = "ADDR")]
    pub(crate) grpc_addr: Option<String>,

    /// Address of the admin service, on the loopback interface [default: beside the gRPC door, if that is on loopback]
    #[arg(long, value_name = "ADDR")]
    pub(crate) admin_addr: Option<String>,

    /// Stop when standard input ends (for a parent that must not leave a gateway behind)
    #[arg(long, hide = true)]
    pub(crate) exit_with_parent: bool,

    /// Address of a plain gRPC health door for probes, which knows the services startup, readiness and liveness; HOST:PORT,
    /// where port 0 takes a free one [default: none]
    #[arg(long, value_name = "ADDR")]
    pub(crate) health_addr: Option<String>,

    /// Address of a door for Prometheus, plain HTTP with GET /metrics: figures and addresses of workers, nothing that anybody
    /// said; HOST:PORT, where port 0 takes a free one [default: none]
    #[arg(long, value_name = "ADDR")]
    pub(crate) metrics_addr: Option<String>,

    #[command(flatten)]
    pub(crate) door: DoorFlags,
}

/// `moerun worker`.
#[derive(Debug, Args)]
pub(crate) struct WorkerArgs {
    #[command(flatten)]
    pub(crate) serving: ServingFlags,

    /// Address to listen on: HOST:PORT, where port 0 takes a free one, or unix:/PATH [default: 127.0.0.1:50061]
    #[arg(long, value_name = "ADDR")]
    pub(crate) listen: Option<String>,

    /// Address of the admin service, on the loopback interface [default: beside the experts, if those are on loopback or a Unix socket]
    #[arg(long, value_name = "ADDR")]
    pub(crate) admin_addr: Option<String>,

    /// Address of a plain gRPC health door for probes, which knows the services startup, readiness and liveness; HOST:PORT,
    /// where port 0 takes a free one [default: none]
    #[arg(long, value_name = "ADDR")]
    pub(crate) health_addr: Option<String>,

    /// Address of a door for Prometheus, plain HTTP with GET /metrics: figures and addresses of workers, nothing that anybody
    /// said; HOST:PORT, where port 0 takes a free one [default: none]
    #[arg(long, value_name = "ADDR")]
    pub(crate) metrics_addr: Option<String>,

    /// Say that this worker is there, from when it holds its experts until it drains, to a gateway's --registry-addr,
    /// HOST:PORT or unix:/PATH, or to etcd:HOST:PORT[+HOST:PORT…][/PREFIX]; once for each
    #[arg(long, value_name = "ADDR", help_heading = "Discovery")]
    pub(crate) register: Vec<String>,

    /// Where gateways reach this worker [default: where it listens, which must then be one address]
    #[arg(long, value_name = "ADDR", help_heading = "Discovery")]
    pub(crate) advertise: Option<String>,

    /// I/N: experts i with i mod N = I, in every layer; slice:I/N: the I-th of N runs of blocks of every expert; I from 0,
    /// or the word ordinal for the number that this host's name ends in, as in ordinal/4; several with commas between
    /// [default: everything]
    #[arg(long, value_name = "SHARD", conflicts_with = "experts")]
    pub(crate) shard: Option<String>,

    /// Hold the shards that follow --shard too, R in all: where every worker does, each shard is on R of them and any R - 1
    /// may be lost [default: 1]
    #[arg(long, value_name = "R", conflicts_with = "experts")]
    pub(crate) replicas: Option<usize>,

    /// Layers, experts and blocks, with ranges and *, as in 0-15:0-31,16-23:*,3:7:0-1; or none, to be given some by a gateway
    #[arg(long, value_name = "L:E[:S],…")]
    pub(crate) experts: Option<String>,

    /// Most memory that experts may take, those that a gateway gives later included, as in 8GiB [default: what is free]
    #[arg(long, value_name = "SIZE")]
    pub(crate) expert_memory: Option<ByteSize>,

    #[command(flatten)]
    pub(crate) cluster: ClusterFlags,

    /// Stop when standard input ends (for a parent that must not leave workers behind)
    #[arg(long, hide = true)]
    pub(crate) exit_with_parent: bool,
}

/// `moerun health`.
#[derive(Debug, Args)]
pub(crate) struct HealthArgs {
    /// HOST:PORT of a --health-addr, or of a gateway's or worker's own door
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:50052")]
    pub(crate) connect: String,

    /// What is asked for: startup, readiness, liveness, or the full name of a gRPC service
    #[arg(long, value_name = "NAME", default_value = "")]
    pub(crate) service: String,

    /// How long to wait for the answer
    #[arg(long, value_name = "SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) timeout: u64,
}

/// `moerun doctor`.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    #[command(flatten)]
    pub(crate) serving: ServingFlags,

    /// Address of a worker, HOST:PORT or unix:/PATH; once for each
    #[arg(long, value_name = "ADDR")]
    pub(crate) worker: Vec<String>,

    #[command(flatten)]
    pub(crate) discovery: DiscoveryFlags,

    #[command(flatten)]
    pub(crate) cluster: ClusterFlags,

    /// Address of the gateway's gRPC door [default: 127.0.0.1:50051]
    #[arg(long, value_name = "ADDR")]
    pub(crate) grpc_addr: Option<String>,

    /// Address of its health door
    #[arg(long, value_name = "ADDR")]
    pub(crate) health_addr: Option<String>,

    /// Address of its door for Prometheus
    #[arg(long, value_name = "ADDR")]
    pub(crate) metrics_addr: Option<String>,

    #[command(flatten)]
    pub(crate) door: DoorFlags,

    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// `moerun generate`.
#[derive(Debug, Args)]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    pub(crate) serving: ServingFlags,

    /// Text to continue
    #[arg(long, value_name = "TEXT", required_unless_present = "prompt_ids")]
    pub(crate) prompt: Option<String>,

    /// Token ids to continue, taken as they are
    #[arg(long, value_name = "1,2,3", value_delimiter = ',', conflicts_with_all = ["prompt", "chat"])]
    pub(crate) prompt_ids: Option<Vec<u32>>,

    /// The prompt is what a user says; the model's chat template makes a conversation of it
    #[arg(long)]
    pub(crate) chat: bool,

    /// Most tokens to generate [default: the checkpoint's, or 256]
    #[arg(long, value_name = "N")]
    pub(crate) max_tokens: Option<u32>,

    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,

    /// The text ends before this string; may be given several times
    #[arg(long, value_name = "STR")]
    pub(crate) stop: Vec<String>,

    /// Go on after the model's own end-of-sequence tokens
    #[arg(long)]
    pub(crate) ignore_eos: bool,

    /// Worker processes to start on this machine for the experts; 0 = experts in this process
    #[arg(long, value_name = "N", conflicts_with = "connect")]
    pub(crate) workers: Option<usize>,

    /// HOST:PORT of a gateway that already runs: ask it, instead of loading a model. With --tls-ca over TLS; --tls-cert and
    /// --tls-key where it wants a certificate
    #[arg(long, value_name = "ADDR")]
    pub(crate) connect: Option<String>,

    /// API key for that gateway; better in the environment, since others on this machine see command lines
    #[arg(
        long,
        value_name = "KEY",
        env = "MOERUN_API_KEY",
        hide_env_values = true,
        help_heading = "Security"
    )]
    pub(crate) api_key: Option<String>,

    #[command(flatten)]
    pub(crate) cluster: ClusterFlags,

    /// Print one JSON object at the end instead of streaming text
    #[arg(long)]
    pub(crate) json: bool,
}

/// How the next token is chosen; what is not given is taken from the checkpoint's generation_config.json.
#[derive(Debug, Args)]
pub(crate) struct SamplingArgs {
    /// 0 = always the likeliest token
    #[arg(long, value_name = "T", allow_negative_numbers = true, help_heading = "Sampling")]
    pub(crate) temperature: Option<f32>,

    /// Keep the K likeliest tokens; 0 = all
    #[arg(long, value_name = "K", help_heading = "Sampling")]
    pub(crate) top_k: Option<u32>,

    /// Keep the likeliest tokens whose probabilities reach P
    #[arg(long, value_name = "P", allow_negative_numbers = true, help_heading = "Sampling")]
    pub(crate) top_p: Option<f32>,

    /// Keep tokens at least P times as likely as the likeliest
    #[arg(long, value_name = "P", allow_negative_numbers = true, help_heading = "Sampling")]
    pub(crate) min_p: Option<f32>,

    /// Above 1: make tokens that were already seen less likely
    #[arg(long, value_name = "R", allow_negative_numbers = true, help_heading = "Sampling")]
    pub(crate) repetition_penalty: Option<f32>,

    /// The same request with the same seed gives the same text [default: 0]
    #[arg(long, value_name = "S", help_heading = "Sampling")]
    pub(crate) seed: Option<u64>,
}

/// `moerun forward`.
#[derive(Debug, Args)]
pub(crate) struct ForwardArgs {
    #[command(flatten)]
    pub(crate) serving: ServingFlags,

    /// safetensors with input_ids and, if rows are padded, attention_mask, both [batch, sequence]
    #[arg(long, value_name = "FILE")]
    pub(crate) inputs: PathBuf,

    /// safetensors to write: logits [batch, sequence, vocab]
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,

    /// JSON to write: how often each expert was chosen, as plan --loads takes it
    #[arg(long, value_name = "FILE")]
    pub(crate) loads: Option<PathBuf>,

    /// Also write hidden_final, layer.{i}.output, and moe.{j}.input, .output, .router_logits, .topk_ids, .topk_weights
    #[arg(long)]
    pub(crate) capture: bool,

    /// Worker processes to start on this machine for the experts; 0 = experts in this process
    #[arg(long, value_name = "N")]
    pub(crate) workers: Option<usize>,
}

/// `moerun chaos`.
#[derive(Debug, Args)]
pub(crate) struct ChaosArgs {
    /// Checkpoint directory or GGUF file
    #[arg(long, value_name = "PATH")]
    pub(crate) model: PathBuf,

    /// Worker processes
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub(crate) workers: usize,

    /// Workers that hold each expert
    #[arg(long, value_name = "R", default_value_t = 1)]
    pub(crate) holders: usize,

    /// Seconds in which faults are begun; the whole run takes about half a minute more
    #[arg(long, value_name = "S", default_value_t = 20)]
    pub(crate) duration: u64,

    /// Requests a second, sent at times that no answer changes
    #[arg(long, value_name = "RATE", default_value_t = 10.0)]
    pub(crate) rate: f64,

    /// Tokens that a request asks for
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub(crate) max_tokens: u32,

    /// Decides faults, prompts and send times
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub(crate) seed: u64,

    /// What may be broken: kill, stop, slow, partition, one-way, reset, corrupt; or none
    #[arg(long, value_name = "FAULTS", default_value = "kill,stop")]
    pub(crate) faults: String,

    /// Instead of random faults: what single faults cost under that many streams, beside what is promised; two holders an
    /// expert, each stretch as long as --duration says
    #[arg(long, value_name = "STREAMS", num_args = 0..=1, default_missing_value = "50")]
    pub(crate) figures: Option<usize>,

    /// Folder for report.md, report.json, history.jsonl and logs.txt, or for figures.txt
    #[arg(long, value_name = "DIR")]
    pub(crate) report: PathBuf,
}

/// `moerun inspect`.
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// Checkpoint directory or GGUF file
    #[arg(long, value_name = "DIR|FILE")]
    pub(crate) model: PathBuf,

    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// `moerun convert`.
#[derive(Debug, Args)]
pub(crate) struct ConvertArgs {
    /// Checkpoint directory or GGUF file
    #[arg(long, value_name = "DIR|FILE")]
    pub(crate) model: PathBuf,

    /// Format to pack in: f32, bf16, int8, int4 or mxfp4, as --weights of the serving commands; they run it in no other
    /// [default: as most of the experts are stored]
    #[arg(long, value_name = "FORMAT")]
    pub(crate) weights: Option<NumberFormat>,

    /// Directory to write; must not exist
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
}

/// `moerun synthesize`.
#[derive(Debug, Args)]
pub(crate) struct SynthesizeArgs {
    /// A real model's shape
    #[arg(
        long,
        value_name = "NAME",
        value_parser = PossibleValuesParser::new(SHAPES.iter().map(|shape| shape.name)),
        required_unless_present = "config",
        conflicts_with = "config"
    )]
    pub(crate) shape: Option<String>,

    /// A config.json of any supported family
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,

    /// Directory to write; must not exist
    #[arg(long, value_name = "DIR", required_unless_present_any = ["list"])]
    pub(crate) out: Option<PathBuf>,

    /// Cut the model to its first N layers
    #[arg(long, value_name = "N")]
    pub(crate) layers: Option<usize>,

    /// The same seed gives the same weights
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub(crate) seed: u64,

    /// Plain tensors of f32 or bf16, or a packed checkpoint in int8, int4 or mxfp4
    #[arg(long, value_name = "FORMAT", default_value = "bf16")]
    pub(crate) weights: NumberFormat,

    /// List the shapes, one a line
    #[arg(long, exclusive = true)]
    pub(crate) list: bool,
}

/// `moerun certs`.
#[derive(Debug, Args)]
pub(crate) struct CertsArgs {
    /// Folder for ca.pem and ca.key, and NAME.pem and NAME.key of each process. An authority that is there is used again;
    /// its key can sign anything, so keep it away from the machines that serve
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,

    /// A worker, once for each; NAMES are those by which gateways dial it, if others than NAME
    #[arg(long, value_name = "NAME[=NAMES,…]")]
    pub(crate) worker: Vec<String>,

    /// A gateway, once for each; NAMES are those by which clients dial it, beside localhost
    #[arg(long, value_name = "NAME[=NAMES,…]", default_value = "gateway")]
    pub(crate) gateway: Vec<String>,

    /// Days that certificates are valid; that of the authority ten times as long
    #[arg(long, value_name = "N", default_value_t = 365, value_parser = clap::value_parser!(u16).range(1..=3650))]
    pub(crate) days: u16,

    /// Replace certificates that are there
    #[arg(long)]
    pub(crate) renew: bool,
}

/// `moerun key`.
#[derive(Debug, Args)]
pub(crate) struct KeyArgs {
    #[command(subcommand)]
    pub(crate) command: KeyCommand,
}

/// What to do with keys.
#[derive(Debug, Subcommand)]
pub(crate) enum KeyCommand {
    /// Make a key: prints it, this once, and then the line for the file of --api-keys
    New {
        /// Whose it is, in letters, digits and -_.@
        name: String,
    },
}

/// `moerun bench`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    pub(crate) part: Option<BenchPart>,

    #[command(flatten)]
    pub(crate) model: BenchModelArgs,
}

/// A part that is measured alone.
#[derive(Debug, Subcommand)]
pub(crate) enum BenchPart {
    /// Expert feed-forwards on 1 to 256 rows, in every number format
    Kernels(BenchKernelsArgs),
    /// A round trip between gateway and worker, beside a plain socket's
    Hop(BenchHopArgs),
    /// How balanced the planner's placements are, beside EPLB's, and how long planning takes
    Plan(BenchPlanArgs),
}

/// `moerun bench --model DIR`.
#[derive(Debug, Args)]
pub(crate) struct BenchModelArgs {
    #[command(flatten)]
    pub(crate) serving: ServingFlags,

    /// Worker processes to start on this machine for the experts; 0 = experts in this process
    #[arg(long, value_name = "N")]
    pub(crate) workers: Option<usize>,

    /// Tokens of each prompt, drawn at random
    #[arg(long, value_name = "P", default_value_t = 512)]
    pub(crate) prompt_tokens: usize,

    /// Tokens that each sequence generates while it is measured
    #[arg(long, value_name = "G", default_value_t = 64)]
    pub(crate) gen_tokens: usize,

    /// Sequences that generate at the same time, one measurement each
    #[arg(long, value_name = "B,…", value_delimiter = ',', default_value = "1")]
    pub(crate) batch: Vec<usize>,

    /// Measurements of each kind, after one that is not counted
    #[arg(long, value_name = "R", default_value_t = 7)]
    pub(crate) repeat: usize,

    /// Seed of the prompts
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub(crate) seed: u64,

    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// `moerun bench kernels`.
#[derive(Debug, Args)]
pub(crate) struct BenchKernelsArgs {
    /// Shapes whose experts are run
    #[arg(
        long,
        value_name = "NAME,…",
        value_delimiter = ',',
        value_parser = PossibleValuesParser::new(SHAPES.iter().map(|shape| shape.name)),
        default_value = "olmoe-1b-7b,granite-3.1-1b-a400m"
    )]
    pub(crate) shape: Vec<String>,

    /// Only this number format [default: all]
    #[arg(long, value_name = "FORMAT")]
    pub(crate) weights: Option<NumberFormat>,

    /// Rows that each expert is run on
    #[arg(
        long,
        value_name = "N,…",
        value_delimiter = ',',
        default_value = "1,2,4,8,16,32,64,128,256"
    )]
    pub(crate) rows: Vec<usize>,

    /// How the experts of a row are added
    #[arg(long, value_name = "MODE", default_value = "exact")]
    pub(crate) combine: CombineMode,

    /// Columns of a block of the combine [default: that of the model's size]
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    pub(crate) combine_block: Vec<usize>,

    /// Threads that compute [default: the machine's cores]
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<usize>,

    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// `moerun bench hop`.
#[derive(Debug, Args)]
pub(crate) struct BenchHopArgs {
    /// Bytes of a message, each way
    #[arg(
        long,
        value_name = "N,…",
        value_delimiter = ',',
        default_value = "4096,32768,1048576"
    )]
    pub(crate) bytes: Vec<usize>,

    /// Whether both ends of the stream look for what comes before they sleep: on, off, or auto, which does on different cores
    #[arg(long, value_name = "auto|on|off", default_value = "auto")]
    pub(crate) spin: Spin,

    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,

    /// Be the other end of the plain socket
    #[arg(long, value_name = "ADDR", hide = true)]
    pub(crate) echo_on: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent_and_hides_only_settings_that_exist() {
        let command = command();
        command.clone().debug_assert();
        for (name, unused) in UNUSED {
            let subcommand = command.find_subcommand(name).expect("a command");
            for argument in unused {
                let argument = subcommand
                    .get_arguments()
                    .find(|it| it.get_id() == argument)
                    .expect("a flag");
                assert!(
                    argument.is_hide_set() && argument.get_long().is_some(),
                    "{name}: {argument}"
                );
            }
        }
    }
}
