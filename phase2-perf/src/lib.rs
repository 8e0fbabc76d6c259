//! Phase 2: performance. Holds the phase's own code as it comes, and its checks.
#![forbid(unsafe_code)]

pub mod bench;
mod checks;
pub mod cost;
pub mod embedded;
pub mod matrix;
pub mod peers;
pub mod plot;
pub mod probe;
pub mod quiet;
pub mod ranges;
pub mod record;
pub mod report;
pub mod stats;

pub use checks::checks;
use tegula_lab::{Bench, Phase};

/// The phase, as the master task list describes it.
pub fn phase() -> Phase {
    Phase {
        number: 2,
        title: "Performance",
        goal: "The engine with AMX beats the baseline, and decode runs at the \
               memory's speed: as ratios taken in one run on one machine, against the \
               roofline and against llama.cpp and ik_llama.cpp, from records that \
               anyone can make again.",
        checks: checks(),
        benches: vec![Bench {
            title: "the embedded model, end to end, at every tier",
            requires: &[],
            run: embedded::tiers,
        }],
        tables: Vec::new(),
    }
}
