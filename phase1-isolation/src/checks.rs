//! Tasks 1.1 to 1.8, and what holds on a real GPU.

use std::{os::unix::process::ExitStatusExt as _, path::PathBuf};

use tegula_engine::{offload::Split, plan::Placement};
use tegula_gguf::{GgmlType, Gguf};
use tegula_kernels::{Amx, Tier};
use tegula_lab::{Check, Env, Need, Outcome, Phase};

use crate::{
    devices::{self, Share},
    gpu, matrix,
    probe::{Seen, probe},
    programs::{Program, Variant, probe_arguments},
};

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
        tables: Vec::new(),
    }
}

/// Tasks 1.1 to 1.8.
pub fn checks() -> Vec<Check> {
    vec![
        Check {
            id: "1.1",
            title: "without `--amx` logits, plan, allocation sizes and thread chunking \
                    equal those of a build that has no AMX code",
            requires: &[],
            run: |env| same_as_without(env).into(),
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
            requires: &[Need::Avx2],
            run: |env| refused_and_unreached(env).into(),
        },
        Check {
            id: "1.5",
            title: "full offload (`-ngl all`) with `--amx` leaves no AMX bytes, and \
                    the same tokens",
            requires: &[Need::Avx2],
            run: |env| on_devices(env, &[1], &[Share::Everything]).into(),
        },
        Check {
            id: "1.6",
            title: "hybrids keep AMX on the CPU's share; what is on the GPU is the \
                    same with and without `--amx`",
            requires: &[Need::Avx2],
            run: |env| on_devices(env, &[1, 2], &[Share::NoExperts]).into(),
        },
        Check {
            id: "1.7",
            title: "two and three devices, split by layer or by tensor, give the \
                    tokens of one",
            requires: &[Need::Avx2],
            run: |env| on_devices(env, &[2, 3], &[Share::Everything]).into(),
        },
        Check {
            id: "1.8",
            title: "the whole matrix: `--amx` or not, no, part or all layers \
                    offloaded, no to three devices",
            requires: &[Need::Avx2],
            run: |env| whole_matrix(env).into(),
        },
    ]
}

/// What only a real GPU can show: `cargo xtask gpu`.
pub fn gpu_checks() -> Vec<Check> {
    vec![
        Check {
            id: "gpu.1",
            title: "perplexity on a GPU is within 0.5 % of the CPU's for every shared model and \
                    every format that can be written, and the same bits in every run",
            requires: &[Need::Gpus(1), Need::Shared],
            run: |env| gpu::perplexities(env).into(),
        },
        Check {
            id: "gpu.2",
            title: "on a GPU, full offload, hybrids, streams and split devices give the CPU's \
                    logits and perplexity but for roundings, and recordings the bits of what \
                    they recorded",
            requires: &[Need::Gpus(1)],
            run: |env| {
                let held = text(env).and_then(|t| gpu::placements(&model(env), &t, &gpu::gpus));
                held.into()
            },
        },
        Check {
            id: "gpu.3",
            title: "compute-sanitizer's memcheck, racecheck and synccheck find nothing in the \
                    kernels' trials and the shipped model",
            requires: &[Need::Gpus(1)],
            run: |env| gpu::sanitized(env, &model(env)).into(),
        },
    ]
}

/// A text for perplexities, in the language that the models know.
fn text(env: &Env) -> Result<String, String> {
    let path = env.root.join("docs/ARCHITECTURE.md");
    std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))
}

/// The model that ships with the program.
fn model(env: &Env) -> PathBuf {
    env.root
        .join("crates/tegula/assets/ferrous-moe-21m-Q4_0.gguf")
}

fn emulated() -> Result<Amx, String> {
    Amx::emulate().map_err(|e| e.to_string())
}

fn tiers() -> impl Iterator<Item = Tier> {
    Tier::ALL.into_iter().filter(|tier| tier.available())
}

/// Task 1.1. How many buffers a pool of several threads makes depends on which of them find
/// work, so buffers are compared with one.
fn same_as_without(env: &Env) -> Result<Outcome, String> {
    let model = model(env);
    let without = Program::probe(&env.root, Variant::Without)?;
    let with = Program::probe(&env.root, Variant::With)?;
    let mut facts = Vec::new();
    for tier in tiers() {
        let run = |program: &Program, threads| program.facts(&model, tier, threads, None);
        let (a, b) = (run(&without, 1)?, run(&with, 1)?);
        let (c, mut d) = (run(&without, 2)?, run(&with, 2)?);
        d.allocated = c.allocated;
        let apart = [a.differences(&b), c.differences(&d)].concat();
        if !apart.is_empty() {
            return Err(format!("{tier}: {} differ", apart.join(", ")));
        }
        if a.logits != c.logits {
            return Err(format!("{tier}: the threads change the logits"));
        }
        if a.instructions + c.instructions > 0 || a.permission || c.permission {
            return Err(format!("{tier}: AMX was touched"));
        }
        let [buffers, bytes] = a.allocated;
        let [jobs, tasks, _] = a.dispatched;
        facts.push((
            tier.to_string(),
            format!(
                "{} logits, {} placements, {buffers} buffers of {bytes} bytes, {jobs} jobs of \
                 {tasks} tasks equal",
                a.logits.len(),
                a.plan["placements"].as_array().map_or(0, Vec::len)
            ),
        ));
    }
    // The probe's own control: these must differ, or it compares nothing.
    let tier = Tier::detect_max();
    if tier > Tier::Scalar {
        let off = with.facts(&model, tier, 1, None)?;
        let on = with.facts(&model, tier, 1, Some("emulate"))?;
        let apart = off.differences(&on).join(", ");
        for part in ["AMX instructions", "logits", "the plan", "allocations"] {
            if !apart.contains(part) {
                return Err(format!("with AMX as without: {part}"));
            }
        }
        facts.push((
            "emulated, as a control".to_owned(),
            format!("{apart} differ"),
        ));
    }
    Ok(Outcome::passed(facts))
}

/// Task 1.4.
fn refused_and_unreached(env: &Env) -> Result<Outcome, String> {
    let mut facts = Vec::new();
    // The program as it ships, where the machine has no AMX; and without AMX code, anywhere.
    let run = ["run", "--amx", "-p", "x", "-n", "1"];
    let mut refused = vec![(Variant::Without, "this build has no AMX code")];
    match Need::Amx.lacks(env) {
        Some(_) => refused.push((Variant::With, "the CPU lacks amx")),
        None => facts.push(("tegula with-amx".to_owned(), "the CPU has AMX".to_owned())),
    }
    for (variant, cause) in refused {
        let output = Program::tegula(&env.root, variant)?.run(&run)?;
        let said = String::from_utf8_lossy(&output.stderr);
        let error = said.lines().find(|line| line.starts_with("error: "));
        let error = error.unwrap_or("no error");
        if output.status.code() != Some(4) || !error.contains(cause) || !output.stdout.is_empty() {
            return Err(format!("{variant:?}: {}: {error}", output.status));
        }
        facts.push((format!("tegula {variant:?}"), format!("exit 4, {error}")));
    }
    let model = model(env);
    let (aborting, with) = (
        Program::probe(&env.root, Variant::Aborting)?,
        Program::probe(&env.root, Variant::With)?,
    );
    for tier in tiers() {
        let lived = aborting.facts(&model, tier, 1, None)?;
        let apart = lived.differences(&with.facts(&model, tier, 1, None)?);
        if !apart.is_empty() {
            return Err(format!("{tier}: {} differ", apart.join(", ")));
        }
        facts.push((format!("aborting, {tier}"), "lives, as it ships".to_owned()));
        if tier == Tier::Scalar {
            continue;
        }
        let model = model.to_string_lossy();
        let output = aborting.run(&probe_arguments(&model, tier, "1", Some("emulate")))?;
        let said = String::from_utf8_lossy(&output.stderr);
        let reached = said.lines().find(|line| line.starts_with("amx-abort: "));
        // SIGABRT has this number on every x86-64 Linux.
        match (output.status.signal(), reached) {
            (Some(6), Some(line)) => {
                facts.push((format!("aborting, {tier}, AMX on"), line.to_owned()));
            }
            _ => return Err(format!("{tier}, AMX on: {}: {said}", output.status)),
        }
    }
    Ok(Outcome::passed(facts))
}

/// Tasks 1.5 to 1.7: simulated devices, by layers and with every layer split.
fn on_devices(env: &Env, counts: &[usize], shares: &[Share]) -> Result<Outcome, String> {
    let splits = [Split::Layer, Split::Tensor];
    let cells = devices::matrix(&model(env), emulated()?, counts, &splits, shares)?;
    Ok(Outcome::passed([(
        "cells on simulated devices",
        format!("{cells} hold"),
    )]))
}

/// Task 1.8: the CPU's part, then devices.
fn whole_matrix(env: &Env) -> Result<Outcome, String> {
    let cells = matrix::on_the_cpu(&model(env), emulated()?)?;
    let mut facts = vec![("cells on the CPU".to_owned(), format!("{cells} hold"))];
    let splits = [Split::Layer, Split::Tensor];
    let shares = [Share::Nothing, Share::Part, Share::Everything];
    let cells = devices::matrix(&model(env), emulated()?, &[1, 2, 3], &splits, &shares)?;
    facts.push((
        "cells on simulated devices".to_owned(),
        format!("{cells} hold"),
    ));
    if Need::Amx.lacks(env).is_none() {
        let program = Program::probe(&env.root, Variant::With)?;
        let run = |amx| program.facts(&model(env), Tier::detect_max(), 2, Some(amx));
        let (silicon, emulated) = (run("silicon")?, run("emulate")?);
        if !silicon.permission || silicon.instructions > 0 || silicon.logits != emulated.logits {
            return Err("silicon: not as emulated".to_owned());
        }
        facts.push((
            "silicon".to_owned(),
            "the emulator's logits, bit for bit".to_owned(),
        ));
    }
    Ok(Outcome::passed(facts))
}

/// Task 1.2. The last run, with AMX, shows that the probe would have seen it.
fn untouched(env: &Env) -> Result<Outcome, String> {
    let mut facts = Vec::new();
    let touched = |seen: &Seen| format!("{} AMX instructions", seen.instructions);
    for tier in tiers() {
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
