//! Whole runs in which every call of every kernel is held against scalar:
//! `cargo test -p tegula-engine --features check-kernels --test check_kernels`. A kernel
//! that differs panics with the operation, its shape, the position and both values.
//!
//! The files are the model that ships with the program and those of `../shared/models`
//! (or `$TEGULA_SHARED/models`); without the latter their tests show up as ignored.

use libtest_mimic::{Arguments, Failed, Trial};
use std::{
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicBool},
};
use tegula_engine::{
    Context, ContextOptions, GenerateOptions, LoadOptions, Model, SamplerOptions, Source, generate,
};
use tegula_gguf::tokenizer::EncodeOptions;
use tegula_kernels::{Amx, Tier, kv::KvType};

/// Of the shared models, one for each kind of kernel.
const SHARED: [&str; 6] = [
    "ferrous-7m-bf16",
    "ferrous-7m-Q8_0",
    "ferrous-7m-Q4_K_M",
    "ferrous-7m-IQ4_XS",
    "ferrous-7m-IQ2_XS",
    "ferrous-moe-21m-MXFP4_MOE",
];

/// A prompt that tiles take, in two micro-batches, and a few tokens more.
fn run(path: &Path, tier: Tier, amx: bool, kv: KvType) -> Result<(), Failed> {
    let amx = amx.then(Amx::emulate).transpose()?;
    let options = LoadOptions {
        tier,
        amx,
        threads: 2,
        ..LoadOptions::new(Source::Path(path.to_owned()))
    };
    let model = Arc::new(Model::load(&options, &mut |_| {})?);
    let options = ContextOptions {
        context: 256,
        ubatch: 16,
        k_type: kv,
        v_type: kv,
        ..ContextOptions::default()
    };
    let mut ctx = Context::new(Arc::clone(&model), &options)?;
    let text = "An iterator adaptor that yields the elements of the underlying iterator until \
                the predicate returns false.";
    let options = EncodeOptions {
        add_special: true,
        parse_special: true,
    };
    let ids = model.tokenizer().encode(text, options);
    if ids.len() <= 16 {
        return Err(format!("{} tokens are no two micro-batches", ids.len()).into());
    }
    let options = GenerateOptions {
        limit: Some(4),
        sampler: SamplerOptions::greedy(),
        ignore_eog: true,
        ..GenerateOptions::default()
    };
    let never = AtomicBool::new(false);
    let out = generate(&mut ctx, 0, &ids, &options, &never, &mut |_| {})?;
    match out.tokens.len() {
        4 => Ok(()),
        n => Err(format!("{n} tokens").into()),
    }
}

fn main() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let embedded = root.join("../tegula/assets/ferrous-moe-21m-Q4_0.gguf");
    let shared = std::env::var_os("TEGULA_SHARED")
        .map_or_else(|| root.join("../../../shared"), PathBuf::from);
    let shared = SHARED.map(|name| shared.join("models").join(format!("{name}.gguf")));
    let mut trials = Vec::new();
    for path in std::iter::once(embedded).chain(shared) {
        let name = path.file_stem().unwrap_or_default().display().to_string();
        for tier in [Tier::Avx2, Tier::Avx512] {
            for (amx, kv) in [
                (false, KvType::F16),
                (false, KvType::Q8_0),
                (true, KvType::BF16),
            ] {
                let kind = if amx { "+amx" } else { "" };
                let path = path.clone();
                let ignored = !path.exists() || !tier.available();
                let trial = Trial::test(format!("{name}::{tier}{kind}::{kv:?}"), move || {
                    run(&path, tier, amx, kv)
                });
                trials.push(trial.with_ignored_flag(ignored));
            }
        }
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}
