//! The gRPC services over loopback, with a real engine and real checkpoints behind them.

mod harness;

mod errors;
mod inference;
mod moe_layer;
mod serving;
