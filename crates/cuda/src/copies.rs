//! Copies between buffers and memory of the process.
//!
//! All go through pinned memory. Small ones are kernels that read or write it: the engines that
//! copy take longer to begin, and every buffer would be a copy of its own. Large ones are
//! cut up, so that one part crosses the link while threads of the CPU fill or empty another.

use crate::{
    device::CudaDevice,
    driver::{Event, Gpu, Stream},
    launch::{PARTS, Parts, launch},
    modules::Unit,
};
use std::{
    ptr, slice,
    sync::{MutexGuard, PoisonError},
};
use tegula_kernels::device::{Buffer, Result, stream::Feeder};

/// Pinned memory through which all copies go.
const RING: usize = 32 << 20;
/// The largest piece of a copy.
pub(crate) const PIECE: usize = 8 << 20;
/// Bytes up to which a kernel copies.
const SMALL: usize = 64 << 10;
/// Bytes from which threads share the copying here.
const MUCH: usize = 256 << 10;
/// Bytes of a large copy that cross the link together.
const LARGE: usize = 2 << 20;

/// Pinned memory, filled from the front again and again.
pub(crate) struct Ring {
    pub start: *mut u8,
    at: usize,
    /// For the pieces of large copies.
    events: Vec<Event>,
}

// SAFETY: plain memory and handles of the driver, used under a lock.
unsafe impl Send for Ring {}

impl Ring {
    pub fn new(gpu: &Gpu) -> Result<Ring> {
        Ok(Ring {
            start: gpu.pinned(RING)?,
            at: 0,
            events: Vec::new(),
        })
    }

    /// Room for `bytes`, which nothing reads or writes: from the front again after waiting where
    /// there is none behind.
    fn take(&mut self, gpu: &Gpu, bytes: usize) -> Result<*mut u8> {
        assert!(bytes <= RING);
        if self.at + bytes > RING {
            gpu.sync()?;
            self.at = 0;
        }
        // SAFETY: inside the ring.
        let room = unsafe { self.start.add(self.at) };
        self.at += bytes.next_multiple_of(64);
        Ok(room)
    }

    /// Copies bytes here; where a device finds them, since pinned memory has one address for both
    /// sides.
    fn stage(&mut self, gpu: &Gpu, src: &[u8]) -> Result<u64> {
        let room = self.take(gpu, src.len())?;
        // SAFETY: room for as many bytes that nothing else reads or writes.
        unsafe { ptr::copy_nonoverlapping(src.as_ptr(), room, src.len()) };
        Ok(room as u64)
    }
}

/// Bytes that parts take in the ring.
fn together(lengths: impl Iterator<Item = usize>) -> usize {
    lengths.map(|len| len.next_multiple_of(64)).sum()
}

fn is_small(bytes: usize, lengths: impl ExactSizeIterator<Item = usize>) -> bool {
    lengths.len() <= PARTS && bytes <= SMALL && { lengths }.all(|len| len.is_multiple_of(4))
}

impl CudaDevice {
    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes in the ring, for kernels that are issued next.
    pub(crate) fn staged(&self, src: &[u8]) -> Result<u64> {
        // Not in a recording: what the memory here holds is not what it will hold then.
        self.pool.gpu.not_recorded();
        let staged = self.ring().stage(&self.pool.gpu, src)?;
        self.overwritten(staged);
        Ok(staged)
    }

    fn copy_parts(&self, parts: &Parts, count: usize) -> Result<()> {
        let most = parts.words.iter().max().map_or(0, |n| *n as usize);
        let grid = [most.div_ceil(256).clamp(1, 64), count, 1];
        let (unit, name, parts) = (Unit::Rows, c"copy_parts", *parts);
        // Not in a recording: what the memory here holds is not what it will hold then.
        self.pool.gpu.not_recorded();
        launch!(self, unit, name, grid, 256, 0, parts)
    }

    /// Copies to the beginnings of several buffers.
    pub(crate) fn write_starts(&self, parts: &[(&Buffer, &[u8])]) -> Result<()> {
        let bytes = together(parts.iter().map(|p| p.1.len()));
        if !is_small(bytes, parts.iter().map(|p| p.1.len())) {
            let mut parts = parts.iter();
            return parts.try_for_each(|(dst, src)| self.write_at(dst, 0, src));
        }
        let mut ring = self.ring();
        let mut table = Parts::default();
        for (i, (dst, src)) in parts.iter().enumerate() {
            assert!(src.len() <= dst.bytes(), "a copy behind a buffer's end");
            self.overwritten(dst.address());
            table.to[i] = dst.address();
            table.from[i] = ring.stage(&self.pool.gpu, src)?;
            table.words[i] = (src.len() / 4) as i32;
        }
        self.copy_parts(&table, parts.len())
    }

    /// `dst += x`, f32 values as bytes: read from the ring, or by way of a buffer if they are many.
    pub(crate) fn add_by(
        &self,
        dst: &Buffer,
        via: &Buffer,
        x: &[u8],
        feeder: &mut dyn Feeder,
    ) -> Result<()> {
        if x.len() > SMALL {
            self.write_by(via, x, feeder)?;
            return self.add_at(dst, via.address(), x.len() / 4);
        }
        let mut ring = self.ring();
        let staged = ring.stage(&self.pool.gpu, x)?;
        self.pool.gpu.not_recorded();
        self.add_at(dst, staged, x.len() / 4)
    }

    /// Copies to a buffer through the ring.
    pub(crate) fn write_at(&self, dst: &Buffer, at: usize, src: &[u8]) -> Result<()> {
        self.write_pieces(dst, at, src, PIECE, &mut |to, from| {
            to.copy_from_slice(from)
        })
    }

    /// The same to its beginning, where `feeder` fills the ring if it is much.
    pub(crate) fn write_by(&self, dst: &Buffer, src: &[u8], feeder: &mut dyn Feeder) -> Result<()> {
        if src.len() <= SMALL {
            return self.write_starts(&[(dst, src)]);
        }
        if src.len() <= MUCH {
            return self.write_at(dst, 0, src);
        }
        self.write_pieces(dst, 0, src, LARGE, &mut |to, from| feeder.fill(to, &[from]))
    }

    fn write_pieces(
        &self,
        dst: &Buffer,
        at: usize,
        src: &[u8],
        limit: usize,
        fill: &mut dyn FnMut(&mut [u8], &[u8]),
    ) -> Result<()> {
        assert!(
            at + src.len() <= dst.bytes(),
            "a copy behind a buffer's end"
        );
        self.overwritten(dst.address());
        let (mut ring, gpu) = (self.ring(), &self.pool.gpu);
        let mut to = dst.address() + at as u64;
        for piece in src.chunks(limit) {
            let staged = ring.take(gpu, piece.len())?;
            // SAFETY: room for the piece that nothing else reads or writes until the copy from
            // there was waited for.
            unsafe {
                fill(slice::from_raw_parts_mut(staged, piece.len()), piece);
                gpu.copy_in(to, staged, piece.len())?;
            }
            to += piece.len() as u64;
        }
        Ok(())
    }

    /// Waits, then copies from a buffer through the ring.
    pub(crate) fn read_at(&self, src: &Buffer, at: usize, dst: &mut [u8]) -> Result<()> {
        assert!(
            at + dst.len() <= src.bytes(),
            "a copy behind a buffer's end"
        );
        let (mut ring, gpu) = (self.ring(), &self.pool.gpu);
        let mut from = src.address() + at as u64;
        for piece in dst.chunks_mut(PIECE) {
            let staged = ring.take(gpu, piece.len())?;
            // SAFETY: room for the piece, which is read once the copy to there was waited for.
            unsafe {
                gpu.copy_out(staged, from, piece.len())?;
                gpu.sync()?;
                ptr::copy_nonoverlapping(staged, piece.as_mut_ptr(), piece.len());
            }
            // Everything before has been waited for.
            ring.at = 0;
            from += piece.len() as u64;
        }
        Ok(())
    }

    /// Waits once, then copies the beginnings of several buffers.
    pub(crate) fn read_starts(&self, parts: &mut [(&Buffer, &mut [u8])]) -> Result<()> {
        let bytes = together(parts.iter().map(|p| p.1.len()));
        if bytes > PIECE {
            let mut parts = parts.iter_mut();
            return parts.try_for_each(|(from, to)| self.read_at(from, 0, to));
        }
        let (mut ring, gpu) = (self.ring(), &self.pool.gpu);
        let small = is_small(bytes, parts.iter().map(|p| p.1.len()));
        let start = ring.take(gpu, bytes)?;
        let (mut at, mut table) = (0, Parts::default());
        for (i, (from, to)) in parts.iter().enumerate() {
            assert!(to.len() <= from.bytes(), "a copy behind a buffer's end");
            // SAFETY: all fit behind `start`, one behind another.
            let staged = unsafe { start.add(at) };
            at += to.len().next_multiple_of(64);
            if small {
                (table.from[i], table.to[i]) = (from.address(), staged as u64);
                table.words[i] = (to.len() / 4) as i32;
            } else {
                // SAFETY: as above; it is read once this was waited for.
                unsafe { gpu.copy_out(staged, from.address(), to.len())? };
            }
        }
        if small {
            self.copy_parts(&table, parts.len())?;
        }
        gpu.sync()?;
        // Everything before has been waited for.
        ring.at = 0;
        at = 0;
        for (_, to) in parts {
            // SAFETY: as above, and the copies are done.
            unsafe { ptr::copy_nonoverlapping(start.add(at), to.as_mut_ptr(), to.len()) };
            at += to.len().next_multiple_of(64);
        }
        Ok(())
    }

    /// The same, where `feeder` empties the ring if it is much.
    pub(crate) fn read_by(
        &self,
        parts: &mut [(&Buffer, &mut [u8])],
        feeder: &mut dyn Feeder,
    ) -> Result<()> {
        if parts.iter().map(|p| p.1.len()).sum::<usize>() <= MUCH {
            return self.read_starts(parts);
        }
        let mut pieces = Vec::new();
        for (from, to) in parts {
            assert!(to.len() <= from.bytes(), "a copy behind a buffer's end");
            let starts = (from.address()..).step_by(LARGE);
            pieces.extend(starts.zip(to.chunks_mut(LARGE)));
        }
        let (mut ring, gpu) = (self.ring(), &self.pool.gpu);
        // So many fit into half of the ring: seldom must one wait before they are on their way.
        for pieces in pieces.chunks_mut(RING / LARGE / 2) {
            while ring.events.len() < pieces.len() {
                let event = gpu.event()?;
                ring.events.push(event);
            }
            let start = ring.take(gpu, together(pieces.iter().map(|p| p.1.len())))?;
            let mut at = 0;
            for (i, (from, to)) in pieces.iter().enumerate() {
                // SAFETY: a place of its own behind `start`, which is read once it was waited for.
                unsafe { gpu.copy_out(start.add(at), *from, to.len())? };
                at += to.len().next_multiple_of(64);
                gpu.record(Stream::Work, &ring.events[i])?;
            }
            at = 0;
            for (i, (_, to)) in pieces.iter_mut().enumerate() {
                gpu.wait_for(&ring.events[i])?;
                // SAFETY: the copy to this place is done, and nothing else writes there.
                let staged = unsafe { slice::from_raw_parts(start.add(at), to.len()) };
                at += to.len().next_multiple_of(64);
                feeder.fill(to, &[staged]);
            }
            // Everything before has been waited for.
            ring.at = 0;
        }
        Ok(())
    }
}
