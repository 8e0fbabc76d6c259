//! Phase 2: performance. Holds the phase's own code as it comes, and its checks.
#![forbid(unsafe_code)]

pub mod bench;
pub mod embedded;

use tegula_lab::{Bench, Check, Need, Phase, unbuilt};

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
    }
}

/// Tasks 2.1 to 2.6.
pub fn checks() -> Vec<Check> {
    const GPU: Need = Need::Unbuilt("crates/cuda and the placement of layers on GPUs");
    const LAB: Need = Need::Unbuilt("the benchmark laboratory");
    vec![
        Check {
            id: "2.1",
            title: "the matrix runner: warm-up, raw samples, median, p10 and p90; \
                    noisy, dirty and emulated runs are refused",
            requires: &[LAB],
            run: unbuilt,
        },
        Check {
            id: "2.2",
            title: "probes of memory and cache bandwidth and of compute peaks, scalar \
                    to AMX",
            requires: &[LAB],
            run: unbuilt,
        },
        Check {
            id: "2.3",
            title: "AMX beats the baseline in every cell of the matrix that the \
                    planner gives to it",
            requires: &[LAB, Need::Amx],
            run: unbuilt,
        },
        Check {
            id: "2.4",
            title: "GPU and hybrid runs are no slower with `--amx`, and beat the peers",
            requires: &[GPU, Need::Gpus(1)],
            run: unbuilt,
        },
        Check {
            id: "2.5",
            title: "decode and prefill against llama.cpp and ik_llama.cpp, interleaved \
                    in one run",
            requires: &[LAB],
            run: unbuilt,
        },
        Check {
            id: "2.6",
            title: "every table of the report is regenerated from records alone",
            requires: &[LAB],
            run: unbuilt,
        },
    ]
}
