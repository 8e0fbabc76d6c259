//! The section of the kernel table for attention.

use crate::{kv::KvType, scalar, tier::Tier};

/// Positions whose softmax is taken together: two pages. Partial results of chunks merge in
/// order, so how chunks are spread over threads does not show in the result.
pub const CHUNK: usize = 2 * crate::kv::KV_PAGE;

/// One chunk of keys and values against some query rows of one KV head.
pub struct ChunkArgs<'a> {
    pub k_type: KvType,
    pub v_type: KvType,
    pub dim: usize,
    /// Query rows `[rows][dim]`, already multiplied by the scale.
    pub q: &'a [f32],
    /// Positions of this chunk that each row sees, from its start: 0 ..= [`CHUNK`].
    pub visible: &'a [usize],
    /// K and V pages of the chunk, one or two.
    pub pages: &'a [(&'a [u8], &'a [u8])],
    /// Scratch `[rows][CHUNK]`.
    pub scores: &'a mut [f32],
    /// Receives `Σ p·v`, `[rows][dim]`; rows that see nothing keep zeros.
    pub acc: &'a mut [f32],
    /// Receives each row's largest score (−∞ where it sees nothing).
    pub max: &'a mut [f32],
    /// Receives each row's `Σ p`.
    pub sum: &'a mut [f32],
}

impl ChunkArgs<'_> {
    /// Checks that all lengths agree; kernels index without further checks.
    pub(crate) fn check(&self) {
        let rows = self.visible.len();
        assert!(self.q.len() == rows * self.dim && self.acc.len() == rows * self.dim);
        assert!(self.scores.len() == rows * CHUNK);
        assert!(self.max.len() == rows && self.sum.len() == rows);
        let reach = self.pages.len() * crate::kv::KV_PAGE;
        assert!(reach <= CHUNK && self.visible.iter().all(|&n| n <= reach));
        for (k, v) in self.pages {
            assert!(k.len() >= self.k_type.page_bytes(self.dim));
            assert!(v.len() >= self.v_type.page_bytes(self.dim));
        }
    }
}

/// Attention kernels.
#[derive(Clone, Copy)]
pub struct AttnOps {
    /// Scores, softmax and weighted values of one chunk.
    ///
    /// # Safety
    /// The CPU has the table's tier.
    pub chunk: unsafe fn(args: &mut ChunkArgs<'_>),
}

impl AttnOps {
    /// The kernels of `tier`, which the CPU must have.
    pub(crate) fn for_tier(tier: Tier) -> AttnOps {
        match tier {
            Tier::Scalar => AttnOps {
                chunk: scalar::attention::chunk,
            },
            Tier::Avx2 => AttnOps {
                chunk: crate::avx2::attention::chunk,
            },
            Tier::Avx512 => AttnOps {
                chunk: crate::avx512::attention::chunk,
            },
        }
    }
}
