//! What the commands take that ask a gateway's admin service.

use clap::Args;

use crate::settings::ClusterFlags;

/// Where the admin service is, and how it is reached.
#[derive(Debug, Args)]
pub(crate) struct AdminArgs {
    /// HOST:PORT or unix:/PATH of a gateway's --admin-addr, or of its gRPC door where that is reached from this host alone.
    /// With --tls-ca over TLS
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:50051")]
    pub(crate) admin: String,

    /// How long to wait for the answer
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) timeout: u64,

    /// API key, where the door wants one; better in the environment, since others on this machine see command lines
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

    /// Let plaintext leave this host
    #[arg(long, help_heading = "Security")]
    pub(crate) insecure: bool,

    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// `moerun status`.
#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    pub(crate) admin: AdminArgs,
}

/// `moerun drain`.
#[derive(Debug, Args)]
pub(crate) struct DrainArgs {
    /// Address of the worker, as the gateway was told
    #[arg(value_name = "WORKER")]
    pub(crate) worker: String,

    #[command(flatten)]
    pub(crate) admin: AdminArgs,
}

/// `moerun resume`.
#[derive(Debug, Args)]
pub(crate) struct ResumeArgs {
    /// Address of the worker, as the gateway was told
    #[arg(value_name = "WORKER")]
    pub(crate) worker: String,

    #[command(flatten)]
    pub(crate) admin: AdminArgs,
}

/// `moerun rebalance`.
#[derive(Debug, Args)]
pub(crate) struct RebalanceArgs {
    /// Only say what would move
    #[arg(long)]
    pub(crate) dry_run: bool,

    #[command(flatten)]
    pub(crate) admin: AdminArgs,
}
