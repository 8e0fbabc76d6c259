//! End-to-end measurements of a loaded model, counted as llama-bench counts them: prompts
//! (`pp`) and generation (`tg`) of random tokens, some tokens deep in the context (`@ d`).

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

/// The repetitions of a test.
#[derive(Clone, Debug, PartialEq)]
pub struct Samples {
    pub test: Test,
    /// Nanoseconds of each repetition, in order.
    pub ns: Vec<u64>,
    /// Where the last repetition's time went, if that was asked for.
    pub profile: Vec<Share>,
}

impl Samples {
    /// Tokens per second of each repetition.
    pub fn tps(&self) -> Vec<f64> {
        let tokens = self.test.tokens() as f64;
        self.ns.iter().map(|&ns| tokens * 1e9 / ns as f64).collect()
    }
}

/// Mean and sample standard deviation (0 for fewer than two samples).
pub fn mean_and_deviation(samples: &[f64]) -> (f64, f64) {
    let n = samples.len() as f64;
    let mean = samples.iter().sum::<f64>() / n.max(1.0);
    let squares: f64 = samples.iter().map(|x| (x - mean).powi(2)).sum();
    let deviation = if samples.len() > 1 {
        (squares / (n - 1.0)).sqrt()
    } else {
        0.0
    };
    (mean, deviation)
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
        ns: Vec::with_capacity(options.repetitions),
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
        let start = Instant::now();
        let whole = tokens.run(&mut ctx, test, cancel)?;
        let elapsed = start.elapsed();
        if options.profile {
            samples.profile = profile.stop();
        }
        if !whole {
            break;
        }
        samples.ns.push(elapsed.as_nanos() as u64);
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

    /// Runs prompt and generation of `test`; false when cancelled before the end.
    fn run(&mut self, ctx: &mut Context, test: Test, cancel: &AtomicBool) -> Result<bool> {
        let prompt: Vec<u32> = (0..test.prompt).map(|_| self.next()).collect();
        let batch = ctx.options().batch;
        for part in prompt.chunks(batch) {
            if cancel.load(Ordering::Relaxed) {
                return Ok(false);
            }
            ctx.decode(&Batch::prompt(0, part))?;
        }
        for _ in 0..test.generate {
            if cancel.load(Ordering::Relaxed) {
                return Ok(false);
            }
            let token = self.next();
            ctx.decode(&Batch::prompt(0, &[token]))?;
        }
        Ok(true)
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
    fn rates_have_mean_and_deviation() {
        let samples = Samples {
            test: test(10, 0, 0),
            ns: vec![1_000_000_000, 500_000_000],
            profile: Vec::new(),
        };
        assert_eq!(samples.tps(), [10.0, 20.0]);
        let (mean, deviation) = mean_and_deviation(&samples.tps());
        assert_eq!(mean, 15.0);
        assert!((deviation - 50f64.sqrt()).abs() < 1e-12);
        assert_eq!(mean_and_deviation(&[3.0]), (3.0, 0.0));
    }
}
