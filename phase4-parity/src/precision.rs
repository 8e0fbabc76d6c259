//! What AMX does to a model's predictions: the same text with and without, token by token.

use std::{path::Path, sync::Arc};

use tegula_engine::{Batch, Context, ContextOptions, LoadOptions, Model, Source, windows};
use tegula_gguf::tokenizer::EncodeOptions;
use tegula_kernels::Amx;

use crate::{
    compare::{kl_divergence, top_k_agreement},
    golden::WINDOW,
    oracle::log_probability,
};

/// By how much perplexities with AMX and without may differ.
pub const PERPLEXITY_WITHIN: f64 = 2e-3;

/// How far two runs are apart over the scored tokens.
#[derive(Clone, Copy, Debug)]
pub struct Apart {
    /// Tokens that were scored.
    pub tokens: usize,
    /// By how much the perplexity with AMX exceeds the other: 0.01 is one per cent.
    pub perplexity: f64,
    /// The standard error of that, from the spread of the tokens' differences: with few
    /// tokens, rounding that favours neither side looks like a difference of this size.
    pub error: f64,
    /// Mean Kullback-Leibler divergence, nats.
    pub kl: f64,
    /// Share of tokens with the same likeliest successor.
    pub same_best: f64,
}

impl std::fmt::Display for Apart {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "perplexity {:+.3} % (standard error {:.3} %), KL {:.1e}, best token equal {:.1} %, \
             {} tokens",
            self.perplexity * 100.0,
            self.error * 100.0,
            self.kl,
            self.same_best * 100.0,
            self.tokens
        )
    }
}

/// Runs a model over the first `limit` windows (0: all) of a text, with `amx` and without, and
/// scores the second half of each, as perplexity does.
///
/// # Errors
/// Says what can't be loaded or run.
pub fn with_amx(model: &Path, text: &str, amx: Amx, limit: usize) -> Result<Apart, String> {
    let context = |amx| {
        let load = LoadOptions {
            amx,
            ..LoadOptions::new(Source::Path(model.to_owned()))
        };
        let model = Model::load(&load, &mut |_| {}).map_err(|e| e.to_string())?;
        let options = ContextOptions {
            context: WINDOW,
            ..ContextOptions::default()
        };
        Context::new(Arc::new(model), &options).map_err(|e| e.to_string())
    };
    let (mut without, mut with) = (context(None)?, context(Some(amx))?);
    let tokenizer = without.model().tokenizer().clone();
    let options = EncodeOptions {
        add_special: true,
        parse_special: false,
    };
    let tokens = tokenizer.encode(text, options);
    let bos = tokenizer.bos().filter(|_| tokenizer.add_bos());
    let windows = windows(&tokens, WINDOW, limit, bos).map_err(|e| e.to_string())?;
    let (mut differences, mut kl, mut same) = (Vec::new(), 0.0, 0.0);
    for window in &windows {
        let first = WINDOW / 2;
        let mut batch = Batch::all_logits(0, window);
        batch.tokens[..first]
            .iter_mut()
            .for_each(|t| t.logits = false);
        let run = |ctx: &mut Context| {
            ctx.truncate(0, 0)
                .and_then(|()| ctx.decode(&batch))
                .map_err(|e| e.to_string())
        };
        let (a, b) = (run(&mut without)?, run(&mut with)?);
        for i in 0..WINDOW - first - 1 {
            let (a, b) = (a.logits(i), b.logits(i));
            let next = window[first + i + 1] as usize;
            differences.push(log_probability(a, next) - log_probability(b, next));
            kl += kl_divergence(a, b);
            same += top_k_agreement(a, b, 1);
        }
    }
    let n = differences.len() as f64;
    let mean = differences.iter().sum::<f64>() / n;
    let variance = differences.iter().map(|d| (d - mean).powi(2)).sum::<f64>() / (n - 1.0);
    Ok(Apart {
        tokens: differences.len(),
        perplexity: mean.exp_m1(),
        error: (variance / n).sqrt(),
        kl: kl / n,
        same_best: same / n,
    })
}
