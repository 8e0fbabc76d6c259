//! `logits`: what the model makes of the last position of a prompt.

use crate::{
    args::{CpuArgs, ModelArgs, PromptArgs, SparseCacheArgs},
    exit::Refusal,
    facts, lora, output,
};
use clap::Args;
use serde::Serialize;
use tegula_engine::Batch;
use tegula_gguf::{Tokenizer, tokenizer::EncodeOptions};

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  tegula logits -p \"An iterator adaptor\"
  tegula logits model.gguf -f prompt.txt --json > logits.json
  tegula logits model.gguf -p \"One two\" --reference --top 5")]
pub struct LogitsArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    prompt: PromptArgs,
    /// Show the N most likely tokens
    #[arg(long, value_name = "N", default_value_t = 10)]
    top: usize,
    /// Run the f32 reference instead of the engine
    #[arg(long)]
    reference: bool,
    /// Print one JSON document with all logits
    #[arg(long)]
    json: bool,
    /// Tokens that the context holds; 0: what the model was trained with
    #[arg(short, long, value_name = "N", default_value_t = 0)]
    ctx_size: usize,
    #[command(flatten)]
    cache: SparseCacheArgs,
    #[command(flatten)]
    cpu: CpuArgs,
}

#[derive(Serialize)]
struct Report<'a> {
    /// The engine's tier, or `reference`.
    isa: &'a str,
    tokens: &'a [u32],
    logits: &'a [f32],
    top: Vec<Candidate>,
}

/// One of the most likely tokens.
#[derive(Serialize)]
struct Candidate {
    id: u32,
    piece: String,
    logit: f32,
    p: f64,
}

pub fn run(args: &LogitsArgs) -> anyhow::Result<()> {
    let Some(text) = args.prompt.read()? else {
        return Err(Refusal::Usage("no prompt: give one with -p or -f".to_owned()).into());
    };
    let encode = |tokenizer: &Tokenizer| tokenizer.encode(&text, EncodeOptions::default());
    let (isa, tokenizer, tokens, logits) = if args.reference {
        let load = args.cpu.options(args.model.source()?)?;
        let gguf = load.open()?;
        let tokenizer = Tokenizer::from_gguf(&gguf)?;
        let tokens = encode(&tokenizer);
        let logits = lora::oracle(&load, &gguf)?.logits(&tokens)?;
        ("reference".to_owned(), tokenizer, tokens, logits)
    } else {
        let model = args.cpu.load(&args.model)?;
        let tokens = encode(model.tokenizer());
        let mut ctx = args.cache.context(&model, args.ctx_size)?;
        let outputs = ctx.decode(&Batch::prompt(0, &tokens))?;
        let isa = facts::isa(&model);
        let tokenizer = model.tokenizer().clone();
        (isa, tokenizer, tokens, outputs.logits(0).to_vec())
    };
    let top = most_likely(&tokenizer, &logits, args.top);
    if args.json {
        return output::json(&Report {
            isa: &isa,
            tokens: &tokens,
            logits: &logits,
            top,
        });
    }
    let mut out = String::from("    id      logit        p  piece\n");
    for c in top {
        out += &format!("{:6} {:10.4} {:8.5}  {:?}\n", c.id, c.logit, c.p, c.piece);
    }
    output::text(&out)
}

fn most_likely(tokenizer: &Tokenizer, logits: &[f32], n: usize) -> Vec<Candidate> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    let max = order.first().map_or(0.0, |&best| f64::from(logits[best]));
    let sum: f64 = logits.iter().map(|&l| (f64::from(l) - max).exp()).sum();
    let candidate = |&id: &usize| Candidate {
        id: id as u32,
        piece: String::from_utf8_lossy(&tokenizer.piece(id as u32)).into_owned(),
        logit: logits[id],
        p: (f64::from(logits[id]) - max).exp() / sum,
    };
    order.iter().take(n).map(candidate).collect()
}
