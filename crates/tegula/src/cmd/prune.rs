//! `prune`: makes weights zero and packs what is sparse enough.

use crate::{
    args,
    exit::Refusal,
    interrupt, output,
    progress::{Progress, Unit},
};
use anyhow::Context as _;
use clap::{Args, ValueEnum};
use phase5_sparamx::prune::{
    Calibration, Norms, PruneError, PruneOptions, PruneProgress, Pruned, prune, prune_in_sequence,
    read_norms,
};
use regex::Regex;
use serde::Serialize;
use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::Instant,
};
use tegula_engine::{LoadOptions, Model, Source, threads::default_threads};
use tegula_gguf::{Gguf, sparse::Pattern};

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  tegula prune model-bf16.gguf pruned.gguf --sparsity 0.5 --method wanda --calib text.txt
  tegula prune model-bf16.gguf pruned.gguf --nm 2:4
  tegula quantize pruned.gguf pruned-S8.gguf S8

The file appears when it is complete. After Ctrl-C the same command goes on where it was; until
then finished tensors wait in a directory .OUT.prune beside OUT. Nothing is retrained: expect
worse text, and measure it with tegula perplexity.")]
pub struct PruneArgs {
    /// The model to read: BF16, F16, F32, Q8_0, Q4_0 or their sparse twins
    #[arg(value_name = "IN")]
    input: PathBuf,
    /// The file to write
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// Share of every row's weights that becomes zero, 0 to less than 1
    #[arg(long, value_name = "X", required_unless_present = "nm")]
    sparsity: Option<f64>,
    /// What decides: the magnitude of a weight, or that times the norm of its inputs (Wanda)
    #[arg(long, value_enum, default_value = "magnitude")]
    method: Method,
    /// At most N values in every M inputs, for instance 2:4, in place of --sparsity
    #[arg(long, value_name = "N:M", conflicts_with = "sparsity")]
    nm: Option<Pattern>,
    /// Text to measure inputs with, for --method wanda: those of a layer as the layers before it,
    /// pruned, make them
    #[arg(long, value_name = "FILE", conflicts_with = "imatrix")]
    calib: Option<PathBuf>,
    /// Norms of inputs that were measured earlier: GGUF of llama-imatrix or of --save-imatrix
    #[arg(long, value_name = "FILE")]
    imatrix: Option<PathBuf>,
    /// Write the measured norms, as llama-imatrix does
    #[arg(long, value_name = "FILE", requires = "calib")]
    save_imatrix: Option<PathBuf>,
    /// Tokens of a window of the text
    #[arg(short, long, value_name = "N", default_value_t = 512)]
    ctx_size: usize,
    /// Windows at most; 0: all
    #[arg(long, value_name = "N", default_value_t = 128)]
    chunks: usize,
    /// The matrices whose name the expression is found in [default: those of attention and of
    /// feed-forward networks]
    #[arg(long, value_name = "REGEX")]
    tensors: Option<Regex>,
    /// Keep the dense types, zeros and all
    #[arg(long)]
    dense: bool,
    /// Threads [default: the physical cores that this process may use]
    #[arg(short, long, value_name = "N", value_parser = args::thread_count)]
    threads: Option<usize>,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Method {
    Magnitude,
    Wanda,
}

#[derive(Serialize)]
struct Report<'a> {
    file: &'a Path,
    method: &'static str,
    /// Zeros of all weights of the pruned tensors.
    sparsity: f64,
    #[serde(flatten)]
    pruned: Pruned,
    /// Experts without a token of the text: there magnitudes alone decided.
    unseen_experts: usize,
    seconds: f64,
}

pub fn run(args: &PruneArgs) -> anyhow::Result<()> {
    let start = Instant::now();
    if args.method == Method::Wanda && args.calib.is_none() && args.imatrix.is_none() {
        let what = "--method wanda needs --calib FILE (a text) or --imatrix FILE";
        return Err(Refusal::Usage(what.to_owned()).into());
    }
    let mut options = PruneOptions {
        sparsity: args.sparsity.unwrap_or(0.0),
        pattern: args.nm,
        tensors: args.tensors.clone(),
        norms: None,
        dense: args.dense,
        least_saving: super::quantize::LEAST_SAVING,
    };
    if args.nm.is_none() && !(0.0..1.0).contains(&options.sparsity) {
        return Err(Refusal::Usage(PruneError::Sparsity(options.sparsity).to_string()).into());
    }
    super::quantize::different_files(&args.input, &args.output)?;
    let model = Gguf::open(&args.input)?;
    let threads = args.threads.unwrap_or_else(default_threads);
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .context("cannot start threads")?;
    let cancel = interrupt::flag()?;
    let measured = match (&args.imatrix, args.method) {
        (_, Method::Magnitude) => None,
        (Some(path), _) => {
            options.norms = Some(read_norms(&Gguf::open(path)?)?);
            None
        }
        (None, _) => Some((load(args, threads)?, calibration(args)?)),
    };
    let mut progress = Progress::new("pruning", Unit::Bytes);
    let mut beat = |p: PruneProgress<'_>| {
        progress.message(p.tensor);
        progress.done(p.done_bytes, p.total_bytes);
        match cancel.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    };
    let (pruned, norms) = pool.install(|| match measured {
        None => {
            let pruned = prune(&model, &args.output, &options, &mut beat)?;
            Ok::<_, PruneError>((pruned, Norms::default()))
        }
        Some((loaded, (text, how))) => {
            let with = (text.as_str(), &how);
            prune_in_sequence(&model, loaded, with, &args.output, &options, &mut beat)
        }
    })?;
    drop(progress);
    if let (Some(path), Method::Wanda) = (&args.save_imatrix, args.method) {
        norms.save(path)?;
    }
    report(args, pruned, norms.unseen(), start.elapsed().as_secs_f64())
}

/// The model as the measurement takes it.
fn load(args: &PruneArgs, threads: usize) -> anyhow::Result<Arc<Model>> {
    args::load(&LoadOptions {
        threads,
        // Layers leave memory behind the text; packed ones would all stay.
        repack: false,
        sparse_pack: false,
        ..LoadOptions::new(Source::Path(args.input.clone()))
    })
}

/// The text, and how it is run.
fn calibration(args: &PruneArgs) -> anyhow::Result<(String, Calibration)> {
    let text = args::read_text(args.calib.as_deref().unwrap_or(Path::new("-")))?;
    let how = Calibration {
        window: args.ctx_size,
        limit: args.chunks,
        ..Calibration::default()
    };
    Ok((text, how))
}

fn report(args: &PruneArgs, pruned: Pruned, unseen: usize, seconds: f64) -> anyhow::Result<()> {
    let sparsity = pruned.zeros as f64 / pruned.weights.max(1) as f64;
    let method = match args.method {
        Method::Magnitude => "magnitude",
        Method::Wanda => "wanda",
    };
    if args.json {
        return output::json(&Report {
            file: &args.output,
            method,
            sparsity,
            pruned,
            unseen_experts: unseen,
            seconds,
        });
    }
    say!(
        "{}: {} from {}, {:.1} % of {} weights in {} tensors are zero, {} tensors packed, {seconds:.1} s",
        args.output.display(),
        output::bytes(pruned.bytes),
        output::bytes(pruned.source_bytes),
        100.0 * sparsity,
        output::count(pruned.weights),
        pruned.tensors,
        pruned.packed,
    );
    if pruned.resumed > 0 {
        say!("{} tensors were finished by an earlier run", pruned.resumed);
    }
    if unseen > 0 {
        say!(
            "{unseen} experts met no token of the text: magnitudes alone decided there; a longer text helps"
        );
    }
    Ok(())
}
