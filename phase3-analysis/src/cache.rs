//! A model of the caches: what each way reads, line by line, through two levels with least
//! recently used replacement. It knows no prefetching: a miss says that a line must come from
//! further away, not that anybody waits for it.

use tegula_kernels::{lab::Way, probe::Caches};

const LINE: u64 = 64;

/// One level.
struct Level {
    ways: usize,
    /// Lines of each set, the latest last.
    sets: Vec<Vec<u64>>,
    misses: u64,
}

impl Level {
    fn new(bytes: u64, ways: usize) -> Level {
        let sets = (bytes / LINE / ways as u64).max(1) as usize;
        Level {
            ways,
            sets: vec![Vec::with_capacity(ways); sets],
            misses: 0,
        }
    }

    /// True if the line was there.
    fn touch(&mut self, line: u64) -> bool {
        let at = (line % self.sets.len() as u64) as usize;
        let set = &mut self.sets[at];
        if let Some(found) = set.iter().position(|&l| l == line) {
            set.remove(found);
            set.push(line);
            return true;
        }
        self.misses += 1;
        if set.len() == self.ways {
            set.remove(0);
        }
        set.push(line);
        false
    }
}

/// Lines that one core moves for a product of 16 rows with all tokens, per 1,000 multiplied
/// weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Traffic {
    /// Lines that the code reads.
    pub reads: f64,
    /// That the first level does not have.
    pub l1_misses: f64,
    /// Nor the second.
    pub l2_misses: f64,
}

/// Whose order of reading is modelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// A way of the laboratory.
    Way(Way),
    /// Tegula's own: a panel of 1,024 inputs is decoded, then all tokens pass over it.
    Panel,
}

impl Order {
    /// As reports name it.
    pub fn name(self) -> &'static str {
        match self {
            Order::Way(way) => way.name(),
            Order::Panel => "tegula",
        }
    }
}

/// Where things lie in the model's memory.
const WEIGHTS: u64 = 0;
const ACTS: u64 = 1 << 40;
const PANEL: u64 = 2 << 40;

/// Runs `strips` strips of 16 rows of `k` weights of `bits` bits with `m` tokens through the
/// caches of this size.
pub fn traffic(caches: &Caches, order: Order, strips: u64, k: u64, bits: u64, m: u64) -> Traffic {
    let mut l1 = Level::new(caches.l1.max(32 << 10), 12);
    let mut l2 = Level::new(caches.l2.max(256 << 10), 16);
    let mut reads = 0;
    let mut read = |base: u64, from: u64, to: u64| {
        for line in (base + from) / LINE..(base + to).div_ceil(LINE) {
            reads += 1;
            if !l1.touch(line) {
                l2.touch(line);
            }
        }
    };
    let row = k * bits / 8;
    for s in 0..strips {
        let strip = s * 16 * row;
        match order {
            // 16 tokens, then the next: each row passes over each of them.
            Order::Way(Way::RowWise | Way::RowWiseOnce) => {
                let once = matches!(order, Order::Way(Way::RowWiseOnce));
                let most = if once { 8 } else { 1 };
                for first in (0..m).step_by(16) {
                    for r in 0..16 {
                        for t in (first..m.min(first + 16)).step_by(most) {
                            read(WEIGHTS, strip + r * row, strip + (r + 1) * row);
                            let end = m.min(t + most as u64);
                            read(ACTS, t * k, end * k);
                        }
                    }
                }
            }
            Order::Way(way) => {
                let most = way.tokens();
                let width = if way == Way::InterleavedFloats { 4 } else { 1 };
                for t in (0..m).step_by(most) {
                    // Along k together, in stretches of 256 inputs.
                    for at in (0..k).step_by(256) {
                        let from = strip + 16 * at * bits / 8;
                        read(WEIGHTS, from, from + 16 * 256 * bits / 8);
                        let end = m.min(t + most as u64);
                        let stride = (end - t) * width;
                        read(
                            ACTS,
                            t * k * width + at * stride,
                            t * k * width + (at + 256) * stride,
                        );
                    }
                }
            }
            Order::Panel => {
                for at in (0..k).step_by(1024) {
                    let len = 1024.min(k - at);
                    let from = strip + 16 * at * bits / 8;
                    read(WEIGHTS, from, from + 16 * len * bits / 8);
                    for t in (0..m).step_by(8) {
                        // One token multiplies straight from the strip.
                        if m > 1 {
                            read(PANEL, 0, 16 * len);
                        }
                        let tokens = 8.min(m - t);
                        read(ACTS, t * k + at * tokens, t * k + (at + len) * tokens);
                    }
                }
            }
        }
    }
    let per = 1_000.0 / (strips * 16 * k * m) as f64;
    Traffic {
        reads: reads as f64 * per,
        l1_misses: l1.misses as f64 * per,
        l2_misses: l2.misses as f64 * per,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CACHES: Caches = Caches {
        l1: 48 << 10,
        l2: 2 << 20,
        l3: 0,
    };

    #[test]
    fn what_was_used_last_stays() {
        let mut level = Level::new(4 * LINE, 2);
        assert!(!level.touch(0) && !level.touch(2) && level.touch(0));
        // 2 is the oldest of its set.
        assert!(!level.touch(4) && level.touch(0) && !level.touch(2));
        assert_eq!(level.misses, 4);
    }

    #[test]
    fn sharing_what_is_read_saves_traffic() {
        let of = |order, m| traffic(&CACHES, order, 4, 4096, 4, m);
        let each = of(Order::Way(Way::InterleavedEach), 64);
        let once = of(Order::Way(Way::Interleaved), 64);
        assert!(each.reads > 2.0 * once.reads, "{each:?} {once:?}");
        // A single token reads every weight once whatever the way.
        let (row, strip) = (of(Order::Way(Way::RowWise), 1), of(Order::Panel, 1));
        let weights = 1000.0 * 0.5 / 64.0;
        assert!(row.l2_misses >= weights * 0.99 && strip.l2_misses >= weights * 0.99);
        assert!(strip.reads < row.reads);
        assert!(of(Order::Panel, 512).l2_misses < of(Order::Panel, 8).l2_misses);
    }
}
