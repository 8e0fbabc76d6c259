//! Writing one slice from several threads, each its own part.

use crate::mem::{LINE, prefetch_write};
use std::{marker::PhantomData, ops::Range};

/// A mutable slice that several threads write, each element one thread.
pub(crate) struct DisjointMut<'a, T> {
    ptr: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: handing out parts is unsafe and asks for disjointness; then it is a split borrow.
unsafe impl<T: Send> Send for DisjointMut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for DisjointMut<'_, T> {}

impl<'a, T> DisjointMut<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        DisjointMut {
            ptr: slice.as_mut_ptr(),
            len: slice.len(),
            slice: PhantomData,
        }
    }

    /// Asks for the part `range`, as far as there is one, to write to it soon.
    pub(crate) fn prefetch(&self, range: Range<usize>) {
        let (start, end) = (range.start.min(self.len), range.end.min(self.len));
        for at in (start..end).step_by((LINE / size_of::<T>()).max(1)) {
            prefetch_write(self.ptr.wrapping_add(at));
        }
    }

    /// The part `range`.
    ///
    /// # Safety
    /// No two parts that live at the same time overlap.
    ///
    /// # Panics
    /// When the range is outside the slice.
    // Handing out several parts from a shared reference is this type's purpose.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn slice(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: inside the slice; the caller excludes overlap.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(range.start), range.len()) }
    }
}
