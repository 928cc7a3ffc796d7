//! Which instruction set the kernels use, chosen once per process.

use std::sync::OnceLock;

use moerun_types::NumberFormat;

#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512};
use crate::simd::{Portable, Simd};

/// Environment variable that forces a variant.
const VARIABLE: &str = "MOERUN_ISA";

/// Variants of every kernel; all give the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Isa {
    /// No instruction beyond the target's baseline.
    Portable,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, VL, DQ, BF16 and VNNI (AMD since Zen 4, Intel since Sapphire Rapids).
    Avx512,
}

/// `MOERUN_ISA` asks for something that cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IsaError {
    /// Not the name of a variant.
    #[error("MOERUN_ISA is {found:?}: wanted portable, avx2 or avx512")]
    Unknown {
        /// The variable's value.
        found: String,
    },
    /// A variant that this processor cannot run.
    #[error("MOERUN_ISA asks for {wanted}, which this processor cannot run: the best it has is {best}")]
    Unavailable {
        /// The variant asked for.
        wanted: Isa,
        /// The best one here.
        best: Isa,
    },
}

impl Isa {
    /// The best variant of this machine, or the one that `MOERUN_ISA=portable|avx2|avx512` asks for. Detected once.
    ///
    /// # Panics
    /// With the message of [`IsaError`], if the variable asks for what cannot be had: call [`Isa::from_env`] first.
    pub fn current() -> Isa {
        static CURRENT: OnceLock<Isa> = OnceLock::new();
        *CURRENT.get_or_init(|| Isa::from_env().unwrap_or_else(|error| panic!("{error}")))
    }

    /// What [`Isa::current`] will be, or why `MOERUN_ISA` cannot be followed. An empty variable counts as unset.
    pub fn from_env() -> Result<Isa, IsaError> {
        match std::env::var_os(VARIABLE) {
            None => Ok(Isa::best()),
            Some(word) => Isa::asked_for(&word.to_string_lossy()),
        }
    }

    fn asked_for(word: &str) -> Result<Isa, IsaError> {
        let wanted = match word {
            "" => return Ok(Isa::best()),
            "portable" => Isa::Portable,
            "avx2" => Isa::Avx2,
            "avx512" => Isa::Avx512,
            other => {
                return Err(IsaError::Unknown {
                    found: other.to_owned(),
                });
            }
        };
        if wanted.is_available() {
            Ok(wanted)
        } else {
            Err(IsaError::Unavailable {
                wanted,
                best: Isa::best(),
            })
        }
    }

    fn best() -> Isa {
        [Isa::Avx512, Isa::Avx2]
            .into_iter()
            .find(|isa| isa.is_available())
            .unwrap_or(Isa::Portable)
    }

    /// Whether this processor can run the variant.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512bf16")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::Avx512 => false,
        }
    }

    /// The variants that can be compared on this machine.
    #[cfg(test)]
    pub(crate) fn all_available() -> Vec<Isa> {
        [Isa::Portable, Isa::Avx2, Isa::Avx512]
            .into_iter()
            .filter(|isa| isa.is_available())
            .collect()
    }

    /// Rows of a product with weights of `format` that are computed together, largest first, down to one: as many as
    /// the registers hold.
    pub(crate) fn tile_rows(self, format: NumberFormat) -> &'static [usize] {
        fn of<S: Simd>(format: NumberFormat) -> &'static [usize] {
            if format.is_quantized() {
                S::BLOCK_TILE_ROWS
            } else {
                S::TILE_ROWS
            }
        }
        match self {
            Isa::Portable => of::<Portable>(format),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => of::<Avx2>(format),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => of::<Avx512>(format),
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::Avx512 => of::<Portable>(format),
        }
    }

    /// [`Simd::I8_BIAS`] of this variant.
    pub(crate) fn i8_bias(self) -> i32 {
        match self {
            Isa::Portable => Portable::I8_BIAS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Avx2::I8_BIAS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Avx512::I8_BIAS,
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::Avx512 => Portable::I8_BIAS,
        }
    }

    /// Runs `kernel` in the code compiled for this variant: one branch per call.
    ///
    /// # Panics
    /// If this processor cannot run the variant.
    pub(crate) fn dispatch<K: Kernel>(self, kernel: K) -> K::Output {
        assert!(self.is_available(), "{self} kernels cannot run on this processor");
        match self {
            Isa::Portable => run_portable(kernel),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the features were just seen to be available.
            Isa::Avx2 => unsafe { run_avx2(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the features were just seen to be available.
            Isa::Avx512 => unsafe { run_avx512(kernel) },
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::Avx512 => unreachable!("asserted to be available"),
        }
    }
}

impl std::fmt::Display for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
        })
    }
}

/// Arithmetic that is compiled once per instruction set. `run` and all it calls in a loop are `#[inline(always)]`, so
/// that they take on the features of the function they are inlined into.
pub(crate) trait Kernel {
    /// What it computes.
    type Output;

    /// Computes it with the lanes of one instruction set.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

#[inline(never)]
pub(crate) fn run_portable<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Portable)
}

#[cfg(target_arch = "x86_64")]
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: this function can run only where these features exist.
    kernel.run(unsafe { Avx2::assume_available() })
}

#[cfg(target_arch = "x86_64")]
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx2,fma,f16c")]
pub(crate) fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: this function can run only where these features exist.
    kernel.run(unsafe { Avx512::assume_available() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn portable_can_always_be_asked_for() {
        assert_eq!(Isa::asked_for("portable"), Ok(Isa::Portable));
        assert_eq!(Isa::asked_for(""), Ok(Isa::best()));
    }

    #[test]
    fn an_unknown_word_is_refused_by_name() {
        let error = Isa::asked_for("sse9").expect_err("no such variant");
        assert_eq!(
            error.to_string(),
            "MOERUN_ISA is \"sse9\": wanted portable, avx2 or avx512"
        );
    }

    #[test]
    fn a_variant_is_given_exactly_when_the_processor_has_it() {
        for (word, isa) in [("avx2", Isa::Avx2), ("avx512", Isa::Avx512)] {
            let wanted = if isa.is_available() {
                Ok(isa)
            } else {
                Err(IsaError::Unavailable {
                    wanted: isa,
                    best: Isa::best(),
                })
            };
            assert_eq!(Isa::asked_for(word), wanted);
        }
    }
}
