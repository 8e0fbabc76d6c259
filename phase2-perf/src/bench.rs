//! End-to-end measurements of a loaded model, counted as llama-bench counts them: prompts
//! (`pp`) and generation (`tg`) of random tokens, some tokens deep in the context (`@ d`).

use crate::quiet::Energy;
use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};
use tegula_engine::{Batch, Context, ContextOptions, Model, Result};
use tegula_kernels::profile::Share;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Test {
    /// Tokens of prompt, run in batches.
    pub prompt: usize,
    /// Tokens generated, one by one.
    pub generate: usize,
    /// Tokens in the context before the clock starts.
    pub depth: usize,
}

impl Test {
    /// Tokens that count.
    pub fn tokens(&self) -> usize {
        self.prompt + self.generate
    }
}

/// `pp512`, `tg128`, `pp512+tg128`, `tg128 @ d4096`.
impl fmt::Display for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut name = match (self.prompt, self.generate) {
            (p, 0) => format!("pp{p}"),
            (0, g) => format!("tg{g}"),
            (p, g) => format!("pp{p}+tg{g}"),
        };
        if self.depth > 0 {
            name += &format!(" @ d{}", self.depth);
        }
        f.pad(&name)
    }
}

/// One repetition of a test.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// Nanoseconds from the first batch to the last token.
    pub ns: u64,
    /// Nanoseconds until the first token could be chosen.
    pub first_ns: u64,
    /// Nanoseconds of each token that was generated.
    pub token_ns: Vec<u64>,
}

/// The repetitions of a test.
#[derive(Clone, Debug, PartialEq)]
pub struct Samples {
    pub test: Test,
    /// In order.
    pub runs: Vec<Sample>,
    /// Energy of the CPU packages over all of them, where it can be read.
    pub joules: Option<f64>,
    /// Where the last repetition's time went, if that was asked for.
    pub profile: Vec<Share>,
}

impl Samples {
    /// Tokens per second of each repetition.
    pub fn tps(&self) -> Vec<f64> {
        let tokens = self.test.tokens() as f64;
        let runs = self.runs.iter();
        runs.map(|run| tokens * 1e9 / run.ns as f64).collect()
    }
}

/// How to measure.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Batches and the cache's types; the context's size follows from the test.
    pub context: ContextOptions,
    pub repetitions: usize,
    /// One repetition that doesn't count comes first (of a single token for `tg`).
    pub warm_up: bool,
    /// Gather where the time goes.
    pub profile: bool,
}

/// Runs a test. `progress` is told how many repetitions are done. When `cancel` is set the
/// repetitions done so far are the result.
///
/// # Errors
/// What [`Context::decode`] can't do.
pub fn measure(
    model: &Arc<Model>,
    test: Test,
    options: &Options,
    cancel: &AtomicBool,
    progress: &mut dyn FnMut(usize),
) -> Result<Samples> {
    let context = ContextOptions {
        context: (test.depth + test.tokens()).max(1),
        ..options.context
    };
    let mut ctx = Context::new(Arc::clone(model), &context)?;
    let mut tokens = Tokens::new(model);
    let mut samples = Samples {
        test,
        runs: Vec::with_capacity(options.repetitions),
        joules: None,
        profile: Vec::new(),
    };
    if options.warm_up {
        let warm = Test {
            generate: test.generate.min(1),
            depth: 0,
            ..test
        };
        tokens.run(&mut ctx, warm, cancel)?;
    }
    for done in 0..options.repetitions {
        ctx.truncate(0, 0)?;
        let deep = Test {
            prompt: test.depth,
            generate: 0,
            depth: 0,
        };
        tokens.run(&mut ctx, deep, cancel)?;
        let profile = &model.compute().profile;
        if options.profile {
            profile.start();
        }
        let energy = Energy::start();
        let run = tokens.run(&mut ctx, test, cancel)?;
        let joules = energy.joules();
        if options.profile {
            samples.profile = profile.stop();
        }
        let Some(run) = run else { break };
        samples.runs.push(run);
        if let Some(joules) = joules {
            *samples.joules.get_or_insert(0.0) += joules;
        }
        progress(done + 1);
    }
    Ok(samples)
}

/// Random tokens, the same ones in every process.
struct Tokens {
    vocab: u64,
    state: u64,
}

impl Tokens {
    fn new(model: &Model) -> Tokens {
        Tokens {
            vocab: model.config().vocab as u64,
            state: 1,
        }
    }

    fn next(&mut self) -> u32 {
        // Knuth's MMIX generator; its high bits are the random ones.
        self.state = self
            .state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((self.state >> 33) % self.vocab) as u32
    }

    /// Runs prompt and generation of `test`; nothing when cancelled before the end.
    fn run(
        &mut self,
        ctx: &mut Context,
        test: Test,
        cancel: &AtomicBool,
    ) -> Result<Option<Sample>> {
        let prompt: Vec<u32> = (0..test.prompt).map(|_| self.next()).collect();
        let mut sample = Sample {
            token_ns: Vec::with_capacity(test.generate),
            ..Sample::default()
        };
        let batch = ctx.options().batch;
        let start = Instant::now();
        for part in prompt.chunks(batch) {
            if cancel.load(Ordering::Relaxed) {
                return Ok(None);
            }
            ctx.decode(&Batch::prompt(0, part))?;
        }
        let mut last = start;
        if test.prompt > 0 {
            last = Instant::now();
            sample.first_ns = (last - start).as_nanos() as u64;
        }
        for _ in 0..test.generate {
            if cancel.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let token = self.next();
            ctx.decode(&Batch::prompt(0, &[token]))?;
            let now = Instant::now();
            sample.token_ns.push((now - last).as_nanos() as u64);
            last = now;
        }
        if test.prompt == 0 {
            sample.first_ns = sample.token_ns.first().copied().unwrap_or(0);
        }
        sample.ns = (last - start).as_nanos() as u64;
        Ok(Some(sample))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn test(prompt: usize, generate: usize, depth: usize) -> Test {
        Test {
            prompt,
            generate,
            depth,
        }
    }

    #[test]
    fn tests_are_named_as_llama_bench_names_them() {
        let names = [
            (test(512, 0, 0), "pp512"),
            (test(0, 128, 0), "tg128"),
            (test(512, 128, 0), "pp512+tg128"),
            (test(0, 64, 4096), "tg64 @ d4096"),
        ];
        for (test, name) in names {
            assert_eq!(test.to_string(), name);
        }
    }

    #[test]
    fn rates_are_tokens_by_time() {
        let run = |ns| Sample {
            ns,
            ..Sample::default()
        };
        let samples = Samples {
            test: test(10, 0, 0),
            runs: vec![run(1_000_000_000), run(500_000_000)],
            joules: None,
            profile: Vec::new(),
        };
        assert_eq!(samples.tps(), [10.0, 20.0]);
    }
}
