//! `explain`: where each tensor goes, which kernel reads it, and why; without loading it.

use crate::{
    args::{CpuArgs, ModelArgs},
    output,
};
use clap::Args;
use serde::Serialize;
use std::collections::BTreeMap;
use tegula_engine::{ModelConfig, Plan, offload::DeviceUse, plan, plan::Placement};

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  tegula explain model.gguf
  tegula explain model.gguf --amx
  tegula explain model.gguf --isa avx2 --json")]
pub struct ExplainArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    cpu: CpuArgs,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// What `--json` prints, and the server shows.
#[derive(Serialize)]
pub struct Report<'a> {
    model: &'a ModelConfig,
    isa: &'a str,
    /// Bytes by device and buffer.
    buffers: BTreeMap<String, u64>,
    /// What each GPU in use holds.
    gpus: &'a [DeviceUse],
    /// What of the model goes to GPUs, in words.
    offload: &'a str,
    tensors: &'a [Placement],
}

/// The report on a plan.
pub fn report<'a>(model: &'a ModelConfig, isa: &'a str, plan: &'a Plan) -> Report<'a> {
    let mut buffers = BTreeMap::new();
    for p in &plan.placements {
        *buffers.entry(place(p)).or_insert(0) += p.bytes;
    }
    if plan.pinned() > 0 {
        buffers.insert("cpu/pinned".to_owned(), plan.pinned());
    }
    Report {
        model,
        isa,
        buffers,
        gpus: &plan.devices,
        offload: &plan.offload.summary,
        tensors: &plan.placements,
    }
}

pub fn run(args: &ExplainArgs) -> anyhow::Result<()> {
    let gguf = args.model.open()?;
    let config = ModelConfig::from_gguf(&gguf)?;
    let flags = args.cpu.options(args.model.source()?)?.plan_flags();
    let plan = plan(&config, &gguf, &flags);
    let isa = match flags.amx {
        None => flags.tier.to_string(),
        Some(amx) => format!("{}, {}", flags.tier, amx.name()),
    };
    let report = report(&config, &isa, &plan);
    if args.json {
        return output::json(&report);
    }
    let mut out = format!("{} ({}), {isa}\n\n", config.name, config.arch);
    for (place, bytes) in &report.buffers {
        out += &format!("{place:12} {:>11}\n", output::bytes(*bytes));
    }
    if let Some((on_tiles, matrices)) = plan.on_tiles() {
        out += &format!("amx          {on_tiles} of {matrices} matrices on bf16 tiles\n");
    }
    for d in &plan.devices {
        out += &format!(
            "{} ({}): {} of weights, {} of KV cache, {} of activations, {} for streaming; {} may be \
             used\n",
            d.name,
            d.description,
            output::bytes(d.weights),
            output::bytes(d.kv),
            output::bytes(d.activations),
            output::bytes(d.streaming),
            output::bytes(d.budget)
        );
    }
    if !plan.offload.summary.is_empty() {
        out += &format!("{}\n", plan.offload.summary);
    }
    out += "\n";
    let width = |f: fn(&Placement) -> usize| plan.placements.iter().map(f).max().unwrap_or(0);
    let (names, kernels) = (width(|p| p.tensor.len()), width(|p| p.kernel.len()));
    for p in &plan.placements {
        let shape: Vec<_> = p.shape.iter().map(u64::to_string).collect();
        out += &format!(
            "{:names$}  {:7} {:16} {:11} {:>10}  {:7}  {:kernels$}  {}{}{}\n",
            p.tensor,
            p.ty,
            shape.join(" x "),
            place(p),
            output::bytes(p.bytes),
            lower(&p.encoding),
            p.kernel,
            p.reason,
            p.streams.map_or(String::new(), |s| format!(
                "; brought to {} for {} tokens and more{}",
                s.device,
                s.from,
                if s.shared { ", in part" } else { "" }
            )),
            p.share.map_or(String::new(), |s| format!(
                "; for single tokens the last {} rows on {}, from {} of pinned memory",
                s.rows,
                s.device,
                output::bytes(s.bytes)
            ))
        );
    }
    output::text(&out)
}

/// Device and buffer: `cpu/packed`.
fn place(p: &Placement) -> String {
    format!("{}/{}", p.device, lower(&p.buffer))
}

/// The name as `--json` has it.
fn lower(name: &impl std::fmt::Debug) -> String {
    format!("{name:?}").to_lowercase()
}
