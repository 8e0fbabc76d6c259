//! `perplexity`: how well the model predicts a text, counted as llama.cpp counts it.

use crate::{
    args::{CpuArgs, ModelArgs, SparseCacheArgs, read_text},
    facts, lora, output,
    progress::{Progress, Unit},
};
use clap::Args;
use serde::Serialize;
use std::{path::PathBuf, time::Instant};
use tegula_engine::perplexity;
use tegula_gguf::{Tokenizer, tokenizer::EncodeOptions};

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  tegula perplexity model.gguf -f text.txt
  tegula perplexity model.gguf -f text.txt -c 512 --chunks 60 --json

The text is cut into windows of -c tokens that don't overlap; the second half of each is
scored.")]
pub struct PerplexityArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The text; `-`: standard input
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// Tokens of a window
    #[arg(short, long, value_name = "N", default_value_t = 512)]
    ctx_size: usize,
    /// Windows at most; -1: all
    #[arg(long, value_name = "N", default_value_t = -1, allow_negative_numbers = true)]
    chunks: i64,
    /// Run the f32 reference instead of the engine
    #[arg(long)]
    reference: bool,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    cache: SparseCacheArgs,
    #[command(flatten)]
    cpu: CpuArgs,
}

#[derive(Serialize)]
struct Report {
    /// The engine's tier, or `reference`.
    isa: String,
    /// Per scored token, in nats.
    nll: f64,
    ppl: f64,
    chunks: usize,
    /// Tokens of a window.
    ctx_size: usize,
    /// Tokens scored.
    scored: usize,
    seconds: f64,
}

pub fn run(args: &PerplexityArgs) -> anyhow::Result<()> {
    let text = read_text(&args.file)?;
    let encode = |tokenizer: &Tokenizer| {
        let options = EncodeOptions {
            add_special: true,
            parse_special: false,
        };
        tokenizer.encode(&text, options)
    };
    let chunks = usize::try_from(args.chunks).unwrap_or(0);
    let report = if args.reference {
        let load = args.cpu.options(args.model.source()?)?;
        let gguf = load.open()?;
        let tokenizer = Tokenizer::from_gguf(&gguf)?;
        let oracle = lora::oracle(&load, &gguf)?;
        let tokens = encode(&tokenizer);
        let chunks = match chunks {
            0 => usize::MAX,
            n => n,
        };
        let all = (tokens.len() / args.ctx_size.max(1)).min(chunks);
        let bos = tokenizer.bos().filter(|_| tokenizer.add_bos());
        let start = Instant::now();
        let mut progress = Progress::new("perplexity", Unit::Chunks);
        let result = oracle.perplexity(&tokens, args.ctx_size, chunks, bos, |so_far| {
            progress.message(format!("ppl {:.4}", so_far.ppl));
            progress.done(so_far.chunks as u64, all as u64);
            true
        })?;
        Report {
            isa: "reference".to_owned(),
            nll: result.nll,
            ppl: result.ppl,
            chunks: result.chunks,
            ctx_size: args.ctx_size,
            scored: result.tokens,
            seconds: start.elapsed().as_secs_f64(),
        }
    } else {
        let model = args.cpu.load(&args.model)?;
        let tokens = encode(model.tokenizer());
        let mut ctx = args.cache.context(&model, args.ctx_size)?;
        let start = Instant::now();
        let mut progress = Progress::new("perplexity", Unit::Chunks);
        let result = perplexity(
            &mut ctx,
            &tokens,
            args.ctx_size,
            chunks,
            &mut |done, all, so_far| {
                progress.message(format!("ppl {:.4}", so_far.ppl()));
                progress.done(done as u64, all as u64);
            },
        )?;
        drop(progress);
        facts::say_notes(&model);
        Report {
            isa: facts::isa(&model),
            nll: result.nll,
            ppl: result.ppl(),
            chunks: result.windows,
            ctx_size: args.ctx_size,
            scored: result.scored,
            seconds: start.elapsed().as_secs_f64(),
        }
    };
    if args.json {
        return output::json(&report);
    }
    let Report {
        nll,
        ppl,
        chunks,
        ctx_size,
        scored,
        ..
    } = report;
    output::line(&format!(
        "PPL {ppl:.4} (nll {nll:.5}) over {chunks} chunks of {ctx_size} tokens, {scored} scored"
    ))
}
