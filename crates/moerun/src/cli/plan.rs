//! What `moerun plan` and `moerun bench plan` take.

use std::path::PathBuf;

use clap::Args;
use moerun_routing::planner::Layout;
use moerun_types::{CombineMode, NumberFormat};

use crate::size::ByteSize;

/// `moerun plan`.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("who").required(true).args(["worker", "workers"]))]
pub(crate) struct PlanArgs {
    /// Checkpoint directory or GGUF file
    #[arg(long, value_name = "DIR|FILE", help_heading = "Model")]
    pub(crate) model: PathBuf,

    /// How experts are held [default: as most of them are stored]
    #[arg(long, value_name = "FORMAT", help_heading = "Model")]
    pub(crate) weights: Option<NumberFormat>,

    /// How partial sums are added: exact or fast
    #[arg(long, value_name = "MODE", help_heading = "Model", default_value = "exact")]
    pub(crate) combine: CombineMode,

    /// Elements of an expert's intermediate dimension per combine block [default: 128, or 256 for wide experts]
    #[arg(long, value_name = "N", help_heading = "Model")]
    pub(crate) combine_block: Option<usize>,

    /// A worker: its name, the memory that experts may take, and where they are known the bytes that it reads per second
    /// [default: 20GB], its round trip [default: 100us] and what it fails together with [default: nothing]; once for each
    #[arg(
        long,
        value_name = "NAME=MEMORY[,bandwidth=SIZE][,rtt=TIME][,domain=NAME]",
        help_heading = "Workers"
    )]
    pub(crate) worker: Vec<String>,

    /// Number of equal workers, named w0, w1, …
    #[arg(long, value_name = "N", help_heading = "Workers", requires = "memory")]
    pub(crate) workers: Option<usize>,

    /// Memory of each of them, as in 8GiB
    #[arg(long, value_name = "SIZE", help_heading = "Workers", conflicts_with = "worker")]
    pub(crate) memory: Option<ByteSize>,

    /// Holders of every expert, on different workers and in different failure domains where there are enough
    #[arg(long, value_name = "R", help_heading = "Placement", default_value_t = 1)]
    pub(crate) replicas: usize,

    /// Holders more in each layer, for its busiest experts
    #[arg(long, value_name = "N", help_heading = "Placement", default_value_t = 0)]
    pub(crate) extra: usize,

    /// How experts are cut: whole, slices:N, or mix:B:N for N slices of the B busiest of each layer [default: for which a
    /// step costs least]
    #[arg(long, value_name = "whole|slices:N|mix:B:N", help_heading = "Placement")]
    pub(crate) force: Option<Layout>,

    /// How often each expert is chosen, as forward --loads writes it [default: all alike]
    #[arg(long, value_name = "FILE", help_heading = "Placement")]
    pub(crate) loads: Option<PathBuf>,

    /// The plan in force, as --out wrote it: what it has is kept where moving gains too little
    #[arg(long, value_name = "PLAN", help_heading = "Placement")]
    pub(crate) present: Option<PathBuf>,

    /// Part of a layer's time that must be gained to move all of it; to move a part of it, that part of the gain
    #[arg(long, value_name = "PART", help_heading = "Placement", default_value_t = 0.1)]
    pub(crate) stability: f64,

    /// Rows of the step whose cost decides how experts are cut
    #[arg(long, value_name = "ROWS", help_heading = "Placement", default_value_t = 16)]
    pub(crate) batch: usize,

    /// Bytes per second between gateway and workers
    #[arg(long, value_name = "SIZE", help_heading = "Placement", default_value = "1.25GB")]
    pub(crate) link: ByteSize,

    /// Among equally good plans the seed decides
    #[arg(long, value_name = "S", help_heading = "Placement", default_value_t = 0)]
    pub(crate) seed: u64,

    /// File to write the plan to
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,

    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// `moerun bench plan`.
#[derive(Debug, Args)]
pub(crate) struct BenchPlanArgs {
    /// Experts of a layer with synthetic loads
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub(crate) experts: usize,

    /// Workers
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub(crate) workers: usize,

    /// Layers of each kind of synthetic loads, each in an order of its own
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub(crate) seeds: u64,

    /// Recorded loads, as forward --loads writes them; once for each file
    #[arg(long, value_name = "FILE")]
    pub(crate) loads: Vec<PathBuf>,

    /// Do not measure how long planning takes
    #[arg(long)]
    pub(crate) quick: bool,

    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}
