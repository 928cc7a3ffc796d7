//! Multiply peaks: chains of one instruction on registers, as many side by side as hide its latency.

use std::hint::black_box;

use super::seconds;
use crate::{CpuPool, Isa, isa::Kernel, lines::LANES, simd::Simd};

/// How long one measurement lasts, in seconds, at least.
const LEAST_SECONDS: f64 = 0.01;
/// Pieces per thread, so that a thread that comes late takes fewer.
const PIECES: usize = 8;

/// A multiply instruction. One multiply-add is two operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Multiply {
    /// Fused multiply-add of f32.
    F32,
    /// Dot product of two bfloat16, added to f32 (`vdpbf16ps`).
    Bf16,
    /// Dot product of four 8-bit integers, added to a 32-bit one (`vpdpbusd`).
    Int8,
}

impl Multiply {
    /// All of them.
    pub const ALL: [Multiply; 3] = [Multiply::F32, Multiply::Bf16, Multiply::Int8];

    /// The instruction that does most of the work where weights are held as `name`: each 16-bit and 32-bit format has its
    /// own, smaller ones use the integer one.
    pub fn for_format(name: &str) -> Self {
        match name {
            "f32" => Multiply::F32,
            "bf16" => Multiply::Bf16,
            _ => Multiply::Int8,
        }
    }

    /// A short name.
    pub fn name(self) -> &'static str {
        match self {
            Multiply::F32 => "f32",
            Multiply::Bf16 => "bf16",
            Multiply::Int8 => "int8",
        }
    }

    /// Runs `rounds` rounds on the calling thread; returns the operations done, or `None` where the instruction set in use
    /// does not have the instruction.
    fn run(self, isa: Isa, rounds: usize) -> Option<f64> {
        match self {
            Multiply::F32 => Some(isa.dispatch(FmaRounds(rounds)) as f64),
            Multiply::Bf16 | Multiply::Int8 => dot_rounds(self, isa, rounds),
        }
    }
}

/// Operations per second of `multiply` by all threads of `pool` together; `None` where the instruction set in use does not
/// have the instruction.
pub fn multiply_peak(pool: &CpuPool, multiply: Multiply) -> Option<f64> {
    let isa = Isa::current();
    let tasks = pool.threads() * PIECES;
    let mut rounds = 256;
    let operations = multiply.run(isa, 1)?;
    loop {
        let elapsed = seconds(|| {
            pool.run(tasks, &|_| {
                black_box(multiply.run(isa, rounds));
            });
        });
        if elapsed >= LEAST_SECONDS {
            return Some(operations * rounds as f64 * tasks as f64 / elapsed);
        }
        rounds *= 2;
    }
}

struct FmaRounds(usize);

impl Kernel for FmaRounds {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> usize {
        if S::WIDE {
            fma_rounds::<S, 12>(simd, self.0)
        } else {
            fma_rounds::<S, 6>(simd, self.0)
        }
    }
}

/// `CHAINS` chains of [`LANES`] lanes; returns the operations.
#[inline(always)]
fn fma_rounds<S: Simd, const CHAINS: usize>(simd: S, rounds: usize) -> usize {
    let (factor, addend) = (simd.splat(black_box(0.5)), simd.splat(black_box(0.25)));
    let mut sums = [simd.splat(black_box(1.0)); CHAINS];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = simd.mul_add(*sum, factor, addend);
        }
    }
    black_box(sums.map(|sum| simd.store(sum)));
    2 * CHAINS * LANES * rounds
}

#[cfg(target_arch = "x86_64")]
fn dot_rounds(multiply: Multiply, isa: Isa, rounds: usize) -> Option<f64> {
    if isa != Isa::Avx512 {
        return None;
    }
    let operations = match multiply {
        // SAFETY: the features have just been seen.
        Multiply::Bf16 if is_x86_feature_detected!("avx512bf16") => unsafe { x86::bf16_rounds(rounds) },
        // SAFETY: the features have just been seen.
        Multiply::Int8 if is_x86_feature_detected!("avx512vnni") => unsafe { x86::int8_rounds(rounds) },
        _ => return None,
    };
    Some(operations as f64)
}

#[cfg(not(target_arch = "x86_64"))]
fn dot_rounds(_: Multiply, _: Isa, _: usize) -> Option<f64> {
    None
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::{arch::x86_64::*, hint::black_box};

    const CHAINS: usize = 12;

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) fn bf16_rounds(rounds: usize) -> usize {
        // 0x3f80 is 1.0 in bfloat16.
        let ones = _mm512_set1_epi32(black_box(0x3f80_3f80));
        // SAFETY: both are 64 bytes without invalid values.
        let ones: __m512bh = unsafe { std::mem::transmute(ones) };
        let mut sums = [_mm512_setzero_ps(); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, ones, ones);
            }
        }
        black_box(sums);
        2 * 32 * CHAINS * rounds
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn int8_rounds(rounds: usize) -> usize {
        let (unsigned, signed) = (_mm512_set1_epi8(black_box(3)), _mm512_set1_epi8(black_box(-2)));
        let mut sums = [_mm512_setzero_si512(); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, unsigned, signed);
            }
        }
        black_box(sums);
        2 * 64 * CHAINS * rounds
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instruction_that_is_there_has_a_peak() {
        let pool = CpuPool::new(2);
        for multiply in Multiply::ALL {
            let peak = multiply_peak(&pool, multiply);
            let is_there = multiply.run(Isa::current(), 1).is_some();
            assert_eq!(peak.is_some(), is_there, "{}", multiply.name());
            assert!(peak.is_none_or(|peak| peak.is_finite() && peak > 1e6), "{peak:?}");
        }
        assert!(multiply_peak(&pool, Multiply::F32).is_some(), "every processor has it");
    }

    #[test]
    fn operations_are_counted_per_round() {
        for isa in Isa::all_available() {
            for multiply in Multiply::ALL {
                let one = multiply.run(isa, 1);
                assert_eq!(
                    multiply.run(isa, 3),
                    one.map(|one| 3.0 * one),
                    "{} {isa}",
                    multiply.name()
                );
                assert!(one.is_none_or(|one| one > 0.0));
                assert!(multiply == Multiply::F32 || isa == Isa::Avx512 || one.is_none());
            }
        }
    }

    #[test]
    fn small_formats_use_the_integer_instruction() {
        let used = ["f32", "bf16", "int8", "int4"].map(|name| Multiply::for_format(name).name());
        assert_eq!(used, ["f32", "bf16", "int8", "int8"]);
    }
}
