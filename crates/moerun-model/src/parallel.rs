//! How rows are shared out among the threads of the pool.

use moerun_kernels::CpuPool;

/// Elements of a row-wise operation that are worth a task of their own.
const ELEMENTS_PER_TASK: usize = 16 * 1024;

/// Rows of one task, of `rows` rows of `width` elements: few enough for all threads, none needlessly few; at least 1.
pub(crate) fn rows_per_task(pool: &CpuPool, rows: usize, width: usize) -> usize {
    (ELEMENTS_PER_TASK / width.max(1))
        .max(rows.div_ceil(4 * pool.threads()))
        .max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_rows_are_shared_by_all_threads_and_few_small_ones_stay_together() {
        let pool = CpuPool::new(2);
        for rows in [0, 1, 2, 7, 64, 1000] {
            for width in [0, 1, 100, 16 * 1024, 100_000] {
                let each = rows_per_task(&pool, rows, width);
                let tasks = rows.div_ceil(each);
                assert!(tasks <= 8, "{tasks} tasks for {rows} rows of {width}");
                assert!(
                    each == 1 || each * width <= ELEMENTS_PER_TASK || tasks >= 4.min(rows),
                    "{rows} of {width}"
                );
            }
        }
        assert_eq!(rows_per_task(&pool, 16, 1000), 16);
        assert_eq!(rows_per_task(&pool, 800, 1000), 100);
    }
}
