//! `synth`: writes a model of random weights.

use crate::{
    exit::Refusal,
    interrupt, output,
    progress::{Progress, Unit},
    synth::{Synth, Types},
};
use clap::Args;
use phase5_sparamx::prune::Target;
use serde::Serialize;
use std::{path::PathBuf, time::Instant};
use tegula_engine::{Arch, Shape, config::Experts, shape::PRESETS};
use tegula_gguf::sparse::Pattern;

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  tegula synth qwen3-8b Q4_0 qwen3-8b-Q4_0.gguf
  tegula synth qwen3-30b-a3b Q4_K_M moe.gguf
  tegula synth llama IQ3_S small.gguf --pure --layers 4 --embd 512 --ff 1024
  tegula synth llama-3-8b S8 sparse.gguf --sparsity 0.5

Shapes: qwen3-0.6b qwen3-1.7b qwen3-4b qwen3-8b qwen3-14b qwen3-30b-a3b qwen2.5-7b llama-3-8b
mixtral-8x7b; llama, qwen2, qwen3 and qwen3moe are small ones to change by flags.

The weights are random, of mean 0 and standard deviation 1/sqrt(row length); the tokenizer has
the bytes and invented words. The same arguments always give the same file. With a sparse type
(S-BF16, S8, S4) the matrices that tegula prune prunes are sparse, and all else is as with its dense
twin (BF16, Q8_0, Q4_0).")]
pub struct SynthArgs {
    /// Name of the shape
    shape: String,
    /// File type such as Q4_K_M, mixed as the quantiser mixes it, or tensor type for all; or a
    /// sparse type, with --sparsity or --nm
    #[arg(value_name = "TYPE")]
    ty: String,
    /// The file to write
    out: PathBuf,
    /// One type for all matrices but routers
    #[arg(long)]
    pure: bool,
    /// Share of the weights of sparse matrices that is zero, 0 to less than 1
    #[arg(long, value_name = "X")]
    sparsity: Option<f64>,
    /// Exactly N values in every M inputs, for instance 2:4, in place of --sparsity
    #[arg(long, value_name = "N:M", conflicts_with = "sparsity")]
    nm: Option<Pattern>,
    /// Seed of the weights
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Threads [default: all CPUs]
    #[arg(short, long, value_name = "N")]
    threads: Option<usize>,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    dims: Dims,
}

/// What may differ from the named shape.
#[derive(Args, Debug)]
#[command(next_help_heading = "Shape")]
struct Dims {
    /// Layers
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// Width of the residual stream
    #[arg(long, value_name = "N")]
    embd: Option<usize>,
    /// Query heads
    #[arg(long, value_name = "N")]
    heads: Option<usize>,
    /// Key and value heads
    #[arg(long, value_name = "N")]
    kv_heads: Option<usize>,
    /// Dimension of a head
    #[arg(long, value_name = "N")]
    head_dim: Option<usize>,
    /// Rows of the feed-forward gate
    #[arg(long, value_name = "N")]
    ff: Option<usize>,
    /// Tokens of the vocabulary, at least 257
    #[arg(long, value_name = "N")]
    vocab: Option<usize>,
    /// Tokens of context that the file promises
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Experts; 0: none
    #[arg(long, value_name = "N")]
    experts: Option<usize>,
    /// Experts that each token visits
    #[arg(long, value_name = "N")]
    experts_used: Option<usize>,
    /// Rows of an expert's gate
    #[arg(long, value_name = "N")]
    expert_ff: Option<usize>,
    /// Whether the embedding is the output matrix, too
    #[arg(long, value_name = "true|false")]
    tied: Option<bool>,
}

impl Dims {
    fn apply(&self, mut shape: Shape) -> Shape {
        let set = |to: &mut usize, from: Option<usize>| *to = from.unwrap_or(*to);
        set(&mut shape.layers, self.layers);
        set(&mut shape.embd, self.embd);
        set(&mut shape.heads, self.heads);
        set(&mut shape.kv_heads, self.kv_heads);
        set(&mut shape.head_dim, self.head_dim);
        set(&mut shape.ff, self.ff);
        set(&mut shape.vocab, self.vocab);
        set(&mut shape.context, self.context);
        shape.tied = self.tied.unwrap_or(shape.tied);
        let mut experts = shape.experts.unwrap_or(Experts {
            count: 0,
            used: 2,
            ff: shape.ff,
        });
        // Files of this architecture have one length for both.
        if shape.arch == Arch::Llama {
            experts.ff = shape.ff;
        }
        set(&mut experts.count, self.experts);
        set(&mut experts.used, self.experts_used);
        set(&mut experts.ff, self.expert_ff);
        shape.experts = (experts.count > 0).then_some(experts);
        shape
    }
}

#[derive(Serialize)]
struct Report<'a> {
    file: &'a std::path::Path,
    shape: &'a str,
    bytes: u64,
    parameters: u64,
    seconds: f64,
}

pub fn run(args: &SynthArgs) -> anyhow::Result<()> {
    let shape = Shape::preset(&args.shape).ok_or_else(|| {
        let known = PRESETS.join(" ");
        Refusal::Usage(format!("unknown shape `{}`; known: {known}", args.shape))
    })?;
    let shape = args.dims.apply(shape);
    let zeros = args.nm.map(Target::Pattern);
    let zeros = zeros.or(args.sparsity.map(Target::Sparsity));
    let synth = Synth::new(&shape, Types::parse(&args.ty, args.pure, zeros)?, args.seed)?;
    let threads = args
        .threads
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let cancel = interrupt::flag()?;
    let start = Instant::now();
    let mut progress = Progress::new("writing", Unit::Bytes);
    let bytes = synth.write(&args.out, threads, &cancel, &mut |written| {
        progress.done(written.done, written.total);
    })?;
    drop(progress);
    let seconds = start.elapsed().as_secs_f64();
    let parameters = synth.parameters();
    if args.json {
        output::json(&Report {
            file: &args.out,
            shape: &shape.name,
            bytes,
            parameters,
            seconds,
        })
    } else {
        say!(
            "{}: {} parameters, {} in {seconds:.1} s ({:.2} GB/s)",
            args.out.display(),
            output::count(parameters),
            output::bytes(bytes),
            bytes as f64 / 1e9 / seconds
        );
        Ok(())
    }
}
