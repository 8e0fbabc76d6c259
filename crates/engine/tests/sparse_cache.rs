//! A sparse KV cache, on the model that ships with the program: at sparsity 0 the dense
//! cache's logits bit for bit; at any sparsity the same ones for every number of threads,
//! micro-batch and company; saved states; what is refused.

use std::sync::{Arc, atomic::AtomicBool};
use tegula_engine::{
    Batch, BatchToken, Context, ContextOptions, Error, GenerateOptions, LoadOptions, Model,
    SamplerOptions, Source, generate, perplexity,
};
use tegula_gguf::tokenizer::EncodeOptions;
use tegula_kernels::{
    Tier,
    device::{Device, sim::SimDevice},
    kv::{KV_PAGE, KvType, pruned::KvSparsity},
};

const MODEL: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../tegula/assets/ferrous-moe-21m-Q4_0.gguf"
);

fn model(threads: usize) -> Arc<Model> {
    let options = LoadOptions {
        threads,
        ..LoadOptions::new(Source::Path(MODEL.into()))
    };
    Arc::new(Model::load(&options, &mut |_| {}).unwrap())
}

fn ids(model: &Model, count: usize) -> Vec<u32> {
    let text = "An iterator adaptor that yields elements until the predicate is false. \
                A vector owns its buffer, and a slice borrows a part of it. ";
    let options = EncodeOptions {
        add_special: true,
        parse_special: false,
    };
    let mut ids = model.tokenizer().encode(&text.repeat(20), options);
    ids.truncate(count);
    assert_eq!(ids.len(), count);
    ids
}

fn options(shares: Option<(f32, f32)>) -> ContextOptions {
    ContextOptions {
        context: 512,
        sparsity: shares.map(|(k, v)| KvSparsity::new(k, v).unwrap()),
        ..ContextOptions::default()
    }
}

fn context(model: &Arc<Model>, options: &ContextOptions) -> Context {
    Context::new(Arc::clone(model), options).unwrap()
}

/// Bits of all logits of the tokens.
fn logits(ctx: &mut Context, ids: &[u32]) -> Vec<u32> {
    let outputs = ctx.decode(&Batch::all_logits(0, ids)).unwrap();
    let rows = (0..outputs.len()).flat_map(|i| outputs.logits(i).to_vec());
    rows.map(f32::to_bits).collect()
}

#[test]
fn nothing_dropped_is_the_dense_cache() {
    let model = model(2);
    let ids = ids(&model, 300);
    let dense = logits(&mut context(&model, &options(None)), &ids);
    let sparse = logits(&mut context(&model, &options(Some((0.0, 0.0)))), &ids);
    assert!(dense == sparse);
    let other = logits(&mut context(&model, &options(Some((0.5, 0.5)))), &ids);
    assert!(other != dense, "pruning changes something");
    let vocab = model.config().vocab;
    let first = KV_PAGE * vocab;
    assert!(other[..first] == dense[..first], "the first page is dense");
}

#[test]
fn results_depend_on_the_sequence_alone() {
    let reference = model(1);
    let ids = ids(&reference, 290);
    let shares = Some((0.3, 0.5));
    let want = logits(&mut context(&reference, &options(shares)), &ids);
    for threads in [1, 2, 5] {
        let model = model(threads);
        for ubatch in [1, 50, 64, 200] {
            let options = ContextOptions {
                ubatch,
                ..options(shares)
            };
            if ubatch == 1 && threads != 2 {
                continue;
            }
            let got = logits(&mut context(&model, &options), &ids);
            assert!(got == want, "{threads} threads, steps of {ubatch}");
        }
    }
    // Two sequences side by side.
    let two = ContextOptions {
        sequences: 2,
        ..options(shares)
    };
    let mut ctx = context(&reference, &two);
    let both = ids.iter().flat_map(|&id| {
        [0, 1].map(|sequence| BatchToken {
            id,
            sequence,
            logits: true,
        })
    });
    let batch = Batch {
        tokens: both.collect(),
    };
    let outputs = ctx.decode(&batch).unwrap();
    let vocab = reference.config().vocab;
    for i in 0..ids.len() {
        for sequence in [0, 1] {
            let row = outputs.logits(2 * i + sequence).iter().map(|x| x.to_bits());
            assert!(
                row.eq(want[i * vocab..(i + 1) * vocab].iter().copied()),
                "token {i}"
            );
        }
    }
}

#[test]
fn what_was_forgotten_is_run_again() {
    let model = model(2);
    let prompt = ids(&model, 200);
    let greedy = GenerateOptions {
        limit: Some(20),
        sampler: SamplerOptions {
            temperature: 0.0,
            ..SamplerOptions::default()
        },
        ignore_eog: true,
        ..GenerateOptions::default()
    };
    let run = |ctx: &mut Context, prompt: &[u32]| {
        let cancel = AtomicBool::new(false);
        let out = generate(ctx, 0, prompt, &greedy, &cancel, &mut |_| {}).unwrap();
        (out.tokens, out.timings.prompt_tokens)
    };
    let shares = options(Some((0.3, 0.5)));
    let mut ctx = context(&model, &shares);
    let (first, _) = run(&mut ctx, &prompt);
    // 150 tokens are in common: those of the third page, which is finished, run again.
    let (again, ran) = run(&mut ctx, &prompt[..150]);
    assert_eq!(ran, 150 - 2 * KV_PAGE);
    assert_eq!(again, run(&mut context(&model, &shares), &prompt[..150]).0);
    ctx.truncate(0, 2 * KV_PAGE - 1).unwrap();
    assert_eq!(ctx.tokens(0).unwrap(), &prompt[..KV_PAGE]);
    assert_eq!(run(&mut ctx, &prompt).0, first);
}

#[test]
fn states_come_back_into_caches_pruned_alike() {
    let model = model(2);
    let ids = ids(&model, 150);
    let shares = options(Some((0.3, 0.5)));
    let mut ctx = context(&model, &shares);
    ctx.decode(&Batch::prompt(0, &ids[..140])).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state");
    ctx.save_state(0, &path).unwrap();
    let want = logits(&mut ctx, &ids[140..]);
    let mut other = context(&model, &shares);
    other.load_state(0, &path).unwrap();
    assert!(logits(&mut other, &ids[140..]) == want);
    for shares in [None, Some((0.3, 0.4))] {
        let mut other = context(&model, &options(shares));
        let error = other.load_state(0, &path).unwrap_err().to_string();
        assert!(error.contains("cache type"), "{error}");
    }
}

#[test]
fn memory_falls_with_what_is_dropped() {
    let model = model(1);
    let bytes = |shares| {
        let options = ContextOptions {
            context: 8192,
            ubatch: 64,
            ..options(shares)
        };
        let ctx = context(&model, &options);
        (ctx.kv_bytes() as f64, ctx.dense_kv_bytes() as f64)
    };
    let (dense, same) = bytes(None);
    assert_eq!(dense, same);
    // 16 bits of each value that is kept and a bit for all; three dense pages.
    let (half, whole) = bytes(Some((0.5, 0.5)));
    assert_eq!(whole, dense);
    let expected = 0.5 + 1.0 / 16.0 + 3.0 / 128.0;
    let share = half / dense;
    assert!((expected..expected + 0.06).contains(&share), "{share}");
}

#[test]
fn perplexity_suffers_little_at_first() {
    let model = model(2);
    let ids = ids(&model, 512);
    let rate = |shares| {
        let mut ctx = context(&model, &options(shares));
        perplexity(&mut ctx, &ids, 256, 0, &mut |_, _, _| ())
            .unwrap()
            .nll
    };
    let (dense, none, some, most) = (
        rate(None),
        rate(Some((0.0, 0.0))),
        rate(Some((0.3, 0.5))),
        rate(Some((0.97, 0.97))),
    );
    assert_eq!(dense, none);
    assert!((some - dense).abs() < 0.1, "{dense} became {some}");
    assert!(
        most > some,
        "{most} with nearly nothing, {some} with most of it"
    );
}

#[test]
fn what_cannot_be_pruned_is_refused() {
    let host = model(1);
    let quantised = ContextOptions {
        v_type: KvType::Q8_0,
        ..options(Some((0.3, 0.5)))
    };
    let error = Context::new(host, &quantised).err().unwrap().to_string();
    assert!(error.contains("q8_0") && error.contains("f16"), "{error}");

    let device: Arc<dyn Device> = Arc::new(SimDevice::new("SIM0", 1 << 30, Tier::Scalar));
    let load = LoadOptions {
        threads: 1,
        ..LoadOptions::new(Source::Path(MODEL.into()))
    };
    let mut load = load.with_devices(vec![device]).unwrap();
    load.offload.margin = 0;
    let model = Arc::new(Model::load(&load, &mut |_| {}).unwrap());
    let refused = Context::new(Arc::clone(&model), &options(Some((0.3, 0.5))));
    assert!(matches!(refused, Err(Error::SparseCacheElsewhere)));
    assert!(Context::new(model, &options(None)).is_ok());
}
