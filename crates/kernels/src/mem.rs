//! Memory for weights and scratch: cache-line aligned, on huge pages when it is large.

use std::{
    alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error},
    arch::x86_64::{_MM_HINT_T0, _mm_prefetch},
    fmt,
    marker::PhantomData,
    ops::{Deref, DerefMut},
    ptr::NonNull,
    slice,
    sync::atomic::{AtomicU64, Ordering},
};

/// Alignment of every buffer: a cache line, and a tile row.
pub const ALIGN: usize = 64;

/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;

/// Asks for `x`, to read it soon: what another core has written comes from its caches, and the
/// processor's own prefetching ends with each 4 KiB.
#[inline]
pub(crate) fn prefetch<T>(x: &[T]) {
    for line in x.chunks(LINE / size_of::<T>()) {
        // SAFETY: a hint, of memory that is there.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
}

/// Asks for the line at `p`, which need not be valid memory.
#[inline(always)]
pub(crate) fn ask<const HINT: i32>(p: *const u8) {
    // SAFETY: prefetching reads nothing that the program could see, and never faults.
    unsafe { _mm_prefetch::<HINT>(p.cast()) };
}

/// Asks for a line to write to it soon: a store waits until no other core holds it.
#[inline]
pub(crate) fn prefetch_write<T>(at: *const T) {
    // SAFETY: a hint, which processors without it pass over; it faults nowhere and writes
    // nothing.
    unsafe {
        std::arch::asm!(
            "prefetchw [{}]",
            in(reg) at,
            options(nostack, preserves_flags, readonly)
        );
    }
}

/// Size of a transparent huge page.
pub(crate) const HUGE: usize = 2 << 20;

/// Zeroed bytes aligned to [`ALIGN`].
///
/// From 2 MiB on the memory comes straight from the kernel, aligned to and advised for huge
/// pages, and untouched: the thread that writes a page first decides its NUMA node.
pub struct AlignedBuf {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: owns its memory like a Vec<u8>.
unsafe impl Send for AlignedBuf {}
// SAFETY: as above; shared access is read-only.
unsafe impl Sync for AlignedBuf {}

/// What this process has asked [`AlignedBuf`] for.
static BUFFERS: AtomicU64 = AtomicU64::new(0);
static BYTES: AtomicU64 = AtomicU64::new(0);

/// All buffers that a process has made so far, those that are gone included.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Allocated {
    /// How many.
    pub buffers: u64,
    /// Their lengths added up.
    pub bytes: u64,
}

/// What this process has allocated as [`AlignedBuf`]: weights, caches, activations, scratch.
pub fn allocated() -> Allocated {
    Allocated {
        buffers: BUFFERS.load(Ordering::Relaxed),
        bytes: BYTES.load(Ordering::Relaxed),
    }
}

impl AlignedBuf {
    /// `len` zero bytes.
    ///
    /// Ends the process when memory is exhausted, as all allocation in Rust does.
    pub fn zeroed(len: usize) -> AlignedBuf {
        BUFFERS.fetch_add(1, Ordering::Relaxed);
        BYTES.fetch_add(len as u64, Ordering::Relaxed);
        let ptr = if len == 0 {
            NonNull::without_provenance(const { std::num::NonZero::new(ALIGN).unwrap() })
        } else if len < HUGE {
            let layout = Self::small(len);
            // SAFETY: the layout's size is not zero.
            let ptr = unsafe { alloc_zeroed(layout) };
            NonNull::new(ptr).unwrap_or_else(|| handle_alloc_error(layout))
        } else {
            map(len).unwrap_or_else(|| handle_alloc_error(Self::small(len)))
        };
        AlignedBuf { ptr, len }
    }

    /// The same on pages of the usual size, to see what huge ones are worth.
    pub fn zeroed_on_small_pages(len: usize) -> AlignedBuf {
        let buf = AlignedBuf::zeroed(len);
        if len >= HUGE {
            // SAFETY: advice on a mapping of our own that nobody has touched.
            unsafe { libc::madvise(buf.ptr.as_ptr().cast(), len, libc::MADV_NOHUGEPAGE) };
        }
        buf
    }

    fn small(len: usize) -> Layout {
        Layout::from_size_align(len, ALIGN).expect("lengths stay far below isize::MAX")
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        if self.len >= HUGE {
            // SAFETY: `map` reserved exactly this range.
            unsafe { libc::munmap(self.ptr.as_ptr().cast(), self.len.next_multiple_of(HUGE)) };
        } else if self.len != 0 {
            // SAFETY: allocated in `zeroed` with this layout.
            unsafe { dealloc(self.ptr.as_ptr(), Self::small(self.len)) };
        }
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len` initialised bytes that we own.
        unsafe { slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.len)
    }
}

/// Plain numbers: any bits are a value.
pub trait Number: Copy + sealed::Sealed {}

mod sealed {
    pub trait Sealed {}
}

macro_rules! numbers {
    ($($ty:ty),*) => { $(impl sealed::Sealed for $ty {} impl Number for $ty {})* };
}
numbers!(i8, u8, u16, u32, i32, f32);

/// Scratch for numbers that starts at a cache line: rows of 64 bytes never straddle two.
#[derive(Debug)]
pub struct AlignedVec<T> {
    buf: AlignedBuf,
    numbers: PhantomData<T>,
}

impl<T> Default for AlignedVec<T> {
    fn default() -> Self {
        AlignedVec {
            buf: AlignedBuf::zeroed(0),
            numbers: PhantomData,
        }
    }
}

/// From how many bytes on scratch fills whole huge pages: what kernels pass over again and again
/// would otherwise take more pages than the first-level TLB has entries.
const SCRATCH: usize = 256 << 10;

impl<T: Number> AlignedVec<T> {
    /// Makes it at least `len` long; when it grows the contents are lost.
    pub fn fit(&mut self, len: usize) {
        if self.len() < len {
            let bytes = len * size_of::<T>();
            let bytes = if bytes < SCRATCH {
                bytes
            } else {
                bytes.next_multiple_of(HUGE)
            };
            self.buf = AlignedBuf::zeroed(0);
            self.buf = AlignedBuf::zeroed(bytes);
        }
    }
}

/// [`Vec::resize`] with zeros, which puts what is added on huge pages where it is large.
pub fn resize(v: &mut Vec<f32>, len: usize) {
    if v.capacity() < len && len * size_of::<f32>() >= HUGE {
        let mut larger: Vec<f32> = Vec::with_capacity(len);
        let start = larger.as_mut_ptr().cast::<u8>();
        let before = start.addr().next_multiple_of(HUGE) - start.addr();
        let whole = (larger.capacity() * size_of::<f32>()).saturating_sub(before) / HUGE * HUGE;
        if whole != 0 {
            // SAFETY: advice on whole pages inside an allocation of our own.
            unsafe { libc::madvise(start.add(before).cast(), whole, libc::MADV_HUGEPAGE) };
        }
        larger.extend_from_slice(v);
        *v = larger;
    }
    v.resize(len, 0.0);
}

impl<T: Number> Deref for AlignedVec<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: aligned to a cache line, whole numbers of which any bits are one.
        unsafe { slice::from_raw_parts(self.buf.as_ptr().cast(), self.buf.len() / size_of::<T>()) }
    }
}

impl<T: Number> DerefMut for AlignedVec<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        let len = self.buf.len() / size_of::<T>();
        // SAFETY: as above, and borrowed mutably.
        unsafe { slice::from_raw_parts_mut(self.buf.as_mut_ptr().cast(), len) }
    }
}

/// Maps whole huge pages at a huge-page boundary.
fn map(len: usize) -> Option<NonNull<u8>> {
    let size = len.checked_next_multiple_of(HUGE)?;
    let reserved = size.checked_add(HUGE)?;
    // SAFETY: a fresh anonymous mapping; the parts cut off below are inside it and unused.
    unsafe {
        let base = libc::mmap(
            std::ptr::null_mut(),
            reserved,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        );
        if base == libc::MAP_FAILED {
            return None;
        }
        let base = base.cast::<u8>();
        let before = base.addr().next_multiple_of(HUGE) - base.addr();
        let start = base.add(before);
        if before != 0 {
            libc::munmap(base.cast(), before);
        }
        if before != HUGE {
            libc::munmap(start.add(size).cast(), HUGE - before);
        }
        // Advice only: without huge pages everything works, a little slower.
        libc::madvise(start.cast(), size, libc::MADV_HUGEPAGE);
        NonNull::new(start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_grow_and_stay() {
        let mut v = AlignedVec::<f32>::default();
        assert!(v.is_empty());
        v.fit(100);
        v[99] = 1.0;
        v.fit(10);
        assert_eq!((v.len(), v[99]), (100, 1.0));
        v.fit(101);
        assert_eq!((v.len(), v[99]), (101, 0.0));
        assert_eq!(v.as_ptr().addr() % ALIGN, 0);
    }

    #[test]
    fn resizing_keeps_what_there_is_and_adds_zeros() {
        let mut v = vec![1.0; 3];
        for len in [5, HUGE / 4 - 1, HUGE, HUGE * 3 / 2, 7] {
            let before = v.len();
            resize(&mut v, len);
            assert_eq!(v.len(), len);
            assert_eq!(v[..3], [1.0; 3]);
            assert!(v[before.min(len)..].iter().all(|&x| x == 0.0));
        }
    }

    #[test]
    fn large_scratch_fills_its_huge_pages() {
        let mut v = AlignedVec::<f32>::default();
        v.fit(SCRATCH / 4 - 1);
        assert_eq!(v.len(), SCRATCH / 4 - 1);
        v.fit(SCRATCH / 4);
        assert_eq!((v.len(), v.as_ptr().addr() % HUGE), (HUGE / 4, 0));
    }

    #[test]
    fn buffers_are_zero_aligned_and_writable() {
        for len in [0, 1, 63, 64, 4096, HUGE - 1, HUGE, HUGE + 1, 3 * HUGE + 77] {
            let mut buf = AlignedBuf::zeroed(len);
            assert_eq!(buf.len(), len);
            assert_eq!(buf.as_ptr().addr() % ALIGN, 0);
            if len >= HUGE {
                assert_eq!(buf.as_ptr().addr() % HUGE, 0);
            }
            assert!(buf.iter().all(|&b| b == 0));
            if let Some(last) = buf.last_mut() {
                *last = 9;
                assert_eq!(buf[len - 1], 9);
            }
        }
    }
}
