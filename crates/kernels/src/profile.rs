//! Where the time goes: wall time per kind of operation, as the thread that dispatches sees
//! it. Off unless asked for; then two clock readings per operation.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

macro_rules! ops {
    ($($(#[$doc:meta])* $op:ident = $name:literal,)*) => {
        /// Kinds of operations.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum Op { $($(#[$doc])* $op,)* }

        impl Op {
            /// All of them.
            pub const ALL: &'static [Op] = &[$(Op::$op,)*];

            /// As reports name it.
            pub const fn name(self) -> &'static str {
                match self { $(Op::$op => $name,)* }
            }
        }
    };
}

ops! {
    /// Rows of the embedding.
    Embed = "embedding",
    /// Norms of rows and heads.
    Norm = "norms",
    /// Activations into the forms that products take.
    Prepare = "activations",
    /// Matrix products.
    Products = "products",
    /// Gate, up and SwiGLU of a dense network.
    GateUp = "gate and up",
    /// All of the experts' networks.
    Experts = "experts",
    /// The choice of experts.
    Route = "routing",
    /// Rotations.
    Rope = "rope",
    /// Keys and values into the cache.
    KvStore = "kv store",
    /// Attention.
    Attention = "attention",
    /// Sums of rows.
    Add = "sums",
    /// Weights into the memory that devices copy from.
    Copy = "weights to devices",
}

const COUNT: usize = Op::ALL.len();

/// Time and calls per kind of operation.
#[derive(Debug, Default)]
pub struct Profile {
    on: AtomicBool,
    ns: [AtomicU64; COUNT],
    calls: [AtomicU64; COUNT],
}

/// What a [`Profile`] has gathered of one kind of operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Share {
    /// The kind.
    pub op: Op,
    /// Operations.
    pub calls: u64,
    /// Their wall time.
    pub time: Duration,
}

impl Profile {
    /// Forgets everything and begins to gather.
    pub fn start(&self) {
        for counter in self.ns.iter().chain(&self.calls) {
            counter.store(0, Relaxed);
        }
        self.on.store(true, Relaxed);
    }

    /// Ends gathering; kinds that occurred, most time first.
    pub fn stop(&self) -> Vec<Share> {
        self.on.store(false, Relaxed);
        let share = |&op: &Op| Share {
            op,
            calls: self.calls[op as usize].load(Relaxed),
            time: Duration::from_nanos(self.ns[op as usize].load(Relaxed)),
        };
        let mut shares: Vec<_> = Op::ALL.iter().map(share).filter(|s| s.calls > 0).collect();
        shares.sort_by_key(|s| std::cmp::Reverse(s.time));
        shares
    }

    /// Counts until the span is dropped.
    pub(crate) fn span(&self, op: Op) -> Span<'_> {
        Span {
            profile: self,
            op,
            start: self.on.load(Relaxed).then(Instant::now),
        }
    }
}

/// An operation that is being timed.
pub(crate) struct Span<'a> {
    profile: &'a Profile,
    op: Op,
    start: Option<Instant>,
}

impl Drop for Span<'_> {
    fn drop(&mut self) {
        if let Some(start) = self.start {
            let ns = start.elapsed().as_nanos() as u64;
            self.profile.ns[self.op as usize].fetch_add(ns, Relaxed);
            self.profile.calls[self.op as usize].fetch_add(1, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gathers_only_between_start_and_stop() {
        let profile = Profile::default();
        drop(profile.span(Op::Norm));
        profile.start();
        drop(profile.span(Op::Add));
        drop(profile.span(Op::Add));
        let shares = profile.stop();
        assert_eq!(shares.len(), 1);
        assert_eq!((shares[0].op, shares[0].calls), (Op::Add, 2));
        drop(profile.span(Op::Add));
        profile.start();
        assert_eq!(profile.stop(), []);
    }
}
