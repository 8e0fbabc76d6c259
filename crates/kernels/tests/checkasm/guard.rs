//! Buffers between inaccessible pages: a kernel that reads or writes outside dies at once.

use libtest_mimic::Failed;
use std::{
    ops::{Deref, DerefMut},
    ptr, slice,
};
use tegula_gguf::GgmlType;
use tegula_kernels::{
    Forms,
    acts::{ActsView, SLACK},
    check::Mismatch,
    strip::{self, ROWS, kernels::StripArgs},
};

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

/// Activations whose arrays end (or begin) at guard pages.
struct GuardedActs {
    q: Guarded<i8>,
    d: Guarded<f32>,
    nsum32: Guarded<i32>,
    nsum16: Guarded<i32>,
    fsum32: Guarded<f32>,
    fsum16: Guarded<f32>,
    floats: Guarded<f32>,
    pairs: Guarded<u32>,
    tiles: Guarded<u16>,
}

impl GuardedActs {
    fn new(view: &ActsView<'_>, end: bool) -> GuardedActs {
        /// A guarded copy of a form's array, or nothing where the form is absent.
        fn copy<T: Copy>(has: bool, from: *const T, len: usize, end: bool) -> Guarded<T> {
            let values = match has {
                // SAFETY: arrays of a form that is present have the lengths below.
                true => unsafe { slice::from_raw_parts(from, len) },
                false => &[],
            };
            Guarded::new(values, end)
        }
        let len = view.m * view.k;
        let q8 = view.forms.has(Forms::Q8);
        let pairs = view.m * view.k.div_ceil(2);
        GuardedActs {
            q: copy(q8, view.q, len, end),
            d: copy(q8, view.d, len / 32 + SLACK, end),
            nsum32: copy(q8, view.nsum32, len / 32, end),
            nsum16: copy(q8, view.nsum16, len / 16, end),
            fsum32: copy(q8, view.fsum32, len / 32 + SLACK, end),
            fsum16: copy(q8, view.fsum16, len / 16 + SLACK, end),
            floats: copy(view.forms.has(Forms::F32), view.floats, len, end),
            pairs: copy(view.forms.has(Forms::BF16), view.pairs, pairs, end),
            tiles: copy(view.forms.has(Forms::TILES), view.tiles, len, end),
        }
    }

    fn view<'a>(&'a self, of: &ActsView<'a>) -> ActsView<'a> {
        let mut view = *of;
        view.q = self.q.as_ptr();
        view.d = self.d.as_ptr();
        view.nsum32 = self.nsum32.as_ptr();
        view.nsum16 = self.nsum16.as_ptr();
        view.fsum32 = self.fsum32.as_ptr();
        view.fsum16 = self.fsum16.as_ptr();
        view.floats = self.floats.as_ptr();
        view.pairs = self.pairs.as_ptr();
        view.tiles = self.tiles.as_ptr();
        view
    }
}

/// Runs a strip kernel on guarded copies of everything: strips of the raw rows in `bytes`,
/// activations, the tile, and a panel of `panel` bytes.
pub fn with_guards(
    (ty, k): (GgmlType, usize),
    bytes: &[u8],
    acts: &ActsView<'_>,
    panel: usize,
    end: bool,
    kernel: impl Fn(&StripArgs<'_>) -> Result<(), Mismatch>,
) -> Result<(), Failed> {
    let layout = strip::layout(ty).unwrap();
    let row_bytes = ty.bytes_for(k as u64).unwrap() as usize;
    let rows: Vec<&[u8]> = bytes.chunks_exact(row_bytes).collect();
    let strips: Vec<Vec<u8>> = rows
        .chunks(ROWS)
        .map(|rows| {
            let mut packed = vec![0; layout.strip_bytes(k)];
            strip::pack_strip(layout, k, rows, &mut packed);
            packed
        })
        .collect();
    with_guarded_strips((ty, k), &strips, acts, panel, end, kernel)
}

/// The same on strips as they are.
pub fn with_guarded_strips(
    (ty, k): (GgmlType, usize),
    strips: &[Vec<u8>],
    acts: &ActsView<'_>,
    panel: usize,
    end: bool,
    kernel: impl Fn(&StripArgs<'_>) -> Result<(), Mismatch>,
) -> Result<(), Failed> {
    let guarded: Vec<_> = strips.iter().map(|s| Guarded::new(s, end)).collect();
    let strips: Vec<_> = guarded.iter().map(|s| s.as_ptr()).collect();
    let bytes: Vec<_> = guarded.iter().map(|s| s.len()).collect();
    let guarded_acts = GuardedActs::new(acts, end);
    let mut tile = Guarded::at_end(&vec![f32::NAN; strips.len() * acts.m * ROWS]);
    let mut panel = Guarded::at_end(&vec![0xaa_u8; panel]);
    assert_eq!(panel.as_ptr().addr() % 64, 0);
    Ok(kernel(&StripArgs {
        ty,
        k,
        strips: &strips,
        bytes: &bytes,
        next: &strips,
        asked: 0,
        acts: guarded_acts.view(acts),
        tile: tile.as_mut_ptr(),
        panel: panel.as_mut_ptr(),
    })?)
}
