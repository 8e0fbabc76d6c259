//! One table of kernels per tier: function pointers and block sizes, filled from scalar and
//! overwritten tier by tier.

use crate::{attn::AttnOps, float::FloatOps, strip::kernels::MatmulKernels, tier::Tier};
use std::sync::OnceLock;

/// The kernels of one tier.
pub struct Kernels {
    /// The tier that was asked for and that the CPU has.
    pub tier: Tier,
    /// Matrix products.
    pub matmul: MatmulKernels,
    /// Rows of f32.
    pub float: FloatOps,
    /// Attention.
    pub attn: AttnOps,
}

impl Kernels {
    /// The table of `tier`, or of the highest tier below it that the CPU has. Built once.
    pub fn for_tier(tier: Tier) -> &'static Kernels {
        static TABLES: [OnceLock<Kernels>; 3] = [const { OnceLock::new() }; 3];
        let tier = tier.min(Tier::detect_max());
        TABLES[tier as usize].get_or_init(|| Kernels::build(tier))
    }

    fn build(tier: Tier) -> Kernels {
        Kernels {
            tier,
            matmul: MatmulKernels::for_tier(tier),
            float: FloatOps::for_tier(tier),
            attn: AttnOps::for_tier(tier),
        }
    }
}
