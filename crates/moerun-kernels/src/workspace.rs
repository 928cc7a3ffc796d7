//! Memory for the length of one call, lent by the pool and used again by the next call.

use std::{
    fmt,
    ops::DerefMut,
    sync::{Mutex, PoisonError},
};

use bumpalo::Bump;
use ndarray::ArrayViewMut2;

use crate::CpuPool;

/// A pool's threads and memory for one call: everything taken from it is given back together, when it is dropped.
///
/// The pool keeps as many as were in use at one time, each as large as its largest use so far, so that a call which is
/// like one before asks the system for no memory.
pub struct Workspace<'p> {
    pool: &'p CpuPool,
    memory: Bump,
}

/// Where workspaces are between two calls.
#[derive(Default)]
pub(crate) struct IdleMemory(Mutex<Vec<Bump>>);

impl CpuPool {
    /// Memory for one call.
    pub fn workspace(&self) -> Workspace<'_> {
        let mut idle = self.idle_memory.lock();
        Workspace {
            pool: self,
            memory: idle.pop().unwrap_or_default(),
        }
    }
}

impl Workspace<'_> {
    /// The pool that it is of.
    pub fn pool(&self) -> &CpuPool {
        self.pool
    }

    /// `len` times `value`.
    #[allow(clippy::mut_from_ref)] // each call gives other memory
    pub fn filled<T: Copy>(&self, len: usize, value: T) -> &mut [T] {
        self.memory.alloc_slice_fill_copy(len, value)
    }

    /// `[rows, cols]` zeroes.
    pub fn matrix(&self, rows: usize, cols: usize) -> ArrayViewMut2<'_, f32> {
        let data = self.filled(rows * cols, 0.0);
        ArrayViewMut2::from_shape((rows, cols), data).expect("rows * cols elements were taken")
    }

    /// All of `items`, in order. They are not dropped: only types for which that means nothing can be held.
    #[allow(clippy::mut_from_ref)] // each call gives other memory
    pub fn collect<T>(&self, items: impl IntoIterator<Item = T>) -> &mut [T] {
        const { assert!(!std::mem::needs_drop::<T>(), "nothing drops what a workspace holds") };
        let mut collected = bumpalo::collections::Vec::new_in(&self.memory);
        collected.extend(items);
        collected.into_bump_slice_mut()
    }

    /// Like [`Workspace::collect`], up to the first error.
    #[allow(clippy::mut_from_ref)] // each call gives other memory
    pub fn try_collect<T, E>(&self, items: impl IntoIterator<Item = Result<T, E>>) -> Result<&mut [T], E> {
        let mut error = None;
        let items = items
            .into_iter()
            .map_while(|item| item.map_err(|found| error = Some(found)).ok());
        let collected = self.collect(items);
        match error {
            Some(error) => Err(error),
            None => Ok(collected),
        }
    }
}

impl Drop for Workspace<'_> {
    fn drop(&mut self) {
        let mut memory = std::mem::take(&mut self.memory);
        // Keeps its largest piece, which after a few calls holds all that one of them takes.
        memory.reset();
        self.pool.idle_memory.lock().push(memory);
    }
}

impl fmt::Debug for Workspace<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Workspace")
            .field("bytes", &self.memory.allocated_bytes())
            .finish_non_exhaustive()
    }
}

impl IdleMemory {
    fn lock(&self) -> impl DerefMut<Target = Vec<Bump>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_call_like_the_first_finds_the_memory_of_the_first() {
        let pool = CpuPool::new(1);
        let call = || {
            let workspace = pool.workspace();
            let ones = workspace.filled(10_000, 1_u32);
            let squares = workspace.collect((0..3000_u64).map(|index| index * index));
            assert!(ones.iter().all(|&one| one == 1) && squares[2999] == 2999 * 2999);
            assert!(workspace.matrix(70, 30).iter().all(|&value| value == 0.0));
            workspace.memory.allocated_bytes()
        };
        for _ in 0..3 {
            call();
        }
        let settled = call();
        assert_eq!(call(), settled);
        assert_eq!(pool.idle_memory.lock().len(), 1);
    }

    #[test]
    fn calls_inside_one_another_have_memory_of_their_own() {
        let pool = CpuPool::new(2);
        let outer = pool.workspace();
        let kept = outer.filled(100, 7_u8);
        pool.run(8, &|_| {
            let inner = pool.workspace();
            assert!(inner.filled(100, 9_u8).iter().all(|&value| value == 9));
        });
        assert!(kept.iter().all(|&value| value == 7));
        drop(outer);
        assert!((2..=3).contains(&pool.idle_memory.lock().len()));
    }

    #[test]
    fn collecting_ends_at_the_first_error() {
        let pool = CpuPool::new(1);
        let workspace = pool.workspace();
        let up_to = |limit: u32| workspace.try_collect((0..5).map(|n| if n < limit { Ok(n) } else { Err(n) }));
        assert_eq!(up_to(5), Ok(&mut [0, 1, 2, 3, 4][..]));
        assert_eq!(up_to(3), Err(3));
    }
}
