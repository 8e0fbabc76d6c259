//! What must hold bit for bit, on the model that ships with the program: the same logits for
//! every number of threads, micro-batch, encoding and company in the batch; saved states
//! that go on as if nothing had happened; stop strings and full contexts.

use std::{
    path::Path,
    sync::{Arc, atomic::AtomicBool},
};
use tegula_engine::{
    Batch, BatchToken, Context, ContextOptions, Error, GenerateOptions, Generation, LoadEvent,
    LoadOptions, Model, SamplerOptions, Source, StopReason, generate, perplexity, plan::Buffer,
};
use tegula_gguf::{blocks, tokenizer::EncodeOptions};
use tegula_kernels::{Tier, kv::KvType};

const MODEL: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../tegula/assets/ferrous-moe-21m-Q4_0.gguf"
);

const TEXT: &str = "An iterator adaptor that yields the elements of the underlying iterator \
    until the predicate returns false. After that, no more elements are taken, and the rest \
    of the iterator is left as it was.";

fn options() -> LoadOptions {
    LoadOptions {
        threads: 2,
        ..LoadOptions::new(Source::Path(MODEL.into()))
    }
}

fn load(options: &LoadOptions) -> Arc<Model> {
    Arc::new(Model::load(options, &mut |_| {}).unwrap())
}

fn context(model: &Arc<Model>, options: ContextOptions) -> Context {
    Context::new(Arc::clone(model), &options).unwrap()
}

fn small() -> ContextOptions {
    ContextOptions {
        context: 512,
        ..ContextOptions::default()
    }
}

fn encode(model: &Model, text: &str) -> Vec<u32> {
    let options = EncodeOptions {
        add_special: true,
        parse_special: true,
    };
    model.tokenizer().encode(text, options)
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|l| l.to_bits()).collect()
}

/// Bits of the logits behind every token of [`TEXT`].
fn all_logits(ctx: &mut Context) -> Vec<Vec<u32>> {
    let ids = encode(&ctx.model().clone(), TEXT);
    let out = ctx.decode(&Batch::all_logits(0, &ids)).unwrap();
    assert_eq!(out.len(), ids.len());
    (0..out.len()).map(|i| bits(out.logits(i))).collect()
}

fn greedy(ctx: &mut Context, ids: &[u32], limit: usize, stop: &[&str]) -> (Generation, String) {
    let options = GenerateOptions {
        limit: Some(limit),
        stop: stop.iter().map(|&s| s.to_owned()).collect(),
        sampler: SamplerOptions::greedy(),
        ignore_eog: true,
        ..GenerateOptions::default()
    };
    let mut shown = String::new();
    let never = AtomicBool::new(false);
    let out = generate(ctx, 0, ids, &options, &never, &mut |s| shown.push_str(s)).unwrap();
    (out, shown)
}

#[test]
fn greedy_text_is_the_same_at_every_tier() {
    for tier in Tier::ALL.into_iter().filter(|t| t.available()) {
        let model = load(&LoadOptions { tier, ..options() });
        let mut ctx = context(&model, small());
        let (out, shown) = greedy(
            &mut ctx,
            &encode(&model, "An iterator adaptor that"),
            24,
            &[],
        );
        assert_eq!(out.text, shown);
        assert_eq!(out.reason, StopReason::Limit);
        insta::assert_snapshot!("greedy", format!("{:?}\n{}", out.tokens, out.text));
    }
}

#[test]
fn logits_do_not_depend_on_threads() {
    let run = |threads| {
        let model = load(&LoadOptions {
            threads,
            ..options()
        });
        all_logits(&mut context(&model, small()))
    };
    let one = run(1);
    for threads in [2, 3, 8] {
        assert!(run(threads) == one, "{threads} threads");
    }
}

#[test]
fn logits_do_not_depend_on_the_micro_batch() {
    let model = load(&options());
    let run = |ubatch| {
        let options = ContextOptions { ubatch, ..small() };
        all_logits(&mut context(&model, options))
    };
    let whole = run(512);
    for ubatch in [1, 7, 16] {
        assert!(run(ubatch) == whole, "micro-batches of {ubatch}");
    }
}

#[test]
fn layers_one_by_one_are_the_model() {
    let model = load(&options());
    let ids = encode(&model, TEXT);
    let (config, batch) = (model.config(), Batch::all_logits(0, &ids));
    let whole = context(&model, small()).decode_hidden(&batch).unwrap();
    let mut ctx = context(
        &model,
        ContextOptions {
            ubatch: 7,
            ..small()
        },
    );
    let mut x = model.embed(&ids);
    for layer in 0..config.layers {
        ctx.truncate(0, 0).unwrap();
        ctx.run_layer(layer, &batch, &mut x).unwrap();
    }
    let norm = model.gguf().require_tensor("output_norm.weight").unwrap();
    let mut w = vec![0.0; config.embd];
    blocks::dequantize(norm.ty, model.gguf().data(norm), &mut w).unwrap();
    for (i, x) in x.chunks_exact(config.embd).enumerate() {
        let squares: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
        let mean = squares / config.embd as f64 + f64::from(config.rms_eps);
        for ((x, w), want) in x.iter().zip(&w).zip(whole.hidden(i)) {
            let got = (f64::from(*x) / mean.sqrt()) as f32 * w;
            assert!(
                (got - want).abs() < 1e-5 * want.abs().max(1.0),
                "{i}: {got}, {want}"
            );
        }
    }
    // A full sequence is refused, as it is for the whole model.
    let mut short = context(
        &model,
        ContextOptions {
            context: 8,
            ..small()
        },
    );
    let full = short.run_layer(0, &batch, &mut model.embed(&ids));
    assert!(matches!(full, Err(Error::ContextFull { .. })), "{full:?}");
}

#[test]
fn matrices_of_layers_can_be_replaced_by_their_names() {
    let mut model = Model::load(&options(), &mut |_| {}).unwrap();
    let named = model.host_matrices();
    let of_layers = named.iter().filter(|(name, _)| name.starts_with("blk."));
    let places: Vec<_> = of_layers
        .map(|(name, w)| (name.clone(), std::ptr::from_ref(*w).addr()))
        .collect();
    assert_eq!(places.len(), 8 * model.config().layers);
    for (name, place) in places {
        let found = model
            .host_matrix_mut(&name)
            .map(|w| std::ptr::from_ref(w).addr());
        assert_eq!(found, Some(place), "{name}");
    }
    for name in [
        "output.weight",
        "blk.99.attn_q.weight",
        "blk.0.ffn_up.weight",
        "blk.0.attn_q",
    ] {
        assert!(model.host_matrix_mut(name).is_none(), "{name}");
    }
}

#[test]
fn logits_do_not_depend_on_how_the_weights_are_held() {
    let run = |options: &LoadOptions| all_logits(&mut context(&load(options), small()));
    let packed = run(&options());
    let raw = LoadOptions {
        repack: false,
        ..options()
    };
    assert!(run(&raw) == packed, "raw");
    let read = LoadOptions {
        mmap: false,
        ..options()
    };
    assert!(run(&read) == packed, "read, not mapped");
    let locked = LoadOptions {
        mlock: true,
        ..options()
    };
    assert!(run(&locked) == packed, "locked");
}

/// Four sequences of different lengths, interleaved in one batch, against each alone.
#[test]
fn sequences_in_one_batch_equal_them_one_by_one() {
    let model = load(&options());
    let ids = encode(&model, TEXT);
    let parts = [&ids[..9], &ids[3..20], &ids[5..6], &ids[..]];
    let many = ContextOptions {
        sequences: parts.len(),
        ubatch: 13,
        ..small()
    };
    let mut ctx = context(&model, many);
    let mut batch = Batch::default();
    for i in 0..ids.len() {
        for (sequence, part) in parts.iter().enumerate().filter(|(_, p)| i < p.len()) {
            batch.tokens.push(BatchToken {
                id: part[i],
                sequence,
                logits: i + 1 == part.len(),
            });
        }
    }
    let together = ctx.decode(&batch).unwrap();
    let ends: Vec<_> = batch.tokens.iter().filter(|t| t.logits).collect();
    assert_eq!(together.len(), parts.len());
    for (row, token) in ends.iter().enumerate() {
        let mut ctx = context(&model, small());
        let alone = ctx
            .decode(&Batch::prompt(0, parts[token.sequence]))
            .unwrap();
        assert_eq!(bits(together.logits(row)), bits(alone.logits(0)));
        assert_eq!(bits(together.hidden(row)), bits(alone.hidden(0)));
    }
}

#[test]
fn a_copy_of_a_sequence_goes_its_own_way() {
    let model = load(&options());
    let ids = encode(&model, TEXT);
    let two = ContextOptions {
        sequences: 2,
        ..small()
    };
    let mut ctx = context(&model, two);
    ctx.decode(&Batch::prompt(0, &ids[..20])).unwrap();
    ctx.copy(0, 1, 10).unwrap();
    assert_eq!(ctx.tokens(1).unwrap(), &ids[..10]);
    let other = ctx.decode(&Batch::prompt(1, &ids[30..40])).unwrap();
    let first = ctx.decode(&Batch::prompt(0, &ids[20..])).unwrap();

    let mut alone = context(&model, small());
    let want = alone.decode(&Batch::prompt(0, &ids)).unwrap();
    assert_eq!(bits(first.logits(0)), bits(want.logits(0)));
    alone.truncate(0, 10).unwrap();
    let want = alone.decode(&Batch::prompt(0, &ids[30..40])).unwrap();
    assert_eq!(bits(other.logits(0)), bits(want.logits(0)));
}

#[test]
fn a_saved_state_goes_on_where_it_was() {
    let model = load(&options());
    let ids = encode(&model, TEXT);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state");
    let mut ctx = context(&model, small());
    ctx.decode(&Batch::prompt(0, &ids[..30])).unwrap();
    ctx.save_state(0, &path).unwrap();
    let want = ctx.decode(&Batch::prompt(0, &ids[30..])).unwrap();

    let mut restored = context(&model, small());
    restored.decode(&Batch::prompt(0, &ids[5..9])).unwrap();
    restored.load_state(0, &path).unwrap();
    assert_eq!(restored.tokens(0).unwrap(), &ids[..30]);
    let got = restored.decode(&Batch::prompt(0, &ids[30..])).unwrap();
    assert_eq!(bits(got.logits(0)), bits(want.logits(0)));
    assert_eq!(
        std::fs::read_dir(dir.path()).unwrap().count(),
        1,
        "no temporary file stays"
    );
    refused_states(&model, dir.path(), &path);
}

/// Damage, another cache type, and no room: each is refused and nothing changes.
fn refused_states(model: &Arc<Model>, dir: &Path, path: &Path) {
    let good = std::fs::read(path).unwrap();
    let bad = dir.join("bad");
    let mut ctx = context(model, small());
    ctx.decode(&Batch::prompt(0, &[1, 2, 3])).unwrap();
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 1;
    for (data, why) in [
        (&flipped[..], "checksum"),
        (&good[..good.len() - 100], "checksum"),
        (&good[..7], "no such file format"),
        (b"GGUF and something else after it", "no such file format"),
    ] {
        std::fs::write(&bad, data).unwrap();
        let error = ctx.load_state(0, &bad).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
        assert_eq!(ctx.tokens(0).unwrap(), [1, 2, 3]);
    }
    let other = ContextOptions {
        k_type: KvType::Q8_0,
        ..small()
    };
    let error = context(model, other).load_state(0, path).unwrap_err();
    assert!(error.to_string().contains("another model"), "{error}");
    let tiny = ContextOptions {
        context: 8,
        ..ContextOptions::default()
    };
    let error = context(model, tiny).load_state(0, path).unwrap_err();
    assert!(matches!(
        error,
        Error::ContextFull {
            needed: 30,
            context: 8
        }
    ));
}

#[test]
fn a_full_context_is_an_error_and_changes_nothing() {
    let model = load(&options());
    let ids = encode(&model, TEXT);
    let tiny = ContextOptions {
        context: 20,
        ..ContextOptions::default()
    };
    let mut ctx = context(&model, tiny);
    ctx.decode(&Batch::prompt(0, &ids[..15])).unwrap();
    let error = ctx.decode(&Batch::prompt(0, &ids[15..21])).unwrap_err();
    assert!(matches!(
        error,
        Error::ContextFull {
            needed: 21,
            context: 20
        }
    ));
    assert_eq!(ctx.tokens(0).unwrap().len(), 15);
    ctx.decode(&Batch::prompt(0, &ids[15..20])).unwrap();

    let bad = Batch::prompt(0, &[model.config().vocab as u32]);
    assert!(matches!(ctx.decode(&bad), Err(Error::Token { .. })));
    let bad = Batch::prompt(1, &[0]);
    assert!(matches!(ctx.decode(&bad), Err(Error::Sequence { .. })));
    assert!(matches!(
        ctx.decode(&Batch::default()),
        Err(Error::Empty(_))
    ));

    let (out, _) = greedy(&mut ctx, &ids[..15], 100, &[]);
    assert_eq!(out.reason, StopReason::ContextFull);
    assert_eq!(out.tokens.len(), 6, "five fit and one more is known");
}

#[test]
fn generation_runs_only_what_is_new() {
    let model = load(&options());
    let ids = encode(&model, TEXT);
    let mut ctx = context(&model, small());
    let (first, _) = greedy(&mut ctx, &ids[..20], 5, &[]);
    assert_eq!(first.timings.prompt_tokens, 20);
    assert_eq!(first.timings.token_ms.len(), 4);
    let (again, _) = greedy(&mut ctx, &ids[..20], 5, &[]);
    assert_eq!(again.timings.prompt_tokens, 1);
    assert_eq!(again.tokens, first.tokens);
    let (longer, _) = greedy(&mut ctx, &ids[..30], 5, &[]);
    assert!(longer.timings.prompt_tokens <= 10);
    let mut fresh = context(&model, small());
    assert_eq!(
        greedy(&mut fresh, &ids[..30], 5, &[]).0.tokens,
        longer.tokens
    );
}

/// Every substring of the text is tried as a stop string, so most cross token boundaries.
#[test]
fn stop_strings_end_the_text_and_are_not_shown() {
    let model = load(&options());
    let ids = encode(&model, "An iterator adaptor that");
    let mut ctx = context(&model, small());
    let (whole, _) = greedy(&mut ctx, &ids, 16, &[]);
    let starts: Vec<usize> = whole.text.char_indices().map(|(i, _)| i).collect();
    for &start in starts[1..].iter().step_by(5) {
        let rest = &whole.text[start..];
        let len = rest.char_indices().nth(6).map_or(rest.len(), |(i, _)| i);
        let stop = &rest[..len];
        let at = whole.text.find(stop).unwrap();
        let (out, shown) = greedy(&mut ctx, &ids, 16, &["not there at all", stop]);
        assert_eq!(out.reason, StopReason::StopString(stop.to_owned()));
        assert_eq!(out.text, whole.text[..at]);
        assert_eq!(shown, out.text);
    }
}

#[test]
fn cancelling_ends_a_generation() {
    let model = load(&options());
    let ids = encode(&model, TEXT);
    let mut ctx = context(&model, small());
    let flag = AtomicBool::new(false);
    let options = GenerateOptions {
        sampler: SamplerOptions::greedy(),
        ignore_eog: true,
        ..GenerateOptions::default()
    };
    let mut shown = String::new();
    let out = generate(&mut ctx, 0, &ids, &options, &flag, &mut |s| {
        shown.push_str(s);
        flag.store(shown.len() > 20, std::sync::atomic::Ordering::Relaxed);
    })
    .unwrap();
    assert_eq!(out.reason, StopReason::Cancelled);
    assert!(out.tokens.len() < 40 && !out.tokens.is_empty());
    let out = generate(&mut ctx, 0, &ids, &options, &flag, &mut |_| {}).unwrap();
    assert_eq!((out.reason, out.tokens.len()), (StopReason::Cancelled, 0));
}

/// The sum over windows from logits that were computed token by token.
#[test]
fn perplexity_is_what_its_definition_says() {
    let model = load(&options());
    let ids = encode(&model, TEXT);
    let ids = &ids[..ids.len() / 16 * 16];
    let mut ctx = context(&model, small());
    let mut seen = Vec::new();
    let got = perplexity(&mut ctx, ids, 16, 0, &mut |done, all, _| {
        seen.push((done, all))
    })
    .unwrap();
    let count = ids.len() / 16;
    assert_eq!(seen, (1..=count).map(|i| (i, count)).collect::<Vec<_>>());
    assert_eq!((got.windows, got.scored), (count, count * 7));

    let bos = model
        .tokenizer()
        .bos()
        .filter(|_| model.tokenizer().add_bos());
    let mut sum = 0.0;
    for window in ids.chunks(16) {
        let mut window = window.to_vec();
        if let Some(bos) = bos {
            window[0] = bos;
        }
        ctx.truncate(0, 0).unwrap();
        for i in 0..15 {
            let out = ctx.decode(&Batch::prompt(0, &window[i..=i])).unwrap();
            if i >= 8 {
                let all: f64 = out.logits(0).iter().map(|&l| f64::from(l).exp()).sum();
                sum += all.ln() - f64::from(out.logits(0)[window[i + 1] as usize]);
            }
        }
    }
    let want = sum / (count * 7) as f64;
    assert!((got.nll - want).abs() < 1e-5, "{} for {want}", got.nll);
    assert!(matches!(
        perplexity(&mut ctx, &ids[..31], 16, 0, &mut |_, _, _| {}),
        Err(Error::TooShort {
            tokens: 31,
            needed: 32
        })
    ));
}

#[test]
fn progress_counts_every_byte_that_is_loaded() {
    let mut events = Vec::new();
    Model::load(&options(), &mut |event| {
        if let LoadEvent::Tensor { done, total, .. } = event {
            events.push((done, total));
        }
    })
    .unwrap();
    assert!(events.is_sorted());
    let (done, total) = *events.last().unwrap();
    assert_eq!(done, total);
}

/// A copy of the model in a directory of its own, and the packed file's path.
fn copy() -> (tempfile::TempDir, LoadOptions, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model.gguf");
    std::fs::copy(MODEL, &model).unwrap();
    let packed = dir.path().join("model.packed");
    let options = LoadOptions {
        packed_cache: Some(packed.clone()),
        source: Source::Path(model),
        ..options()
    };
    (dir, options, packed)
}

/// The bits of all logits, and what became of the packed file.
fn with_packed_file(options: &LoadOptions) -> (Vec<Vec<u32>>, String) {
    let mut became = String::new();
    let model = Model::load(options, &mut |event| {
        if let LoadEvent::PackedFile(file) = event {
            became = file.to_string();
        }
    });
    let model = Arc::new(model.unwrap());
    let logits = all_logits(&mut context(&model, small()));
    (logits, became)
}

#[test]
fn packed_files_are_written_used_and_replaced_when_they_do_not_fit() {
    if Tier::detect_max() == Tier::Scalar {
        return;
    }
    let (dir, options, packed) = copy();
    let want = all_logits(&mut context(&load(&self::options()), small()));
    let run = |options: &LoadOptions, said: &str| {
        let (logits, became) = with_packed_file(options);
        assert!(became.ends_with(said), "`{became}`, not `{said}`");
        assert!(logits == want, "{said}: other logits");
    };
    run(&options, "model.packed: written");
    run(&options, "model.packed: used");
    let plan = load(&options).plan().clone();
    assert_eq!(plan.bytes_in(Buffer::Packed), 0);
    let whole = std::fs::read(&packed).unwrap();
    let strips = plan.bytes_in(Buffer::Cache);
    assert!(strips > 0 && (whole.len() as u64) > strips);
    // Each kind of misfit, and every part of the file.
    let changed = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        std::fs::write(&packed, bytes).unwrap();
    };
    for (at, said) in [
        (8, "was written by another version of tegula"),
        (12, "was written by another version of tegula"),
        (16, "is stale: the model has changed"),
        (20, "holds other matrices than are wanted"),
        (24, "is damaged: the sum of its tables is wrong"),
        (30, "is stale: the model has changed"),
        (60, "holds other matrices than are wanted"),
        (whole.len() - 1, "is wrong"),
        (whole.len() / 2, "is wrong"),
    ] {
        changed(at);
        run(&options, said);
        run(&options, "used");
    }
    assert!(
        std::fs::read(&packed).unwrap() == whole,
        "written otherwise"
    );
    for cut in [0, 27, 100, whole.len() - 1] {
        std::fs::write(&packed, &whole[..cut]).unwrap();
        let (logits, became) = with_packed_file(&options);
        assert!(logits == want, "cut to {cut}");
        assert!(
            became.contains("written; the one that was there"),
            "{cut}: {became}"
        );
    }
    // The model's time is part of it.
    let Source::Path(model) = &options.source else {
        unreachable!("a path");
    };
    let file = std::fs::File::options().write(true).open(model).unwrap();
    file.set_modified(std::time::SystemTime::UNIX_EPOCH)
        .unwrap();
    run(&options, "is stale: the model has changed");
    assert_eq!(
        std::fs::read_dir(dir.path()).unwrap().count(),
        2,
        "left over"
    );
}

#[test]
fn packed_files_that_can_not_be_are_done_without() {
    let (dir, options, packed) = copy();
    let run = |options: &LoadOptions, said: &str| {
        let (_, became) = with_packed_file(options);
        assert!(became.contains(said), "`{became}`, not `{said}`");
    };
    let scalar = LoadOptions {
        tier: Tier::Scalar,
        ..options.clone()
    };
    run(&scalar, "not used: there is nothing to pack");
    if Tier::detect_max() > Tier::Scalar {
        std::fs::write(&packed, "somebody's diary").unwrap();
        run(&options, "not used: it is no packed file");
        assert_eq!(std::fs::read(&packed).unwrap(), b"somebody's diary");
        let nowhere = LoadOptions {
            packed_cache: Some(dir.path().join("no/such/directory")),
            ..options.clone()
        };
        run(&nowhere, "not used: it can't be written");
    }
    assert!(std::fs::read_dir(dir.path()).unwrap().count() <= 2);
}

#[test]
fn weights_that_do_not_fit_are_refused_before_they_are_loaded() {
    let tight = |memory| LoadOptions {
        memory: Some(memory),
        ..options()
    };
    let error = Model::load(&tight(1000), &mut |_| panic!("a tensor was loaded")).unwrap_err();
    let Error::Memory { needed, .. } = error else {
        panic!("{error}");
    };
    Model::load(&tight(needed), &mut |_| {}).unwrap();
}

#[test]
fn the_plan_says_where_everything_is() {
    let model = load(&options());
    let place = |name: &str| {
        let p = model.plan().get(name).unwrap();
        let bytes = p.bytes;
        format!("{name} {} {:?} {:?} {bytes}", p.ty, p.buffer, p.encoding)
    };
    let names = [
        "token_embd.weight",
        "blk.0.attn_norm.weight",
        "blk.0.attn_q.weight",
        "blk.0.ffn_gate_inp.weight",
        "blk.0.ffn_down_exps.weight",
    ];
    let rows: Vec<_> = names.into_iter().map(place).collect();
    if Tier::detect_max() > Tier::Scalar {
        insta::assert_snapshot!("plan", rows.join("\n"));
    }
    let raw = load(&LoadOptions {
        repack: false,
        ..options()
    });
    let mapped = raw.plan().get("blk.0.attn_q.weight").unwrap();
    assert_eq!(
        (mapped.buffer, mapped.encoding),
        (Buffer::Mmap, tegula_engine::plan::Encoding::Raw)
    );
}
