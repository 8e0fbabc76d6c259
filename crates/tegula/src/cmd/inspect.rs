//! `inspect`: what is in a file.

use crate::{args::ModelArgs, facts, output};
use clap::Args;
use serde::Serialize;
use serde_json::{Map, Value as Json, json};
use std::collections::BTreeMap;
use tegula_engine::AdapterInfo;
use tegula_gguf::{Array, Gguf, Value};

/// Elements of an array, and characters of a string, that are shown without `--full`.
const SHOWN: usize = 8;
const SHOWN_CHARS: usize = 100;

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  tegula inspect model.gguf
  tegula inspect model.gguf --json | jq .types")]
pub struct InspectArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Long arrays and texts of the metadata as a whole
    #[arg(long)]
    full: bool,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    files: Vec<String>,
    version: u32,
    bytes: u64,
    parameters: u64,
    file_type: String,
    /// Of a LoRA adapter: what it changes.
    #[serde(skip_serializing_if = "Option::is_none")]
    adapter: Option<String>,
    metadata: Map<String, Json>,
    /// By type: number of tensors, weights, bytes.
    types: BTreeMap<&'static str, Total>,
    tensors: Vec<Tensor>,
}

#[derive(Clone, Copy, Default, Serialize)]
struct Total {
    tensors: usize,
    weights: u64,
    bytes: u64,
}

#[derive(Serialize)]
struct Tensor {
    name: String,
    #[serde(rename = "type")]
    ty: &'static str,
    /// ggml order: row length first.
    shape: Vec<u64>,
    offset: u64,
    bytes: u64,
    /// Of a sparse tensor: weights that have a value, of all.
    #[serde(skip_serializing_if = "Option::is_none")]
    density: Option<f64>,
    /// Of a sparse tensor: the constant pattern of its values.
    #[serde(skip_serializing_if = "Option::is_none")]
    pattern: Option<String>,
}

pub fn run(args: &InspectArgs) -> anyhow::Result<()> {
    let gguf = args.model.open()?;
    let report = report(&gguf, args.full);
    if args.json {
        output::json(&report)
    } else {
        output::text(&text(&gguf, &report, args.full))
    }
}

fn report(gguf: &Gguf, full: bool) -> Report {
    let mut types: BTreeMap<_, Total> = BTreeMap::new();
    for t in gguf.tensors() {
        let total = types.entry(t.ty.name()).or_default();
        total.tensors += 1;
        total.weights += t.elements();
        total.bytes += t.bytes;
    }
    let tensors = gguf.tensors().iter().map(|t| {
        let header = facts::sparse_header(gguf, t);
        Tensor {
            name: t.name.clone(),
            ty: t.ty.name(),
            shape: t.shape.clone(),
            offset: t.offset,
            bytes: t.bytes,
            density: header.map(|h| h.density()),
            pattern: header.and_then(|h| h.pattern).map(|p| p.to_string()),
        }
    });
    let metadata = gguf.metadata().iter();
    Report {
        files: gguf.files().iter().map(|f| f.name.clone()).collect(),
        version: gguf.version(),
        bytes: gguf.file_bytes(),
        parameters: facts::parameters(gguf),
        file_type: facts::file_type(gguf),
        adapter: AdapterInfo::of_file(gguf).map(|a| a.size()),
        metadata: metadata
            .map(|(k, v)| (k.to_owned(), value(v, full)))
            .collect(),
        types,
        tensors: tensors.collect(),
    }
}

/// A metadata value as JSON; of a long array its type, length and beginning.
fn value(v: &Value, full: bool) -> Json {
    match v {
        Value::U8(n) => json!(n),
        Value::I8(n) => json!(n),
        Value::U16(n) => json!(n),
        Value::I16(n) => json!(n),
        Value::U32(n) => json!(n),
        Value::I32(n) => json!(n),
        Value::U64(n) => json!(n),
        Value::I64(n) => json!(n),
        // By way of its shortest text: 1e-6 rather than 9.999999974752427e-7.
        Value::F32(x) => json!(x.to_string().parse::<f64>().ok()),
        Value::F64(x) => json!(x),
        Value::Bool(b) => json!(b),
        Value::String(s) => json!(s),
        Value::Array(a) if full || a.len() <= SHOWN => Json::Array(elements(a, a.len(), full)),
        Value::Array(a) => json!({
            "array": a.element_type().name(),
            "length": a.len(),
            "first": elements(a, SHOWN, full),
        }),
    }
}

fn elements(a: &Array, n: usize, full: bool) -> Vec<Json> {
    (0..n)
        .filter_map(|i| a.get(i))
        .map(|v| value(&v, full))
        .collect()
}

fn text(gguf: &Gguf, report: &Report, full: bool) -> String {
    let mut out = String::new();
    for file in gguf.files() {
        out += &format!("{}: {}\n", file.name, output::bytes(file.bytes));
    }
    out += &format!(
        "GGUF version {}, {} parameters, {}\n",
        report.version,
        output::count(report.parameters),
        report.file_type
    );
    if let Some(adapter) = &report.adapter {
        out += &format!("LoRA adapter: {adapter}\n");
    }
    out += "\nmetadata\n";
    for (key, v) in gguf.metadata().iter() {
        let shown = match v {
            Value::String(s) if !full && s.chars().count() > SHOWN_CHARS => {
                let start: String = s.chars().take(SHOWN_CHARS).collect();
                format!("{start:?}… ({} bytes)", s.len())
            }
            Value::Array(a) if !full && a.len() > SHOWN => {
                let start = Json::Array(elements(a, SHOWN, full)).to_string();
                let start = start.trim_end_matches(']');
                format!("{start}, …] ({})", a.len())
            }
            v => value(v, full).to_string(),
        };
        out += &format!("  {key} ({}) = {shown}\n", v.ty().name());
    }
    out += "\ntypes\n";
    for (name, t) in &report.types {
        out += &format!(
            "  {name:8} {:5} tensors {:>10} weights {:>11}\n",
            t.tensors,
            output::count(t.weights),
            output::bytes(t.bytes)
        );
    }
    out += "\ntensors\n";
    let width = report
        .tensors
        .iter()
        .map(|t| t.name.len())
        .max()
        .unwrap_or(0);
    for t in &report.tensors {
        let shape: Vec<_> = t.shape.iter().map(u64::to_string).collect();
        let (name, ty) = (&t.name, t.ty);
        let (shape, bytes) = (shape.join(" x "), output::bytes(t.bytes));
        out += &format!("  {name:width$}  {ty:8} {shape:20} {bytes:>11}");
        if let Some(density) = t.density {
            out += &format!("  {:5.1} % zeros", 100.0 * (1.0 - density));
        }
        if let Some(pattern) = &t.pattern {
            out += &format!(", {pattern}");
        }
        out += "\n";
    }
    out
}
