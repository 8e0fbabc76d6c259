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
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};
use tegula_gguf::{
    GgmlType, Gguf,
    quantize::{
        FileType, QuantizeOptions, UnknownFileType, choose, parse_tensor_type, quantize,
        read_importance,
    },
    sparse::{Sparsify, densify, sparsify},
};

/// Matrices are packed sparse if they lose this share of their bytes by it.
pub const LEAST_SAVING: f64 = 0.1;

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  tegula quantize model-bf16.gguf model-Q4_K_M.gguf Q4_K_M
  tegula quantize model-bf16.gguf out.gguf IQ4_XS --imatrix imatrix.gguf
  tegula quantize model-bf16.gguf out.gguf Q4_0 --tensor-type ffn_down=Q8_0
  tegula quantize pruned-bf16.gguf sparse.gguf S8

The file appears when it is complete; after an error, a full disk or Ctrl-C nothing is left.")]
pub struct QuantizeArgs {
    /// The model to read
    #[arg(value_name = "IN")]
    input: PathBuf,
    /// The file to write
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// File type, such as Q4_K_M; S-BF16, S8, S4: BF16, Q8_0, Q4_0 without their zeros, for
    /// the matrices that lose a tenth of their bytes by that
    #[arg(value_name = "TYPE", value_parser = writable)]
    file_type: Target,
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

/// What to write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Target {
    Dense(FileType),
    /// A sparse type, and the file type of its dense twin.
    Sparse(GgmlType, FileType),
}

impl Target {
    fn name(self) -> &'static str {
        match self {
            Target::Dense(file) => file.name(),
            Target::Sparse(ty, _) => ty.name(),
        }
    }

    /// The file type that dense tensors are quantised to.
    fn file_type(self) -> FileType {
        match self {
            Target::Dense(file) | Target::Sparse(_, file) => file,
        }
    }
}

fn writable(s: &str) -> Result<Target, String> {
    let sparse = s.parse().ok().filter(|ty: &GgmlType| ty.is_sparse());
    if let Some(ty) = sparse {
        let dense = ty.dense().name().parse();
        return Ok(Target::Sparse(
            ty,
            dense.map_err(|e: UnknownFileType| e.to_string())?,
        ));
    }
    let file: FileType = s.parse().map_err(|e: UnknownFileType| e.to_string())?;
    if file.can_write() {
        Ok(Target::Dense(file))
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
    /// Weights that have a value, of all in sparse tensors.
    #[serde(skip_serializing_if = "Option::is_none")]
    density: Option<f64>,
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
    let start = Instant::now();
    let fallbacks = pool.install(|| convert(args, model, &options, &cancel))?;
    report(args, fallbacks, start.elapsed().as_secs_f64())
}

/// Writes the file, by way of temporary ones where sparse tensors are unpacked or packed.
/// Returns the number of tensors that got another type since their rows don't fit.
fn convert(
    args: &QuantizeArgs,
    mut model: Gguf,
    options: &QuantizeOptions,
    cancel: &AtomicBool,
) -> anyhow::Result<usize> {
    let beat = |progress: &mut Progress, message: String, done, total| {
        progress.message(message);
        progress.done(done, total);
        match cancel.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    };
    let mut temporary = Vec::new();
    if model.tensors().iter().any(|t| t.ty.is_sparse()) {
        let path = Temporary::beside(&args.output, "dense");
        let mut progress = Progress::new("unpacking", Unit::Bytes);
        densify(&model, &path.0, &mut |p| {
            beat(
                &mut progress,
                p.tensor.name.clone(),
                p.done_bytes,
                p.total_bytes,
            )
        })?;
        model = Gguf::open(&path.0)?;
        temporary.push(path);
    }
    let choices = choose(model.metadata(), model.tensors(), options)?;
    let unchanged = model
        .tensors()
        .iter()
        .zip(&choices)
        .all(|(t, c)| t.ty == c.ty);
    let sparse = match args.file_type {
        Target::Sparse(ty, _) => Some(ty),
        Target::Dense(_) => None,
    };
    let mut fallbacks = 0;
    if sparse.is_none() || !unchanged {
        let path = sparse.map(|_| Temporary::beside(&args.output, "quantized"));
        let to = path.as_ref().map_or(&*args.output, |p| &p.0);
        let mut progress = Progress::new("quantizing", Unit::Bytes);
        let quantized = quantize(&model, to, options, &mut |p| {
            let message = format!("{} {} to {}", p.tensor.name, p.tensor.ty, p.choice.ty);
            beat(&mut progress, message, p.done_bytes, p.total_bytes)
        })?;
        fallbacks = quantized.fallbacks();
        if let Some(path) = path {
            model = Gguf::open(&path.0)?;
            temporary.push(path);
        }
    }
    if let Some(ty) = sparse {
        let options = Sparsify {
            wanted: &|t| t.ty == ty.dense() && t.name != "token_embd.weight",
            least_saving: LEAST_SAVING,
            pattern: None,
        };
        let mut progress = Progress::new("packing", Unit::Bytes);
        let packed = sparsify(&model, &args.output, &options, &mut |p| {
            beat(
                &mut progress,
                p.tensor.name.clone(),
                p.done_bytes,
                p.total_bytes,
            )
        })?;
        drop(progress);
        if packed.tensors == 0 {
            say!(
                "no {} matrix has enough zeros to be smaller as {ty}; prune the model first (tegula prune)",
                ty.dense()
            );
        }
    }
    Ok(fallbacks)
}

/// A file that is gone when this is dropped.
struct Temporary(PathBuf);

impl Temporary {
    fn beside(path: &Path, what: &str) -> Temporary {
        let mut name = std::ffi::OsString::from(".");
        name.push(path.file_name().unwrap_or_default());
        name.push(format!(".{}-{what}.tmp", std::process::id()));
        Temporary(path.with_file_name(name))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // It may never have come to be.
        let _ = std::fs::remove_file(&self.0);
    }
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
        ..QuantizeOptions::new(args.file_type.file_type())
    })
}

/// Refuses to put the result in its source's place.
pub fn different_files(input: &Path, output: &Path) -> Result<(), Refusal> {
    match (input.canonicalize(), output.canonicalize()) {
        (Ok(a), Ok(b)) if a == b => {
            let what = format!("{}: is both IN and OUT", output.display());
            Err(Refusal::Usage(what))
        }
        _ => Ok(()),
    }
}

fn report(args: &QuantizeArgs, fallbacks: usize, seconds: f64) -> anyhow::Result<()> {
    let source_bytes = Gguf::open(&args.input)?.file_bytes();
    let written = Gguf::open(&args.output)?;
    let weights = facts::parameters(&written).max(1);
    let bytes: u64 = written.tensors().iter().map(|t| t.bytes).sum();
    let bits_per_weight = bytes as f64 * 8.0 / weights as f64;
    let mut types = BTreeMap::new();
    for t in written.tensors() {
        *types.entry(t.ty.name()).or_insert(0) += 1;
    }
    let density = facts::density(&written);
    if args.json {
        return output::json(&Report {
            file: &args.output,
            file_type: args.file_type.name(),
            source_bytes,
            bytes: written.file_bytes(),
            bits_per_weight,
            fallbacks,
            density,
            types,
            seconds,
        });
    }
    let types: Vec<_> = types.iter().map(|(ty, n)| format!("{n} {ty}")).collect();
    say!(
        "{}: {} from {}, {bits_per_weight:.2} bits per weight, {seconds:.1} s; tensors: {}",
        args.output.display(),
        output::bytes(written.file_bytes()),
        output::bytes(source_bytes),
        types.join(", ")
    );
    if let Some(density) = density {
        say!(
            "{:.1} % of the weights of sparse tensors are zero",
            100.0 * (1.0 - density)
        );
    }
    if fallbacks > 0 {
        say!("{fallbacks} tensors got a larger type: their rows are no multiple of the block");
    }
    Ok(())
}
