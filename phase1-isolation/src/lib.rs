//! Phase 1: isolation. Holds the phase's own code as it comes, and its checks.
#![forbid(unsafe_code)]

use tegula_lab::{Check, Need, Phase, unbuilt};

/// The phase, as the master task list describes it.
pub fn phase() -> Phase {
    Phase {
        number: 1,
        title: "Isolation",
        goal: "AMX is strictly opt-in. Without `--amx` the program is the one that \
               has no AMX code; with it, AMX buffers hold CPU-resident weights alone, \
               and GPUs, one or several, work as before.",
        checks: checks(),
        benches: Vec::new(),
    }
}

/// Tasks 1.1 to 1.8.
pub fn checks() -> Vec<Check> {
    const AMXE: Need = Need::Unbuilt("the AMX tier of the kernels and the engine's `--amx`");
    const GPU: Need = Need::Unbuilt("crates/cuda and the placement of layers on GPUs");
    vec![
        Check {
            id: "1.1",
            title: "without `--amx` logits, plan, allocation sizes and thread chunking \
                    equal those of a build that has no AMX code",
            requires: &[AMXE],
            run: unbuilt,
        },
        Check {
            id: "1.2",
            title: "without `--amx` no AMX instruction runs and XCOMP permission bit \
                    18 stays unset",
            requires: &[AMXE],
            run: unbuilt,
        },
        Check {
            id: "1.3",
            title: "with `--amx` every eligible CPU-resident weight is packed for AMX, \
                    and nothing else is",
            requires: &[AMXE],
            run: unbuilt,
        },
        Check {
            id: "1.4",
            title: "`--amx` where AMX can't be had names the cause and exits with 4; \
                    aborting AMX code is never reached without it",
            requires: &[AMXE],
            run: unbuilt,
        },
        Check {
            id: "1.5",
            title: "full offload (`-ngl all`) with `--amx` leaves no AMX bytes, and \
                    the same tokens",
            requires: &[GPU, Need::Gpus(1)],
            run: unbuilt,
        },
        Check {
            id: "1.6",
            title: "hybrids keep AMX on the CPU's share; what is on the GPU is the \
                    same with and without `--amx`",
            requires: &[GPU, Need::Amx, Need::Gpus(1)],
            run: unbuilt,
        },
        Check {
            id: "1.7",
            title: "two and three devices, split by layer or by tensor, give the \
                    tokens of one",
            requires: &[GPU, Need::Gpus(1)],
            run: unbuilt,
        },
        Check {
            id: "1.8",
            title: "the whole matrix: `--amx` or not, no, part or all layers \
                    offloaded, no to three devices",
            requires: &[GPU, Need::Gpus(1)],
            run: unbuilt,
        },
    ]
}
