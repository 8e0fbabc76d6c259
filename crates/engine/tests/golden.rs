//! The engine against what others computed: token ids, greedy continuations and last
//! logits by `transformers` in f32, perplexities by llama.cpp.
//!
//! The files are in `../shared/models` beside the checkout (or `$TEGULA_SHARED/models`);
//! without them these tests show up as ignored.

use libtest_mimic::{Arguments, Failed, Trial};
use std::{path::PathBuf, sync::Arc, sync::atomic::AtomicBool};
use tegula_engine::{
    Batch, Context, ContextOptions, GenerateOptions, LoadOptions, Model, SamplerOptions, Source,
    generate, perplexity,
};
use tegula_gguf::tokenizer::EncodeOptions;
use tegula_kernels::{Kernels, Tier};

fn shared() -> PathBuf {
    let default = || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared"));
    std::env::var_os("TEGULA_SHARED").map_or_else(default, PathBuf::from)
}

fn golden() -> serde_json::Value {
    let text = std::fs::read_to_string(shared().join("models/golden.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn context(file: &str, tier: Tier) -> Result<Context, Failed> {
    let source = Source::Path(shared().join("models").join(file));
    let options = LoadOptions {
        tier,
        threads: 2,
        ..LoadOptions::new(source)
    };
    let model = Arc::new(Model::load(&options, &mut |_| {})?);
    Ok(Context::new(model, &ContextOptions::default())?)
}

fn ids(value: &serde_json::Value) -> Vec<u32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|v| v.as_u64().unwrap() as u32)
        .collect()
}

/// Token ids exact; last logits within 2e-2 (relative L2). Greedy text is compared as far
/// as bf16 products leave the choice clear: the first eight tokens.
fn continuations(name: &str, tier: Tier) -> Result<(), Failed> {
    let golden = golden();
    let mut ctx = context(&format!("{name}-bf16.gguf"), tier)?;
    for prompt in golden[name]["prompts"].as_array().unwrap() {
        let text = prompt["prompt"].as_str().unwrap();
        let options = EncodeOptions {
            add_special: true,
            parse_special: true,
        };
        let got = ctx.model().tokenizer().encode(text, options);
        if got != ids(&prompt["ids"]) {
            return Err(format!("{text:?}: ids {got:?}").into());
        }
        ctx.truncate(0, 0)?;
        let outputs = ctx.decode(&Batch::prompt(0, &got))?;
        let want: Vec<f64> = prompt["last_logits"]
            .as_array()
            .unwrap()
            .iter()
            .map(|v| v.as_f64().unwrap())
            .collect();
        let (mut difference, mut norm) = (0.0, 0.0);
        for (&g, &w) in outputs.logits(0).iter().zip(&want) {
            difference += (f64::from(g) - w).powi(2);
            norm += w * w;
        }
        let relative = (difference / norm).sqrt();
        if outputs.logits(0).len() != want.len() || relative > 2e-2 {
            return Err(format!("{text:?}: logits differ by {relative:.1e}").into());
        }
        let greedy = ids(&prompt["greedy"]);
        let options = GenerateOptions {
            limit: Some(8),
            sampler: SamplerOptions::greedy(),
            ignore_eog: true,
            ..GenerateOptions::default()
        };
        let out = generate(
            &mut ctx,
            0,
            &got,
            &options,
            &AtomicBool::new(false),
            &mut |_| {},
        )?;
        if out.tokens != greedy[..8] {
            return Err(format!(
                "{text:?}: greedy {:?}, golden {:?}",
                out.tokens,
                &greedy[..8]
            )
            .into());
        }
    }
    Ok(())
}

/// Within 0.5 % of llama.cpp's figure.
fn perplexities(name: &str, file: &str) -> Result<(), Failed> {
    let want = golden()[name]["perplexity"]["ppl"][file].as_f64().unwrap();
    let stem = if file == "BF16" { "bf16" } else { file };
    let mut ctx = context(&format!("{name}-{stem}.gguf"), Tier::detect_max())?;
    let text = std::fs::read_to_string(shared().join("models/heldout.txt"))?;
    let tokens = ctx.model().tokenizer().encode(
        &text,
        EncodeOptions {
            add_special: true,
            parse_special: false,
        },
    );
    let got = perplexity(&mut ctx, &tokens, 512, 60, &mut |_, _, _| {})?;
    let off = got.ppl() / want - 1.0;
    if off.abs() > 5e-3 || got.windows != 60 {
        return Err(format!(
            "perplexity {:.4} over {} windows, golden {want} ({:+.2} %)",
            got.ppl(),
            got.windows,
            off * 100.0
        )
        .into());
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
        for tier in Tier::ALL {
            let trial = Trial::test(format!("continuations::{name}::{tier}"), move || {
                continuations(name, tier)
            });
            trials.push(trial.with_ignored_flag(absent || !tier.available()));
        }
    }
    let files: [(&str, &[&str]); 2] = [
        (
            "ferrous-7m",
            &[
                "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K_M", "Q6_K", "IQ4_XS", "IQ3_S", "IQ2_XS",
            ],
        ),
        ("ferrous-moe-21m", &["BF16", "Q4_0", "Q4_K_M", "MXFP4_MOE"]),
    ];
    for (name, types) in files {
        for &file in types {
            let trial = Trial::test(format!("perplexity::{name}::{file}"), move || {
                perplexities(name, file)
            });
            trials.push(trial.with_ignored_flag(absent || slow));
        }
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}
