//! Pinned memory that kernels read and write: weights that stay there, and results.
//!
//! It has one address for both sides, so kernels take such matrices as they take any; what they
//! read crosses the link once, and what they write is here when they have ended. Nobody copies.

use crate::{
    device::{CudaDevice, Pool, is_float},
    launch::{Parts, launch},
    modules::Unit,
};
use std::{cell::OnceCell, hint, ptr, sync::Arc};
use tegula_kernels::device::{Buffer, DeviceError, Memory, Product, Result};

/// Who pinned memory goes back to.
struct Pinned(Arc<Pool>);

impl Memory for Pinned {
    fn free(&self, address: u64, _: usize) {
        let gpu = &self.0.gpu;
        // A lost device reads nothing any more.
        let _ = gpu.sync();
        // SAFETY: it came from `pinned`; what was issued has been waited for.
        unsafe { gpu.free_pinned(address as *mut u8) };
    }
}

impl CudaDevice {
    pub(crate) fn pinned_buffer(&self, bytes: usize) -> Result<Buffer> {
        let gpu = &self.pool.gpu;
        let start = gpu.pinned(bytes.max(1)).map_err(|error| match error {
            DeviceError::Failed { device, cause, .. } => DeviceError::Pinned {
                device,
                needed: bytes as u64,
                cause,
            },
            other => other,
        })?;
        let memory = Arc::new(Pinned(Arc::clone(&self.pool)));
        Ok(Buffer::pinned(start as u64, bytes, memory))
    }

    /// Products with an x of this side, to pinned buffers.
    pub(crate) fn multiply_from(&self, products: &[Product<'_>], x: &[u8], m: usize) -> Result<()> {
        assert!(products.iter().all(|p| p.out.is_pinned()));
        let staged = self.staged(x)?;
        let near = OnceCell::new();
        // Codes are made of x once, across the link; plain floats meet x in every row.
        let place = |ty| match is_float(ty) {
            false => Ok(staged),
            true => match near.get() {
                Some(&near) => Ok(near),
                None => {
                    let bytes = self.near(staged, x.len())?;
                    Ok(*near.get_or_init(|| bytes))
                }
            },
        };
        self.multiply(products, place, m)
    }

    /// Copies what the ring holds to memory of the device.
    fn near(&self, staged: u64, bytes: usize) -> Result<u64> {
        let to = self.scratch("shared input", bytes)?;
        self.overwritten(to);
        let mut parts = Parts::default();
        (parts.to[0], parts.from[0], parts.words[0]) = (to, staged, (bytes / 4) as i32);
        let grid = [(bytes / 4).div_ceil(256).clamp(1, 64), 1, 1];
        launch!(self, Unit::Rows, c"copy_parts", grid, 256, 0, parts)?;
        Ok(to)
    }

    /// Waits for what was issued, without sleeping, and copies from pinned buffers.
    pub(crate) fn collect_pinned(&self, parts: &mut [(&Buffer, &mut [u8])]) -> Result<()> {
        while !self.pool.gpu.is_idle()? {
            hint::spin_loop();
        }
        for (src, dst) in parts {
            assert!(src.is_pinned() && dst.len() <= src.bytes());
            // SAFETY: memory of this process, as long; nothing writes there any more.
            unsafe {
                ptr::copy_nonoverlapping(src.address() as *const u8, dst.as_mut_ptr(), dst.len());
            }
        }
        Ok(())
    }
}
