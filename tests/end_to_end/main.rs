//! End-to-end tests: real processes, real checkpoints, real clients.

mod bench;
mod cluster;
mod command_line;
mod fault_matrix;
mod formats;
mod gguf;
mod loading;
mod malformed;
mod packed;
mod parity;
mod service;
mod sizes;
mod tools;
