//! Work on disjoint pieces of arrays, on all threads of the pool.

use std::{ops::Range, sync::Mutex};

use moerun_kernels::CpuPool;

/// Elements of a row-wise operation that are worth a task of their own.
const ELEMENTS_PER_TASK: usize = 16 * 1024;

/// Calls `task` once with each of `items`; returns when all are done. Also a single item goes through the pool, so that
/// every call computes under the pool's floating-point mode.
pub(crate) fn for_each<T: Send>(pool: &CpuPool, items: Vec<T>, task: impl Fn(T) + Sync) {
    // A task takes its item out of its own slot, so no lock is ever contended.
    let slots: Vec<Mutex<Option<T>>> = items.into_iter().map(|item| Mutex::new(Some(item))).collect();
    pool.run(slots.len(), &|index| {
        let item = slots[index].lock().expect("a slot is locked once").take();
        task(item.expect("a task runs once"));
    });
}

/// Cuts `rows` rows of `width` elements into runs, enough for all threads but none needlessly small.
pub(crate) fn row_runs(pool: &CpuPool, rows: usize, width: usize) -> Vec<Range<usize>> {
    let rows_per_task = (ELEMENTS_PER_TASK / width.max(1))
        .max(rows.div_ceil(4 * pool.threads()))
        .max(1);
    (0..rows)
        .step_by(rows_per_task)
        .map(|first| first..(first + rows_per_task).min(rows))
        .collect()
}

/// Splits a row-major `[rows, width]` buffer at the borders of `runs`, which tile its rows.
pub(crate) fn split_rows<'a>(mut data: &'a mut [f32], width: usize, runs: &[Range<usize>]) -> Vec<&'a mut [f32]> {
    let mut parts = Vec::with_capacity(runs.len());
    for run in runs {
        let (part, rest) = data.split_at_mut(run.len() * width);
        parts.push(part);
        data = rest;
    }
    parts
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn runs_tile_all_rows_whatever_their_number_and_width() {
        let pool = CpuPool::new(2);
        for rows in [0, 1, 2, 7, 64, 1000] {
            for width in [0, 1, 100, 16 * 1024, 100_000] {
                let runs = row_runs(&pool, rows, width);
                let tiled: Vec<usize> = runs.iter().cloned().flatten().collect();
                assert_eq!(tiled, (0..rows).collect::<Vec<_>>(), "{rows} rows of {width}");
                assert!(runs.iter().all(|run| !run.is_empty()), "{rows} rows of {width}");
            }
        }
    }

    #[test]
    fn parts_are_cut_where_the_runs_end() {
        let mut data: Vec<f32> = (0..12u8).map(f32::from).collect();
        let parts = split_rows(&mut data, 3, &[0..1, 1..4]);
        assert_eq!(parts[0], [0.0, 1.0, 2.0]);
        assert_eq!(parts[1], [3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0]);
    }

    #[test]
    fn every_item_is_taken_once() {
        let sum = AtomicUsize::new(0);
        for_each(&CpuPool::new(3), (0..100).collect(), |item: usize| {
            sum.fetch_add(item, Ordering::SeqCst);
        });
        assert_eq!(sum.into_inner(), 4950);
    }
}
