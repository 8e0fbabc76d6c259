//! Weights that stay in host memory, on their way to a slot.
//!
//! Pieces are filled in pinned memory, cross the link on a stream of their own, land in memory
//! of the device and are rearranged to the slot on the stream that computes. Events order them
//! both ways, so the only thing that waits here is a piece that is still being copied; products
//! that were issued before run meanwhile, and find their slots as they were.

use crate::{
    device::{CudaDevice, Pool},
    driver::{Event, Stream},
    launch::launch,
    modules::Unit,
};
use std::{
    slice,
    sync::{Arc, PoisonError},
};
use tegula_kernels::device::{
    Buffer, Matrix, RawMatrix, Result, matrix_bytes,
    stream::{Feeder, LANDING, PIECE, PIECES, Piece, pieces},
};

/// Pieces and where they land.
pub(crate) struct Stage {
    pool: Arc<Pool>,
    /// [`LANDING`] bytes.
    pinned: *mut u8,
    landing: Buffer,
    /// Per piece: it has crossed the link, so its pinned memory may be filled again.
    copied: Vec<Event>,
    /// Per piece: it has been rearranged, so it may land again.
    rearranged: Vec<Event>,
    /// The next piece.
    next: usize,
}

// SAFETY: plain memory and handles of the driver, used under the device's lock.
unsafe impl Send for Stage {}

impl Drop for Stage {
    fn drop(&mut self) {
        // SAFETY: the memory came from `pinned`; after waiting nothing reads it.
        unsafe {
            let _ = self.pool.gpu.sync_on(Stream::Copies);
            self.pool.gpu.free_pinned(self.pinned);
        }
    }
}

impl Stage {
    fn new(pool: &Arc<Pool>) -> Result<Stage> {
        let events = || (0..PIECES).map(|_| pool.gpu.event()).collect::<Result<_>>();
        let (copied, rearranged) = (events()?, events()?);
        let landing = pool.alloc(LANDING)?;
        Ok(Stage {
            pinned: pool.gpu.pinned(LANDING)?,
            pool: Arc::clone(pool),
            landing,
            copied,
            rearranged,
            next: 0,
        })
    }

    /// Fills a piece and sends it on its way; where it will have landed for what is issued next,
    /// and which event is to be recorded behind that.
    fn send(&mut self, piece: &Piece<'_>, feeder: &mut dyn Feeder) -> Result<(u64, &Event)> {
        let (i, gpu) = (self.next, &self.pool.gpu);
        self.next = (i + 1) % PIECES;
        let (copied, rearranged) = (&self.copied[i], &self.rearranged[i]);
        while !gpu.has_passed(copied)? {
            if !feeder.meanwhile() {
                gpu.wait_for(copied)?;
            }
        }
        let landed = self.landing.address() + (i * PIECE) as u64;
        assert!(piece.len <= PIECE);
        // SAFETY: piece i of the pinned memory; its last copy has been waited for, and it is
        // not filled again before this one has.
        unsafe {
            let staged = self.pinned.add(i * PIECE);
            feeder.fill(slice::from_raw_parts_mut(staged, piece.len), &piece.parts);
            gpu.wait_on(Stream::Copies, rearranged)?;
            gpu.copy_in_on(Stream::Copies, landed, staged, piece.len)?;
        }
        gpu.record(Stream::Copies, copied)?;
        gpu.wait_on(Stream::Work, copied)?;
        Ok((landed, rearranged))
    }
}

impl CudaDevice {
    /// A slot, with the pieces through which it is filled.
    pub(crate) fn new_slot(&self, slot: Matrix) -> Result<Matrix> {
        let mut stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
        if stage.is_none() {
            *stage = Some(Stage::new(&self.pool)?);
        }
        Ok(slot)
    }

    pub(crate) fn stream_in(
        &self,
        from: &RawMatrix,
        chosen: Option<&[u32]>,
        feeder: &mut dyn Feeder,
        slot: &mut Matrix,
    ) -> Result<()> {
        let experts = chosen.map_or(from.experts(), <[u32]>::len);
        let (ty, n, k) = (from.ty(), from.n(), from.k());
        let bytes = matrix_bytes(ty, n as u64, k as u64, experts as u64);
        assert!(
            bytes.is_some_and(|bytes| bytes <= slot.buffer.bytes() as u64),
            "a matrix larger than its slot"
        );
        (slot.ty, slot.n, slot.k, slot.experts) = (ty, n, k, experts);
        let table = self.plane_table(slot);
        let mut stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
        let stage = match &mut *stage {
            Some(stage) => stage,
            none => none.insert(Stage::new(&self.pool)?),
        };
        for piece in pieces(from, chosen, PIECE) {
            let (raw, rearranged) = stage.send(&piece, feeder)?;
            let (first, len) = (piece.first_block, piece.len as u64);
            let grid = [piece.len.div_ceil(256), 1, 1];
            let (unit, name) = (Unit::Rows, c"to_planes");
            launch!(self, unit, name, grid, 256, 0, raw, first, len, table)?;
            self.pool.gpu.record(Stream::Work, rearranged)?;
        }
        Ok(())
    }
}
