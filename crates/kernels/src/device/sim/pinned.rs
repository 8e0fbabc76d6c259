//! The host's memory as the simulated device sees it: at addresses of the device's own, without a
//! part in its budget. What is sent to it has results when somebody waits for them, and poison
//! until then.

use super::{POISON, SimDevice};
use crate::device::{ALIGN, Buffer, DeviceError, Memory, Product, Result, rounded};
use std::{collections::HashMap, sync::Arc};

#[derive(Default)]
pub(super) struct Pinned {
    /// Bytes of each block.
    blocks: HashMap<u64, u64>,
    /// Bytes of all that there may be.
    limit: Option<u64>,
    /// Results that nobody has waited for, and where they go.
    sent: Vec<(u64, Vec<u8>)>,
}

impl Pinned {
    fn bytes(&self) -> u64 {
        self.blocks.values().sum()
    }

    /// Forgets a block; `false` if there is none.
    pub fn give(&mut self, address: u64) -> bool {
        self.blocks.remove(&address).is_some()
    }
}

impl SimDevice {
    /// Bytes of pinned memory in use.
    pub fn pinned(&self) -> u64 {
        self.shared.heap().pinned.bytes()
    }

    /// Lets no more than so many bytes be pinned.
    pub fn limit_pinned(&self, bytes: u64) {
        self.shared.heap().pinned.limit = Some(bytes);
    }

    pub(super) fn alloc_pinned(&self, bytes: usize) -> Result<Buffer> {
        let mut heap = self.shared.heap();
        let needed = rounded(bytes);
        let free = heap.pinned.limit.map(|l| l - heap.pinned.bytes().min(l));
        if let Some(free) = free.filter(|free| needed > *free) {
            return Err(DeviceError::Pinned {
                device: self.shared.name.clone(),
                needed,
                cause: format!("{free} bytes are left"),
            });
        }
        let address = heap.next;
        heap.next += needed.max(ALIGN);
        heap.blocks.insert(address, vec![POISON; bytes]);
        heap.pinned.blocks.insert(address, needed);
        let memory: Arc<dyn Memory> = Arc::clone(&self.shared) as _;
        Ok(Buffer::pinned(address, bytes, memory))
    }

    pub(super) fn multiply_from(&self, products: &[Product<'_>], x: &[u8], m: usize) -> Result<()> {
        self.not_recorded();
        self.step("matmul")?;
        let value = |b: &[u8; 4]| f32::from_le_bytes(*b);
        let x: Vec<f32> = x.as_chunks().0.iter().map(value).collect();
        for p in products {
            assert!(p.out.is_pinned());
            let y = self.multiplied(p, &x[..m * p.w.k], m);
            let y: Vec<u8> = y.iter().flat_map(|v| v.to_le_bytes()).collect();
            self.put_bytes(p.out, 0, &vec![POISON; y.len()]);
            self.shared.heap().pinned.sent.push((p.out.address(), y));
        }
        self.shared.heap().copies.sent += 1;
        Ok(())
    }

    pub(super) fn collect_pinned(&self, parts: &mut [(&Buffer, &mut [u8])]) -> Result<()> {
        self.not_recorded();
        self.step("waiting")?;
        let mut heap = self.shared.heap();
        for (address, bytes) in std::mem::take(&mut heap.pinned.sent) {
            if let Some(block) = heap.blocks.get_mut(&address) {
                block[..bytes.len()].copy_from_slice(&bytes);
            }
        }
        for (src, dst) in parts {
            assert!(src.is_pinned());
            dst.copy_from_slice(&heap.blocks[&src.address()][..dst.len()]);
        }
        heap.copies.collected += 1;
        Ok(())
    }
}
