//! Every kernel of every tier against scalar, after dav1d's checkasm: seeded random inputs,
//! awkward lengths, buffers that end at guard pages. Tiers that the CPU lacks show up as
//! ignored tests.

mod attention;
mod float;
mod guard;

use libtest_mimic::{Arguments, Failed, Trial};
use tegula_kernels::{Kernels, Tier};

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

/// Fails unless `got` is within `relative` of `want`, measured against the larger of the
/// value and `floor`.
pub fn close(
    what: &str,
    got: &[f32],
    want: &[f32],
    relative: f32,
    floor: f32,
) -> Result<(), Failed> {
    if got.len() != want.len() {
        return Err(format!("{what}: {} values instead of {}", got.len(), want.len()).into());
    }
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        let bound = relative * w.abs().max(floor);
        if !((g - w).abs() <= bound || g == w || g.is_nan() && w.is_nan()) {
            return Err(format!("{what}: element {i} is {g}, scalar says {w}").into());
        }
    }
    Ok(())
}

/// One trial per tier; `check` gets the tier's table and scalar's.
pub fn per_tier(
    trials: &mut Vec<Trial>,
    name: &str,
    check: fn(&Kernels, &Kernels) -> Result<(), Failed>,
) {
    for tier in Tier::ALL {
        let run = move || check(Kernels::for_tier(tier), Kernels::for_tier(Tier::Scalar));
        let trial = Trial::test(format!("{name}::{tier}"), run);
        trials.push(trial.with_ignored_flag(!tier.available()));
    }
}

fn main() {
    let mut trials = Vec::new();
    float::trials(&mut trials);
    attention::trials(&mut trials);
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}
