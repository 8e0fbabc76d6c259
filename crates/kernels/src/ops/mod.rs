//! The operations that the engine calls: safe, parallel over a pool, dispatched by a table.

mod attention;
mod embed;
mod low_rank;
pub mod matmul;
pub mod moe;
mod rope;
mod rows;

use std::sync::{Arc, OnceLock};

use crate::{
    acts::ActsView,
    amx::Amx,
    pool::{Pool, PoolConfig},
    profile::Profile,
    table::Kernels,
    tier::Tier,
    weights::Weights,
};

pub use attention::{Attended, Token};
pub use rope::{Heads, RopeParams, RopeStyle, RopeTable, Yarn};

/// A pool and the kernels that run on it.
pub struct Compute {
    pub pool: Pool,
    pub table: &'static Kernels,
    /// Where the time goes.
    pub profile: Arc<Profile>,
    observer: OnceLock<Arc<dyn Observer>>,
}

/// Sees the inputs of matrix products, before they are multiplied.
pub trait Observer: Send + Sync {
    /// `x`, `[m][k]` as the product's form of activations holds it, meets matrix `expert` of
    /// `weights`.
    fn product(&self, weights: &Weights, expert: usize, x: &[f32]);
}

impl Compute {
    /// Kernels of `tier`, or of the highest tier below it that the CPU has.
    pub fn new(tier: Tier, pool: PoolConfig) -> Compute {
        Compute {
            pool: Pool::new(pool),
            table: Kernels::for_tier(tier),
            profile: Arc::default(),
            observer: OnceLock::new(),
        }
    }

    /// The same with tile products.
    pub fn with_amx(tier: Tier, amx: Amx, pool: PoolConfig) -> Compute {
        Compute {
            pool: Pool::new(pool),
            table: Kernels::with_amx(tier, amx),
            profile: Arc::default(),
            observer: OnceLock::new(),
        }
    }

    /// Has an observer see all products from now on; returns false if there is one already.
    pub fn observe(&self, observer: Arc<dyn Observer>) -> bool {
        self.observer.set(observer).is_ok()
    }

    fn observed(&self, weights: &Weights, expert: usize, x: &ActsView<'_>) {
        if let Some(observer) = self.observer.get() {
            // SAFETY: operations make views of activations that they hold.
            let x = unsafe { x.to_f32() };
            observer.product(weights, expert, &x);
        }
    }
}
