//! Perplexity, counted as llama.cpp counts it: windows of `context` tokens that do not
//! overlap, each beginning with BOS where the model wants one, the second half scored.

use crate::{Batch, Context, Error, Result};

/// The result over some windows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Perplexity {
    /// Mean negative log-likelihood per scored token, nats.
    pub nll: f64,
    pub windows: usize,
    /// Tokens scored.
    pub scored: usize,
}

impl Perplexity {
    /// `e^nll`.
    pub fn ppl(&self) -> f64 {
        self.nll.exp()
    }
}

/// Cuts `tokens` into windows of `context`, at most `limit` (0: all), and replaces the first
/// token of each by `bos` where there is one.
pub fn windows(
    tokens: &[u32],
    context: usize,
    limit: usize,
    bos: Option<u32>,
) -> Result<Vec<Vec<u32>>> {
    // llama.cpp refuses less than two windows' worth as meaningless.
    if context < 4 || tokens.len() < 2 * context {
        return Err(Error::TooShort {
            tokens: tokens.len(),
            needed: 2 * context.max(4),
        });
    }
    let count = tokens.len() / context;
    let count = if limit == 0 { count } else { count.min(limit) };
    let window = |w: &[u32]| {
        let mut w = w.to_vec();
        if let Some(bos) = bos {
            w[0] = bos;
        }
        w
    };
    Ok(tokens
        .chunks_exact(context)
        .take(count)
        .map(window)
        .collect())
}

/// Scores one window given its logits, `row(i)` behind token `i`; returns the sum of
/// negative log-likelihoods and how many were summed.
pub fn score<'a>(window: &[u32], row: impl Fn(usize) -> &'a [f32]) -> (f64, usize) {
    let first = window.len() / 2;
    let scored = first..window.len() - 1;
    let nll = scored.clone().map(|i| nll(row(i), window[i + 1])).sum();
    (nll, scored.len())
}

/// `-ln softmax(logits)[id]`.
fn nll(logits: &[f32], id: u32) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
    sum.ln() - f64::from(logits[id as usize] - max)
}

/// Perplexity of `tokens`; `progress(done, all, so_far)` after each window.
pub fn perplexity(
    ctx: &mut Context,
    tokens: &[u32],
    context: usize,
    limit: usize,
    progress: &mut dyn FnMut(usize, usize, &Perplexity),
) -> Result<Perplexity> {
    let tokenizer = ctx.model().tokenizer();
    let bos = tokenizer.bos().filter(|_| tokenizer.add_bos());
    let windows = windows(tokens, context, limit, bos)?;
    let mut sum = 0.0;
    let mut result = Perplexity {
        nll: 0.0,
        windows: 0,
        scored: 0,
    };
    for window in &windows {
        ctx.truncate(0, 0)?;
        let mut batch = Batch::all_logits(0, window);
        let first = context / 2;
        for token in &mut batch.tokens[..first] {
            token.logits = false;
        }
        let outputs = ctx.decode(&batch)?;
        let (nll, scored) = score(window, |i| outputs.logits(i - first));
        sum += nll;
        result.scored += scored;
        result.windows += 1;
        result.nll = sum / result.scored as f64;
        progress(result.windows, windows.len(), &result);
    }
    ctx.truncate(0, 0)?;
    Ok(result)
}
