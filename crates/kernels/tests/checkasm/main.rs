//! Every kernel of every tier against scalar, after dav1d's checkasm: seeded random inputs,
//! awkward lengths, buffers that end at guard pages. Tiers that the CPU lacks show up as
//! ignored tests.

mod amx;
mod attention;
mod data;
mod float;
mod guard;
mod matmul;
mod moe;
mod rope;

use libtest_mimic::{Arguments, Failed, Trial};
use tegula_kernels::Tier;

/// A deterministic stream of numbers.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed ^ 0x5851_f42d_4c95_7f2d)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
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

/// One trial per tier.
pub fn per_tier(
    trials: &mut Vec<Trial>,
    name: &str,
    check: impl Fn(Tier) -> Result<(), Failed> + Send + Copy + 'static,
) {
    for tier in Tier::ALL {
        let trial = Trial::test(format!("{name}::{tier}"), move || check(tier));
        trials.push(trial.with_ignored_flag(!tier.available()));
    }
}

fn main() {
    let mut trials = Vec::new();
    float::trials(&mut trials);
    attention::trials(&mut trials);
    matmul::trials(&mut trials);
    moe::trials(&mut trials);
    rope::trials(&mut trials);
    amx::trials(&mut trials);
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}
