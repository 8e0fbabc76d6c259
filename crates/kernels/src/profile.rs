//! Where the time goes: wall time per kind of operation, as the thread that dispatches sees
//! it. Off unless asked for; then two clock readings per operation. What runs inside another
//! operation counts for itself alone, so that all kinds together are no more than the time that
//! passed; what they leave of it is work between operations.

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
    Heads = "norm and rope",
    /// Keys and values into the cache.
    KvStore = "kv store",
    /// Attention.
    Attention = "attention",
    /// Sums of rows.
    Add = "sums",
    /// Weights and activations into and out of the memory that devices copy from.
    Copy = "staging",
    /// Activations on their way to devices: this side's part of it.
    Upload = "to devices",
    /// Operations of devices: issuing them.
    Issue = "device calls",
    /// Waiting for what devices compute and send back.
    Wait = "waiting for devices",
    /// Weights on their way to devices: waiting for room on the way there.
    Stream = "weights to devices",
}

const COUNT: usize = Op::ALL.len();

/// Time and calls per kind of operation.
#[derive(Debug, Default)]
pub struct Profile {
    on: AtomicBool,
    ns: [AtomicU64; COUNT],
    calls: [AtomicU64; COUNT],
    /// Of all operations that have ended.
    ended_ns: AtomicU64,
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
        for counter in self.ns.iter().chain(&self.calls).chain([&self.ended_ns]) {
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
    pub fn span(&self, op: Op) -> Span<'_> {
        let start = || (Instant::now(), self.ended_ns.load(Relaxed));
        Span {
            profile: self,
            op,
            start: self.on.load(Relaxed).then(start),
        }
    }

    /// What `f` makes, counted.
    pub fn timed<T>(&self, op: Op, f: impl FnOnce() -> T) -> T {
        let _span = self.span(op);
        f()
    }
}

/// An operation that is being timed.
pub struct Span<'a> {
    profile: &'a Profile,
    op: Op,
    /// And what had ended then: what ends until this one does ran inside it.
    start: Option<(Instant, u64)>,
}

impl Drop for Span<'_> {
    fn drop(&mut self) {
        if let Some((start, before)) = self.start {
            let profile = self.profile;
            let inside = profile.ended_ns.load(Relaxed).saturating_sub(before);
            let ns = (start.elapsed().as_nanos() as u64).saturating_sub(inside);
            profile.ns[self.op as usize].fetch_add(ns, Relaxed);
            profile.calls[self.op as usize].fetch_add(1, Relaxed);
            profile.ended_ns.fetch_add(ns, Relaxed);
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

    #[test]
    fn what_runs_inside_counts_for_itself() {
        let profile = Profile::default();
        profile.start();
        let begin = Instant::now();
        {
            let _whole = profile.span(Op::Stream);
            for _ in 0..2 {
                let _part = profile.span(Op::Copy);
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        let passed = begin.elapsed();
        let shares = profile.stop();
        let of = |op| shares.iter().find(|s| s.op == op).unwrap();
        assert_eq!((of(Op::Copy).calls, of(Op::Stream).calls), (2, 1));
        assert!(of(Op::Copy).time >= Duration::from_millis(10));
        assert!(of(Op::Copy).time + of(Op::Stream).time <= passed);
    }
}
