//! End-to-end tests: real processes, real checkpoints, real clients.

mod bench;
mod cluster;
mod command_line;
mod doctor;
mod failover;
mod fault_matrix;
mod formats;
mod gguf;
mod loading;
mod malformed;
mod metrics;
mod packed;
mod parity;
mod plan;
mod prompts_in_logs;
mod security;
mod service;
mod sizes;
mod supervision;
mod tools;
