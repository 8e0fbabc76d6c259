//! Tasks 1.1 to 1.8.

use std::path::PathBuf;

use tegula_engine::plan::Placement;
use tegula_gguf::{GgmlType, Gguf};
use tegula_kernels::{Amx, Tier};
use tegula_lab::{Check, Env, Need, Outcome, Phase, unbuilt};

use crate::probe::{Seen, probe};

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
    const GPU: Need = Need::Unbuilt("crates/cuda and the placement of layers on GPUs");
    vec![
        Check {
            id: "1.1",
            title: "without `--amx` logits, plan, allocation sizes and thread chunking \
                    equal those of a build that has no AMX code",
            requires: &[Need::Unbuilt("a build without AMX code to compare with")],
            run: unbuilt,
        },
        Check {
            id: "1.2",
            title: "without `--amx` no AMX instruction runs and XCOMP permission bit \
                    18 stays unset",
            requires: &[Need::Avx2],
            run: |env| untouched(env).into(),
        },
        Check {
            id: "1.3",
            title: "with `--amx` every eligible CPU-resident weight is multiplied on AMX \
                    tiles, and nothing else is placed otherwise",
            requires: &[Need::Avx2],
            run: |env| eligible(env).into(),
        },
        Check {
            id: "1.4",
            title: "`--amx` where AMX can't be had names the cause and exits with 4; \
                    aborting AMX code is never reached without it",
            requires: &[Need::Unbuilt("a build whose AMX code aborts")],
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

/// The model that ships with the program.
fn model(env: &Env) -> PathBuf {
    env.root
        .join("crates/tegula/assets/ferrous-moe-21m-Q4_0.gguf")
}

fn emulated() -> Result<Amx, String> {
    Amx::emulate().map_err(|e| e.to_string())
}

/// Task 1.2. The last run, with AMX, shows that the probe would have seen it.
fn untouched(env: &Env) -> Result<Outcome, String> {
    let mut facts = Vec::new();
    let touched = |seen: &Seen| format!("{} AMX instructions", seen.instructions);
    for tier in Tier::ALL.into_iter().filter(|tier| tier.available()) {
        let seen = probe(&model(env), tier, None)?;
        if seen.instructions > 0 || seen.permission {
            let asked = if seen.permission {
                ", permission set"
            } else {
                ""
            };
            return Err(format!("{tier}: {}{asked}", touched(&seen)));
        }
        facts.push((
            tier.to_string(),
            format!("{}, no permission", touched(&seen)),
        ));
    }
    let seen = probe(&model(env), Tier::detect_max(), Some(emulated()?))?;
    if seen.instructions == 0 {
        return Err("the probe sees no AMX instruction where there must be some".to_owned());
    }
    facts.push(("emulated, as a control".to_owned(), touched(&seen)));
    Ok(Outcome::passed(facts))
}

/// Task 1.3.
fn eligible(env: &Env) -> Result<Outcome, String> {
    let path = model(env);
    let tier = Tier::detect_max();
    let without = probe(&path, tier, None)?.plan;
    let amx = emulated()?;
    let with = probe(&path, tier, Some(amx))?.plan;
    let gguf = Gguf::open(&path).map_err(|e| e.to_string())?;
    let mut on_tiles = 0;
    for (a, b) in without.placements.iter().zip(&with.placements) {
        let tensor = gguf
            .tensor(&a.tensor)
            .ok_or("a tensor that is in no file")?;
        // The embedded model multiplies with all its matrices; routers are F32.
        let wanted = tensor.shape.len() > 1
            && tensor.ty != GgmlType::F32
            && tensor.row_len().is_multiple_of(32);
        let place = |p: &Placement| (p.tensor.clone(), p.device, p.buffer, p.encoding, p.bytes);
        if place(a) != place(b) {
            return Err(format!("{}: {a:?} without, {b:?} with", a.tensor));
        }
        if b.kernel.contains(amx.name()) != wanted || a.kernel.contains("amx") {
            return Err(format!(
                "{}: `{}` without, `{}` with",
                a.tensor, a.kernel, b.kernel
            ));
        }
        on_tiles += usize::from(wanted);
    }
    match (on_tiles, without.placements.len() == with.placements.len()) {
        (0, _) => Err("the model has nothing for AMX".to_owned()),
        (_, false) => Err("the plans have different tensors".to_owned()),
        (n, true) => Ok(Outcome::passed([(
            "matrices on tiles",
            format!("{n} of {} tensors", with.placements.len()),
        )])),
    }
}
