//! Workers over loopback against the experts of this process.
// A test's own helpers may fail as loudly as a test.
#![allow(clippy::unwrap_used)]

mod admission;
mod cluster;
mod equality;
mod failover;
mod faults;
mod live;
mod members;
mod puppet;
