//! Denormals are zero on every computing thread: they cost a hundred cycles each and carry nothing.

#[cfg(target_arch = "x86_64")]
mod control {
    use core::arch::asm;

    /// Flush results to zero (bit 15), take denormal inputs as zero (bit 6).
    pub(super) const FLUSH: u32 = 1 << 15 | 1 << 6;

    pub(super) fn read() -> u32 {
        let mut control = 0_u32;
        // SAFETY: writes MXCSR into the four bytes pointed to.
        unsafe { asm!("stmxcsr [{}]", in(reg) &mut control, options(nostack, preserves_flags)) };
        control
    }

    pub(super) fn write(control: u32) {
        // SAFETY: only values read from MXCSR, with the two flush bits changed, are written, so no reserved bit is
        // set, no exception unmasked and the rounding mode kept.
        unsafe { asm!("ldmxcsr [{}]", in(reg) &control, options(nostack, preserves_flags)) };
    }
}

/// Makes the calling thread treat denormals as zero (FTZ and DAZ), as every computing thread of Moerun does.
pub fn flush_denormals() {
    std::mem::forget(FlushDenormals::enter());
}

/// The calling thread flushes denormals until this is dropped; then it does what it did before.
#[derive(Debug)]
pub(crate) struct FlushDenormals {
    #[cfg(target_arch = "x86_64")]
    before: u32,
    // The register belongs to the thread.
    _not_send: std::marker::PhantomData<*const ()>,
}

impl FlushDenormals {
    pub(crate) fn enter() -> Self {
        #[cfg(target_arch = "x86_64")]
        let before = control::read();
        #[cfg(target_arch = "x86_64")]
        if before & control::FLUSH != control::FLUSH {
            control::write(before | control::FLUSH);
        }
        Self {
            #[cfg(target_arch = "x86_64")]
            before,
            _not_send: std::marker::PhantomData,
        }
    }
}

impl Drop for FlushDenormals {
    fn drop(&mut self) {
        #[cfg(target_arch = "x86_64")]
        if self.before & control::FLUSH != control::FLUSH {
            control::write(self.before);
        }
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
pub(crate) mod tests {
    use std::hint::black_box;

    use super::*;

    /// Whether this thread makes a denormal result zero and takes a denormal input as zero.
    pub(crate) fn flushes() -> bool {
        let result = black_box(f32::MIN_POSITIVE) * black_box(0.5);
        let input = black_box(f32::from_bits(1)) * black_box(1e30);
        result.to_bits() == 0 && input.to_bits() == 0
    }

    #[test]
    fn denormals_are_flushed_inside_the_guard_and_not_after() {
        let thread = std::thread::spawn(|| {
            assert!(!flushes());
            {
                let _outer = FlushDenormals::enter();
                assert!(flushes());
                drop(FlushDenormals::enter());
                assert!(flushes(), "an inner guard must not end the outer one");
            }
            assert!(!flushes());
            flush_denormals();
            assert!(flushes());
        });
        thread.join().expect("the assertions hold");
    }
}
