//! Streaming read.

use super::seconds;
use crate::{
    CpuPool, Isa,
    isa::Kernel,
    lines::{Line, Lines},
    simd::Simd,
};

/// Read without a claim in between, per thread.
const CHUNK_LINES: usize = (4 << 20) / size_of::<Line>();
/// Lines that are read into registers of their own, so that no load waits for another.
const STREAMS: usize = 8;

/// Memory to be read, larger than any cache, written once so that every page is there.
#[derive(Debug)]
pub struct ProbeMemory {
    lines: Lines,
}

impl ProbeMemory {
    /// Takes `bytes` of memory, filled by all threads of `pool`.
    pub fn new(pool: &CpuPool, bytes: usize) -> Self {
        let mut lines = Lines::zeroed(bytes / size_of::<Line>());
        {
            let chunks: Vec<_> = lines
                .as_mut_slice()
                .chunks_mut(CHUNK_LINES)
                .map(std::sync::Mutex::new)
                .collect();
            pool.run(chunks.len(), &|index| {
                let mut chunk = chunks[index].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                // Normal numbers between 1 and 2: an addition takes the same time for each.
                for (line, number) in chunk.iter_mut().zip(0_u32..) {
                    *line = std::array::from_fn(|lane| {
                        0x3f80_0000 | (number.wrapping_mul(2_654_435_761) >> 9) ^ lane as u32
                    });
                }
            });
        }
        Self { lines }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.lines.bytes()
    }
}

/// Bytes per second at which all threads of `pool` together read `memory` once, from the first byte to the last.
pub fn read_bandwidth(pool: &CpuPool, memory: &ProbeMemory) -> f64 {
    let isa = Isa::current();
    let chunks: Vec<&[Line]> = memory.lines.as_slice().chunks(CHUNK_LINES).collect();
    let elapsed = seconds(|| {
        pool.run(chunks.len(), &|index| {
            std::hint::black_box(isa.dispatch(SumLines(chunks[index])));
        });
    });
    memory.bytes() as f64 / elapsed
}

/// Adds up all numbers, so that all are read.
struct SumLines<'a>(&'a [Line]);

impl Kernel for SumLines<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let mut sums = [simd.splat(0.0); STREAMS];
        let (groups, rest) = self.0.as_chunks::<STREAMS>();
        for group in groups {
            for (sum, line) in sums.iter_mut().zip(group) {
                *sum = simd.add(*sum, simd.load_bits(line));
            }
        }
        for line in rest {
            sums[0] = simd.add(sums[0], simd.load_bits(line));
        }
        sums.into_iter().flat_map(|sum| simd.store(sum)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_read_on_every_isa() {
        let pool = CpuPool::new(2);
        let memory = ProbeMemory::new(&pool, 3 << 20);
        assert_eq!(memory.bytes(), 3 << 20);
        let lines = &memory.lines.as_slice()[..1000];
        let wanted: f64 = lines
            .iter()
            .flatten()
            .map(|&word| f64::from(f32::from_bits(word)))
            .sum();
        for isa in Isa::all_available() {
            let found = f64::from(isa.dispatch(SumLines(lines)));
            assert!((found - wanted).abs() < wanted * 1e-4, "{isa}: {found}, not {wanted}");
            let fewer = f64::from(isa.dispatch(SumLines(&lines[..999])));
            assert!(found - fewer > 15.0, "{isa}: the last line is left out");
        }
        let bandwidth = read_bandwidth(&pool, &memory);
        assert!(bandwidth.is_finite() && bandwidth > 0.0);
    }
}
