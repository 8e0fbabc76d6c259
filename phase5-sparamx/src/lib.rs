//! Phase 5: sparse AMX. The pruner, SparAMX's positions, the checks and the measurements; the
//! format is in `tegula-gguf`, the kernels in `tegula-kernels`.
#![forbid(unsafe_code)]

pub mod bench;
mod checks;
pub mod prune;
pub mod report;
pub mod sparamx;

pub use checks::checks;
use tegula_lab::{Bench, Phase};

/// The phase, as the master task list describes it.
pub fn phase() -> Phase {
    Phase {
        number: 5,
        title: "Sparse AMX",
        goal: "SparAMX's unstructured sparsity in GGUF, right at any shape and faster \
               than its dense twin; and the truth about quality at equal bytes.",
        checks: checks(),
        benches: vec![Bench {
            title: "sparse products beside dense ones",
            requires: &[],
            run: bench::run,
        }],
        tables: Vec::new(),
    }
}
