//! One array written by several threads, each its own parts.

use std::{marker::PhantomData, ops::Range};

/// A mutable slice whose parts are handed out to tasks that promise to keep apart.
#[derive(Debug)]
pub(crate) struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    lifetime: PhantomData<&'a mut [T]>,
}

// SAFETY: it is a `&mut [T]` that is cut up; `part`'s caller keeps the parts apart.
unsafe impl<T: Send> Send for Disjoint<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self {
            start: slice.as_mut_ptr(),
            len: slice.len(),
            lifetime: PhantomData,
        }
    }

    /// The elements `range`; panics if it is out of bounds.
    ///
    /// # Safety
    /// No other part that is alive at the same time may overlap `range`.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)] // the caller keeps the parts apart
    pub(crate) unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "part {range:?} of {} elements",
            self.len
        );
        // SAFETY: in bounds of the slice borrowed for `'a`; not aliased, as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}
