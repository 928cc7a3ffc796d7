//! Settings of the system's allocator.

/// Keeps memory that messages have used for the next ones.
///
/// glibc gives blocks of 128 KiB and more back to the system and asks again, and the system zeroes each page on its first
/// touch: milliseconds for a message of 8 MiB. Blocks up to 4 MiB, above any message that streams, now come from the heap,
/// which is cut only when 64 MiB at its end are free; larger ones, weights among them, still come and go by themselves. An
/// operator who sets `GLIBC_TUNABLES` or `MALLOC_…_` has the last word. Call it once, first thing.
pub fn keep_freed_memory() {
    let told = ["GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"];
    if told.iter().all(|variable| std::env::var_os(variable).is_none()) {
        set_thresholds();
    }
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn set_thresholds() {
    use std::ffi::c_int;

    unsafe extern "C" {
        fn mallopt(parameter: c_int, value: c_int) -> c_int;
    }
    const TRIM_THRESHOLD: c_int = -1;
    const MMAP_THRESHOLD: c_int = -3;
    for (parameter, bytes) in [(MMAP_THRESHOLD, 4 << 20), (TRIM_THRESHOLD, 64 << 20)] {
        // SAFETY: a function of glibc that takes two numbers; it locks what it changes. Its refusal changes nothing.
        unsafe { mallopt(parameter, bytes) };
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn set_thresholds() {}
