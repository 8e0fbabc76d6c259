//! `quantize`: writes a model in smaller types.

use crate::{
    exit::Refusal,
    facts, interrupt, output,
    progress::{Progress, Unit},
};
use anyhow::Context as _;
use clap::Args;
use serde::Serialize;
use std::{
    collections::BTreeMap,
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::atomic::Ordering,
    time::Instant,
};
use tegula_gguf::{
    GgmlType, Gguf,
    quantize::{
        FileType, QuantizeOptions, Quantized, parse_tensor_type, quantize, read_importance,
    },
};

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  tegula quantize model-bf16.gguf model-Q4_K_M.gguf Q4_K_M
  tegula quantize model-bf16.gguf out.gguf IQ4_XS --imatrix imatrix.gguf
  tegula quantize model-bf16.gguf out.gguf Q4_0 --tensor-type ffn_down=Q8_0

The file appears when it is complete; after an error, a full disk or Ctrl-C nothing is left.")]
pub struct QuantizeArgs {
    /// The model to read
    #[arg(value_name = "IN")]
    input: PathBuf,
    /// The file to write
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// File type, such as Q4_K_M
    #[arg(value_name = "TYPE", value_parser = writable)]
    file_type: FileType,
    /// How much each input column counts: GGUF of llama-imatrix
    #[arg(long, value_name = "FILE")]
    imatrix: Option<PathBuf>,
    /// The base type for all matrices, without the mix's exceptions
    #[arg(long)]
    pure: bool,
    /// Type of the token embedding
    #[arg(long, value_name = "TYPE")]
    token_embedding_type: Option<GgmlType>,
    /// Type of the output matrix
    #[arg(long, value_name = "TYPE")]
    output_tensor_type: Option<GgmlType>,
    /// Type of the tensors whose name the expression is found in; may be repeated
    #[arg(long, value_name = "REGEX=TYPE")]
    tensor_type: Vec<String>,
    /// Leave the output matrix as it is
    #[arg(long)]
    leave_output_tensor: bool,
    /// Quantise what is quantised already, at a loss
    #[arg(long)]
    allow_requantize: bool,
    /// Threads [default: all CPUs]
    #[arg(short, long, value_name = "N", value_parser = crate::args::thread_count)]
    threads: Option<usize>,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

fn writable(s: &str) -> Result<FileType, String> {
    let file: FileType = s
        .parse()
        .map_err(|e: tegula_gguf::quantize::UnknownFileType| e.to_string())?;
    if file.can_write() {
        Ok(file)
    } else {
        let names = FileType::writable_names();
        Err(format!("{file} can only be read; those to write: {names}"))
    }
}

#[derive(Serialize)]
struct Report<'a> {
    file: &'a Path,
    file_type: &'static str,
    source_bytes: u64,
    bytes: u64,
    bits_per_weight: f64,
    /// Tensors that got another type since their rows don't fit.
    fallbacks: usize,
    /// Tensors by type.
    types: BTreeMap<&'static str, usize>,
    seconds: f64,
}

pub fn run(args: &QuantizeArgs) -> anyhow::Result<()> {
    let options = options(args)?;
    let model = Gguf::open(&args.input)?;
    different_files(&args.input, &args.output)?;
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(args.threads.unwrap_or(0))
        .build()
        .context("cannot start threads")?;
    let cancel = interrupt::flag()?;
    let mut progress = Progress::new("quantizing", Unit::Bytes);
    let start = Instant::now();
    let quantized = pool.install(|| {
        quantize(&model, &args.output, &options, &mut |p| {
            if cancel.load(Ordering::Relaxed) {
                return ControlFlow::Break(());
            }
            progress.message(format!(
                "{} {} to {}",
                p.tensor.name, p.tensor.ty, p.choice.ty
            ));
            progress.done(p.done_bytes, p.total_bytes);
            ControlFlow::Continue(())
        })
    })?;
    drop(progress);
    report(args, &model, &quantized, start.elapsed().as_secs_f64())
}

fn options(args: &QuantizeArgs) -> anyhow::Result<QuantizeOptions> {
    let importance = match &args.imatrix {
        Some(path) => Some(read_importance(&Gguf::open(path)?)?),
        None => None,
    };
    let usage = |e: tegula_gguf::Error| Refusal::Usage(format!("--tensor-type: {e}"));
    let tensor_types = args.tensor_type.iter().map(|s| parse_tensor_type(s));
    Ok(QuantizeOptions {
        pure: args.pure,
        tensor_types: tensor_types.collect::<Result<_, _>>().map_err(usage)?,
        output_tensor_type: args.output_tensor_type,
        token_embedding_type: args.token_embedding_type,
        leave_output_tensor: args.leave_output_tensor,
        allow_requantize: args.allow_requantize,
        importance,
        ..QuantizeOptions::new(args.file_type)
    })
}

/// Refuses to put the result in its source's place.
fn different_files(input: &Path, output: &Path) -> Result<(), Refusal> {
    match (input.canonicalize(), output.canonicalize()) {
        (Ok(a), Ok(b)) if a == b => {
            let what = format!("{}: is both IN and OUT", output.display());
            Err(Refusal::Usage(what))
        }
        _ => Ok(()),
    }
}

fn report(
    args: &QuantizeArgs,
    model: &Gguf,
    quantized: &Quantized,
    seconds: f64,
) -> anyhow::Result<()> {
    let weights = facts::parameters(model).max(1);
    let bits_per_weight = quantized.target_bytes as f64 * 8.0 / weights as f64;
    let mut types = BTreeMap::new();
    for choice in &quantized.choices {
        *types.entry(choice.ty.name()).or_insert(0) += 1;
    }
    if args.json {
        return output::json(&Report {
            file: &args.output,
            file_type: args.file_type.name(),
            source_bytes: model.file_bytes(),
            bytes: quantized.file_bytes,
            bits_per_weight,
            fallbacks: quantized.fallbacks(),
            types,
            seconds,
        });
    }
    let types: Vec<_> = types.iter().map(|(ty, n)| format!("{n} {ty}")).collect();
    say!(
        "{}: {} from {}, {bits_per_weight:.2} bits per weight, {seconds:.1} s; tensors: {}",
        args.output.display(),
        output::bytes(quantized.file_bytes),
        output::bytes(model.file_bytes()),
        types.join(", ")
    );
    if quantized.fallbacks() > 0 {
        say!(
            "{} tensors got a larger type: their rows are no multiple of the block",
            quantized.fallbacks()
        );
    }
    Ok(())
}
