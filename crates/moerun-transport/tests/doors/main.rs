//! Doors and those who knock: a real gRPC server over sockets on loopback.
#![allow(clippy::unwrap_used, reason = "tests")]

mod certificates;
mod door;
mod limits;
mod rotation;
