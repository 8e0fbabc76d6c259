//! `run`: continues a text.

use crate::{
    args::{
        self, CpuArgs, LengthArgs, ModelArgs, PromptArgs, SamplingArgs, SparseCacheArgs,
        check_biases,
    },
    constrain::{ConstraintArgs, guide},
    exit::Refusal,
    facts, interrupt, lora, output,
};
use clap::Args;
use serde::Serialize;
use std::{
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};
use tegula_engine::{
    Batch, Constraint, Context, GenerateOptions, Generation, LoadOptions, Model, Sampler,
    StopReason, Timings, generate_constrained,
};
use tegula_gguf::{
    Tokenizer,
    tokenizer::{Decoder, EncodeOptions},
};
use tegula_grammar::Grammar;

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  tegula run -p \"An iterator adaptor that\" -n 64
  tegula run model.gguf -f prompt.txt --temp 0 --json
  tegula run model.gguf -p \"A date:\" --regex '[0-9]{4}-[0-9]{2}-[0-9]{2}'
  tegula run model.gguf -p \"Part one.\" -n 50 --save-state s.bin
  tegula run model.gguf --load-state s.bin -p \" Part two.\"

The text goes to stdout as it is generated, statistics to stderr. Ctrl-C ends the generation
and still prints them; a second one ends the program.")]
pub struct RunArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    prompt: PromptArgs,
    #[command(flatten)]
    length: LengthArgs,
    #[command(flatten)]
    cache: SparseCacheArgs,
    #[command(flatten)]
    cpu: CpuArgs,
    /// Go on behind end-of-generation tokens
    #[arg(long)]
    ignore_eos: bool,
    /// End before this text; may be repeated
    #[arg(
        long,
        value_name = "TEXT",
        allow_hyphen_values = true,
        conflicts_with = "reference"
    )]
    stop: Vec<String>,
    /// Don't run a token before the clock starts
    #[arg(long)]
    no_warmup: bool,
    /// Keep the prompt's state in FILE and use what it has in common with the prompt
    #[arg(long, value_name = "FILE", conflicts_with_all = ["reference", "load_state", "save_state"])]
    prompt_cache: Option<PathBuf>,
    /// Save the state behind the last token
    #[arg(long, value_name = "FILE", conflicts_with = "reference")]
    save_state: Option<PathBuf>,
    /// Go on from a saved state; the prompt, if any, is appended
    #[arg(long, value_name = "FILE", conflicts_with = "reference")]
    load_state: Option<PathBuf>,
    /// Run the f32 reference instead of the engine
    #[arg(long)]
    reference: bool,
    /// Print one JSON document instead of the text
    #[arg(long)]
    json: bool,
    /// Say more about the model and where its tensors are
    #[arg(short, long)]
    verbose: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    constraint: ConstraintArgs,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report<'a> {
    model: &'a str,
    arch: &'a str,
    /// The engine's tier, or `reference`.
    isa: &'a str,
    threads: usize,
    prompt_tokens: &'a [u32],
    tokens: &'a [u32],
    text: &'a str,
    stop_reason: &'a str,
    timings: TimingsReport,
}

#[derive(Serialize)]
struct TimingsReport {
    load_ms: f64,
    prompt_n: usize,
    prompt_ms: f64,
    prompt_tps: f64,
    decode_n: usize,
    decode_ms: f64,
    decode_tps: f64,
}

/// What was run, for the statistics.
struct Run {
    model: String,
    arch: String,
    isa: String,
    threads: usize,
    load_ms: f64,
    prompt: Vec<u32>,
    generation: Generation,
}

pub fn run(args: &RunArgs) -> anyhow::Result<()> {
    let text = args.prompt.read()?;
    if text.is_none() && args.load_state.is_none() {
        return Err(Refusal::Usage("no prompt: give one with -p or -f".to_owned()).into());
    }
    let options = GenerateOptions {
        limit: args.length.limit(),
        stop: args.stop.clone(),
        sampler: args.sampling.options()?,
        ignore_eog: args.ignore_eos,
        show_special: false,
    };
    let grammar = args.constraint.grammar()?;
    if args.reference && grammar.is_some() {
        let what = "the reference takes no schema, grammar or expression";
        return Err(Refusal::Usage(what.to_owned()).into());
    }
    let load = args.cpu.options(args.model.source()?)?;
    let mut out = Stdout::new(!args.json);
    let run = if args.reference {
        reference(
            &load,
            text.as_deref().unwrap_or_default(),
            &options,
            &mut out,
        )?
    } else {
        engine(
            args,
            &load,
            text.as_deref(),
            &options,
            grammar.as_ref(),
            &mut out,
        )?
    };
    out.finish(&run.generation)?;
    if args.json {
        let t = &run.generation.timings;
        output::json(&Report {
            model: &run.model,
            arch: &run.arch,
            isa: &run.isa,
            threads: run.threads,
            prompt_tokens: &run.prompt,
            tokens: &run.generation.tokens,
            text: &run.generation.text,
            stop_reason: reason(&run.generation.reason),
            timings: TimingsReport {
                load_ms: run.load_ms,
                prompt_n: t.prompt_tokens,
                prompt_ms: t.prompt_ms,
                prompt_tps: t.prompt_tps(),
                decode_n: t.token_ms.len(),
                decode_ms: t.decode_ms(),
                decode_tps: t.decode_tps(),
            },
        })?;
    } else {
        say!();
        print_statistics(&run);
    }
    Ok(())
}

fn engine(
    args: &RunArgs,
    load: &LoadOptions,
    text: Option<&str>,
    options: &GenerateOptions,
    grammar: Option<&Grammar>,
    out: &mut Stdout,
) -> anyhow::Result<Run> {
    let model = args::load(load)?;
    check_biases(&options.sampler, model.config().vocab)?;
    let mut guide = match grammar {
        Some(grammar) => Some(guide(grammar, model.tokenizer())?),
        None => None,
    };
    let mut ctx = args.cache.context(&model, args.length.ctx_size)?;
    if args.verbose {
        describe(&model, &ctx);
    }
    let mut prompt = Vec::new();
    if let Some(path) = &args.load_state {
        ctx.load_state(0, path)?;
        prompt.extend_from_slice(ctx.tokens(0)?);
    }
    let encode = EncodeOptions {
        add_special: prompt.is_empty(),
        parse_special: true,
    };
    prompt.extend(
        text.iter()
            .flat_map(|t| model.tokenizer().encode(t, encode)),
    );
    if let Some(path) = args.prompt_cache.as_deref().filter(|p| p.exists()) {
        ctx.load_state(0, path)?;
    }
    if !args.no_warmup {
        warm_up(&mut ctx)?;
    }
    let cancel = interrupt::flag()?;
    let generation = generate_constrained(
        &mut ctx,
        0,
        &prompt,
        options,
        guide.as_mut().map(|guide| guide as &mut dyn Constraint),
        &cancel,
        &mut |piece| out.show(piece, &cancel),
    )?;
    if let Some(path) = args.save_state.as_ref().or(args.prompt_cache.as_ref()) {
        // The last token was chosen but perhaps not run; one that doesn't fit is left out.
        let known = ctx.tokens(0)?.len();
        let rest: Vec<u32> = prompt
            .iter()
            .chain(&generation.tokens)
            .skip(known)
            .copied()
            .collect();
        let room = ctx.options().context - known;
        if !rest.is_empty() && rest.len() <= room {
            ctx.decode(&Batch::prompt(0, &rest))?;
        }
        ctx.save_state(0, path)?;
    }
    facts::say_notes(&model);
    let compute = model.compute();
    Ok(Run {
        model: model.config().name.clone(),
        arch: model.config().arch.to_string(),
        isa: facts::isa(&model),
        threads: compute.pool.threads(),
        load_ms: model.load_ms(),
        prompt,
        generation,
    })
}

/// Runs a token so that pages, threads and caches are there when the clock starts.
pub fn warm_up(ctx: &mut Context) -> anyhow::Result<()> {
    let held = ctx.tokens(0)?.len();
    // A sparse cache may not be able to forget the token alone.
    if ctx.options().sparsity.is_some() && held > 0 {
        return Ok(());
    }
    if held < ctx.options().context {
        let token = ctx.model().tokenizer().bos().unwrap_or(0);
        ctx.decode(&Batch::prompt(0, &[token]))?;
        ctx.truncate(0, held)?;
    }
    Ok(())
}

/// The same by the f32 reference: slow, one token after the other.
fn reference(
    load: &LoadOptions,
    text: &str,
    options: &GenerateOptions,
    out: &mut Stdout,
) -> anyhow::Result<Run> {
    let start = Instant::now();
    let gguf = load.open()?;
    let tokenizer = Tokenizer::from_gguf(&gguf)?;
    let oracle = lora::oracle(load, &gguf)?;
    check_biases(&options.sampler, oracle.config().n_vocab)?;
    let load_ms = millis(start);
    let prompt = tokenizer.encode(text, EncodeOptions::default());
    let limit = options.limit.unwrap_or(usize::MAX);
    let cancel = interrupt::flag()?;

    let mut sampler = Sampler::new(options.sampler.clone());
    prompt.iter().for_each(|&id| sampler.accept(id));
    let mut decoder = Decoder::new(&tokenizer);
    let mut generated = String::new();
    let mut reason = StopReason::ContextFull;
    let mut timings = Timings {
        prompt_tokens: prompt.len(),
        ..Timings::default()
    };
    let mut begin = Instant::now();
    let mut first = true;
    let tokens = oracle.generate(&prompt, limit, |logits| {
        let ms = millis(begin);
        if std::mem::take(&mut first) {
            timings.prompt_ms = ms;
        } else {
            timings.token_ms.push(ms);
        }
        begin = Instant::now();
        if cancel.load(Ordering::Relaxed) {
            reason = StopReason::Cancelled;
            return None;
        }
        let id = sampler.sample(logits);
        if tokenizer.is_eog(id) && !options.ignore_eog {
            reason = StopReason::EndOfGeneration;
            return None;
        }
        sampler.accept(id);
        let piece = decoder.push(id);
        out.show(&piece, &cancel);
        generated.push_str(&piece);
        Some(id)
    })?;
    if tokens.len() == limit {
        reason = StopReason::Limit;
    }
    let rest = decoder.flush();
    out.show(&rest, &cancel);
    generated.push_str(&rest);
    Ok(Run {
        model: gguf
            .metadata()
            .str("general.name")?
            .unwrap_or("unnamed")
            .to_owned(),
        arch: oracle.config().arch.clone(),
        isa: "reference".to_owned(),
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        load_ms,
        prompt,
        generation: Generation {
            tokens,
            text: generated,
            reason,
            timings,
        },
    })
}

fn millis(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// Where generated text goes. A closed pipe ends the generation.
pub struct Stdout {
    shown: bool,
    error: Option<anyhow::Error>,
}

impl Stdout {
    /// Shows the text, or swallows it.
    pub fn new(shown: bool) -> Stdout {
        Stdout { shown, error: None }
    }

    /// Shows a piece of text; if that fails, ends the generation by `cancel`.
    pub fn show(&mut self, piece: &str, cancel: &AtomicBool) {
        if self.shown && self.error.is_none() {
            self.error = output::text(piece).err();
            if self.error.is_some() {
                cancel.store(true, Ordering::Relaxed);
            }
        }
    }

    /// Ends the text with a line break.
    pub fn finish(self, generation: &Generation) -> anyhow::Result<()> {
        match self.error {
            Some(error) => Err(error),
            None if self.shown && !generation.text.ends_with('\n') => output::text("\n"),
            None => Ok(()),
        }
    }
}

/// The reason as `--json` has it.
fn reason(reason: &StopReason) -> &'static str {
    match reason {
        StopReason::EndOfGeneration => "end_of_generation",
        StopReason::Limit => "limit",
        StopReason::StopString(_) => "stop_string",
        StopReason::ContextFull => "context_full",
        StopReason::Cancelled => "cancelled",
    }
}

fn print_statistics(run: &Run) {
    say!(
        "model   {} ({}), {}, {} threads",
        run.model,
        run.arch,
        run.isa,
        run.threads
    );
    say!("load    {:9.1} ms", run.load_ms);
    print_timings(&run.generation.timings);
    match &run.generation.reason {
        StopReason::EndOfGeneration | StopReason::Limit => {}
        StopReason::StopString(s) => say!("ended by the stop string {s:?}"),
        StopReason::ContextFull => say!("ended as the context is full (-c)"),
        StopReason::Cancelled => say!("interrupted"),
    }
}

/// Times and rates on stderr.
pub fn print_timings(t: &Timings) {
    say!(
        "prompt  {:9.1} ms {:6} tokens {:9.1} t/s",
        t.prompt_ms,
        t.prompt_tokens,
        t.prompt_tps()
    );
    say!(
        "decode  {:9.1} ms {:6} tokens {:9.1} t/s",
        t.decode_ms(),
        t.token_ms.len(),
        t.decode_tps()
    );
}

fn describe(model: &Model, ctx: &Context) {
    let c = model.config();
    say!(
        "{}: {} parameters, {} layers, width {}, {} heads ({} KV) of {}, vocabulary {}",
        c.name,
        output::count(facts::parameters(model.gguf())),
        c.layers,
        c.embd,
        c.heads,
        c.kv_heads,
        c.head_dim,
        c.vocab
    );
    for buffer in [
        tegula_engine::plan::Buffer::Mmap,
        tegula_engine::plan::Buffer::Heap,
        tegula_engine::plan::Buffer::Packed,
    ] {
        let bytes = model.plan().bytes_in(buffer);
        if bytes > 0 {
            say!("{buffer:?}: {}", output::bytes(bytes));
        }
    }
    let pinned = model.plan().pinned();
    if pinned > 0 {
        say!(
            "Pinned, for a GPU's share of single tokens: {}",
            output::bytes(pinned)
        );
    }
    let sparse = match (ctx.options().sparsity, ctx.dense_kv_bytes()) {
        (Some(sparsity), dense) => format!(
            ", pruned by {sparsity} (dense: {})",
            output::bytes(dense as u64)
        ),
        (None, _) => String::new(),
    };
    say!(
        "KV cache: {} for {} tokens{sparse}",
        output::bytes(ctx.kv_bytes() as u64),
        ctx.options().context
    );
}
