//! The settings of all serving commands: defaults < TOML file < environment < flags.

mod discovery;
mod environment;
mod placement;
mod security;

use std::{
    env,
    path::{Path, PathBuf},
};

use clap::{Args, ValueEnum};
use figment::{
    Figment,
    providers::{Format, Serialized, Toml},
};
use moerun_dispatch::OnExpertLoss;
use moerun_process::{LogFormat, Spin};
use moerun_types::{CombineMode, KvFormat, NumberFormat};
use moerun_weights::Load;
use serde::{Deserialize, Serialize};

use crate::size::ByteSize;

pub(crate) use discovery::DiscoveryFlags;
pub(crate) use security::{ClusterFlags, DoorFlags};

/// Flags that every serving command takes. A flag that is not given leaves the word to the environment
/// (`MOERUN_MAX_CONTEXT` for `--max-context`), then to the file given with `--config`, then to the default.
#[derive(Debug, Clone, Default, Args, Serialize)]
pub(crate) struct ServingFlags {
    /// Checkpoint directory (config.json, *.safetensors, tokenizer.json; also as convert writes it) or GGUF file
    #[arg(long, value_name = "DIR|FILE", help_heading = "Model")]
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<PathBuf>,

    /// How weights are held [default: as most of the experts are stored]: f32 (4 bytes a weight, nothing is rounded), bf16
    /// (2; 8 bits of precision), int8 (1.06; 32 weights share a scale, close to bf16), int4 (0.56; likewise, visibly less
    /// accurate; embedding and head in int8) or mxfp4 (0.53 for the experts of checkpoints that store it; embedding and
    /// head in int8, the rest in bf16). Activations are rounded to bf16, and to int8 for the last three
    #[arg(long, value_name = "FORMAT", help_heading = "Model")]
    #[serde(skip_serializing_if = "Option::is_none")]
    weights: Option<NumberFormat>,

    /// How packed weights come into memory: map uses them where their files are mapped, so that nothing is read before it
    /// is needed and a model may be larger than memory; copy reads them at once, onto huge pages where the kernel allows
    /// [default: map]. Other weights are always copied
    #[arg(long, value_name = "map|copy", help_heading = "Model")]
    #[serde(skip_serializing_if = "Option::is_none")]
    load: Option<Load>,

    /// How partial sums of experts are added: exact (same bits for any number of workers) or fast [default: exact]
    #[arg(long, value_name = "MODE", help_heading = "Model")]
    #[serde(skip_serializing_if = "Option::is_none")]
    combine: Option<CombineMode>,

    /// Elements of an expert's intermediate dimension per block of the exact combine [default: 128, or 256 for wide
    /// experts]; gateway and workers must agree
    #[arg(long, value_name = "N", help_heading = "Model")]
    #[serde(skip_serializing_if = "Option::is_none")]
    combine_block: Option<usize>,

    /// Threads that compute [default: the machine's cores]
    #[arg(long, value_name = "N", help_heading = "Limits")]
    #[serde(skip_serializing_if = "Option::is_none")]
    threads: Option<usize>,

    /// Memory for keys and values, as in 2GiB [default: room for 16 full contexts, at most a quarter of what is free]
    #[arg(long, value_name = "SIZE", help_heading = "Limits")]
    #[serde(skip_serializing_if = "Option::is_none")]
    kv_memory: Option<ByteSize>,

    /// How keys and values are held: f32, bf16 or int8 (a byte each and a scale per token and head); answers stay equal
    /// bit for bit within one format [default: f32]
    #[arg(long, value_name = "FORMAT", help_heading = "Limits")]
    #[serde(skip_serializing_if = "Option::is_none")]
    kv_format: Option<KvFormat>,

    /// Longest sequence, prompt and answer together [default: what the checkpoint supports]
    #[arg(long, value_name = "TOKENS", help_heading = "Limits")]
    #[serde(skip_serializing_if = "Option::is_none")]
    max_context: Option<usize>,

    /// Most rows in one forward pass, prefill and decode together [default: 512]
    #[arg(long, value_name = "TOKENS", help_heading = "Limits")]
    #[serde(skip_serializing_if = "Option::is_none")]
    max_batch_tokens: Option<usize>,

    /// Most requests that wait to start; one more is refused [default: 256]
    #[arg(long, value_name = "N", help_heading = "Limits")]
    #[serde(skip_serializing_if = "Option::is_none")]
    max_queue: Option<usize>,

    /// Whether keys and values of prompts are kept for requests that begin alike: on or off; the answers are the same
    /// [default: on]
    #[arg(long, value_name = "on|off", help_heading = "Limits")]
    #[serde(skip_serializing_if = "Option::is_none")]
    prefix_cache: Option<Switch>,

    /// Most tokens guessed from a text's own repetitions and verified in one step; the answers are the same, 0 guesses
    /// none [default: 0]
    #[arg(long, value_name = "TOKENS", help_heading = "Limits")]
    #[serde(skip_serializing_if = "Option::is_none")]
    speculate: Option<usize>,

    /// Whether threads that wait for another process look for its answer for 50 µs before they sleep: on, off, or auto,
    /// which does where the host has a core for every computing thread [default: auto]
    #[arg(long, value_name = "auto|on|off", help_heading = "Limits")]
    #[serde(skip_serializing_if = "Option::is_none")]
    spin: Option<Spin>,

    /// What to do when all holders of an expert are gone: local (the gateway computes it from its own checkpoint, exact
    /// and slower, where that has it), fail (the request does) or skip (the expert is left out and the answer marked as
    /// degraded) [default: local]
    #[arg(long, value_name = "local|fail|skip", help_heading = "Limits")]
    #[serde(skip_serializing_if = "Option::is_none")]
    on_expert_loss: Option<OnExpertLoss>,

    /// How often each worker is asked with a known input, in seconds [default: 60]
    #[arg(long, value_name = "SECONDS", help_heading = "Limits")]
    #[serde(skip_serializing_if = "Option::is_none")]
    canary_interval: Option<u64>,

    /// Name of the model in requests [default: the directory's name]
    #[arg(long, value_name = "NAME", help_heading = "Model")]
    #[serde(skip_serializing_if = "Option::is_none")]
    served_name: Option<String>,

    /// Let plaintext leave this host: listen on, and dial, addresses that others can reach without TLS. Whoever is on the
    /// way reads and changes everything
    #[arg(long, help_heading = "Security")]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    insecure: bool,

    /// Log lines as text or json, on standard error [default: text]
    #[arg(long, value_name = "FORMAT", help_heading = "Settings and logs")]
    #[serde(skip_serializing_if = "Option::is_none")]
    log_format: Option<LogFormat>,

    /// What is logged: off, error, warn, info, debug, trace, or a filter as in info,moerun_dispatch=debug [default:
    /// MOERUN_LOG, else RUST_LOG, else info when serving and warn otherwise]
    #[arg(long, value_name = "LEVEL", help_heading = "Settings and logs")]
    #[serde(skip_serializing_if = "Option::is_none")]
    log_level: Option<String>,

    /// TOML file with any of these settings, under the flags' names with underscores (max_context = 4096)
    #[arg(long, value_name = "FILE", env = "MOERUN_CONFIG", help_heading = "Settings and logs")]
    #[serde(skip)]
    config: Option<PathBuf>,
}

/// A setting that is on or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Switch {
    /// On.
    On,
    /// Off.
    Off,
}

/// Settings that only some commands have as flags, given to [`Settings::load`] by those commands.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct RoleFlags {
    /// Address of the gRPC door.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) grpc_addr: Option<String>,
    /// Address of the health door.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) health_addr: Option<String>,
    /// Address of the door for Prometheus.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) metrics_addr: Option<String>,
    /// Address of the admin service.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) admin_addr: Option<String>,
    /// Worker processes to start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) workers: Option<usize>,
    /// Addresses of workers.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) worker: Vec<String>,
    /// Address a worker listens on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) listen: Option<String>,
    /// Shard of a worker.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) shard: Option<String>,
    /// Replicas of a worker's shard.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) replicas: Option<usize>,
    /// Experts of a worker.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) experts: Option<String>,
    /// Most memory that a worker's experts may take.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) expert_memory: Option<ByteSize>,
    /// Who says who holds what.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) placement: Option<String>,
    /// Holders that every expert is to have.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) placement_replicas: Option<usize>,
    /// Where a worker says that it is there.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) register: Vec<String>,
    /// Where gateways reach a worker.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) advertise: Option<String>,
    /// Where a gateway looks for workers.
    #[serde(flatten)]
    pub(crate) discovery: DiscoveryFlags,
    /// Between gateway and workers.
    #[serde(flatten)]
    pub(crate) cluster: ClusterFlags,
    /// Between clients and gateway.
    #[serde(flatten)]
    pub(crate) door: DoorFlags,
}

/// Settings that make no sense: the command ends with the exit code of wrong usage.
#[derive(Debug, thiserror::Error)]
#[error("settings: {0}")]
pub(crate) struct SettingsError(pub(crate) String);

impl From<figment::Error> for SettingsError {
    fn from(error: figment::Error) -> Self {
        let messages: Vec<String> = error.into_iter().map(|error| describe(&error)).collect();
        SettingsError(messages.join("; "))
    }
}

/// File, key and reason in one line. A parser's message has a drawing of the place, which its first line tells too.
fn describe(error: &figment::Error) -> String {
    let file = error
        .metadata
        .as_ref()
        .and_then(|metadata| metadata.source.as_ref()?.file_path());
    let mut words: Vec<String> = file.map(|path| path.display().to_string()).into_iter().collect();
    if !error.path.is_empty() {
        words.push(error.path.join("."));
    }
    let reason = error.kind.to_string();
    let lines: Vec<&str> = reason
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.contains('|'))
        .collect();
    words.push(lines.join(", "));
    words.join(": ")
}

/// All settings, resolved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Settings {
    /// Checkpoint directory.
    pub(crate) model: Option<PathBuf>,
    /// How weights are held; `None` = the checkpoint's own type.
    pub(crate) weights: Option<NumberFormat>,
    /// How packed weights come into memory.
    pub(crate) load: Load,
    /// Exact or fast combine.
    pub(crate) combine: CombineMode,
    /// Block of the exact combine; `None` = by the experts' width.
    pub(crate) combine_block: Option<usize>,
    /// Threads that compute; `None` = all cores.
    pub(crate) threads: Option<usize>,
    /// Memory for keys and values; `None` = by the context and what is free.
    pub(crate) kv_memory: Option<ByteSize>,
    /// How keys and values are held.
    pub(crate) kv_format: KvFormat,
    /// Longest sequence; `None` = the checkpoint's.
    pub(crate) max_context: Option<usize>,
    /// Most rows in one forward pass.
    pub(crate) max_batch_tokens: usize,
    /// Most requests that wait.
    pub(crate) max_queue: usize,
    /// Whether keys and values are kept for requests that begin alike.
    pub(crate) prefix_cache: Switch,
    /// Most tokens guessed and verified in one step.
    pub(crate) speculate: usize,
    /// Whether threads that wait for another process spin first.
    pub(crate) spin: Spin,
    /// When all holders of an expert are gone.
    pub(crate) on_expert_loss: OnExpertLoss,
    /// Seconds between known inputs to each worker.
    pub(crate) canary_interval: u64,
    /// Name of the model in requests; `None` = the directory's name.
    pub(crate) served_name: Option<String>,
    /// `text` or `json`.
    pub(crate) log_format: LogFormat,
    /// What is logged; `None` = by the command.
    pub(crate) log_level: Option<String>,
    /// Address of the gateway's gRPC door.
    pub(crate) grpc_addr: String,
    /// Address of the health door; `None` = there is none.
    pub(crate) health_addr: Option<String>,
    /// Address of the door for Prometheus; `None` = there is none.
    pub(crate) metrics_addr: Option<String>,
    /// Address of the admin service; `None` = beside the other services, if those are on loopback or a Unix socket.
    pub(crate) admin_addr: Option<String>,
    /// Worker processes to start.
    pub(crate) workers: usize,
    /// Addresses of workers.
    pub(crate) worker: Vec<String>,
    /// Places to look for workers.
    pub(crate) discover: Vec<String>,
    /// Seconds between two looks at a name.
    pub(crate) discover_interval: u64,
    /// Name server; `None` = the system's.
    pub(crate) dns_server: Option<String>,
    /// Address where workers register; `None` = they do not.
    pub(crate) registry_addr: Option<String>,
    /// Where a worker says that it is there.
    pub(crate) register: Vec<String>,
    /// Where gateways reach a worker; `None` = where it listens.
    pub(crate) advertise: Option<String>,
    /// Address a worker listens on.
    pub(crate) listen: String,
    /// Shard of a worker.
    pub(crate) shard: Option<String>,
    /// Shards that a worker holds, from `shard` on.
    pub(crate) replicas: usize,
    /// Experts of a worker.
    pub(crate) experts: Option<String>,
    /// Most memory that a worker's experts may take; `None` = what the system has.
    pub(crate) expert_memory: Option<ByteSize>,
    /// Who says who holds what: `held`, `auto`, or a file of a plan.
    pub(crate) placement: String,
    /// Holders that every expert is to have; `None` = as many as there are.
    pub(crate) placement_replicas: Option<usize>,
    /// Whether plaintext may leave this host.
    pub(crate) insecure: bool,
    /// Certificate of this process, between gateway and workers.
    pub(crate) tls_cert: Option<PathBuf>,
    /// The key to it.
    pub(crate) tls_key: Option<PathBuf>,
    /// Authorities of those at the other end.
    pub(crate) tls_ca: Option<PathBuf>,
    /// Identities of those at the other end; empty = all that the authorities vouch for.
    pub(crate) allow_peer: Vec<String>,
    /// Certificate of the gateway's gRPC door.
    pub(crate) grpc_tls_cert: Option<PathBuf>,
    /// The key to it.
    pub(crate) grpc_tls_key: Option<PathBuf>,
    /// Authorities of clients, where they show certificates.
    pub(crate) grpc_tls_client_ca: Option<PathBuf>,
    /// File of API keys.
    pub(crate) api_keys: Option<PathBuf>,
    /// API keys, in lines as in that file, or separated by commas.
    pub(crate) api_key_list: Option<String>,
    /// Most connections of a door.
    pub(crate) max_connections: usize,
    /// Most tokens of an answer; `None` = what the context leaves.
    pub(crate) max_answer_tokens: Option<usize>,
    /// Whether prompts and answers are logged.
    pub(crate) log_prompts: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            model: None,
            weights: None,
            load: Load::default(),
            combine: CombineMode::Exact,
            combine_block: None,
            threads: None,
            kv_memory: None,
            kv_format: KvFormat::F32,
            max_context: None,
            max_batch_tokens: 512,
            max_queue: 256,
            prefix_cache: Switch::On,
            speculate: 0,
            spin: Spin::Auto,
            on_expert_loss: OnExpertLoss::Local,
            canary_interval: 60,
            served_name: None,
            log_format: LogFormat::Text,
            log_level: None,
            grpc_addr: "127.0.0.1:50051".to_owned(),
            health_addr: None,
            metrics_addr: None,
            admin_addr: None,
            workers: 0,
            worker: Vec::new(),
            discover: Vec::new(),
            discover_interval: 5,
            dns_server: None,
            registry_addr: None,
            register: Vec::new(),
            advertise: None,
            listen: "127.0.0.1:50061".to_owned(),
            shard: None,
            replicas: 1,
            experts: None,
            expert_memory: None,
            placement: "held".to_owned(),
            placement_replicas: None,
            insecure: false,
            tls_cert: None,
            tls_key: None,
            tls_ca: None,
            allow_peer: Vec::new(),
            grpc_tls_cert: None,
            grpc_tls_key: None,
            grpc_tls_client_ca: None,
            api_keys: None,
            api_key_list: None,
            max_connections: 1024,
            max_answer_tokens: None,
            log_prompts: false,
        }
    }
}

impl Settings {
    /// Merges defaults, file, environment and flags, and checks what can be checked without the checkpoint.
    pub(crate) fn load(flags: &ServingFlags, role: &RoleFlags) -> Result<Self, SettingsError> {
        Self::load_with(flags, role, |variable| env::var(variable).ok())
    }

    fn load_with(
        flags: &ServingFlags,
        role: &RoleFlags,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, SettingsError> {
        let mut figment = Figment::from(Serialized::defaults(Settings::default()));
        if let Some(path) = &flags.config {
            if !path.is_file() {
                return Err(SettingsError(format!("--config {}: no such file", path.display())));
            }
            figment = figment.merge(Toml::file_exact(path));
        }
        let environment = environment::settings(variable)?;
        let mut settings: Settings = figment
            .merge(Serialized::defaults(&environment))
            .merge(Serialized::defaults(flags))
            .merge(Serialized::defaults(role))
            .extract()?;
        // Two ways to say one thing: where a flag, or else the environment, says one of them, the other from below is void.
        let flags_say = (role.shard.is_some(), role.experts.is_some());
        let environment_says = (environment.contains_key("shard"), environment.contains_key("experts"));
        let said = if flags_say == (false, false) {
            environment_says
        } else {
            flags_say
        };
        match said {
            (true, false) => settings.experts = None,
            (false, true) => settings.shard = None,
            (true, true) | (false, false) => {}
        }
        settings.check().map_err(SettingsError)?;
        Ok(settings)
    }

    fn check(&self) -> Result<(), String> {
        let bounded = [
            ("threads", self.threads, 1, 1024),
            ("workers", Some(self.workers), 0, 64),
            ("replicas", Some(self.replicas), 1, 64),
            ("placement_replicas", self.placement_replicas, 1, 64),
            ("max_context", self.max_context, 1, u32::MAX as usize),
            ("combine_block", self.combine_block, 8, 1 << 20),
            ("max_batch_tokens", Some(self.max_batch_tokens), 1, 1 << 16),
            ("max_queue", Some(self.max_queue), 1, 1 << 20),
            ("speculate", Some(self.speculate), 0, 256),
            ("canary_interval", usize::try_from(self.canary_interval).ok(), 1, 86_400),
            (
                "discover_interval",
                usize::try_from(self.discover_interval).ok(),
                1,
                3600,
            ),
            ("max_connections", Some(self.max_connections), 1, 1 << 20),
            ("max_answer_tokens", self.max_answer_tokens, 1, u32::MAX as usize),
        ];
        for (name, value, least, most) in bounded {
            if let Some(value) = value.filter(|value| !(least..=most).contains(value)) {
                return Err(format!("{name}: wanted {least} to {most}, found {value}"));
            }
        }
        match self.combine_block {
            Some(block) if block % 8 != 0 => Err(format!("combine_block: wanted a multiple of 8, found {block}")),
            _ => Ok(()),
        }
    }

    /// The checkpoint directory, which every serving command needs.
    pub(crate) fn model_dir(&self) -> Result<&PathBuf, SettingsError> {
        let none = "no checkpoint given: wanted --model DIR or FILE.gguf, MOERUN_MODEL or model = \"DIR\" in --config";
        self.model.as_ref().ok_or_else(|| SettingsError(none.to_owned()))
    }
}

/// Reads one file of settings, with no other.
pub(crate) fn check_file(file: &Path) -> Result<(), SettingsError> {
    let flags = ServingFlags {
        config: Some(file.to_owned()),
        ..ServingFlags::default()
    };
    Settings::load_with(&flags, &RoleFlags::default(), |_| None).map(|_| ())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn flags_win_over_the_environment_and_that_over_the_file() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(
            file,
            "max_context = 64\nmax_queue = 7\nthreads = 2\nlog_level = \"error\""
        )
        .unwrap();
        let flags = ServingFlags {
            max_context: Some(32),
            config: Some(file.path().to_owned()),
            ..ServingFlags::default()
        };
        let variable = |name: &str| {
            let value = match name {
                "MOERUN_MAX_CONTEXT" | "MOERUN_MAX_QUEUE" => "9",
                "MOERUN_WORKER" => "a:1,b:2",
                "MOERUN_LOG" => "debug",
                _ => return None,
            };
            Some(value.to_owned())
        };
        let settings = Settings::load_with(&flags, &RoleFlags::default(), variable).unwrap();
        assert_eq!(settings.max_context, Some(32));
        assert_eq!(settings.max_queue, 9);
        assert_eq!(settings.threads, Some(2));
        assert_eq!(settings.worker, ["a:1", "b:2"]);
        assert_eq!(settings.log_level.as_deref(), Some("debug"));
    }

    #[test]
    fn experts_are_left_out_only_where_that_is_asked_for() {
        let load = |on_expert_loss| {
            let flags = ServingFlags {
                on_expert_loss,
                ..ServingFlags::default()
            };
            let settings = Settings::load_with(&flags, &RoleFlags::default(), |_| None);
            settings.unwrap().on_expert_loss
        };
        assert_eq!(load(None), OnExpertLoss::Local);
        assert_eq!(load(Some(OnExpertLoss::Skip)), OnExpertLoss::Skip);
    }

    #[test]
    fn a_shard_from_above_replaces_experts_from_below_and_the_other_way_round() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(file, "shard = \"0/3\"").unwrap();
        let flags = ServingFlags {
            config: Some(file.path().to_owned()),
            ..ServingFlags::default()
        };
        let shard_flag = RoleFlags {
            shard: Some("1/2".to_owned()),
            ..RoleFlags::default()
        };
        let experts = |name: &str| (name == "MOERUN_EXPERTS").then(|| "*:*".to_owned());
        let both = |name: &str| matches!(name, "MOERUN_EXPERTS" | "MOERUN_SHARD").then(|| "0/5".to_owned());
        let said = |role: &RoleFlags, variable: &dyn Fn(&str) -> Option<String>| {
            let settings = Settings::load_with(&flags, role, variable).unwrap();
            (settings.shard, settings.experts)
        };
        let text = |text: &str| Some(text.to_owned());
        let none = RoleFlags::default();
        assert_eq!(said(&none, &|_| None), (text("0/3"), None));
        assert_eq!(said(&none, &experts), (None, text("*:*")));
        assert_eq!(said(&shard_flag, &experts), (text("1/2"), None));
        // Both from one place contradict each other: the worker refuses them.
        assert_eq!(said(&none, &both), (text("0/5"), text("0/5")));
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(
            file,
            "max_context = 64\nmax_queue = 7\nprefix_cache = \"off\"\nspeculate = 4\nkv_memory = \"3MiB\"\nkv_format = \"int8\"\nworker = [\"a:1\"]"
        )
        .unwrap();
        let flags = ServingFlags {
            max_context: Some(32),
            config: Some(file.path().to_owned()),
            ..ServingFlags::default()
        };
        let settings = Settings::load(&flags, &RoleFlags::default()).unwrap();
        assert_eq!(settings.max_context, Some(32));
        assert_eq!(settings.max_queue, 7);
        assert_eq!((settings.prefix_cache, settings.speculate), (Switch::Off, 4));
        assert_eq!(settings.kv_memory, Some(ByteSize(3 << 20)));
        assert_eq!(settings.kv_format, KvFormat::Int8);
        assert_eq!(settings.worker, ["a:1"]);
        assert_eq!(settings.max_batch_tokens, 512);
    }

    #[test]
    fn an_unknown_key_or_a_wrong_value_is_refused_by_name() {
        for (text, word) in [
            ("max_contxt = 64", "max_contxt"),
            ("max_queue = 0", "max_queue"),
            ("prefix_cache = \"maybe\"", "prefix_cache"),
            ("spin = \"maybe\"", "spin"),
            ("speculate = 257", "speculate"),
            ("weights = \"f64\"", "weights"),
            ("load = \"fast\"", "load"),
            ("combine_block = 12", "combine_block"),
            ("kv_memory = \"lots\"", "kv_memory"),
            ("kv_format = \"int3\"", "kv_format"),
            ("max_context = = 64", "line 1, column"),
        ] {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            writeln!(file, "{text}").unwrap();
            let flags = ServingFlags {
                config: Some(file.path().to_owned()),
                ..ServingFlags::default()
            };
            let error = Settings::load(&flags, &RoleFlags::default()).expect_err(text);
            let error = format!("{error:#}");
            let path = file.path().display().to_string();
            // What is read is checked by the file's reader, ranges afterwards, whatever they come from.
            assert!(
                error.contains(word) && (error.contains(&path) || error.contains("wanted")),
                "{text}: {error}"
            );
            assert!(!error.contains('\n'), "{text}: {error}");
        }
    }
}
