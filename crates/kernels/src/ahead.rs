//! What threads ask memory for before they have a task.
//!
//! Between two products of one token nobody reads weights: the last threads finish, the caller
//! normalises, chooses experts, or starts the next job. A mixture of experts loses a tenth of its
//! time so (`docs/bench/2026-11-28-h200-e`). Whoever waits meanwhile asks for the beginning of
//! what it will read next, for its second-level cache.

use std::{
    arch::x86_64::_MM_HINT_T1,
    cell::Cell,
    ptr,
    sync::atomic::{AtomicPtr, AtomicUsize, Ordering},
};

use crate::mem::{self, LINE};

/// Pieces of memory that a thread can be told of.
pub const PIECES: usize = 8;

/// Lines of a piece that are asked for before the next piece's.
const LINES: usize = 2;

/// What a thread's first task of the next job will read: pieces up to the first without bytes.
///
/// A thread may see parts of two tellings, or memory that is gone: it only asks for it, which
/// reads nothing and never faults.
#[derive(Default)]
pub(crate) struct Told([(AtomicPtr<u8>, AtomicUsize); PIECES]);

impl Told {
    pub fn tell<'m>(&self, mut next: impl FnMut() -> Option<&'m [u8]>) {
        for (at, bytes) in &self.0 {
            let piece = next().unwrap_or_default();
            at.store(piece.as_ptr().cast_mut(), Ordering::Relaxed);
            bytes.store(piece.len(), Ordering::Relaxed);
            if piece.is_empty() {
                break;
            }
        }
    }

    /// Asks for all pieces in turns, until `ready`.
    pub fn ask(&self, ready: impl Fn() -> bool) {
        let pieces = self.0.each_ref().map(|(at, bytes)| {
            let at = at.load(Ordering::Relaxed).cast_const();
            (at, bytes.load(Ordering::Relaxed))
        });
        let some = pieces.iter().take_while(|(_, bytes)| *bytes > 0);
        let longest = some.clone().map(|(_, bytes)| *bytes).max().unwrap_or(0);
        for line in (0..longest).step_by(LINES * LINE) {
            for (at, bytes) in some.clone() {
                for line in (line..*bytes).step_by(LINE).take(LINES) {
                    mem::ask::<_MM_HINT_T1>(at.wrapping_add(line));
                }
            }
            let (first, bytes) = pieces[0];
            set_asked(first, bytes.min(line + LINES * LINE));
            if ready() {
                return;
            }
        }
    }
}

thread_local! {
    /// Where what this thread has asked for last begins, and how many bytes of it.
    static ASKED: Cell<(*const u8, usize)> = const { Cell::new((ptr::null(), 0)) };
}

/// Notes that this thread has asked for `bytes` bytes at `at`, and for as many of what is read in turns with
/// that.
pub(crate) fn set_asked(at: *const u8, bytes: usize) {
    ASKED.set((at, bytes));
}

/// How many bytes at `at` this thread has just asked for.
pub(crate) fn asked(at: *const u8) -> usize {
    let (of, bytes) = ASKED.get();
    if of == at { bytes } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn asking_ends_when_there_is_a_task() {
        let told = Told::default();
        told.ask(|| panic!("nothing was told"));
        let memory = [0u8; 1000];
        let pieces = || [&memory[..300], &memory[300..1000]].into_iter();
        let mut left = pieces();
        told.tell(|| left.next());
        told.ask(|| false);
        assert_eq!(asked(memory.as_ptr()), 300);
        assert_eq!(asked(memory[300..].as_ptr()), 0);
        told.ask(|| true);
        assert_eq!(asked(memory.as_ptr()), LINES * LINE);
        // What was told before is forgotten.
        let mut left = pieces().skip(1);
        told.tell(|| left.next());
        let turns = Cell::new(0);
        told.ask(|| {
            turns.set(turns.get() + 1);
            false
        });
        assert_eq!(turns.get(), 700_usize.div_ceil(LINES * LINE));
        assert_eq!(asked(memory[300..].as_ptr()), 700);
    }
}
