//! Phase 3: analysis. Holds the phase's own code as it comes, and its checks.
#![forbid(unsafe_code)]

use tegula_lab::{Check, Need, Phase, unbuilt};

/// The phase, as the master task list describes it.
pub fn phase() -> Phase {
    Phase {
        number: 3,
        title: "Analysis",
        goal: "Why ik_llama.cpp beats llama.cpp on CPUs: the same products written \
               each way in one laboratory, and what explains the difference, in \
               bytes, instructions and waits.",
        checks: checks(),
        benches: Vec::new(),
        tables: Vec::new(),
    }
}

/// Tasks 3.1 to 3.6.
pub fn checks() -> Vec<Check> {
    const ANA: Need = Need::Unbuilt("the products written each way");
    vec![
        Check {
            id: "3.1",
            title: "the row-wise product, upstream's way, equals the scalar definition",
            requires: &[ANA],
            run: unbuilt,
        },
        Check {
            id: "3.2",
            title: "the interleaved product with decode-once strips, IQK's way, equals \
                    the scalar definition",
            requires: &[ANA],
            run: unbuilt,
        },
        Check {
            id: "3.3",
            title: "the three ways are timed on the same shapes in one run",
            requires: &[ANA],
            run: unbuilt,
        },
        Check {
            id: "3.4",
            title: "instruction mix, bytes moved and cache behaviour of each way",
            requires: &[ANA],
            run: unbuilt,
        },
        Check {
            id: "3.5",
            title: "ablations: each idea switched off alone",
            requires: &[ANA],
            run: unbuilt,
        },
        Check {
            id: "3.6",
            title: "the report answers with figures and is regenerated from records \
                    alone",
            requires: &[ANA],
            run: unbuilt,
        },
    ]
}
