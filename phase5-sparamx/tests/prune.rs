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
    Calibration, Norms, PruneError, PruneOptions, PruneProgress, Pruned, leftovers, prune,
    prune_in_sequence, read_norms,
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

fn with_sparsity(sparsity: f64) -> PruneOptions {
    PruneOptions {
        sparsity,
        ..options()
    }
}

/// Prunes in sequence with a text of five windows, of which two run together.
fn in_sequence(
    input: &Path,
    out: &Path,
    text: &str,
    sparsity: f64,
    progress: &mut dyn FnMut(&str) -> ControlFlow<()>,
) -> Result<(Pruned, Norms), PruneError> {
    let how = Calibration {
        window: 32,
        limit: 5,
        together: 70,
    };
    let source = Gguf::open(input).unwrap();
    let options = with_sparsity(sparsity);
    let model = load(input);
    prune_in_sequence(&source, model, (text, &how), out, &options, &mut |p| {
        progress(p.tensor)
    })
}

fn to_the_end(input: &Path, out: &Path, sparsity: f64) -> (Pruned, Norms) {
    let go_on = &mut |_: &str| ControlFlow::Continue(());
    in_sequence(input, out, &TEXT.repeat(5), sparsity, go_on).unwrap()
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
    let [sparse, dense] = ["sparse.gguf", "dense.gguf"].map(|name| dir.path().join(name));
    let (pruned, norms) = to_the_end(&embedded(), &sparse, 0.5);
    let all = norms.all();
    let model = load(&embedded());
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
    assert_eq!(counts.iter().sum::<u64>(), 5 * 32 * 4);
    // A small one gains too little.
    assert!(pruned.packed + 1 >= pruned.tensors, "{pruned:?}");
    assert!((0.49..0.56).contains(&(pruned.zeros as f64 / pruned.weights as f64)));
    unpack(&sparse, &dense);
    assert!(logits(&sparse) == logits(&dense), "sparse is not as dense");

    // They come back from the file that `quantize --imatrix` reads, too, and prune.
    let saved = dir.path().join("imatrix.gguf");
    norms.save(&saved).unwrap();
    let read = read_norms(&Gguf::open(&saved).unwrap()).unwrap();
    let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-5 * b.abs();
    for (name, norms) in &all {
        assert!(read[name].iter().zip(norms).all(near), "{name}");
    }
    let given = PruneOptions {
        norms: Some(all),
        ..with_sparsity(0.5)
    };
    let again = dir.path().join("again.gguf");
    run(&embedded(), &again, &given).unwrap();
    assert!(fs::read(&again).unwrap() == fs::read(&sparse).unwrap());
}

#[test]
fn norms_are_those_of_a_text_that_has_passed_the_pruned_layers() {
    let dir = tempfile::tempdir().unwrap();
    let [half, same, none] = ["half", "same", "none"].map(|name| dir.path().join(name));
    let (_, norms) = to_the_end(&embedded(), &half, 0.5);
    // What comes into a layer of the result, with no more pruned, is what came in when it was made.
    let (_, behind_pruned) = to_the_end(&half, &same, 0.0);
    let (_, behind_dense) = to_the_end(&embedded(), &none, 0.0);
    for layer in 0..load(&embedded()).config().layers {
        let name = format!("blk.{layer}.attn_q.weight");
        let [norms, pruned, dense] = [&norms, &behind_pruned, &behind_dense]
            .map(|norms| norms.of(&name).unwrap_or_else(|| panic!("{name}")));
        assert!(norms == pruned, "{name}");
        assert_eq!(norms == dense, layer == 0, "{name}");
    }
}

#[test]
fn interrupted_measurements_go_on_and_end_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let [whole, out] = ["whole.gguf", "out.gguf"].map(|name| dir.path().join(name));
    let text = TEXT.repeat(5);
    let (_, norms) = to_the_end(&embedded(), &whole, 0.5);
    let mut steps = Vec::new();
    // Runs to the step that `end` accepts; says at which steps it was.
    let mut run = |text: &str, end: &dyn Fn(&str) -> bool| {
        steps.clear();
        let result = in_sequence(&embedded(), &out, text, 0.5, &mut |step| {
            steps.push(step.to_owned());
            match end(step) {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        });
        (result, steps.clone())
    };
    let cancelled = |result: Result<(Pruned, Norms), PruneError>| {
        assert!(matches!(result, Err(PruneError::Cancelled)), "{result:?}");
        assert!(!out.exists() && leftovers(&out).is_dir());
    };
    let measured = |steps: &[String], layer: usize| {
        let inputs = format!("inputs of layer {layer}");
        steps.iter().filter(|step| **step == inputs).count()
    };
    // Between two tensors of the second layer.
    let (broken, steps) = run(&text, &|step| step == "blk.1.attn_output.weight");
    cancelled(broken);
    assert_eq!([0, 1, 2].map(|layer| measured(&steps, layer)), [3, 3, 0]);
    // Half a file is no file.
    fs::write(leftovers(&out).join("inputs-2.tmp"), b"half").unwrap();
    fs::write(leftovers(&out).join("inputs-3.bin"), b"half").unwrap();
    // On the way to the third layer, whose inputs are not whole then.
    let (broken, steps) = run(&text, &|step| step == "outputs of layer 1");
    cancelled(broken);
    assert_eq!([0, 1, 2].map(|layer| measured(&steps, layer)), [0, 3, 0]);
    let (done, steps) = run(&text, &|_| false);
    let (pruned, resumed) = done.unwrap();
    assert_eq!([0, 1, 2].map(|layer| measured(&steps, layer)), [0, 3, 3]);
    assert!(pruned.resumed > 7, "{pruned:?}");
    assert!(resumed == norms);
    assert!(fs::read(&whole).unwrap() == fs::read(&out).unwrap());
    assert!(!leftovers(&out).exists());

    // Another text starts anew.
    fs::remove_file(&out).unwrap();
    let (broken, _) = run(&text, &|step| step == "outputs of layer 1");
    cancelled(broken);
    let (broken, steps) = run(&text[1..], &|step| step == "inputs of layer 1");
    cancelled(broken);
    assert_eq!(measured(&steps, 0), 3);
}

#[test]
fn a_text_too_short_and_a_model_in_use_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.gguf");
    let source = Gguf::open(embedded()).unwrap();
    let run = |model, text: &str, options: &PruneOptions| {
        let with = (text, &Calibration::default());
        let go_on = &mut |_: PruneProgress<'_>| ControlFlow::Continue(());
        let error = prune_in_sequence(&source, model, with, &out, options, go_on).unwrap_err();
        assert!(!out.exists() && !leftovers(&out).exists());
        error.to_string()
    };
    let error = run(load(&embedded()), "Too short.", &options());
    assert!(error.contains("1024 are needed"), "{error}");
    let text = TEXT.repeat(40);
    let model = load(&embedded());
    let error = run(Arc::clone(&model), &text, &options());
    assert!(error.contains("in use"), "{error}");
}
