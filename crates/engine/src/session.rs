//! Generating text: the loop that run, chat and serve share.

use crate::{Batch, Constraint, Context, Error, Result, Sampler, SamplerOptions, TextStream};
use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};
use tegula_gguf::tokenizer::Decoder;

/// How to generate.
#[derive(Clone, Debug, Default)]
pub struct GenerateOptions {
    /// Tokens at most; without a limit until the context is full.
    pub limit: Option<usize>,
    /// Texts that end the generation; they are not part of the result.
    pub stop: Vec<String>,
    pub sampler: SamplerOptions,
    /// Go on behind end-of-generation tokens.
    pub ignore_eog: bool,
    /// Show special tokens as text.
    pub show_special: bool,
}

/// Why a generation ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The model ended it.
    EndOfGeneration,
    /// The limit was reached.
    Limit,
    /// This stop string came up.
    StopString(String),
    /// The context holds no more.
    ContextFull,
    /// The caller's flag was set.
    Cancelled,
}

/// What it took.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Timings {
    /// Prompt tokens that were run (not those that were already in the cache).
    pub prompt_tokens: usize,
    pub prompt_ms: f64,
    /// Time of each generated token behind the first, which the prompt's run gave.
    pub token_ms: Vec<f64>,
}

impl Timings {
    /// Prompt tokens per second.
    pub fn prompt_tps(&self) -> f64 {
        per_second(self.prompt_tokens, self.prompt_ms)
    }

    /// Milliseconds of generation.
    pub fn decode_ms(&self) -> f64 {
        // The sum of nothing is -0.0.
        self.token_ms.iter().sum::<f64>() + 0.0
    }

    /// Generated tokens per second.
    pub fn decode_tps(&self) -> f64 {
        per_second(self.token_ms.len(), self.decode_ms())
    }
}

fn per_second(count: usize, ms: f64) -> f64 {
    if ms > 0.0 {
        count as f64 * 1e3 / ms
    } else {
        0.0
    }
}

/// A finished generation.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    /// Generated ids, without the end-of-generation token.
    pub tokens: Vec<u32>,
    pub text: String,
    pub reason: StopReason,
    pub timings: Timings,
}

/// Runs `prompt` in `sequence` and generates. The part of the prompt that the sequence
/// already holds is not run again. `on_text` receives the text as it becomes certain.
pub fn generate(
    ctx: &mut Context,
    sequence: usize,
    prompt: &[u32],
    options: &GenerateOptions,
    cancel: &AtomicBool,
    on_text: &mut dyn FnMut(&str),
) -> Result<Generation> {
    generate_constrained(ctx, sequence, prompt, options, None, cancel, on_text)
}

/// The same where a constraint says which tokens may come.
pub fn generate_constrained(
    ctx: &mut Context,
    sequence: usize,
    prompt: &[u32],
    options: &GenerateOptions,
    mut constraint: Option<&mut dyn Constraint>,
    cancel: &AtomicBool,
    on_text: &mut dyn FnMut(&str),
) -> Result<Generation> {
    if prompt.is_empty() {
        return Err(Error::Empty("prompt"));
    }
    let context = ctx.options().context;
    if prompt.len() > context {
        return Err(Error::ContextFull {
            needed: prompt.len(),
            context,
        });
    }
    let tokenizer = ctx.model().tokenizer().clone();
    let mut sampler = Sampler::new(options.sampler.clone());
    prompt.iter().for_each(|&id| sampler.accept(id));

    let start = Instant::now();
    let held = ctx.tokens(sequence)?;
    let common = held.iter().zip(prompt).take_while(|(a, b)| a == b).count();
    // At least the last token must run: its logits are wanted.
    let common = common.min(prompt.len() - 1);
    ctx.truncate(sequence, common)?;
    // A sparse cache may have to forget more.
    let common = ctx.tokens(sequence)?.len();
    let rest = &prompt[common..];
    let mut timings = Timings {
        prompt_tokens: rest.len(),
        ..Timings::default()
    };
    let mut text = TextStream::new(
        Decoder::new(&tokenizer).show_special(options.show_special),
        &options.stop,
    );
    let mut tokens = Vec::new();
    // Where only the likeliest token counts, devices keep the logits.
    let best = constraint.is_none() && options.sampler.is_argmax();
    // Where only some of the logits count, they keep the others.
    let some = constraint.is_none();
    let decode = |ctx: &mut Context, batch: &Batch, sampler: &Sampler| match sampler.needs() {
        _ if best => ctx.decode_best(batch),
        Some(top) if some => ctx.decode_top(batch, &top),
        _ => ctx.decode(batch),
    };
    let mut outputs = None;
    let batch = ctx.options().batch;
    for (i, part) in rest.chunks(batch).enumerate() {
        if cancel.load(Ordering::Relaxed) {
            break;
        }
        let mut step = Batch::prompt(sequence, part);
        if (i + 1) * batch < rest.len() {
            step.tokens.iter_mut().for_each(|t| t.logits = false);
        }
        outputs = Some(decode(ctx, &step, &sampler)?);
    }
    timings.prompt_ms = start.elapsed().as_secs_f64() * 1e3;

    let reason = loop {
        let Some(row) = outputs.as_ref().filter(|_| !cancel.load(Ordering::Relaxed)) else {
            break StopReason::Cancelled;
        };
        if options.limit.is_some_and(|limit| tokens.len() >= limit) {
            break StopReason::Limit;
        }
        let allowed = match constraint.as_mut() {
            Some(constraint) => {
                let room = ctx.options().context - ctx.tokens(sequence)?.len() + 1;
                let limit = options.limit.map(|limit| limit - tokens.len());
                let left = limit.map_or(room, |limit| limit.min(room));
                Some(constraint.allowed_with(left, tokens.len())?)
            }
            None => None,
        };
        let id = match (row.best(0), row.top(0)) {
            (Some(id), _) => id,
            (None, Some(top)) => sampler.sample_among(top),
            (None, None) => sampler.sample_allowed(row.logits(0), allowed.as_ref()),
        };
        if tokenizer.is_eog(id) && (!options.ignore_eog || allowed.is_some()) {
            break StopReason::EndOfGeneration;
        }
        tokens.push(id);
        sampler.accept(id);
        if let Some(constraint) = constraint.as_mut() {
            constraint.accept(id)?;
        }
        if let Some(stop) = text.push(id, on_text) {
            break StopReason::StopString(stop);
        }
        if constraint.as_ref().is_some_and(|c| c.is_complete()) {
            break StopReason::EndOfGeneration;
        }
        if options.limit.is_some_and(|limit| tokens.len() >= limit) {
            break StopReason::Limit;
        }
        let begin = Instant::now();
        match decode(ctx, &Batch::prompt(sequence, &[id]), &sampler) {
            Ok(next) => outputs = Some(next),
            Err(Error::ContextFull { .. }) => break StopReason::ContextFull,
            Err(other) => return Err(other),
        }
        timings.token_ms.push(begin.elapsed().as_secs_f64() * 1e3);
    };
    let reason = match reason {
        StopReason::StopString(_) => reason,
        other => text.finish(on_text).map_or(other, StopReason::StopString),
    };
    Ok(Generation {
        tokens,
        text: text.into_text(),
        reason,
        timings,
    })
}
