//! The operations that the engine calls: safe, parallel over a pool, dispatched by a table.

pub mod matmul;
pub mod moe;

use crate::pool::PoolConfig;
use crate::{pool::Pool, table::Kernels, tier::Tier};

/// A pool and the kernels that run on it.
pub struct Compute {
    pub pool: Pool,
    pub table: &'static Kernels,
}

impl Compute {
    /// Kernels of `tier`, which the CPU must have (else the highest tier that it has).
    pub fn new(tier: Tier, pool: PoolConfig) -> Compute {
        Compute {
            pool: Pool::new(pool),
            table: Kernels::for_tier(tier),
        }
    }
}
