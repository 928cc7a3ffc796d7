//! Checkpoints opened from disk: the golden ones, quantised ones, sharded ones, and lies.

// clippy knows the tests but not the functions they share; a panic is how either fails.
#![allow(clippy::unwrap_used)]

mod directories;
mod files;

mod gguf;
mod golden;
mod hashes;
mod lies;
mod mangled;
mod needs;
mod packed;
mod quantised;
mod transfer;
