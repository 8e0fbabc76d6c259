//! `explain`: where each tensor goes, which kernel reads it, and why; without loading it.

use crate::{
    args::{CpuArgs, ModelArgs},
    output,
};
use clap::Args;
use serde::Serialize;
use std::collections::BTreeMap;
use tegula_engine::{AdapterInfo, ModelConfig, Plan, offload::DeviceUse, plan, plan::Placement};

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
    /// In the order in which tensors' `lora` numbers them.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    adapters: &'a [AdapterInfo],
    /// What each GPU in use holds.
    gpus: &'a [DeviceUse],
    /// What of the model goes to GPUs, in words.
    offload: &'a str,
    tensors: &'a [Placement],
}

/// The report on a plan.
pub fn report<'a>(
    model: &'a ModelConfig,
    isa: &'a str,
    plan: &'a Plan,
    adapters: &'a [AdapterInfo],
) -> Report<'a> {
    let mut buffers = BTreeMap::new();
    for p in &plan.placements {
        *buffers.entry(place(p)).or_insert(0) += p.bytes;
    }
    if plan.pinned() > 0 {
        buffers.insert("cpu/pinned".to_owned(), plan.pinned());
    }
    if plan.adapter_bytes() > 0 {
        buffers.insert("cpu/lora".to_owned(), plan.adapter_bytes());
    }
    Report {
        model,
        isa,
        buffers,
        adapters,
        gpus: &plan.devices,
        offload: &plan.offload.summary,
        tensors: &plan.placements,
    }
}

pub fn run(args: &ExplainArgs) -> anyhow::Result<()> {
    let gguf = args.model.open()?;
    let config = ModelConfig::from_gguf(&gguf)?;
    let load = args.cpu.options(args.model.source()?)?;
    let (adapters, flags) = load.adapters_and_flags(&gguf, &config)?;
    let plan = plan(&config, &gguf, &flags);
    let isa = match flags.amx {
        None => flags.tier.to_string(),
        Some(amx) => format!("{}, {}", flags.tier, amx.name()),
    };
    let report = report(&config, &isa, &plan, adapters.infos());
    if args.json {
        return output::json(&report);
    }
    output::text(&text(&report, &plan))
}

/// The report as people read it.
fn text(report: &Report<'_>, plan: &Plan) -> String {
    let Report { model, isa, .. } = report;
    let mut out = format!("{} ({}), {isa}\n\n", model.name, model.arch);
    for (place, bytes) in &report.buffers {
        out += &format!("{place:12} {:>11}\n", output::bytes(*bytes));
    }
    if let Some((on_tiles, matrices)) = plan.on_tiles() {
        out += &format!("amx          {on_tiles} of {matrices} matrices on tiles\n");
    }
    for (i, adapter) in report.adapters.iter().enumerate() {
        out += &format!("lora {i}       {}: {}\n", adapter.file, adapter.describe());
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
            "{:names$}  {:7} {:16} {:11} {:>10}  {:7}  {:kernels$}  {}{}{}{}\n",
            p.tensor,
            p.ty,
            shape.join(" x "),
            place(p),
            output::bytes(p.bytes),
            lower(&p.encoding),
            p.kernel,
            p.reason,
            p.lora
                .iter()
                .map(|l| format!("; + lora {} of rank {} x {}", l.adapter, l.rank, l.scale))
                .collect::<String>(),
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
    out
}

/// Device and buffer: `cpu/packed`.
fn place(p: &Placement) -> String {
    format!("{}/{}", p.device, lower(&p.buffer))
}

/// The name as `--json` has it.
fn lower(name: &impl std::fmt::Debug) -> String {
    format!("{name:?}").to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use tegula_engine::{LoadOptions, Source, offload::GpuLayers, share::DecodeShare};
    use tegula_kernels::{Tier, device::sim::SimDevice};

    #[test]
    fn shares_of_single_tokens_are_told_per_tensor_and_in_all() {
        let model = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/assets/ferrous-moe-21m-Q4_0.gguf"
        );
        let options = LoadOptions::new(Source::Path(model.into()));
        let device = Arc::new(SimDevice::new("SIM0", 1 << 30, Tier::Scalar));
        let mut options = options.with_devices(vec![device]).unwrap();
        options.offload.layers = GpuLayers::Count(3);
        options.offload.decode_share = DecodeShare::Fraction(0.25);
        let gguf = options.open().unwrap();
        let config = ModelConfig::from_gguf(&gguf).unwrap();
        let told = |options: &LoadOptions| {
            let plan = plan(&config, &gguf, &options.plan_flags());
            let report = report(&config, "scalar", &plan, &[]);
            let json = serde_json::to_value(&report).unwrap();
            (text(&report, &plan), json, plan)
        };
        let (text, json, with) = told(&options);
        let line = |name: &str| text.lines().find(|l| l.starts_with(name)).unwrap();
        let rows = with.get("blk.0.attn_q.weight").unwrap().share.unwrap().rows;
        let said = format!("; for single tokens the last {rows} rows on gpu0, from ");
        assert!(line("blk.0.attn_q.weight").contains(&said), "{text}");
        assert!(!line("blk.0.ffn_up_exps.weight").contains("single tokens"));
        assert!(line("cpu/pinned").ends_with(&output::bytes(with.pinned())));
        assert!(text.contains("; for single tokens SIM0 multiplies 0.25 of the rows of "));
        assert_eq!(json["buffers"]["cpu/pinned"], with.pinned());
        let share = |name: &str| {
            let all = json["tensors"].as_array().unwrap();
            all.iter().find(|t| t["tensor"] == name).unwrap()["share"].clone()
        };
        assert_eq!(share("blk.0.attn_q.weight")["rows"], rows);
        assert!(share("blk.0.ffn_up_exps.weight").is_null());
        // None: not a word.
        options.offload.decode_share = DecodeShare::Fraction(0.0);
        let (text, json, _) = told(&options);
        assert!(
            !text.contains("single tokens") && !text.contains("pinned"),
            "{text}"
        );
        assert!(json["buffers"]["cpu/pinned"].is_null());
    }
}
