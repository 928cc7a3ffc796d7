//! Harness of the end-to-end tests: the `moerun` binary as its users run it, in processes of its own.

mod etcd_server;
mod golden;
mod metrics;
mod process;
mod python;

pub use etcd_server::EtcdServer;
pub use golden::{Golden, assert_close, decoder_families, dense_families, golden_dir, moe_families, read_tensors};
pub use metrics::{metric, metrics_page};
pub use process::{Finished, Server, free_port, moerun, moerun_planted, run, run_for, run_with};
pub use python::{run_client, run_python};
