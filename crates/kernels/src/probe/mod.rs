//! What the machine can do at most: bytes a second from each level of memory, and products a
//! second of each instruction set. Kernels are judged against these figures.
//!
//! Every probe runs on all threads of a pool at once, since that is how kernels run: cores
//! share memory, the last cache, and power.

mod bandwidth;
mod peak;

use crate::pool::Pool;
use std::{
    sync::{
        Barrier,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

pub use bandwidth::{Caches, Level, read_bandwidth};
pub use peak::{Peak, compute_peak};

/// A rate that was measured several times.
#[derive(Clone, Debug, PartialEq)]
pub struct Rates {
    /// Units per second of each repetition, in order.
    pub samples: Vec<f64>,
}

/// Runs `work(thread, units)` on every thread of the pool at the same time, `repetitions`
/// times, with as many units that a repetition takes about `time`; units per second over all
/// threads, times `scale`.
fn measure(
    pool: &Pool,
    repetitions: usize,
    time: Duration,
    scale: f64,
    work: &(dyn Fn(usize, u64) + Sync),
) -> Rates {
    let mut units = 1;
    // Finds the amount, warms caches up, and lets clocks settle.
    loop {
        let took = together(pool, units, work);
        if took >= time / 2 || units >= 1 << 40 {
            break;
        }
        let aim = time.as_secs_f64() / took.as_secs_f64().max(1e-7);
        units = (units as f64 * aim.clamp(2.0, 16.0)) as u64;
    }
    let rate = |_| {
        let took = together(pool, units, work).as_secs_f64();
        units as f64 * pool.threads() as f64 * scale / took
    };
    Rates {
        samples: (0..repetitions).map(rate).collect(),
    }
}

/// From the first thread's start to the last one's end.
fn together(pool: &Pool, units: u64, work: &(dyn Fn(usize, u64) + Sync)) -> Duration {
    let threads = pool.threads();
    let barrier = Barrier::new(threads);
    let (epoch, first, last) = (Instant::now(), AtomicU64::new(u64::MAX), AtomicU64::new(0));
    // A thread that waits at the barrier takes no second task, so each takes one.
    pool.run(threads, &|thread| {
        barrier.wait();
        first.fetch_min(epoch.elapsed().as_nanos() as u64, Relaxed);
        work(thread, units);
        last.fetch_max(epoch.elapsed().as_nanos() as u64, Relaxed);
    });
    Duration::from_nanos(
        last.load(Relaxed)
            .saturating_sub(first.load(Relaxed))
            .max(1),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{pool::PoolConfig, tier::Tier};

    const SHORT: Duration = Duration::from_micros(300);

    #[test]
    fn every_thread_works_and_units_add_up() {
        let pool = Pool::new(PoolConfig::new(3));
        let seen = [const { AtomicU64::new(0) }; 3];
        let rates = measure(&pool, 2, SHORT, 1.0, &|thread, units| {
            seen[thread].fetch_add(units, Relaxed);
            std::thread::sleep(Duration::from_micros(units.min(400)));
        });
        assert_eq!(rates.samples.len(), 2);
        assert!(rates.samples.iter().all(|r| r.is_finite() && *r > 0.0));
        let seen: Vec<u64> = seen.iter().map(|n| n.load(Relaxed)).collect();
        assert!(
            seen[0] > 0 && seen.iter().all(|n| *n == seen[0]),
            "{seen:?}"
        );
    }

    #[test]
    fn what_the_cpu_has_is_measured_and_the_rest_is_refused() {
        let pool = Pool::new(PoolConfig::new(2));
        for peak in Peak::ALL {
            let rates = compute_peak(peak, &pool, None, 1, SHORT);
            assert_eq!(rates.is_some(), peak.available(None), "{}", peak.name());
            let Some(rates) = rates else { continue };
            // Slower than a pocket calculator, or faster than any CPU: a wrong count.
            assert!(
                (1e6..1e16).contains(&rates.samples[0]),
                "{peak:?} {rates:?}"
            );
        }
    }

    #[cfg(feature = "amx")]
    #[test]
    fn emulated_tiles_are_no_peak() {
        let Ok(amx) = crate::Amx::emulate() else {
            return;
        };
        let pool = Pool::new(PoolConfig::new(1));
        assert!(!Peak::AmxInt8.available(Some(amx)));
        assert!(compute_peak(Peak::AmxBf16, &pool, Some(amx), 1, SHORT).is_none());
    }

    #[test]
    fn levels_fit_their_caches() {
        let caches = Caches {
            l1: 48 << 10,
            l2: 2 << 20,
            l3: 300 << 20,
        };
        let bytes = |level| caches.bytes(level, 14, u64::MAX);
        assert!(bytes(Level::L1) <= 14 * (48 << 10));
        assert!(bytes(Level::L2) > 14 * (48 << 10) && bytes(Level::L2) <= 14 * (2 << 20));
        assert!(bytes(Level::L3) > 14 * (2 << 20) && bytes(Level::L3) <= 300 << 20);
        assert!(bytes(Level::Memory) >= 4 * (300 << 20));
        assert!(caches.bytes(Level::Memory, 14, 1 << 30) <= 1 << 30);
    }

    #[test]
    fn every_tier_reads_every_level() {
        let pool = Pool::new(PoolConfig::new(2));
        for tier in Tier::ALL.into_iter().filter(|t| t.available()) {
            for bytes in [32 << 10, 1 << 20] {
                let rates = read_bandwidth(&pool, tier, bytes, 1, SHORT);
                assert!((1e6..1e14).contains(&rates.samples[0]), "{tier} {rates:?}");
            }
        }
    }
}
