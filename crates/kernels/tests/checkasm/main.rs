//! Every kernel of every tier against scalar, after dav1d's checkasm: seeded random inputs,
//! awkward lengths, buffers that end at guard pages. Tiers that the CPU lacks show up as
//! ignored tests.

#[cfg(feature = "amx")]
mod amx;
mod attention;
mod data;
mod float;
mod guard;
mod matmul;
mod moe;
mod random;
mod rope;
mod sparse;

use libtest_mimic::{Arguments, Failed, Trial};
use random::Random;
use tegula_kernels::Tier;

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
    sparse::trials(&mut trials);
    #[cfg(feature = "amx")]
    amx::trials(&mut trials);
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}
