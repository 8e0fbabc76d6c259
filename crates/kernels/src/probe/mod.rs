//! What the machine can do at most: bytes a second from each level of memory, and products a
//! second of each instruction set. Kernels are judged against these figures.
//!
//! Every probe runs on all threads of a pool at once, since that is how kernels run: cores
//! share memory, the last cache, and power.

mod bandwidth;
mod peak;

use crate::pool::Pool;
use std::{
    sync::{Barrier, Mutex, PoisonError},
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

/// Runs `work(thread, units)` on every thread of the pool at the same time, `repetitions` times
/// for `time`; units per second over all threads, times `scale`.
fn measure(
    pool: &Pool,
    repetitions: usize,
    time: Duration,
    scale: f64,
    work: &(dyn Fn(usize, u64) + Sync),
) -> Rates {
    // Warms caches up, and lets clocks settle.
    together(pool, time / 2, work);
    Rates {
        samples: (0..repetitions)
            .map(|_| together(pool, time, work) * scale)
            .collect(),
    }
}

/// Units per second of all threads, each of which works for `time`. Threads that share a core, or
/// are farther from memory, do less than others; if all did as much, the others would wait for them,
/// and what the machine gives would not show.
fn together(pool: &Pool, time: Duration, work: &(dyn Fn(usize, u64) + Sync)) -> f64 {
    let threads = pool.threads();
    let barrier = Barrier::new(threads);
    let rates = Mutex::new(0.0);
    // A thread that waits at the barrier takes no second task, so each takes one.
    pool.run(threads, &|thread| {
        barrier.wait();
        let start = Instant::now();
        let (mut units, mut some, mut took) = (0, 1, Duration::ZERO);
        while took < time {
            work(thread, some);
            units += some;
            took = start.elapsed();
            // Often enough to end in time, and seldom enough for the clock to cost nothing.
            if took < time / 32 {
                some *= 2;
            }
        }
        let rate = units as f64 / took.as_secs_f64().max(1e-9);
        *rates.lock().unwrap_or_else(PoisonError::into_inner) += rate;
    });
    rates.into_inner().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{pool::PoolConfig, tier::Tier};
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

    const SHORT: Duration = Duration::from_micros(300);

    #[test]
    fn every_thread_works_and_none_waits_for_a_slow_one() {
        let pool = Pool::new(PoolConfig::new(3));
        let seen = [const { AtomicU64::new(0) }; 3];
        let rates = measure(&pool, 2, 10 * SHORT, 1.0, &|thread, units| {
            seen[thread].fetch_add(units, Relaxed);
            let unit = if thread == 0 { 20_000 } else { 100 };
            std::thread::sleep(Duration::from_micros(unit * units));
        });
        let seen = seen.each_ref().map(|n| n.load(Relaxed));
        // A warm-up and two repetitions, of which each is one unit's time for the slow thread.
        assert_eq!(seen[0], 3);
        assert!(seen[1] > 3 && seen[2] > 3, "{seen:?}");
        // No thread does more than a unit in 100 us, and the slow one adds 50 a second at most.
        let most = 2.0 * 1e4 + 50.0;
        assert_eq!(rates.samples.len(), 2);
        assert!(
            rates.samples.iter().all(|&r| r > 0.0 && r <= most),
            "{rates:?}"
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
