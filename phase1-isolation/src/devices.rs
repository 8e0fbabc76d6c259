//! Tasks 1.5 to 1.8 on simulated devices: a model on none to three of them, by layers or with
//! every layer split, with AMX and without. AMX is emulated, so that its instructions are
//! counted; that silicon gives the emulator's logits is another check.

use std::{path::Path, sync::Arc};

use tegula_engine::{
    Batch, Context, ContextOptions, LoadOptions, Model, ModelConfig,
    offload::{GpuLayers, Split},
    plan,
    plan::{Device, Placement, Plan, TileUse},
};
use tegula_kernels::{Amx, Tier, amx::has_permission, device::sim::SimDevice};

use crate::probe::{TOKENS, options, trap};

/// Tokens that follow the prompt, each the likeliest without devices and AMX.
const NEXT: usize = 4;

/// Logits may differ so far, of the largest: AMX rounds activations to bf16 where vectors round
/// them to eight bits, and split layers sum in another order, of which some is then rounded.
pub(crate) const BOUND: f32 = 0.02;

/// Where that makes a router choose another expert, of two that it finds alike, they may differ
/// so far, once in a run.
const ANOTHER_EXPERT: f32 = 0.08;

/// How much is on devices.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Share {
    Nothing,
    /// Some of the layers.
    Part,
    /// All layers, the experts not.
    NoExperts,
    Everything,
}

/// One way to run the model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cell {
    pub devices: usize,
    pub split: Split,
    pub share: Share,
    pub amx: Option<Amx>,
    /// Devices round as the CPU does with AMX, which no real device does: then what lies where
    /// changes nothing but the order of some sums.
    pub alike: bool,
}

impl Cell {
    pub fn name(&self) -> String {
        let Cell {
            devices,
            split,
            share,
            amx,
            alike,
        } = self;
        let amx = if amx.is_some() { "with" } else { "without" };
        let alike = if *alike { ", devices like the CPU" } else { "" };
        format!("{devices} devices, {split:?} split, {share:?} on them, {amx} AMX{alike}")
    }
}

/// What a cell left behind.
pub(crate) struct Ran {
    pub plan: Plan,
    pub instructions: u64,
    /// Behind the prompt and the tokens that follow, `[vocab]` each.
    logits: Vec<Vec<f32>>,
    /// Per device: bytes in use with the model and a context, bytes of weights brought there.
    resident: Vec<(u64, u64)>,
}

/// Loads the model, runs a prompt and a continuation: the likeliest, or as another run had it.
///
/// # Errors
/// When it can't be run, or `explain` would have said something else.
pub(crate) fn run(model: &Path, cell: &Cell, like: Option<&Ran>) -> Result<Ran, String> {
    let failed = |e: &dyn std::fmt::Display| format!("{}: {e}", cell.name());
    trap()?;
    let tier = Tier::detect_max();
    let sim = |i| {
        let name = format!("SIM{i}");
        match cell.amx.filter(|_| cell.alike) {
            Some(amx) => SimDevice::with_amx(&name, 1 << 30, tier, amx),
            None => SimDevice::new(&name, 1 << 30, tier),
        }
    };
    let sims: Vec<_> = (0..cell.devices).map(|i| Arc::new(sim(i))).collect();
    let devices = sims.iter().map(|d| Arc::clone(d) as _).collect();
    let mut load = options(model, tier, cell.amx, 2)
        .with_devices(devices)
        .map_err(|e| failed(&e))?;
    let gguf = load.open().map_err(|e| failed(&e))?;
    let config = ModelConfig::from_gguf(&gguf).map_err(|e| failed(&e))?;
    let flags = &mut load.offload;
    flags.margin = 0;
    flags.context = TOKENS + NEXT;
    flags.split = cell.split;
    flags.layers = GpuLayers::Count(match cell.share {
        Share::Nothing => 0,
        Share::Part => config.layers / 2,
        Share::NoExperts | Share::Everything => usize::MAX,
    });
    if cell.share == Share::NoExperts {
        flags.cpu_moe = usize::MAX;
    }
    let before = amx_emu::total();
    let explained = plan(&config, &gguf, &load.plan_flags());
    if amx_emu::total() != before || sims.iter().any(|d| d.used() > 0) {
        return Err(format!("{}: planning has loaded something", cell.name()));
    }
    let model = loaded(&load).map_err(|e| failed(&e))?;
    let (planned, executed) = (json(&explained)?, json(model.plan())?);
    if planned != executed {
        return Err(format!("{}: explain says otherwise", cell.name()));
    }
    let small = ContextOptions {
        context: TOKENS + NEXT,
        ..ContextOptions::default()
    };
    let mut context = Context::new(Arc::clone(&model), &small).map_err(|e| failed(&e))?;
    let resident = |d: &Arc<SimDevice>| (d.used(), d.copies().weights);
    let resident = sims.iter().map(resident).collect();
    let ids: Vec<u32> = (1..=TOKENS as u32).collect();
    let mut outputs = context
        .decode(&Batch::prompt(0, &ids))
        .map_err(|e| failed(&e))?;
    let mut logits = vec![outputs.logits(0).to_vec()];
    for i in 0..NEXT {
        let next = likeliest(&like.map_or(&logits, |other| &other.logits)[i]);
        outputs = context
            .decode(&Batch::prompt(0, &[next as u32]))
            .map_err(|e| failed(&e))?;
        logits.push(outputs.logits(0).to_vec());
    }
    if has_permission() {
        return Err(format!("{}: the permission is set", cell.name()));
    }
    Ok(Ran {
        plan: explained,
        instructions: amx_emu::total() - before,
        logits,
        resident,
    })
}

fn loaded(load: &LoadOptions) -> tegula_engine::Result<Arc<Model>> {
    Model::load(load, &mut |_| {}).map(Arc::new)
}

fn json(plan: &Plan) -> Result<serde_json::Value, String> {
    serde_json::to_value(plan).map_err(|e| e.to_string())
}

/// The number of the largest.
pub(crate) fn likeliest(logits: &[f32]) -> usize {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.map_or(0, |(i, _)| i)
}

/// What of a plan is on devices.
fn on_devices(plan: &Plan) -> Vec<&Placement> {
    let there = |p: &&Placement| p.device != Device::Cpu;
    plan.placements.iter().filter(there).collect()
}

/// A matrix that AMX multiplies where it lies on the CPU.
fn on_tiles(p: &Placement) -> bool {
    matches!(p.tiles, Some(TileUse::From(_)))
}

fn largest(logits: &[f32]) -> f32 {
    logits.iter().fold(0.0, |m, v| m.max(v.abs()))
}

/// How far logits are from others, of the largest of these; not a number where one isn't.
pub(crate) fn distance(logits: &[f32], others: &[f32]) -> f32 {
    let most = logits.iter().zip(others).map(|(a, b)| (a - b).abs());
    // `max` would pass over what is no number.
    let most = most.fold(0.0, |m: f32, d| if m.is_nan() || d <= m { m } else { d });
    most / largest(others)
}

/// The same logits and tokens: to the bit, or as near as [`BOUND`] says.
///
/// # Errors
/// Names the first difference.
fn agree(cell: &Cell, ran: &Ran, other: &Ran, exact: bool) -> Result<(), String> {
    near(&cell.name(), &ran.logits, &other.logits, exact)
}

/// The same of rows of logits, `[vocab]` each.
///
/// # Errors
/// Names the first difference.
pub(crate) fn near(
    name: &str,
    rows: &[Vec<f32>],
    other: &[Vec<f32>],
    exact: bool,
) -> Result<(), String> {
    let wrong = |what: String| Err(format!("{name}: {what}"));
    if rows.len() != other.len() {
        return wrong(format!(
            "{} rows of logits and not {}",
            rows.len(),
            other.len()
        ));
    }
    let mut others = usize::from(!exact);
    for (i, (got, want)) in rows.iter().zip(other).enumerate() {
        let apart = distance(got, want);
        let mut bound = if exact { 0.0 } else { BOUND };
        if apart > bound && others > 0 {
            others -= 1;
            bound = ANOTHER_EXPERT;
        }
        if apart.is_nan() || apart > bound {
            return wrong(format!("logits {i} differ by {apart} of the largest"));
        }
        // Another token only where the other finds it as likely, within the bound.
        let (a, b) = (likeliest(got), likeliest(want));
        if (want[b] - want[a]) / largest(want) > bound {
            return wrong(format!("token {i} is {a}, on the CPU {b}"));
        }
    }
    Ok(())
}

/// What must hold of `ran`, beside the same on the CPU alone with AMX as here, and beside the
/// same without AMX.
///
/// # Errors
/// The first thing that does not hold.
pub(crate) fn holds(
    cell: &Cell,
    ran: &Ran,
    cpu: &Ran,
    without: Option<&Ran>,
) -> Result<(), String> {
    let wrong = |what: String| Err(format!("{}: {what}", cell.name()));
    // Devices compute with the vector kernels of the CPU.
    let exact = cell.amx.is_none() && cell.split != Split::Tensor;
    agree(cell, ran, cpu, exact)?;
    for (p, known) in ran.plan.placements.iter().zip(&cpu.plan.placements) {
        let here = p.device == Device::Cpu;
        if here && (&p.kernel, p.bytes, p.buffer) != (&known.kernel, known.bytes, known.buffer) {
            // The output matrix's copy on a device leaves the embedding to look-ups.
            if !p.reason.contains("looked up") {
                return wrong(format!(
                    "{}: {} and not {}",
                    p.tensor, p.kernel, known.kernel
                ));
            }
        }
        if !here && (on_tiles(p) || p.kernel.contains("amx")) {
            return wrong(format!("{}: AMX on a device", p.tensor));
        }
    }
    let tiles = ran.plan.placements.iter().filter(|p| on_tiles(p)).count();
    let everything = cell.share == Share::Everything && cell.devices > 0;
    if (ran.instructions > 0) != (cell.amx.is_some() && !everything) {
        return wrong(format!("{} AMX instructions", ran.instructions));
    }
    if (tiles > 0) != (cell.amx.is_some() && !everything) {
        return wrong(format!("{tiles} matrices on tiles"));
    }
    let Some(without) = without else {
        return Ok(());
    };
    if ran.resident != without.resident {
        return wrong("devices hold other bytes than without AMX".to_owned());
    }
    let place = |p: &&Placement| {
        let of = (p.tensor.clone(), p.device, p.bytes, p.parts.clone());
        (of, p.kernel.clone(), p.encoding)
    };
    let (a, b) = (on_devices(&ran.plan), on_devices(&without.plan));
    if !a.iter().map(place).eq(b.iter().map(place)) || ran.plan.devices != without.plan.devices {
        return wrong("devices hold other tensors than without AMX".to_owned());
    }
    Ok(())
}

/// Runs cells with AMX and without, beside the CPU alone. Returns how many cells held.
///
/// # Errors
/// Names the first cell where something doesn't hold.
pub(crate) fn matrix(
    model: &Path,
    amx: Amx,
    counts: &[usize],
    splits: &[Split],
    shares: &[Share],
) -> Result<usize, String> {
    let alone = |amx| Cell {
        devices: 0,
        split: Split::Layer,
        share: Share::Nothing,
        amx,
        alike: false,
    };
    let cpu_without = run(model, &alone(None), None)?;
    let cpu_with = run(model, &alone(Some(amx)), Some(&cpu_without))?;
    holds(&alone(Some(amx)), &cpu_with, &cpu_with, Some(&cpu_without))?;
    holds(&alone(None), &cpu_without, &cpu_without, None)?;
    let mut cells = 2;
    for &devices in counts {
        for &split in splits {
            for &share in shares {
                let cell = |amx| Cell {
                    devices,
                    split,
                    share,
                    amx,
                    alike: false,
                };
                let without = run(model, &cell(None), Some(&cpu_without))?;
                holds(&cell(None), &without, &cpu_without, None)?;
                let with = run(model, &cell(Some(amx)), Some(&cpu_without))?;
                // With everything on devices there is nothing that AMX could change.
                let beside = match share {
                    Share::Everything => &cpu_without,
                    _ => &cpu_with,
                };
                holds(&cell(Some(amx)), &with, beside, Some(&without))?;
                if [Share::Part, Share::NoExperts].contains(&share) {
                    let cell = Cell {
                        alike: true,
                        ..cell(Some(amx))
                    };
                    let alike = run(model, &cell, Some(&cpu_without))?;
                    agree(&cell, &alike, &cpu_with, split == Split::Layer)?;
                    cells += 1;
                }
                if share == Share::Everything && with.logits != without.logits {
                    return Err(format!(
                        "{}: other logits than without",
                        cell(Some(amx)).name()
                    ));
                }
                cells += 2;
            }
        }
    }
    Ok(cells)
}
