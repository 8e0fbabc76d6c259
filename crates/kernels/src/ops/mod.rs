//! The operations that the engine calls: safe, parallel over a pool, dispatched by a table.

mod attention;
mod embed;
pub mod matmul;
pub mod moe;
mod rope;
mod rows;

use crate::{
    amx::Amx,
    pool::{Pool, PoolConfig},
    profile::Profile,
    table::Kernels,
    tier::Tier,
};

pub use attention::Token;
pub use rope::{RopeParams, RopeStyle, RopeTable, Yarn};

/// A pool and the kernels that run on it.
pub struct Compute {
    pub pool: Pool,
    pub table: &'static Kernels,
    /// Where the time goes.
    pub profile: Profile,
}

impl Compute {
    /// Kernels of `tier`, or of the highest tier below it that the CPU has.
    pub fn new(tier: Tier, pool: PoolConfig) -> Compute {
        Compute {
            pool: Pool::new(pool),
            table: Kernels::for_tier(tier),
            profile: Profile::default(),
        }
    }

    /// The same with tile products.
    pub fn with_amx(tier: Tier, amx: Amx, pool: PoolConfig) -> Compute {
        Compute {
            pool: Pool::new(pool),
            table: Kernels::with_amx(tier, amx),
            profile: Profile::default(),
        }
    }
}
