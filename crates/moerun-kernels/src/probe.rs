//! What the machine can do at most: bytes read per second, and operations per second of each multiply instruction.
//!
//! A kernel's figure means something beside these, taken by the same threads in the same process.

mod multiply;
mod read;

use std::time::{Duration, Instant};

pub use self::{
    multiply::{Multiply, multiply_peak},
    read::{ProbeMemory, read_bandwidth},
};

/// Seconds that `run` takes, and never nothing.
fn seconds(run: impl FnOnce()) -> f64 {
    let begun = Instant::now();
    run();
    begun.elapsed().max(Duration::from_nanos(1)).as_secs_f64()
}
