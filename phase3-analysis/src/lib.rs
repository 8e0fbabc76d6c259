//! Phase 3: analysis. The same products written in several ways, timed in turns, and what
//! explains the difference: instructions, lines moved, and what each idea is worth alone.
#![forbid(unsafe_code)]

pub mod ablations;
pub mod cache;
mod checks;
pub mod code;
pub mod data;
pub mod lab;
pub mod products;
pub mod report;
pub mod series;

pub use checks::checks;
use tegula_lab::{Bench, Need, Phase};

/// The phase, as the master task list describes it.
pub fn phase() -> Phase {
    Phase {
        number: 3,
        title: "Analysis",
        goal: "Why ik_llama.cpp beats llama.cpp on CPUs: the same products written \
               each way in one laboratory, and what explains the difference, in \
               bytes, instructions and waits.",
        checks: checks(),
        benches: vec![Bench {
            title: "the laboratory: limits, code, caches, products each way, ablations",
            requires: &[Need::Avx2],
            run: lab::run,
        }],
        tables: Vec::new(),
    }
}
