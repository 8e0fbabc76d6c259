//! The engine against what others computed: token ids, greedy continuations and last
//! logits by `transformers` in f32, perplexities by llama.cpp; and, on the same files, that
//! results do not depend on threads, micro-batches, or the company in a batch.
//!
//! The files are in `../shared/models` beside the checkout (or `$TEGULA_SHARED/models`);
//! without them these tests show up as ignored. Most perplexities, half a minute each, are
//! ignored as well: `cargo test -p tegula-engine --test golden -- --include-ignored` runs
//! them.

use libtest_mimic::{Arguments, Failed, Trial};
use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::Arc,
};
use tegula_engine::{
    Batch, BatchToken, Context, ContextOptions, LoadOptions, Model, Outputs, Source, perplexity,
};
use tegula_gguf::{
    Gguf,
    quantize::{FileType, QuantizeOptions, quantize},
    tokenizer::EncodeOptions,
};
use tegula_kernels::{Amx, Kernels, Tier};

/// Largest relative L2 distance of logits: activations are rounded to bf16 where the CPU has
/// bf16 dot products, keys and values to f16 everywhere.
const LOGITS_WITHIN: f64 = 2e-2;

/// Largest deviation from a perplexity, as a share of it: of a given file, and of one that
/// our own quantiser made.
const GIVEN_WITHIN: f64 = 5e-3;
const OWN_WITHIN: f64 = 1e-2;

/// Windows of 512 tokens that the figures are over.
const WINDOWS: usize = 60;

/// Model and type of every given file.
const FILES: [(&str, &str); 13] = [
    ("ferrous-7m", "BF16"),
    ("ferrous-7m", "Q8_0"),
    ("ferrous-7m", "Q4_0"),
    ("ferrous-7m", "Q4_1"),
    ("ferrous-7m", "Q4_K_M"),
    ("ferrous-7m", "Q6_K"),
    ("ferrous-7m", "IQ4_XS"),
    ("ferrous-7m", "IQ3_S"),
    ("ferrous-7m", "IQ2_XS"),
    ("ferrous-moe-21m", "BF16"),
    ("ferrous-moe-21m", "Q4_0"),
    ("ferrous-moe-21m", "Q4_K_M"),
    ("ferrous-moe-21m", "MXFP4_MOE"),
];

/// What our own quantiser makes of the bf16 files: every type with a figure that it writes.
const OWN: [(&str, FileType); 12] = [
    ("ferrous-7m", FileType::F16),
    ("ferrous-7m", FileType::Q8_0),
    ("ferrous-7m", FileType::Q4_0),
    ("ferrous-7m", FileType::Q4_1),
    ("ferrous-7m", FileType::Q4_K_M),
    ("ferrous-7m", FileType::Q6_K),
    ("ferrous-7m", FileType::IQ4_XS),
    ("ferrous-moe-21m", FileType::F16),
    ("ferrous-moe-21m", FileType::Q8_0),
    ("ferrous-moe-21m", FileType::Q4_0),
    ("ferrous-moe-21m", FileType::Q4_K_M),
    ("ferrous-moe-21m", FileType::MXFP4_MOE),
];

/// Perplexities that every test run computes: one with and one without experts.
const ALWAYS: [(&str, &str); 2] = [("ferrous-7m", "Q4_0"), ("ferrous-moe-21m", "Q4_K_M")];

fn shared() -> PathBuf {
    let default = || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared"));
    std::env::var_os("TEGULA_SHARED").map_or_else(default, PathBuf::from)
}

fn golden() -> serde_json::Value {
    let text = std::fs::read_to_string(shared().join("models/golden.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// The given file of a type.
fn path(model: &str, ty: &str) -> PathBuf {
    let ty = if ty == "BF16" { "bf16" } else { ty };
    shared().join("models").join(format!("{model}-{ty}.gguf"))
}

fn load(options: &LoadOptions) -> Result<Arc<Model>, Failed> {
    Ok(Arc::new(Model::load(options, &mut |_| {})?))
}

fn options(path: &Path) -> LoadOptions {
    LoadOptions {
        threads: 2,
        ..LoadOptions::new(Source::Path(path.to_owned()))
    }
}

fn ids(value: &serde_json::Value) -> Vec<u32> {
    let number = |v: &serde_json::Value| v.as_u64().unwrap() as u32;
    value.as_array().unwrap().iter().map(number).collect()
}

fn floats(value: &serde_json::Value) -> Vec<f32> {
    let number = |v: &serde_json::Value| v.as_f64().unwrap() as f32;
    value.as_array().unwrap().iter().map(number).collect()
}

/// `|a - b| / |a|`
fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let squares = |v: &mut dyn Iterator<Item = f64>| v.map(|v| v * v).sum::<f64>();
    let difference = squares(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b)));
    (difference / squares(&mut a.iter().map(|&a| f64::from(a)))).sqrt()
}

/// Token ids exact; last logits near; and at every step of the golden continuation the
/// engine's best token is the golden one, or the golden one is as good within rounding.
fn continuations(name: &str, tier: Tier, amx: bool) -> Result<(), Failed> {
    let golden = golden();
    let amx = amx.then(Amx::emulate).transpose()?;
    let model = load(&LoadOptions {
        tier,
        amx,
        ..options(&path(name, "BF16"))
    })?;
    let mut ctx = Context::new(Arc::clone(&model), &ContextOptions::default())?;
    let (mut worst, mut close) = (0f64, 0);
    for prompt in golden[name]["prompts"].as_array().unwrap() {
        let text = prompt["prompt"].as_str().unwrap();
        let options = EncodeOptions {
            add_special: true,
            parse_special: true,
        };
        let got = model.tokenizer().encode(text, options);
        if got != ids(&prompt["ids"]) {
            return Err(format!("{text:?}: ids {got:?}").into());
        }
        ctx.truncate(0, 0)?;
        let outputs = ctx.decode(&Batch::prompt(0, &got))?;
        let relative = distance(&floats(&prompt["last_logits"]), outputs.logits(0));
        if relative > LOGITS_WITHIN || relative.is_nan() {
            return Err(format!("{text:?}: logits differ by {relative:.1e}").into());
        }
        worst = worst.max(relative);

        let greedy = ids(&prompt["greedy"]);
        let rest = ctx.decode(&Batch::all_logits(0, &greedy[..greedy.len() - 1]))?;
        let rows =
            std::iter::once(outputs.logits(0)).chain((0..rest.len()).map(|i| rest.logits(i)));
        for (i, (row, &want)) in rows.zip(&greedy).enumerate() {
            let best = row.iter().copied().fold(f32::MIN, f32::max);
            let gap = f64::from(best - row[want as usize]);
            // The root mean square of two logits' differences, if all are as far apart as
            // may be.
            let norm = row.iter().map(|&l| f64::from(l).powi(2)).sum::<f64>();
            let rounding = LOGITS_WITHIN * (2.0 * norm / row.len() as f64).sqrt();
            if gap > rounding {
                return Err(format!("{text:?}: token {i} is {gap:.2e} from the best").into());
            }
            close += usize::from(gap > 0.0);
        }
    }
    let amx = if amx.is_some() { "+amx" } else { "" };
    eprintln!("{name} {tier}{amx}: logits {worst:.1e} apart, {close} tokens second by rounding");
    Ok(())
}

/// The perplexity of a file over the held-out text, against llama.cpp's figure.
fn hold_perplexity(model: &str, ty: &str, file: &Path, within: f64) -> Result<(), Failed> {
    let want = golden()[model]["perplexity"]["ppl"][ty].as_f64().unwrap();
    let mut ctx = Context::new(load(&options(file))?, &ContextOptions::default())?;
    let text = std::fs::read_to_string(shared().join("models/heldout.txt"))?;
    let plain = EncodeOptions {
        add_special: true,
        parse_special: false,
    };
    let tokens = ctx.model().tokenizer().encode(&text, plain);
    let got = perplexity(&mut ctx, &tokens, 512, WINDOWS, &mut |_, _, _| {})?;
    let off = got.ppl() / want - 1.0;
    let figures = format!(
        "{model} {ty}: {:.4} over {} windows, golden {want} ({:+.3} %)",
        got.ppl(),
        got.windows,
        off * 100.0
    );
    if off.abs() > within || off.is_nan() || got.windows != WINDOWS {
        return Err(figures.into());
    }
    eprintln!("{figures}");
    Ok(())
}

/// The same of a file that our quantiser makes.
fn own_perplexity(model: &str, file_type: FileType) -> Result<(), Failed> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("own.gguf");
    let source = Gguf::open(path(model, "BF16"))?;
    let options = QuantizeOptions::new(file_type);
    quantize(&source, &file, &options, &mut |_| ControlFlow::Continue(()))?;
    hold_perplexity(model, file_type.name(), &file, OWN_WITHIN)
}

const TEXT: &str = "An iterator adaptor that yields the elements of the underlying iterator \
    until the predicate returns false. After that, no more elements are taken.";

fn bits(outputs: &Outputs) -> Vec<Vec<u32>> {
    let row = |i| outputs.logits(i).iter().map(|l| l.to_bits()).collect();
    (0..outputs.len()).map(row).collect()
}

/// The same logits, bit for bit, for every number of threads, every micro-batch, and for
/// sequences in one batch or each alone.
fn independent(model: &str, ty: &str) -> Result<(), Failed> {
    let file = path(model, ty);
    let small = ContextOptions {
        context: 256,
        ..ContextOptions::default()
    };
    let mut want = Vec::new();
    for threads in [1, 2, 3, 8] {
        let loaded = load(&LoadOptions {
            threads,
            ..options(&file)
        })?;
        let plain = EncodeOptions {
            add_special: true,
            parse_special: false,
        };
        let ids = loaded.tokenizer().encode(TEXT, plain);
        let run = |ubatch| -> Result<_, Failed> {
            let options = ContextOptions { ubatch, ..small };
            let mut ctx = Context::new(Arc::clone(&loaded), &options)?;
            Ok(bits(&ctx.decode(&Batch::all_logits(0, &ids))?))
        };
        let got = run(512)?;
        if want.is_empty() {
            for ubatch in [1, 7, 16] {
                if run(ubatch)? != got {
                    return Err(format!("micro-batches of {ubatch} differ").into());
                }
            }
            want = got;
        } else if got != want {
            return Err(format!("{threads} threads differ from one").into());
        }
        if threads == 2 {
            let options = ContextOptions {
                sequences: 3,
                ubatch: 13,
                ..small
            };
            let mut ctx = Context::new(Arc::clone(&loaded), &options)?;
            // Lengths that end inside and at the end of micro-batches, interleaved.
            let lengths = [ids.len(), 9, 1];
            let mut batch = Batch::default();
            for (i, &id) in ids.iter().enumerate() {
                for (sequence, _) in lengths.iter().enumerate().filter(|(_, n)| i < **n) {
                    let logits = true;
                    batch.tokens.push(BatchToken {
                        id,
                        sequence,
                        logits,
                    });
                }
            }
            let together = bits(&ctx.decode(&batch)?);
            let mut next = [0; 3];
            for (row, token) in together.iter().zip(&batch.tokens) {
                let at = &mut next[token.sequence];
                if *row != want[*at] {
                    let sequence = token.sequence;
                    return Err(format!("sequence {sequence} differs among others").into());
                }
                *at += 1;
            }
        }
    }
    Ok(())
}

fn main() {
    let absent = !shared().join("models/golden.json").exists();
    // Half a minute per file with vector kernels, many minutes without.
    let product = |tier| Kernels::for_tier(tier).matmul.name;
    let slow = product(Tier::detect_max()) == product(Tier::Scalar);
    let mut trials = Vec::new();
    for name in ["ferrous-7m", "ferrous-moe-21m"] {
        for (tier, amx) in [
            (Tier::Scalar, false),
            (Tier::Avx2, false),
            (Tier::Avx512, false),
            (Tier::detect_max(), true),
        ] {
            let kind = match amx {
                true => "amx".to_owned(),
                false => tier.to_string(),
            };
            let trial = Trial::test(format!("continuations::{name}::{kind}"), move || {
                continuations(name, tier, amx)
            });
            trials.push(trial.with_ignored_flag(absent || !tier.available() || amx && slow));
        }
    }
    for (model, ty) in FILES {
        let name = format!("{model}::{ty}");
        let trial = Trial::test(format!("independent::{name}"), move || {
            independent(model, ty)
        });
        trials.push(trial.with_ignored_flag(absent));
        let trial = Trial::test(format!("perplexity::{name}"), move || {
            hold_perplexity(model, ty, &path(model, ty), GIVEN_WITHIN)
        });
        let always = ALWAYS.contains(&(model, ty));
        trials.push(trial.with_ignored_flag(absent || slow || !always));
    }
    for (model, file_type) in OWN {
        let trial = Trial::test(format!("own_perplexity::{model}::{file_type}"), move || {
            own_perplexity(model, file_type)
        });
        trials.push(trial.with_ignored_flag(true));
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}
