//! Phase 5: sparse AMX. Holds the phase's own code as it comes, and its checks.
#![forbid(unsafe_code)]

pub mod prune;

use tegula_lab::{Check, Need, Phase, unbuilt};

/// The phase, as the master task list describes it.
pub fn phase() -> Phase {
    Phase {
        number: 5,
        title: "Sparse AMX",
        goal: "SparAMX's unstructured sparsity in GGUF, right at any shape and faster \
               than its dense twin; and the truth about quality at equal bytes.",
        checks: checks(),
        benches: Vec::new(),
        tables: Vec::new(),
    }
}

/// Tasks 5.1 to 5.10.
pub fn checks() -> Vec<Check> {
    const SPA: Need = Need::Unbuilt("the sparse formats");
    vec![
        Check {
            id: "5.1",
            title: "what SparAMX does and where it is wrong, reproduced from its own \
                    layout",
            requires: &[SPA],
            run: unbuilt,
        },
        Check {
            id: "5.2",
            title: "sparse formats in GGUF: versioned, documented, read and written",
            requires: &[SPA],
            run: unbuilt,
        },
        Check {
            id: "5.3",
            title: "pack and unpack are bit-exact at every sparsity, shape and thread \
                    count",
            requires: &[SPA],
            run: unbuilt,
        },
        Check {
            id: "5.4",
            title: "the pruner: magnitude and Wanda, unstructured and N:M, resumable",
            requires: &[SPA],
            run: unbuilt,
        },
        Check {
            id: "5.5",
            title: "register kernels for batches 1 to 4 equal dense on the same \
                    zero-filled weights",
            requires: &[SPA],
            run: unbuilt,
        },
        Check {
            id: "5.6",
            title: "AMX kernels for larger batches equal dense on the same zero-filled \
                    weights",
            requires: &[SPA, Need::Amx],
            run: unbuilt,
        },
        Check {
            id: "5.7",
            title: "sparse experts, fused",
            requires: &[SPA],
            run: unbuilt,
        },
        Check {
            id: "5.8",
            title: "sparse attention over finished blocks of the KV cache",
            requires: &[SPA],
            run: unbuilt,
        },
        Check {
            id: "5.9",
            title: "speed: sparse over dense, interleaved in one process",
            requires: &[SPA],
            run: unbuilt,
        },
        Check {
            id: "5.10",
            title: "quality by method, sparsity and format, at equal bytes",
            requires: &[SPA],
            run: unbuilt,
        },
    ]
}
