//! How many threads compute, unless the operator says otherwise.

use std::{num::NonZeroUsize, thread};

/// Threads that this process may use: what the scheduler and the control group allow, at least 1.
pub fn available_threads() -> usize {
    thread::available_parallelism().map_or(1, NonZeroUsize::get)
}

/// Threads for each of `workers` processes that share `available` threads of one machine, at least 1.
pub fn threads_per_worker(available: usize, workers: usize) -> usize {
    (available / workers.max(1)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_share_the_threads_and_have_at_least_one() {
        assert_eq!(threads_per_worker(8, 2), 4);
        assert_eq!(threads_per_worker(8, 3), 2);
        assert_eq!(threads_per_worker(2, 4), 1);
        assert_eq!(threads_per_worker(2, 0), 2);
        assert!(available_threads() >= 1);
    }
}
