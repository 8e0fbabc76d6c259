//! Reading speed of caches and memory.

use super::{Rates, measure};
use crate::{
    disjoint::DisjointMut, generic::matmul::ask_ahead, mem::AlignedBuf, pool::Pool, tier::Tier,
};
use std::{
    arch::x86_64::*,
    fs,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

/// A level of memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Level {
    /// The first cache of each core.
    L1,
    /// The second cache of each core.
    L2,
    /// The last cache, shared.
    L3,
    /// Main memory.
    Memory,
}

impl Level {
    /// Nearest first.
    pub const ALL: [Level; 4] = [Level::L1, Level::L2, Level::L3, Level::Memory];

    /// As reports name it.
    pub const fn name(self) -> &'static str {
        match self {
            Level::L1 => "L1",
            Level::L2 => "L2",
            Level::L3 => "L3",
            Level::Memory => "memory",
        }
    }
}

/// Sizes in bytes; 0 for a cache that isn't there or isn't known.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Caches {
    /// Data cache of a core.
    pub l1: u64,
    /// Second cache of a core.
    pub l2: u64,
    /// Last cache.
    pub l3: u64,
}

impl Caches {
    /// What the system says of the first CPU.
    pub fn detect() -> Caches {
        let mut caches = Caches::default();
        for index in 0..8 {
            let dir = format!("/sys/devices/system/cpu/cpu0/cache/index{index}");
            let read = |name: &str| fs::read_to_string(format!("{dir}/{name}")).unwrap_or_default();
            if read("type").trim() == "Instruction" {
                continue;
            }
            let size = read("size");
            let kib = size.trim().trim_end_matches('K').parse::<u64>();
            let bytes = kib.unwrap_or(0) << 10;
            match read("level").trim() {
                "1" => caches.l1 = bytes,
                "2" => caches.l2 = bytes,
                "3" => caches.l3 = bytes,
                _ => {}
            }
        }
        caches
    }

    /// How much all `threads` together read to measure a level: well inside it and well
    /// outside the level before; 0 where there is no such size. Memory takes at most `limit`.
    pub fn bytes(&self, level: Level, threads: usize, limit: u64) -> u64 {
        let threads = threads.max(1) as u64;
        let private = self.l2.max(self.l1) * threads;
        match level {
            Level::L1 => self.l1 / 2 * threads,
            Level::L2 => self.l2 / 2 * threads,
            Level::L3 if self.l3 > 2 * private => (self.l3 / 2).min(private.max(32 << 20) * 2),
            Level::L3 => 0,
            // Large hosts' last caches keep part of what is passed over again and again.
            Level::Memory => (16 * (self.l3 + private)).max(1 << 30).min(limit),
        }
    }
}

/// Streams that a reader follows at once: one alone keeps too few lines on their way from memory
/// to show what memory gives.
const STREAMS: usize = 4;

/// What a reader takes at once: a whole number of its steps.
const STEP: usize = 512 * STREAMS;

/// Bytes per second that all threads together read from a buffer of `bytes`, each its own
/// part over and over.
pub fn read_bandwidth(
    pool: &Pool,
    tier: Tier,
    bytes: u64,
    repetitions: usize,
    time: Duration,
) -> Rates {
    let threads = pool.threads();
    let part = (bytes as usize / threads).next_multiple_of(STEP).max(STEP);
    let mut buf = AlignedBuf::zeroed(part * threads);
    let parts = DisjointMut::new(&mut buf);
    // Whoever reads a page has written it, so that it lies in memory near by.
    pool.run(threads, &|thread| {
        // SAFETY: every task has its own part.
        let part = unsafe { parts.slice(thread * part..(thread + 1) * part) };
        part.fill(1);
    });
    let sink = AtomicU64::new(0);
    // As kernels do, and in no cache of a core's own, where asking would only take time.
    let asks = part as u64 > Caches::detect().l2;
    let read: unsafe fn(&[u8], bool) -> u64 = match tier.min(Tier::detect_max()) {
        Tier::Scalar => read_sse2,
        Tier::Avx2 => read_avx2,
        Tier::Avx512 => read_avx512,
    };
    let buf = &buf;
    measure(pool, repetitions, time, part as f64, &|thread, units| {
        let part = &buf[thread * part..(thread + 1) * part];
        let mut sum = 0u64;
        for _ in 0..units {
            // SAFETY: the CPU has the tier; the part is a whole number of steps.
            sum = sum.wrapping_add(unsafe { read(std::hint::black_box(part), asks) });
        }
        sink.fetch_add(sum, Relaxed);
    })
}

macro_rules! reader {
    ($name:ident, $feature:literal, $vector:ty, $load:ident, $or:ident, $zero:ident) => {
        /// Some function of all bytes, which are asked for ahead if `asks`.
        ///
        /// # Safety
        /// The CPU has the features; `bytes` are aligned to cache lines and a multiple of
        /// [`STEP`].
        #[target_feature(enable = $feature)]
        unsafe fn $name(bytes: &[u8], asks: bool) -> u64 {
            const LANES: usize = size_of::<$vector>();
            let mut sums = [$zero(); 2 * STREAMS];
            let stream = bytes.len() / STREAMS;
            for at in (0..stream).step_by(2 * LANES) {
                for i in (0..STREAMS).filter(|_| asks) {
                    let p = bytes.as_ptr().wrapping_add(i * stream + at);
                    ask_ahead::<_MM_HINT_T1>(p, 2 * LANES);
                }
                for (i, sum) in sums.iter_mut().enumerate() {
                    let at = i % STREAMS * stream + at + i / STREAMS * LANES;
                    // SAFETY: inside the stream, aligned to the vector.
                    let vector = unsafe { $load(bytes.as_ptr().add(at).cast()) };
                    *sum = $or(*sum, vector);
                }
            }
            let mut all = $zero();
            for sum in sums {
                all = $or(all, sum);
            }
            let mut words = [0u64; LANES / 8];
            // SAFETY: an array of the vector's size.
            unsafe { std::ptr::copy_nonoverlapping((&raw const all).cast(), &mut words, 1) };
            words.iter().fold(0, |a, b| a | b)
        }
    };
}

reader!(
    read_sse2,
    "sse2",
    __m128i,
    _mm_load_si128,
    _mm_or_si128,
    _mm_setzero_si128
);
reader!(
    read_avx2,
    "avx2",
    __m256i,
    _mm256_load_si256,
    _mm256_or_si256,
    _mm256_setzero_si256
);
reader!(
    read_avx512,
    "avx512f",
    __m512i,
    _mm512_load_si512,
    _mm512_or_si512,
    _mm512_setzero_si512
);
