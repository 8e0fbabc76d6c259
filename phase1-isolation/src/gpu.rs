//! What holds on a real GPU. Where a machine has no build tools, programs that
//! were built elsewhere are named by environment variables.

use std::{
    fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    thread,
};

use tegula_engine::{
    Batch, Context, ContextOptions, LoadOptions, Model, OffloadFlags, Source,
    offload::{GpuLayers, Split},
    perplexity,
};
use tegula_gguf::{
    Gguf,
    quantize::{FileType, QuantizeOptions, quantize},
    tokenizer::EncodeOptions,
};
use tegula_kernels::device::Device;
use tegula_lab::{Env, Outcome};

use crate::devices::{BOUND, distance, likeliest, near};
use crate::programs::{Program, Variant};

/// Perplexities may differ so far from the CPU's, which rounds activations to eight bits where
/// tensor cores round them to bf16.
const WITHIN: f64 = 0.005;

/// Tokens of a window of the text.
const WINDOW: usize = 512;

/// Tokens of a prompt: more than are multiplied row by row.
const PROMPT: u32 = 40;

/// Tokens that follow it, each so often that a recording is made and replayed.
const NEXT: usize = 6;
const TIMES: usize = 4;

type Devices = Vec<Arc<dyn Device>>;

/// The machine's GPUs, each presented as `split` devices.
pub(crate) fn gpus(split: usize) -> Result<Devices, String> {
    let found = tegula_cuda::detect(split).map_err(|e| e.to_string())?;
    let devices: Devices = found.into_iter().map(|d| d as _).collect();
    match devices.is_empty() {
        true => Err("the driver shows a GPU that CUDA does not".to_owned()),
        false => Ok(devices),
    }
}

fn context(
    path: &Path,
    devices: Devices,
    positions: usize,
    set: impl FnOnce(&mut OffloadFlags),
) -> Result<Context, String> {
    let failed = |e: tegula_engine::Error| format!("{}: {e}", path.display());
    let load = LoadOptions::new(Source::Path(path.to_owned()));
    let mut load = load.with_devices(devices).map_err(failed)?;
    load.offload.context = positions;
    set(&mut load.offload);
    let model = Model::load(&load, &mut |_| {}).map_err(failed)?;
    let options = ContextOptions {
        context: positions,
        ..ContextOptions::default()
    };
    Context::new(Arc::new(model), &options).map_err(failed)
}

/// A directory that goes when this does.
struct Temporary(PathBuf);

impl Temporary {
    fn new() -> Result<Temporary, String> {
        let path = std::env::temp_dir().join(format!("tegula-gpu-{}", std::process::id()));
        fs::create_dir_all(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(Temporary(path))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The mean negative log-likelihood over a text.
fn nll(mut ctx: Context, text: &str) -> Result<f64, String> {
    let tokenizer = ctx.model().tokenizer().clone();
    let special = EncodeOptions {
        add_special: true,
        ..EncodeOptions::default()
    };
    let tokens = tokenizer.encode(text, special);
    let result = perplexity(&mut ctx, &tokens, WINDOW, 0, &mut |_, _, _| {});
    Ok(result.map_err(|e| e.to_string())?.nll)
}

/// A file on the CPU and twice on a device: by how much the perplexity there exceeds the CPU's.
fn beside_the_cpu(path: &Path, text: &str, devices: &Devices) -> Result<f64, String> {
    let on_cpu = nll(context(path, Vec::new(), WINDOW, |_| {})?, text)?;
    let there = || {
        let all = |f: &mut OffloadFlags| f.layers = GpuLayers::Count(usize::MAX);
        nll(context(path, devices.clone(), WINDOW, all)?, text)
    };
    let (first, second) = (there()?, there()?);
    if first.to_bits() != second.to_bits() {
        return Err(format!(
            "{first} in one run on the GPU and {second} in the next"
        ));
    }
    Ok((first - on_cpu).exp() - 1.0)
}

/// Every file of the shared models, and every format that can be written from the one
/// that is not quantised.
pub(crate) fn perplexities(env: &Env) -> Result<Outcome, String> {
    let unreadable = |e: std::io::Error| format!("the shared models: {e}");
    let text = fs::read_to_string(env.model("heldout.txt")?).map_err(unreadable)?;
    let models = env.model("heldout.txt")?;
    let models = models.parent().unwrap_or(Path::new("."));
    let mut files: Vec<PathBuf> = fs::read_dir(models)
        .map_err(unreadable)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "gguf"))
        .collect();
    files.sort();
    let devices: Devices = gpus(1)?.into_iter().take(1).collect();
    let mut facts = Vec::new();
    let mut wrong = Vec::new();
    let mut try_one = |name: String, path: &Path| match beside_the_cpu(path, &text, &devices) {
        Ok(excess) => {
            let said = format!("{:+.3} %", excess * 100.0);
            if excess.is_nan() || excess.abs() > WITHIN {
                wrong.push(format!("{name}: {said}"));
            }
            facts.push((name, said));
        }
        Err(why) => wrong.push(format!("{name}: {why}")),
    };
    for path in &files {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        try_one(name.into_owned(), path);
    }
    let whole = files
        .iter()
        .find(|path| path.ends_with("ferrous-7m-bf16.gguf"));
    if let Some(whole) = whole {
        let source = Gguf::open(whole).map_err(|e| e.to_string())?;
        let dir = Temporary::new()?;
        // One mix of each format: all that is quantised gets it.
        let mut made = Vec::new();
        for &ty in FileType::ALL.iter().filter(|ty| ty.can_write()) {
            if made.contains(&ty.base()) {
                continue;
            }
            made.push(ty.base());
            let path = dir.0.join(format!("made-{ty}.gguf"));
            let options = QuantizeOptions {
                pure: true,
                ..QuantizeOptions::new(ty)
            };
            quantize(&source, &path, &options, &mut |_| ControlFlow::Continue(()))
                .map_err(|e| format!("{ty}: {e}"))?;
            try_one(format!("made here, {}", ty.base()), &path);
            fs::remove_file(&path).map_err(unreadable)?;
        }
    }
    match (wrong.is_empty(), facts.is_empty()) {
        (true, false) => Ok(Outcome::passed(facts)),
        (true, true) => Err("the shared models hold no file".to_owned()),
        (false, _) => Err(wrong.join("; ")),
    }
}

type Rows = Vec<Vec<f32>>;

/// A prompt and tokens that follow, each several times over: rows of logits. The following ones
/// are the likeliest, or as `like` had them.
///
/// # Errors
/// When it can't be run, or one time differs from another by a bit.
fn run(ctx: &mut Context, like: Option<&Rows>) -> Result<Rows, String> {
    let mut rows = Rows::new();
    let mut held = 0;
    for i in 0..=NEXT {
        let ids: Vec<u32> = match i.checked_sub(1) {
            None => (1..=PROMPT).collect(),
            Some(before) => vec![likeliest(&like.unwrap_or(&rows)[before]) as u32],
        };
        let mut first: Option<Vec<f32>> = None;
        for time in 0..TIMES {
            ctx.truncate(0, held).map_err(|e| e.to_string())?;
            let outputs = ctx.decode(&Batch::prompt(0, &ids));
            let outputs = outputs.map_err(|e| e.to_string())?;
            let logits = outputs.logits(0);
            let first = first.get_or_insert_with(|| logits.to_vec());
            let bits = |row: &[f32]| row.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            if bits(first) != bits(logits) {
                return Err(format!("step {i} has other logits the {time}. time again"));
            }
        }
        rows.extend(first);
        held += ids.len();
    }
    Ok(rows)
}

/// Rows of logits of one placement may differ so far from the CPU's, of the largest, half of them
/// less than [`BOUND`]: other roundings make routers choose other experts of those that they find
/// alike, in any layer and at any position, and what follows attends to what these made. What such
/// choices do to the text on the whole, perplexities say.
const OTHER_EXPERTS: f32 = 0.25;

/// How far logits are apart at most, and in the middle row.
///
/// # Errors
/// When that is more than other experts explain.
fn apart(name: &str, rows: &Rows, like: &Rows) -> Result<String, String> {
    let mut apart: Vec<f32> = rows.iter().zip(like).map(|(a, b)| distance(a, b)).collect();
    apart.sort_by(f32::total_cmp);
    let (middle, most) = (apart[apart.len() / 2], apart[apart.len() - 1]);
    let said = format!("logits differ by {middle:.4} of the largest, by {most:.4} at most");
    // What is no number is not within, either.
    match middle <= BOUND && most <= OTHER_EXPERTS && rows.len() == like.len() {
        true => Ok(said),
        false => Err(format!("{name}: {said}: {apart:?}")),
    }
}

type Set<'a> = &'a dyn Fn(&mut OffloadFlags);

/// The shipped model, wherever its parts lie on devices: `devices(n)` are `n` of one kind.
pub(crate) fn placements(
    model: &Path,
    text: &str,
    devices: &dyn Fn(usize) -> Result<Devices, String>,
) -> Result<Outcome, String> {
    let positions = PROMPT as usize + NEXT;
    let [first, two, three] = [1, 2, 3].map(|n| devices(n).map(|d| d[..n].to_vec()));
    let (first, more) = (first?, [two?, three?]);
    let of = |devices: &Devices, like: Option<&Rows>, set: Set<'_>| {
        run(&mut context(model, devices.clone(), positions, set)?, like)
    };
    let text_on =
        |devices: &Devices, set: Set<'_>| nll(context(model, devices.clone(), WINDOW, set)?, text);
    let cpu = of(&Devices::new(), None, &|_| {})?;
    let text_on_cpu = text_on(&Devices::new(), &|_| {})?;
    // The same as on the CPU, but for roundings: rows of logits, and a text.
    let alike = |name: &str, rows: &Rows, devices: &Devices, set: Set<'_>| {
        let said = apart(name, rows, &cpu)?;
        let excess = (text_on(devices, set)? - text_on_cpu).exp() - 1.0;
        let said = format!("{said}; perplexity {:+.3} %", excess * 100.0);
        match excess.abs() <= WITHIN {
            true => Ok((name.to_owned(), said)),
            false => Err(format!("{name}: {said}")),
        }
    };
    let all: Set<'_> = &|f| f.layers = GpuLayers::Count(usize::MAX);
    let one = of(&first, Some(&cpu), all)?;
    let part: Set<'_> = &|f| f.layers = GpuLayers::Count(4);
    let experts: Set<'_> = &|f| {
        f.layers = GpuLayers::Count(usize::MAX);
        f.cpu_moe = usize::MAX;
    };
    let some_experts: Set<'_> = &|f| {
        f.layers = GpuLayers::Count(usize::MAX);
        f.cpu_moe = 2;
    };
    let cache: Set<'_> = &|f| f.kv_on_cpu = true;
    let streamed_layers: Set<'_> = &|f| {
        f.layers = GpuLayers::Count(4);
        f.op_offload_min_batch = Some(8);
    };
    let streamed_experts: Set<'_> = &|f| {
        f.cpu_moe = usize::MAX;
        f.op_offload_min_batch = Some(8);
    };
    let mut facts = vec![alike("one device", &one, &first, all)?];
    for (name, set) in [
        ("some layers", part),
        ("experts on the CPU", experts),
        ("some experts on the CPU", some_experts),
        ("the cache on the CPU", cache),
        ("layers that stream", streamed_layers),
        ("experts that stream", streamed_experts),
    ] {
        facts.push(alike(name, &of(&first, Some(&cpu), set)?, &first, set)?);
    }
    for devices in &more {
        let n = devices.len();
        // The same kernels on the same numbers.
        let name = format!("{n} split devices, by layer");
        near(&name, &of(devices, Some(&cpu), all)?, &one, true)?;
        facts.push((name, "one device's logits, bit for bit".to_owned()));
        for (what, set) in [
            ("", all),
            (", some layers", part),
            (", experts on the CPU", experts),
        ] {
            let name = format!("{n} split devices, every layer split{what}");
            let set: Set<'_> = &|f| {
                set(f);
                f.split = Split::Tensor;
            };
            facts.push(alike(&name, &of(devices, Some(&cpu), set)?, devices, set)?);
        }
    }
    facts.push((
        "recordings".to_owned(),
        format!("{TIMES} times the same bits each"),
    ));
    Ok(Outcome::passed(facts))
}

/// A program that is named by an environment variable, or else found by `build`.
fn program(
    variable: &str,
    build: impl FnOnce() -> Result<Program, String>,
) -> Result<PathBuf, String> {
    match std::env::var_os(variable) {
        Some(path) => Ok(path.into()),
        None => Ok(build()?.path().to_owned()),
    }
}

/// NVIDIA's tool, if there is one.
fn sanitizer() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("TEGULA_SANITIZER") {
        return Some(path.into());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer"].map(PathBuf::from);
    let mut all = std::env::split_paths(&path).chain(usual);
    all.find_map(|dir| {
        let tool = dir.join("compute-sanitizer");
        tool.is_file().then_some(tool)
    })
}

/// Trials of checkgpu that show every kernel to a tool that makes them a hundred times slower:
/// of the formats a few.
const TRIALS: [&str; 16] = [
    "gpu::rows",
    "gpu::routing",
    "gpu::routers",
    "gpu::largest",
    "gpu::forms",
    "gpu::recordings",
    "gpu::streaming",
    "gpu::pinned",
    "gpu::attention_f16_f16",
    "gpu::attention_bf16_bf16",
    "gpu::attention_q8_0_q8_0",
    "gpu::attention_bf16_q8_0",
    "gpu::products_BF16",
    "gpu::products_Q4_0",
    "gpu::products_Q6_K",
    "gpu::products_IQ2_XS",
];

/// What NVIDIA's tool finds in the kernels and in runs of the model.
pub(crate) fn sanitized(env: &Env, model: &Path) -> Result<Outcome, String> {
    let Some(tool) = sanitizer() else {
        return Ok(Outcome::blocked(
            "compute-sanitizer, of the CUDA toolkit (in PATH, or named by TEGULA_SANITIZER)",
        ));
    };
    let checkgpu = program("TEGULA_CHECKGPU", || Program::checkgpu(&env.root));
    let tegula = program("TEGULA_PROGRAM", || {
        Program::tegula(&env.root, Variant::With)
    });
    let (checkgpu, tegula) = match (checkgpu, tegula) {
        (Ok(a), Ok(b)) => (a, b),
        (Err(why), _) | (_, Err(why)) => {
            return Ok(Outcome::blocked(format!(
                "programs to look at, built or named by TEGULA_CHECKGPU and TEGULA_PROGRAM: {why}"
            )));
        }
    };
    let model = model.to_string_lossy();
    let text = [
        "run",
        "-m",
        &model,
        "-p",
        "An iterator adaptor that",
        "-n",
        "6",
        "-t",
        "2",
    ];
    let text = |more: &[&str]| -> Vec<String> {
        let all = text.iter().chain(more).map(|a| (*a).to_owned());
        all.collect()
    };
    let trial = |name: &str| {
        ["--include-ignored", "--exact", name]
            .map(str::to_owned)
            .to_vec()
    };
    let mut runs: Vec<_> = TRIALS.map(|name| (name, &checkgpu, trial(name))).to_vec();
    runs.extend([
        ("the model on a GPU", &tegula, text(&["-ngl", "all"])),
        ("experts on the CPU", &tegula, text(&["--cpu-moe"])),
        (
            "some layers, sampling",
            &tegula,
            text(&["-ngl", "4", "--temp", "1", "--seed", "1"]),
        ),
        (
            "experts that stream",
            &tegula,
            text(&["--cpu-moe", "--op-offload-min-batch", "2"]),
        ),
    ]);
    let kinds = ["memcheck", "racecheck", "synccheck"];
    let all: Vec<_> = kinds
        .iter()
        .flat_map(|kind| runs.iter().map(move |run| (*kind, run)))
        .collect();
    let mut facts = Vec::new();
    for some in all.chunks(AT_ONCE) {
        let found: Vec<_> = thread::scope(|scope| {
            let begun = some.iter().map(|(kind, (_, program, arguments))| {
                scope.spawn(|| watch(&tool, kind, program, arguments))
            });
            let begun: Vec<_> = begun.collect();
            begun.into_iter().map(|run| run.join()).collect()
        });
        for ((kind, (name, ..)), found) in some.iter().zip(found) {
            let found =
                found.map_err(|_| format!("{kind}, {name}: the watching thread failed"))??;
            facts.push((format!("{kind}, {name}"), found));
        }
    }
    Ok(Outcome::passed(facts))
}

/// Programs that run under the tool at the same time: each uses one CPU and little of the GPU.
const AT_ONCE: usize = 5;

/// What a number of the tool's exit means that no program of ours ends with.
const FOUND: i32 = 93;

/// Runs a program under one of the tools; the last line that it says.
///
/// # Errors
/// When the tool finds something, or the program fails.
fn watch(tool: &Path, kind: &str, program: &Path, arguments: &[String]) -> Result<String, String> {
    let mut command = Command::new(tool);
    command.args(["--tool", kind, "--error-exitcode", &FOUND.to_string()]);
    if kind == "racecheck" {
        // Warnings are of warps that synchronise in a way that the tool does not know.
        command.args(["--racecheck-report", "analysis", "--print-level", "error"]);
    }
    let output = command.arg(program).args(arguments).output();
    let output = output.map_err(|e| format!("{}: {e}", tool.display()))?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    let summary = said.lines().rev().find(|line| line.contains("SUMMARY"));
    match (output.status.success(), summary) {
        (true, Some(line)) => Ok(line.trim_start_matches(['=', ' ']).to_owned()),
        (true, None) => Err(format!("{kind}: {} says nothing", tool.display())),
        (false, _) => {
            let lines: Vec<&str> = said
                .lines()
                .filter(|l| l.starts_with("===="))
                .take(12)
                .collect();
            let lines = match lines.is_empty() {
                true => said.lines().take(12).collect(),
                false => lines,
            };
            Err(format!(
                "{kind} of {}: {}: {}",
                program.display(),
                output.status,
                lines.join(" | ")
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tegula_kernels::{Tier, device::sim::SimDevice};

    fn sims(n: usize) -> Result<Devices, String> {
        let sim = |i| SimDevice::new(&format!("SIM{i}"), 1 << 30, Tier::detect_max());
        Ok((0..n).map(|i| Arc::new(sim(i)) as _).collect())
    }

    fn model() -> PathBuf {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        root.join("crates/tegula/assets/ferrous-moe-21m-Q4_0.gguf")
    }

    #[test]
    fn what_is_asked_of_a_gpu_holds_of_simulated_devices() {
        let text = "fn main() { println!(\"Hello, world!\"); }\n".repeat(80);
        let Outcome::Passed { facts } = placements(&model(), &text, &sims).unwrap() else {
            panic!("not passed");
        };
        assert_eq!(facts.len(), 1 + 6 + 2 * 4 + 1);
        let apart = beside_the_cpu(&model(), &text, &sims(1).unwrap());
        assert_eq!(apart, Ok(0.0));
    }

    #[test]
    fn rows_that_other_experts_do_not_explain_are_a_failure() {
        let like = vec![vec![1.0, -4.0, 2.0]; 3];
        let moved = |by: [f32; 3]| {
            let rows = by.map(|d| vec![1.0 + d, -4.0, 2.0]).to_vec();
            apart("there", &rows, &like)
        };
        let said = moved([0.0, 0.9, 0.04]).unwrap();
        assert!(said.contains("0.0100") && said.contains("0.2250"), "{said}");
        for by in [[0.0, 0.1, 0.1], [0.0, 0.0, 1.1], [0.0, 0.0, f32::NAN]] {
            assert!(moved(by).unwrap_err().starts_with("there: "), "{by:?}");
        }
        assert!(apart("there", &like[..2].to_vec(), &like).is_err());
    }

    #[test]
    fn a_tool_that_finds_something_or_says_nothing_is_a_failure() {
        let shell = |script: &str| {
            let dir = Temporary::new().unwrap();
            let tool = dir.0.join("tool");
            fs::write(&tool, format!("#!/bin/sh\n{script}\n")).unwrap();
            let run = Command::new("chmod").arg("+x").arg(&tool).status();
            assert!(run.unwrap().success());
            watch(&tool, "memcheck", Path::new("program"), &[])
        };
        let said = shell("echo '========= ERROR SUMMARY: 0 errors'").unwrap();
        assert_eq!(said, "ERROR SUMMARY: 0 errors");
        assert!(shell("exit 0").unwrap_err().contains("says nothing"));
        let found = shell("echo '========= Invalid read'; exit 93").unwrap_err();
        assert!(
            found.contains("Invalid read") && found.contains("93"),
            "{found}"
        );
    }
}
