//! The gRPC services over loopback, with a real engine and real checkpoints behind them.
#![allow(clippy::unwrap_used)] // clippy's exception for tests does not reach the helpers of an integration test

mod harness;

mod abuse;
mod errors;
mod inference;
mod moe_layer;
mod serving;
