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
const PASSES: usize = 5;

/// Read bandwidth and multiply peaks: of all measurements the largest, since what is not reached now may be a moment later.
pub(super) struct Machine {
    memory: ProbeMemory,
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
            read_bytes_per_second: 0.0,
            multiply_ops_per_second: [None; Multiply::ALL.len()],
        };
        machine.measure(pool);
        Ok(machine)
    }

    /// Measures again.
    pub(super) fn measure(&mut self, pool: &CpuPool) {
        for _ in 0..PASSES {
            self.read_bytes_per_second = self.read_bytes_per_second.max(read_bandwidth(pool, &self.memory));
            for (best, multiply) in self.multiply_ops_per_second.iter_mut().zip(Multiply::ALL) {
                let peak = multiply_peak(pool, multiply);
                *best = best.map_or(peak, |best| peak.map(|peak| peak.max(best)));
            }
        }
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

    pub(super) fn to_json(&self) -> Value {
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
            "machine: reads {:.1} GB/s; multiplies",
            self.read_bytes_per_second / 1e9
        )?;
        for (multiply, peak) in Multiply::ALL.iter().zip(self.multiply_ops_per_second) {
            if let Some(peak) = peak {
                write!(f, " {} {:.0}", multiply.name(), peak / 1e9)?;
            }
        }
        f.write_str(" Gop/s")
    }
}
