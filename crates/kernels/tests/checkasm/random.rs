//! Numbers for tests and benches.

use tegula_gguf::fuzz::driver;

/// A deterministic stream of numbers.
pub struct Random(driver::Random);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(driver::Random::new(seed ^ 0x5851_f42d_4c95_7f2d))
    }

    pub fn bits(&mut self) -> u64 {
        self.0.next_u64()
    }

    pub fn below(&mut self, n: usize) -> usize {
        self.0.below(n)
    }

    /// About normal, standard deviation 1.
    pub fn normal(&mut self) -> f32 {
        let sum: f32 = (0..12)
            .map(|_| (self.bits() >> 40) as f32 / (1u64 << 24) as f32)
            .sum();
        sum - 6.0
    }

    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }
}
