//! The pruner on files: exact shares, results that do not depend on interruptions, and errors
//! that leave nothing.

use std::{
    collections::HashMap,
    fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::Arc,
};

use phase5_sparamx::prune::{
    Calibration, Norms, PruneError, PruneOptions, Pruned, calibrate, kept_norms, leftovers, prune,
    read_norms,
};
use tegula_engine::{Batch, Context, ContextOptions, LoadOptions, Model, Source};
use tegula_gguf::{
    GgmlType, Gguf, Metadata, blocks,
    sparse::{Sparse, densify},
    writer::GgufWriter,
};

const TENSORS: [(&str, GgmlType, &[u64]); 6] = [
    ("token_embd.weight", GgmlType::BF16, &[64, 8]),
    ("blk.0.attn_q.weight", GgmlType::BF16, &[64, 48]),
    ("blk.0.ffn_gate_inp.weight", GgmlType::F32, &[64, 4]),
    ("blk.0.ffn_up_exps.weight", GgmlType::Q8_0, &[64, 32, 4]),
    ("blk.0.ffn_down_exps.weight", GgmlType::Q4_0, &[64, 64, 4]),
    ("blk.0.attn_norm.weight", GgmlType::F32, &[64]),
];

/// A model of random weights.
fn model(dir: &Path) -> PathBuf {
    let mut metadata = Metadata::default();
    metadata.set("general.architecture", "test");
    let mut writer = GgufWriter::new(metadata);
    let mut data = Vec::new();
    let mut state = 1u32;
    for (name, ty, shape) in TENSORS {
        writer.add_tensor(name, ty, shape).unwrap();
        let weights: Vec<f32> = (0..shape.iter().product())
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 24) as f32 - 0.5
            })
            .collect();
        let mut bytes = vec![0; ty.bytes_for(weights.len() as u64).unwrap() as usize];
        blocks::quantize(ty, &weights, None, &mut bytes).unwrap();
        data.push(bytes);
    }
    let path = dir.join("in.gguf");
    let slices: Vec<&[u8]> = data.iter().map(Vec::as_slice).collect();
    fs::write(&path, writer.to_bytes(&slices).unwrap()).unwrap();
    path
}

fn options() -> PruneOptions {
    PruneOptions {
        sparsity: 0.75,
        least_saving: 0.1,
        ..PruneOptions::default()
    }
}

fn run(model: &Path, out: &Path, options: &PruneOptions) -> Result<Pruned, PruneError> {
    let model = Gguf::open(model).unwrap();
    prune(&model, out, options, &mut |_| ControlFlow::Continue(()))
}

fn unpack(from: &Path, to: &Path) {
    let model = Gguf::open(from).unwrap();
    densify(&model, to, &mut |_| ControlFlow::Continue(())).unwrap();
}

#[test]
fn matrices_lose_their_share_and_all_else_stays() {
    let dir = tempfile::tempdir().unwrap();
    let (input, out) = (model(dir.path()), dir.path().join("out.gguf"));
    let pruned = run(&input, &out, &options()).unwrap();
    assert_eq!((pruned.tensors, pruned.packed, pruned.resumed), (3, 3, 0));
    let weights = 64 * 48 + 64 * 32 * 4 + 64 * 64 * 4;
    assert_eq!(pruned.weights, weights);
    // Codes that are zero already are the first to go.
    assert!(pruned.zeros >= weights / 4 * 3 && pruned.zeros < weights / 100 * 82);
    let (before, after) = (Gguf::open(&input).unwrap(), Gguf::open(&out).unwrap());
    assert_eq!(after.file_bytes(), pruned.bytes);
    let mut zeros = 0;
    for (a, b) in before.tensors().iter().zip(after.tensors()) {
        assert_eq!((&a.name, &a.shape), (&b.name, &b.shape));
        if b.ty.is_sparse() {
            let sparse = Sparse::parse(after.data(b)).unwrap();
            sparse.check().unwrap();
            zeros += b.elements() - sparse.header().values;
        } else {
            assert!(before.data(a) == after.data(b), "{}", a.name);
        }
    }
    assert_eq!(zeros, pruned.zeros);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);

    // Dense: the same weights.
    let [dense, unpacked] = ["dense.gguf", "unpacked.gguf"].map(|name| dir.path().join(name));
    let keep_types = PruneOptions {
        dense: true,
        ..options()
    };
    run(&input, &dense, &keep_types).unwrap();
    unpack(&out, &unpacked);
    let (dense, unpacked) = (Gguf::open(&dense).unwrap(), Gguf::open(&unpacked).unwrap());
    for (a, b) in dense.tensors().iter().zip(unpacked.tensors()) {
        assert_eq!(a.ty, b.ty);
        assert!(dense.data(a) == unpacked.data(b), "{}", a.name);
    }
}

#[test]
fn patterns_make_strips_of_one_length() {
    let dir = tempfile::tempdir().unwrap();
    let (input, out) = (model(dir.path()), dir.path().join("out.gguf"));
    let pattern = Some("2:4".parse().unwrap());
    let with_pattern = PruneOptions {
        pattern,
        ..options()
    };
    run(&input, &out, &with_pattern).unwrap();
    let out = Gguf::open(&out).unwrap();
    let t = out.require_tensor("blk.0.ffn_up_exps.weight").unwrap();
    let sparse = Sparse::parse(out.data(t)).unwrap();
    sparse.check().unwrap();
    assert_eq!(sparse.header().pattern, pattern);
    assert_eq!(sparse.header().values, 64 * 32 * 4 / 2);
}

#[test]
fn an_interrupted_run_goes_on_and_ends_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let input = model(dir.path());
    let (whole, out) = (dir.path().join("whole.gguf"), dir.path().join("out.gguf"));
    run(&input, &whole, &options()).unwrap();
    let source = Gguf::open(&input).unwrap();
    // Breaks before the tensor with this index.
    let interrupted = |before: usize, options: &PruneOptions| {
        let mut next = 0;
        let result = prune(&source, &out, options, &mut |_| {
            next += 1;
            match next > before {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        });
        assert!(matches!(result, Err(PruneError::Cancelled)), "{result:?}");
        assert!(!out.exists() && leftovers(&out).is_dir());
    };
    interrupted(2, &options());
    // Half a tensor on disk is no tensor.
    fs::write(leftovers(&out).join("3.tmp"), b"half").unwrap();
    interrupted(4, &options());
    let pruned = run(&input, &out, &options()).unwrap();
    assert_eq!((pruned.tensors, pruned.resumed), (3, 2));
    assert!(fs::read(&whole).unwrap() == fs::read(&out).unwrap());
    assert!(!leftovers(&out).exists());

    // Other options start anew.
    fs::remove_file(&out).unwrap();
    let other = PruneOptions {
        sparsity: 0.5,
        ..options()
    };
    interrupted(4, &other);
    let pruned = run(&input, &out, &options()).unwrap();
    assert_eq!(pruned.resumed, 0);
    assert!(fs::read(&whole).unwrap() == fs::read(&out).unwrap());
}

#[test]
fn what_cant_be_is_refused_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (input, out) = (model(dir.path()), dir.path().join("out.gguf"));
    let refused = |change: fn(&mut PruneOptions)| {
        let mut options = options();
        change(&mut options);
        let error = run(&input, &out, &options).unwrap_err().to_string();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "{error}");
        error
    };
    let errors = [
        refused(|o| o.sparsity = 1.0),
        refused(|o| o.sparsity = -0.1),
        refused(|o| o.sparsity = f64::NAN),
        refused(|o| o.tensors = Some("ssm".parse().unwrap())),
        refused(|o| o.norms = Some(HashMap::from([("other".to_owned(), vec![1.0; 64])]))),
        refused(|o| {
            let name = "blk.0.ffn_up_exps.weight".to_owned();
            o.norms = Some(HashMap::from([(name, vec![1.0; 64])]));
            o.tensors = Some("ffn_up".parse().unwrap());
        }),
    ];
    let parts = [
        "sparsity 1 is out of range",
        "-0.1",
        "NaN",
        "`ssm`",
        "no norms of its inputs",
        "64 norms of inputs, 256 needed",
    ];
    for (error, part) in errors.iter().zip(parts) {
        assert!(error.contains(part), "{error}");
    }
}

/// The model that is part of the program: a mixture of 16 experts, 4 used, in Q4_0.
fn embedded() -> PathBuf {
    let path = "../crates/tegula/assets/ferrous-moe-21m-Q4_0.gguf";
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

const TEXT: &str = "A vector is a contiguous growable array type. Iterators are lazy: they do \
    nothing unless consumed. The borrow checker holds that references never outlive what they \
    refer to, and that a mutable reference is the only one while it lives.\n";

fn load(path: &Path) -> Arc<Model> {
    let options = LoadOptions {
        threads: 2,
        ..LoadOptions::new(Source::Path(path.to_owned()))
    };
    Arc::new(Model::load(&options, &mut |_| ()).unwrap())
}

fn measure(model: &Arc<Model>, text: &str, window: usize) -> Result<Norms, PruneError> {
    let how = Calibration {
        window,
        limit: 4,
        ..Calibration::default()
    };
    calibrate(Arc::clone(model), text, &how, &mut |_, _| {
        ControlFlow::Continue(())
    })
}

/// Logits of a prompt, then of tokens alone and in threes.
fn logits(path: &Path) -> Vec<f32> {
    let ids: Vec<u32> = (0..40).map(|i| i * 37 % 1000).collect();
    let mut ctx = Context::new(load(path), &ContextOptions::default()).unwrap();
    let mut all = Vec::new();
    for part in [&ids[..30], &ids[30..31], &ids[31..34], &ids[34..]] {
        let out = ctx.decode(&Batch::all_logits(0, part)).unwrap();
        all.extend((0..out.len()).flat_map(|i| out.logits(i).to_vec()));
    }
    all
}

#[test]
fn the_engine_measures_inputs_and_sparse_runs_as_dense() {
    let dir = tempfile::tempdir().unwrap();
    let model = load(&embedded());
    let text = TEXT.repeat(4);
    let norms = measure(&model, &text, 32).unwrap();
    let all = norms.all();
    let config = model.config();
    for layer in 0..config.layers {
        for (part, len) in [
            ("attn_q", config.embd),
            ("attn_output", config.heads * config.head_dim),
            ("ffn_up_exps", 16 * config.embd),
        ] {
            let name = format!("blk.{layer}.{part}.weight");
            let norms = all.get(&name).unwrap_or_else(|| panic!("{name}"));
            assert_eq!(norms.len(), len, "{name}");
            assert!(norms.iter().all(|x| x.is_finite() && *x >= 0.0), "{name}");
        }
    }
    // Every token of a layer chooses four experts.
    let (_, counts) = norms.counts("blk.1.ffn_down_exps.weight").unwrap();
    assert_eq!(counts.iter().sum::<u64>(), 4 * 32 * 4);
    assert!(matches!(
        measure(&model, &text, 32),
        Err(PruneError::Observed)
    ));

    // They come back from the file that `quantize --imatrix` reads, too.
    let saved = dir.path().join("imatrix.gguf");
    norms.save(&saved).unwrap();
    let read = read_norms(&Gguf::open(&saved).unwrap()).unwrap();
    let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-5 * b.abs();
    for (name, norms) in &all {
        assert!(read[name].iter().zip(norms).all(near), "{name}");
    }

    let [sparse, dense] = ["sparse.gguf", "dense.gguf"].map(|name| dir.path().join(name));
    let wanda = PruneOptions {
        sparsity: 0.5,
        norms: Some(all),
        ..options()
    };
    let pruned = run(&embedded(), &sparse, &wanda).unwrap();
    // A small one gains too little.
    assert!(pruned.packed + 1 >= pruned.tensors, "{pruned:?}");
    unpack(&sparse, &dense);
    assert!(logits(&sparse) == logits(&dense), "sparse is not as dense");
}

#[test]
fn interrupted_measurements_go_on_and_end_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.gguf");
    let kept = kept_norms(&out);
    // Weights from the file as they are give the same inputs.
    let mapped = || {
        let options = LoadOptions {
            threads: 2,
            repack: false,
            ..LoadOptions::new(Source::Path(embedded()))
        };
        Arc::new(Model::load(&options, &mut |_| ()).unwrap())
    };
    // Five windows, two at a time; breaks where `until` are done. Also where it began.
    let text = TEXT.repeat(5);
    let run = |model, text: &str, kept, until| {
        let how = Calibration {
            window: 32,
            limit: 5,
            together: 70,
            kept,
        };
        let mut begin = None;
        let norms = calibrate(model, text, &how, &mut |done, all| {
            assert_eq!(all, 5);
            begin.get_or_insert(done);
            match done >= until {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        });
        (norms, begin)
    };
    let (whole, _) = run(load(&embedded()), &text, None, 5);
    let whole = whole.unwrap();
    let (_, counts) = whole.counts("blk.0.attn_q.weight").unwrap();
    assert_eq!(counts, [5 * 32]);

    let kept = Some(kept.as_path());
    let (broken, begin) = run(mapped(), &text, kept, 2);
    assert!(matches!(broken, Err(PruneError::Cancelled)), "{broken:?}");
    assert_eq!(begin, Some(0));
    let (rest, begin) = run(mapped(), &text, kept, 5);
    assert_eq!(begin, Some(2));
    assert!(rest.unwrap() == whole);
    // They are complete now, and pruning takes place beside them.
    let (again, begin) = run(mapped(), &text, kept, 0);
    assert_eq!(begin, None);
    let wanda = PruneOptions {
        norms: Some(again.unwrap().all()),
        ..options()
    };
    let source = Gguf::open(embedded()).unwrap();
    let result = prune(&source, &out, &wanda, &mut |_| ControlFlow::Break(()));
    assert!(matches!(result, Err(PruneError::Cancelled)), "{result:?}");
    assert!(kept_norms(&out).is_file());
    // Another text starts anew, and so does a file that is damaged.
    let (_, begin) = run(mapped(), &text[1..], kept, 2);
    assert_eq!(begin, Some(0));
    fs::write(kept_norms(&out), b"half").unwrap();
    let (_, begin) = run(mapped(), &text, kept, 0);
    assert_eq!(begin, Some(0));
    // A finished run leaves nothing.
    prune(&source, &out, &wanda, &mut |_| ControlFlow::Continue(())).unwrap();
    assert!(out.is_file() && !leftovers(&out).exists());
}

#[test]
fn a_text_too_short_is_refused() {
    let error = measure(&load(&embedded()), "Too short.", 512).unwrap_err();
    assert!(error.to_string().contains("1024 are needed"), "{error}");
}
