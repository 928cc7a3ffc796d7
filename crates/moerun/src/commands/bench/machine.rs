//! The machine's limits, measured by the threads that compute.

use std::fmt;

use anyhow::ensure;
use moerun_kernels::{CpuPool, Multiply, ProbeMemory, multiply_peak, read_bandwidth};
use moerun_types::NumberFormat;
use moerun_weights::available_memory_bytes;
use serde_json::{Value, json};

use crate::size::ByteSize;

/// Memory that is read: more than any cache holds.
pub(super) const PROBE_BYTES: usize = 1 << 30;
/// Passes over it each time.
const PASSES: usize = 3;

/// Measures the machine's limits, again and again: on a guest of a busy host the read bandwidth halves and doubles within
/// a minute, so that a rate can only be judged by what was possible just before and after it.
pub(super) struct Machine {
    memory: ProbeMemory,
    best: Limits,
}

/// What the machine could do at some time: of several measurements the largest.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Limits {
    read_bytes_per_second: f64,
    multiply_ops_per_second: [Option<f64>; Multiply::ALL.len()],
}

impl Machine {
    /// Takes the memory to be read, if there is so much, and measures for the first time.
    pub(super) fn measure_first(pool: &CpuPool) -> anyhow::Result<Self> {
        if let Some(available) = available_memory_bytes() {
            ensure!(
                available > PROBE_BYTES as u64,
                "the read bandwidth is measured on {}, but {} of memory are available",
                ByteSize(PROBE_BYTES as u64),
                ByteSize(available)
            );
        }
        let mut machine = Self {
            memory: ProbeMemory::new(pool, PROBE_BYTES),
            best: Limits::NONE,
        };
        machine.measure(pool);
        Ok(machine)
    }

    /// What the machine can do now.
    pub(super) fn measure(&mut self, pool: &CpuPool) -> Limits {
        let mut now = Limits::NONE;
        for _ in 0..PASSES {
            now = now.or_more(Limits {
                read_bytes_per_second: read_bandwidth(pool, &self.memory),
                multiply_ops_per_second: Multiply::ALL.map(|multiply| multiply_peak(pool, multiply)),
            });
        }
        self.best = self.best.or_more(now);
        now
    }

    /// The best that was ever seen.
    pub(super) fn to_json(&self) -> Value {
        self.best.to_json()
    }
}

impl Limits {
    const NONE: Self = Self {
        read_bytes_per_second: 0.0,
        multiply_ops_per_second: [None; Multiply::ALL.len()],
    };

    /// The larger of each.
    pub(super) fn or_more(self, other: Self) -> Self {
        let mut more = self;
        more.read_bytes_per_second = more.read_bytes_per_second.max(other.read_bytes_per_second);
        for (more, other) in more
            .multiply_ops_per_second
            .iter_mut()
            .zip(other.multiply_ops_per_second)
        {
            *more = match (*more, other) {
                (Some(one), Some(other)) => Some(one.max(other)),
                (one, other) => one.or(other),
            };
        }
        more
    }

    /// Share of the read bandwidth that `bytes_per_second` is.
    pub(super) fn share_of_read(&self, bytes_per_second: f64) -> f64 {
        bytes_per_second / self.read_bytes_per_second
    }

    /// Share of the peak of the instruction for `format` that `ops_per_second` is.
    pub(super) fn share_of_peak(&self, format: NumberFormat, ops_per_second: f64) -> Option<f64> {
        let wanted = Multiply::for_format(&format.to_string());
        let index = Multiply::ALL.iter().position(|&multiply| multiply == wanted)?;
        Some(ops_per_second / self.multiply_ops_per_second[index]?)
    }

    pub(super) fn to_json(self) -> Value {
        let peaks: serde_json::Map<String, Value> = Multiply::ALL
            .iter()
            .zip(self.multiply_ops_per_second)
            .map(|(multiply, peak)| (multiply.name().to_owned(), json!(peak)))
            .collect();
        json!({
            "read_bytes_per_second": self.read_bytes_per_second,
            "multiply_ops_per_second": peaks,
        })
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "machine, at best: reads {:.1} GB/s; multiplies",
            self.best.read_bytes_per_second / 1e9
        )?;
        for (multiply, peak) in Multiply::ALL.iter().zip(self.best.multiply_ops_per_second) {
            if let Some(peak) = peak {
                write!(f, " {} {:.0}", multiply.name(), peak / 1e9)?;
            }
        }
        f.write_str(" Gop/s")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_the_larger_of_two_measurements() {
        let before = Limits {
            read_bytes_per_second: 20.0,
            multiply_ops_per_second: [Some(3.0), None, Some(8.0)],
        };
        let after = Limits {
            read_bytes_per_second: 10.0,
            multiply_ops_per_second: [Some(4.0), None, Some(5.0)],
        };
        for limits in [
            before.or_more(after),
            after.or_more(before),
            before.or_more(after).or_more(Limits::NONE),
        ] {
            assert_eq!(limits.share_of_read(5.0), 0.25);
            assert_eq!(limits.share_of_peak(NumberFormat::F32, 1.0), Some(0.25));
            assert_eq!(limits.share_of_peak(NumberFormat::Bf16, 1.0), None);
            assert_eq!(limits.share_of_peak(NumberFormat::Int4, 2.0), Some(0.25));
        }
    }
}
