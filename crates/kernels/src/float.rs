//! The section of the kernel table for float rows.

use crate::{scalar, tier::Tier};

/// Row kernels. All are tolerance-compared between tiers and fixed within one.
#[derive(Clone, Copy)]
pub struct FloatOps {
    /// `dst = x / sqrt(mean(x²) + eps) * w`, all of one length.
    ///
    /// # Safety
    /// The CPU has the table's tier. (Likewise for all others.)
    pub rms_norm: unsafe fn(x: &[f32], w: &[f32], eps: f32, dst: &mut [f32]),
    /// `dst += x`.
    ///
    /// # Safety
    /// As above.
    pub add_assign: unsafe fn(dst: &mut [f32], x: &[f32]),
    /// `dst = gate * sigmoid(gate) * up`.
    ///
    /// # Safety
    /// As above.
    pub swiglu: unsafe fn(gate: &[f32], up: &[f32], dst: &mut [f32]),
    /// Softmax in place.
    ///
    /// # Safety
    /// As above.
    pub softmax: unsafe fn(x: &mut [f32]),
    /// Sums of strips, `step` apart, to where they belong: `dst[16 i + j] = sums[i * step + j]`,
    /// or added to what is there.
    ///
    /// # Safety
    /// As above.
    pub gather: unsafe fn(sums: &[f32], step: usize, dst: &mut [f32], adds: bool),
}

impl FloatOps {
    /// The kernels of `tier`, which the CPU must have.
    pub(crate) fn for_tier(tier: Tier) -> FloatOps {
        match tier {
            Tier::Scalar => scalar::float::OPS,
            Tier::Avx2 => crate::avx2::float::OPS,
            Tier::Avx512 => crate::avx512::float::OPS,
        }
    }
}
