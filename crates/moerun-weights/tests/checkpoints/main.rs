//! Checkpoints opened from disk: the golden ones, quantised ones, sharded ones, and lies.

mod directories;
mod files;

mod golden;
mod hashes;
mod lies;
mod needs;
mod quantised;
