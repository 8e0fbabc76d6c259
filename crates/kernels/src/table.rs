//! One table of kernels per tier: function pointers and block sizes, filled from scalar and
//! overwritten tier by tier.

use crate::{amx::Amx, attn::AttnOps, float::FloatOps, strip::kernels::MatmulKernels, tier::Tier};
use std::sync::OnceLock;

/// The kernels of one tier.
pub struct Kernels {
    /// The tier that was asked for and that the CPU has.
    pub tier: Tier,
    /// The right to use AMX, if that was asked for.
    pub amx: Option<Amx>,
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
        TABLES[tier as usize].get_or_init(|| Kernels::build(tier, None))
    }

    /// The same with tile products.
    pub fn with_amx(tier: Tier, amx: Amx) -> &'static Kernels {
        static TABLES: [OnceLock<Kernels>; 6] = [const { OnceLock::new() }; 6];
        let tier = tier.min(Tier::detect_max());
        let table = &TABLES[tier as usize + 3 * usize::from(amx.is_emulated())];
        table.get_or_init(|| Kernels::build(tier, Some(amx)))
    }

    fn build(tier: Tier, amx: Option<Amx>) -> Kernels {
        let kernels = Kernels {
            tier,
            amx,
            matmul: MatmulKernels::for_tier(tier, amx),
            float: FloatOps::for_tier(tier),
            attn: AttnOps::for_tier(tier, amx),
        };
        #[cfg(feature = "check-kernels")]
        let kernels = crate::check::checked(kernels);
        kernels
    }
}
