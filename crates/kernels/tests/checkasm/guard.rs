//! Buffers between inaccessible pages: a kernel that reads or writes outside dies at once.

use std::{ops::Deref, ops::DerefMut, ptr, slice};

const PAGE: usize = 4096;

/// `len` values whose end (or start) touches a guard page.
pub struct Guarded<T> {
    base: *mut u8,
    mapped: usize,
    data: *mut T,
    len: usize,
}

impl<T: Copy> Guarded<T> {
    /// A copy of `values` that ends exactly at a guard page.
    pub fn at_end(values: &[T]) -> Guarded<T> {
        Guarded::new(values, true)
    }

    /// A copy of `values` that begins exactly behind a guard page.
    pub fn at_start(values: &[T]) -> Guarded<T> {
        Guarded::new(values, false)
    }

    fn new(values: &[T], end: bool) -> Guarded<T> {
        let bytes = size_of_val(values);
        let inner = bytes.next_multiple_of(PAGE);
        let mapped = inner + 2 * PAGE;
        // SAFETY: a fresh mapping, of which only the inner part is touched; T is Copy data
        // and the mapping is at least as aligned as any T at either edge, whose size is a
        // multiple of its alignment.
        unsafe {
            let base = libc::mmap(
                ptr::null_mut(),
                mapped,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
            .cast::<u8>();
            assert!(base.cast() != libc::MAP_FAILED);
            if inner != 0 {
                let open = libc::PROT_READ | libc::PROT_WRITE;
                assert_eq!(libc::mprotect(base.add(PAGE).cast(), inner, open), 0);
            }
            let offset = if end { inner - bytes } else { 0 };
            let data = base.add(PAGE + offset).cast::<T>();
            ptr::copy_nonoverlapping(values.as_ptr(), data, values.len());
            Guarded {
                base,
                mapped,
                data,
                len: values.len(),
            }
        }
    }
}

impl<T> Drop for Guarded<T> {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this size.
        unsafe { libc::munmap(self.base.cast(), self.mapped) };
    }
}

impl<T> Deref for Guarded<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `len` values written in `new`.
        unsafe { slice::from_raw_parts(self.data, self.len) }
    }
}

impl<T> DerefMut for Guarded<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, borrowed mutably.
        unsafe { slice::from_raw_parts_mut(self.data, self.len) }
    }
}
