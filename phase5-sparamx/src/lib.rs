//! Phase 5: sparse AMX. The pruner, SparAMX's positions, the checks and the measurements; the
//! format is in `tegula-gguf`, the kernels in `tegula-kernels`.
#![forbid(unsafe_code)]

pub mod bench;
mod checks;
pub mod prune;
pub mod quality;
pub mod report;
pub mod sparamx;

pub use checks::checks;
use tegula_lab::{Bench, Env, Need, Phase, Series};

/// The phase, as the master task list describes it.
pub fn phase() -> Phase {
    Phase {
        number: 5,
        title: "Sparse AMX",
        goal: "SparAMX's unstructured sparsity in GGUF, right at any shape and faster \
               than its dense twin; and the truth about quality at equal bytes.",
        checks: checks(),
        benches: benches(),
        tables: Vec::new(),
    }
}

type Measure = fn(&Env) -> Result<Vec<Series>, String>;

const fn on(title: &'static str, requires: &'static [Need], run: Measure) -> Bench {
    Bench {
        title,
        requires,
        run,
    }
}

fn benches() -> Vec<Bench> {
    let mut all = vec![
        on("sparse products beside dense ones", &[], bench::run),
        on(
            "attention to a pruned cache of 16,384 positions beside a dense one",
            &[],
            bench::attention::run,
        ),
    ];
    #[cfg(feature = "amx")]
    all.push(on(
        "register kernels beside SparAMX's staged algorithm",
        &[Need::Amx, Need::Avx512],
        bench::staged::run,
    ));
    all.push(on(
        "whole models of random weights, sparse and dense",
        &[],
        bench::whole::run,
    ));
    all
}
