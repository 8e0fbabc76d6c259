//! Tasks 5.1 to 5.10.

use std::{collections::BTreeMap, fs, ops::ControlFlow, path::Path, sync::Arc, time::Duration};

use tegula_engine::{
    Batch, Context, ContextOptions, LoadOptions, Model, Source, perplexity,
    threads::default_threads,
};
use tegula_gguf::{
    Bytes, GgmlType, Gguf, Metadata,
    sparse::{self, Sparse, Sparsify, densify, pack_tensor, sparsify},
    tokenizer::EncodeOptions,
    writer::GgufWriter,
};
use tegula_kernels::{
    Acts, Amx, Compute, PoolConfig, Tier, Weights,
    kv::pruned::KvSparsity,
    ops::moe::{MoeScratch, RouteOptions},
};
use tegula_lab::{Check, Env, Need, Outcome};

use crate::{
    bench::{self, Name, dense_rows},
    prune::{
        Calibration, PruneOptions, PruneProgress, Pruned, leftovers, prune, prune_in_sequence,
    },
    quality,
    sparamx::{
        self,
        layer::{Layer, Values},
    },
};

/// Tasks 5.1 to 5.10.
pub fn checks() -> Vec<Check> {
    vec![
        Check {
            id: "5.1",
            title: "what SparAMX does and where it is wrong, reproduced from its own \
                    layout",
            requires: &[],
            run: |_| predecessor().into(),
        },
        Check {
            id: "5.2",
            title: "sparse formats in GGUF: versioned, documented, read and written",
            requires: &[],
            run: |env| formats(env).into(),
        },
        Check {
            id: "5.3",
            title: "pack and unpack are bit-exact at every sparsity, shape and thread \
                    count",
            requires: &[],
            run: |_| lossless().into(),
        },
        Check {
            id: "5.4",
            title: "the pruner: magnitude and Wanda, unstructured and N:M, resumable",
            requires: &[],
            run: |env| pruner(env).into(),
        },
        Check {
            id: "5.5",
            title: "register kernels for batches 1 to 4 equal dense on the same \
                    zero-filled weights",
            requires: &[],
            run: |_| registers().into(),
        },
        Check {
            id: "5.6",
            title: "AMX kernels for larger batches equal dense on the same zero-filled \
                    weights",
            requires: &[Need::Amx],
            run: |_| tiles().into(),
        },
        Check {
            id: "5.7",
            title: "sparse experts, fused",
            requires: &[],
            run: |_| experts().into(),
        },
        Check {
            id: "5.8",
            title: "sparse attention over finished blocks of the KV cache",
            requires: &[],
            run: |env| sparse_attention(env).into(),
        },
        Check {
            id: "5.9",
            title: "speed: sparse over dense, interleaved in one process",
            // Fewer cores do not come near the memory's bandwidth, which the floors are about.
            requires: &[Need::Avx512, Need::Cores(8)],
            run: |_| speed().into(),
        },
        Check {
            id: "5.10",
            title: "quality by method, sparsity and format, at equal bytes",
            requires: &[Need::Shared],
            run: |env| quality::check(env).into(),
        },
    ]
}

pub(crate) type Result<T> = std::result::Result<T, String>;

pub(crate) fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

pub(crate) fn holds(condition: bool, otherwise: impl FnOnce() -> String) -> Result<()> {
    match condition {
        true => Ok(()),
        false => Err(otherwise()),
    }
}

/// A directory that is gone when the check ends.
pub(crate) struct Scratch(std::path::PathBuf);

impl Scratch {
    pub fn new(what: &str) -> Result<Scratch> {
        let dir = std::env::temp_dir().join(format!("tegula-phase5-{what}-{}", std::process::id()));
        fs::create_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
        Ok(Scratch(dir))
    }

    pub fn file(&self, name: &str) -> std::path::PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Left behind it harms nobody.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn predecessor() -> Result<Outcome> {
    let wrong = sparamx::misplaced(48, 64, 16);
    holds(wrong > 0.0, || {
        "SparAMX's odd shares were expected to go wrong".into()
    })?;
    for (rows, threads) in [(64, 16), (256, 16), (16, 16)] {
        let wrong = sparamx::misplaced(rows, 64, threads);
        holds(wrong == 0.0, || {
            format!("{rows} rows of tiles on {threads} threads: {wrong}")
        })?;
    }
    let largest = 0.3f32;
    let rows = [0.3f32, -0.1, 0.02, 0.299];
    let left = rows
        .iter()
        .filter(|&&w| (w * sparamx::int8_scale(largest)).round() != 0.0);
    let left = left.count();
    holds(left == 0, || {
        format!("{left} weights are left of a row below a half")
    })?;
    // Ours, on the same shapes and threads.
    equal_products(&[(768, 2048)], &[16], &[1], None)?;
    equal_products(&[(14336, 64)], &[16], &[1], None)?;
    let layers = imported()?;
    Ok(Outcome::passed([
        ("layers in SparAMX's layout, imported", layers),
        (
            "768 x 2048 on 16 threads, SparAMX",
            format!("{:.0} % of tiles take another tile's values", 100.0 * wrong),
        ),
        (
            "a row of magnitudes up to 0.3, SparAMX's 8 bits",
            "all weights become zero".to_owned(),
        ),
        (
            "768 x 2048 and 14336 rows on 16 threads, here",
            "as dense, bit for bit".to_owned(),
        ),
    ]))
}

/// Holds that layers which are packed as SparAMX does come back, whatever number of threads
/// they were packed for.
fn imported() -> Result<String> {
    let (n, k) = (768, 512);
    let weights = dense_rows(GgmlType::S_BF16, n, k, 50, 3);
    let counts = [1, 2, 4, 8, 16, 48];
    for threads in counts {
        let layer = Layer::pack(Values::Bf16, (n, k), &weights, threads).map_err(text)?;
        let rows = layer.rows().map_err(text)?;
        holds(rows == weights, || {
            format!("a layer for {threads} threads: other weights")
        })?;
    }
    let floats: Vec<f32> = (0..n * k)
        .map(|i| match i % 3 {
            0 => 0.0,
            _ => (i as f32 * 0.7).sin() * 300.0,
        })
        .collect();
    let (codes, factors) = Layer::int8_codes(&floats, k);
    let layer = Layer::pack(Values::Int8, (n, k), &codes, 16).map_err(text)?;
    let rows = Layer { factors, ..layer }.rows().map_err(text)?;
    let kept = rows.chunks_exact(34).flat_map(|block| &block[2..]);
    holds(kept.eq(&codes), || "8 bits: other codes".into())?;
    let shape = [k as u64, n as u64];
    pack_tensor(GgmlType::S8, &shape, None, &rows).map_err(text)?;
    Ok(format!(
        "bf16 for {} numbers of threads and 8 bits: the same values in the same places",
        counts.len()
    ))
}

/// Copies of a model in sparse types; a newer version and damage are errors.
fn formats(env: &Env) -> Result<Outcome> {
    let scratch = Scratch::new("formats")?;
    let doc = fs::read_to_string(env.root.join("docs/sparse-format.md")).map_err(text)?;
    for part in [
        sparse::VERSION_KEY,
        sparse::TENSORS_KEY,
        "TGSPARSE",
        "S-BF16",
        "S8",
        "S4",
    ] {
        holds(doc.contains(part), || {
            format!("docs/sparse-format.md does not name {part}")
        })?;
    }
    let mut writer = GgufWriter::new(Metadata::default());
    let mut data = Vec::new();
    for &ty in GgmlType::SPARSE {
        let shape = [512, 40, 3];
        writer
            .add_tensor(ty.name(), ty.dense(), &shape)
            .map_err(text)?;
        data.push(dense_rows(ty, 120, 512, 60, 1));
    }
    let slices: Vec<&[u8]> = data.iter().map(Vec::as_slice).collect();
    let dense = Bytes::from_vec(writer.to_bytes(&slices).map_err(text)?);
    let dense = Gguf::from_bytes(dense, "dense").map_err(text)?;
    let (there, back) = (scratch.file("sparse.gguf"), scratch.file("dense.gguf"));
    let options = Sparsify {
        wanted: &|_| true,
        least_saving: 0.1,
        pattern: None,
    };
    let go_on = &mut |_: sparse::SparseProgress<'_>| ControlFlow::Continue(());
    let converted = sparsify(&dense, &there, &options, go_on).map_err(text)?;
    holds(converted.tensors == 3, || format!("{converted:?}"))?;
    let packed = Gguf::open(&there).map_err(text)?;
    densify(&packed, &back, go_on).map_err(text)?;
    let back = Gguf::open(&back).map_err(text)?;
    for (a, b) in dense.tensors().iter().zip(back.tensors()) {
        let same = a.ty == b.ty && dense.data(a) == back.data(b);
        holds(same, || {
            format!("{}: did not come back bit for bit", a.name)
        })?;
    }
    // The version is a number behind its key and type.
    let mut newer = fs::read(&there).map_err(text)?;
    let key = sparse::VERSION_KEY.as_bytes();
    let at = newer.windows(key.len()).position(|w| w == key);
    let at = at.ok_or("the version's key is missing")? + key.len() + 4;
    newer[at] += 1;
    let error = Gguf::from_bytes(Bytes::from_vec(newer), "newer.gguf");
    let error = error.err().ok_or("a newer version was read")?.to_string();
    holds(error.contains("newer"), || error.clone())?;
    let t = packed.require_tensor("S8").map_err(text)?;
    let mut damaged = packed.data(t).to_vec();
    let at = Sparse::parse(&damaged).map_err(text)?.header().strips_at();
    damaged[at + 32..at + 96].fill(0xff);
    let damage = Sparse::parse(&damaged).map_err(text)?.check();
    let damage = damage
        .err()
        .ok_or("a damaged bitmap was accepted")?
        .to_string();
    let shares: Vec<String> = packed
        .tensors()
        .iter()
        .zip(dense.tensors())
        .map(|(s, d)| {
            format!(
                "{} {:.3} of {}",
                s.ty,
                s.bytes as f64 / d.bytes as f64,
                d.ty
            )
        })
        .collect();
    Ok(Outcome::passed([
        ("bytes at 60 %", shares.join(", ")),
        ("a newer file", error),
        ("a damaged one", damage),
    ]))
}

fn lossless() -> Result<Outcome> {
    let mut cases = 0;
    let mut one = |ty: GgmlType, n: usize, k: usize, percent: u32| -> Result<()> {
        let rows = dense_rows(ty, n, k, percent, 3);
        let shape = [k as u64, n as u64];
        let packed = pack_tensor(ty, &shape, None, &rows).map_err(text)?;
        let pool = tegula_kernels::Pool::new(PoolConfig::new(1 + cases % 17));
        let w = Weights::sparse(ty, n, k, 1, Bytes::from_vec(packed), &pool);
        let back = w.map_err(text)?.unpack_raw(&pool);
        cases += 1;
        holds(back == rows, || {
            format!("{ty} {n}x{k} at {percent} %: other weights")
        })
    };
    let shapes = [
        (16, 64),
        (48, 768),
        (17, 96),
        (100, 512),
        (768, 2048),
        (31, 4096),
        (16, 14336),
        (1024, 64),
        (2048, 96),
        (4096, 64),
        (14336, 64),
    ];
    for &ty in GgmlType::SPARSE {
        for (n, k) in shapes {
            for percent in [0, 25, 50, 75, 90, 99, 100] {
                one(ty, n, k, percent)?;
            }
        }
        one(ty, 128_256, 64, 50)?;
    }
    // Rows that are no whole groups: of this type alone.
    for (n, k) in [(17, 100), (100, 100)] {
        one(GgmlType::S_BF16, n, k, 50)?;
    }
    Ok(Outcome::passed([
        (
            "tensors",
            format!(
                "{cases}, of 3 types, {} shapes, 7 sparsities",
                shapes.len() + 3
            ),
        ),
        ("threads", "1 to 17".to_owned()),
    ]))
}

/// The model that is part of the program.
fn embedded(env: &Env) -> std::path::PathBuf {
    env.root
        .join("crates/tegula/assets/ferrous-moe-21m-Q4_0.gguf")
}

pub(crate) fn load(path: &Path, threads: usize) -> Result<Arc<Model>> {
    let options = LoadOptions {
        threads,
        // Dense files are compared with sparse ones: they are to stay dense.
        sparse_pack: false,
        ..LoadOptions::new(Source::Path(path.to_owned()))
    };
    Model::load(&options, &mut |_| ())
        .map(Arc::new)
        .map_err(text)
}

fn pruner(env: &Env) -> Result<Outcome> {
    let scratch = Scratch::new("pruner")?;
    let path = embedded(env);
    let source = Gguf::open(&path).map_err(text)?;
    let words = "Iterators are lazy: they do nothing unless consumed. ".repeat(40);
    let how = Calibration {
        window: 64,
        limit: 4,
        ..Calibration::default()
    };
    let base = || PruneOptions {
        sparsity: 0.5,
        least_saving: 0.1,
        ..PruneOptions::default()
    };
    let cases = [
        ("magnitude 50 %", base()),
        ("wanda 50 %", base()),
        (
            "magnitude 2:4",
            PruneOptions {
                pattern: "2:4".parse().ok(),
                ..base()
            },
        ),
    ];
    let mut facts = BTreeMap::new();
    for (name, options) in &cases {
        let out = scratch.file("out.gguf");
        // To its end, or to the given number of steps.
        let run = |end: usize| -> Result<Pruned> {
            let mut steps = 0;
            let progress = &mut |_: PruneProgress<'_>| {
                steps += 1;
                match steps > end {
                    true => ControlFlow::Break(()),
                    false => ControlFlow::Continue(()),
                }
            };
            let pruned = match name.starts_with("wanda") {
                false => prune(&source, &out, options, progress),
                true => {
                    let (model, how) = (load(&path, 1)?, (words.as_str(), &how));
                    let done = prune_in_sequence(&source, model, how, &out, options, progress);
                    done.map(|(pruned, _)| pruned)
                }
            };
            pruned.map_err(text)
        };
        let cut = run(10);
        holds(cut.is_err() && !out.exists(), || {
            format!("{name}: a break left a file")
        })?;
        let pruned = run(usize::MAX)?;
        holds(pruned.resumed > 0, || {
            format!("{name}: nothing was resumed")
        })?;
        holds(!leftovers(&out).exists(), || format!("{name}: leftovers"))?;
        let share = pruned.zeros as f64 / pruned.weights as f64;
        holds((0.5..0.6).contains(&share), || {
            format!("{name}: {share} of weights are zero")
        })?;
        let said = format!(
            "{:.1} % zeros, {:.3} of the bytes, {} of {} tensors resumed",
            100.0 * share,
            pruned.bytes as f64 / source.file_bytes() as f64,
            pruned.resumed,
            pruned.tensors
        );
        facts.insert((*name).to_owned(), said);
        fs::remove_file(&out).map_err(text)?;
    }
    for sparsity in [-0.1, 1.0, f64::NAN] {
        let options = PruneOptions { sparsity, ..base() };
        let out = scratch.file("never.gguf");
        let refused = prune(&source, &out, &options, &mut |_| ControlFlow::Continue(()));
        holds(refused.is_err(), || {
            format!("sparsity {sparsity} was accepted")
        })?;
    }
    Ok(Outcome::Passed { facts })
}

/// Holds that sparse products equal dense ones bit for bit; returns how many were compared.
fn equal_products(
    shapes: &[(usize, usize)],
    threads: &[usize],
    batches: &[usize],
    amx: Option<Amx>,
) -> Result<usize> {
    let compute = |threads| {
        let pool = PoolConfig::new(threads);
        match amx {
            Some(amx) => Compute::with_amx(Tier::detect_max(), amx, pool),
            None => Compute::new(Tier::detect_max(), pool),
        }
    };
    let one = compute(1);
    let others: Vec<Compute> = threads.iter().map(|&n| compute(n)).collect();
    let mut count = 0;
    for &ty in GgmlType::SPARSE {
        for (i, &(n, k)) in shapes.iter().enumerate() {
            let percent = [50, 75, 25, 99][i % 4];
            let rows = dense_rows(ty, n, k, percent, 11);
            let packed = pack_tensor(ty, &[k as u64, n as u64], None, &rows).map_err(text)?;
            let sparse = Weights::sparse(ty, n, k, 1, Bytes::from_vec(packed), &one.pool);
            let sparse = sparse.map_err(text)?;
            let dense = Weights::raw(ty.dense(), n, k, 1, Bytes::from_vec(rows)).map_err(text)?;
            let dense = dense.pack(&one.pool);
            for &m in batches {
                let x: Vec<f32> = (0..m * k).map(|i| (i as f32 * 0.37).sin()).collect();
                let product = |c: &Compute, w: &Weights| {
                    let mut acts = Acts::new();
                    c.prepare(&mut acts, &x, m, k, c.forms(m, [w]));
                    let mut y = vec![f32::NAN; m * n];
                    c.matmul(w, &acts, &mut y);
                    y
                };
                let want = product(&one, &dense);
                holds(want.iter().all(|y| y.is_finite()), || {
                    "a product is not finite".into()
                })?;
                for (c, threads) in others.iter().zip(threads) {
                    let same = product(c, &sparse) == want;
                    holds(same, || {
                        format!("{ty} {n}x{k} by {m} tokens on {threads} threads: not as dense")
                    })?;
                    count += 1;
                }
            }
        }
    }
    Ok(count)
}

fn registers() -> Result<Outcome> {
    let shapes = [(768, 2048), (100, 96), (17, 1056), (1024, 512)];
    let count = equal_products(&shapes, &[1, 2, 3, 5, 16, 17], &[1, 2, 3, 4, 8, 33], None)?;
    let table = Compute::new(Tier::detect_max(), PoolConfig::new(1)).table;
    let direct: Vec<&str> = GgmlType::SPARSE
        .iter()
        .filter(|&&ty| (table.matmul.sparse)(ty))
        .map(|ty| ty.name())
        .collect();
    Ok(Outcome::passed([
        ("products equal bit for bit", count.to_string()),
        ("kernels", table.matmul.name.to_owned()),
        (
            "types with kernels of their own here",
            match direct.is_empty() {
                true => "none: strips are made dense first".to_owned(),
                false => direct.join(", "),
            },
        ),
    ]))
}

fn tiles() -> Result<Outcome> {
    let amx = Amx::acquire().map_err(text)?;
    let shapes = [(768, 2048), (100, 96), (48, 1056)];
    let count = equal_products(&shapes, &[1, 2, 3], &[16, 33, 64, 530], Some(amx))?;
    let c = Compute::with_amx(Tier::detect_max(), amx, PoolConfig::new(1));
    let direct = c
        .table
        .matmul
        .tiles
        .as_ref()
        .is_some_and(|t| GgmlType::SPARSE.iter().all(|&ty| (t.sparse)(ty)));
    Ok(Outcome::passed([
        ("products equal bit for bit", count.to_string()),
        (
            "on the way to tiles",
            match direct {
                true => "zeros are put back in registers, once per batch".to_owned(),
                false => "strips are made dense first".to_owned(),
            },
        ),
    ]))
}

fn experts() -> Result<Outcome> {
    let (k, ff, count, used) = (256, 96, 16, 4);
    let (mut compared, mut jobs) = (0, BTreeMap::new());
    for &ty in GgmlType::SPARSE {
        let one = Compute::new(Tier::detect_max(), PoolConfig::new(1));
        let both = |n: usize, k: usize, seed| -> Result<[Weights; 2]> {
            let rows = dense_rows(ty, n * count, k, 50, seed);
            let shape = [k as u64, n as u64, count as u64];
            let packed = pack_tensor(ty, &shape, None, &rows).map_err(text)?;
            let sparse = Weights::sparse(ty, n, k, count, Bytes::from_vec(packed), &one.pool);
            let dense = Weights::raw(ty.dense(), n, k, count, Bytes::from_vec(rows));
            Ok([dense.map_err(text)?.pack(&one.pool), sparse.map_err(text)?])
        };
        let (gate, up, down) = (both(ff, k, 1)?, both(ff, k, 2)?, both(k, ff, 3)?);
        for m in [1, 3, 20] {
            let x: Vec<f32> = (0..m * k).map(|i| (i as f32 * 0.21).sin()).collect();
            let logits: Vec<f32> = (0..m * count).map(|i| (i as f32 * 1.3).cos()).collect();
            let run = |threads, side: usize| {
                let c = Compute::new(Tier::detect_max(), PoolConfig::new(threads));
                let options = RouteOptions {
                    used,
                    normalize: true,
                    scale: 1.0,
                };
                let routing = c.route(&logits, count, &options);
                let mut out = vec![0.0; m * k];
                let mut scratch = MoeScratch::default();
                let (gate, up, down) = (&gate[side], &up[side], &down[side]);
                let before = c.pool.dispatched().jobs;
                c.moe_ffn(&x, &routing, gate, up, down, &mut scratch, &mut out);
                (out, c.pool.dispatched().jobs - before)
            };
            let (want, _) = run(1, 0);
            for threads in [1, 2, 5, 16] {
                let (got, count) = run(threads, 1);
                jobs.insert(m, count);
                let most = if m == 1 { 2 } else { 3 };
                holds(count <= most, || {
                    format!("{ty}, {m} tokens: {count} dispatches, {most} are enough")
                })?;
                holds(got == want, || {
                    format!("{ty}, {m} tokens, {threads} threads: not as dense")
                })?;
                compared += 1;
            }
        }
    }
    Ok(Outcome::passed([
        ("networks equal bit for bit", compared.to_string()),
        (
            "dispatches per layer",
            format!(
                "{} for one token: gate and up of all experts, down of all; {} for several, with \
                 tokens to experts",
                jobs[&1], jobs[&20]
            ),
        ),
    ]))
}

/// Shares of K and V whose perplexity is told.
const SHARES: [(f32, f32); 7] = [
    (0.0, 0.0),
    (0.3, 0.0),
    (0.0, 0.3),
    (0.3, 0.5),
    (0.5, 0.5),
    (0.7, 0.7),
    (0.9, 0.9),
];

/// With nothing dropped the dense cache, bit for bit; deterministic; memory and perplexity by
/// what is dropped.
fn sparse_attention(env: &Env) -> Result<Outcome> {
    let held_out = env.model("heldout.txt").ok();
    let (text_name, path) = match held_out {
        Some(path) => ("heldout.txt", path),
        None => (
            "docs/ARCHITECTURE.md",
            env.root.join("docs/ARCHITECTURE.md"),
        ),
    };
    let words = fs::read_to_string(path).map_err(text)?;
    let threads = [1, 2, 5].map(|threads| load(&embedded(env), threads));
    let models = threads.into_iter().collect::<Result<Vec<_>>>()?;
    let tokenizer = models[0].tokenizer();
    let encode = EncodeOptions {
        add_special: true,
        parse_special: false,
    };
    let ids = tokenizer.encode(&words, encode);
    let context = |model: &Arc<Model>, shares: Option<(f32, f32)>, ubatch| {
        let options = ContextOptions {
            context: 512,
            ubatch,
            sparsity: shares.and_then(|(k, v)| KvSparsity::new(k, v)),
            ..ContextOptions::default()
        };
        Context::new(Arc::clone(model), &options).map_err(text)
    };
    let logits = |mut ctx: Context| -> Result<Vec<f32>> {
        let out = ctx
            .decode(&Batch::all_logits(0, &ids[..300]))
            .map_err(text)?;
        Ok((0..out.len())
            .flat_map(|i| out.logits(i).to_vec())
            .collect())
    };
    let dense = logits(context(&models[0], None, 512)?)?;
    let same = logits(context(&models[0], Some((0.0, 0.0)), 512)?)? == dense;
    holds(same, || "nothing is dropped, and logits differ".into())?;
    let want = logits(context(&models[0], Some((0.3, 0.5)), 512)?)?;
    holds(want != dense, || "dropping values changes nothing".into())?;
    for (model, ubatch) in models.iter().zip([64, 100, 7]) {
        let same = logits(context(model, Some((0.3, 0.5)), ubatch)?)? == want;
        holds(same, || {
            let threads = model.compute().pool.threads();
            format!("{threads} threads, steps of {ubatch} tokens: other logits")
        })?;
    }
    let fast = load(&embedded(env), default_threads())?;
    let rate = |shares: Option<(f32, f32)>| -> Result<f64> {
        let mut ctx = context(&fast, shares, 512)?;
        let scored = perplexity(&mut ctx, &ids, 512, WINDOWS, &mut |_, _, _| ());
        Ok(scored.map_err(text)?.ppl())
    };
    let base = rate(None)?;
    let mut facts = BTreeMap::from([
        (
            "nothing dropped".to_owned(),
            "logits of the dense cache, bit for bit".to_owned(),
        ),
        (
            "threads and steps".to_owned(),
            "logits equal bit for bit".to_owned(),
        ),
        (
            "perplexity, dense".to_owned(),
            format!("{base:.4} ({text_name}, windows of 512)"),
        ),
    ]);
    for (k, v) in SHARES {
        let ppl = rate(Some((k, v)))?;
        let large = ContextOptions {
            context: 16384,
            sparsity: KvSparsity::new(k, v),
            ..ContextOptions::default()
        };
        let ctx = Context::new(Arc::clone(&fast), &large).map_err(text)?;
        let share = ctx.kv_bytes() as f64 / ctx.dense_kv_bytes() as f64;
        holds((k, v) != (0.0, 0.0) || ppl == base, || {
            format!("nothing is dropped, and the perplexity is {ppl}, not {base}")
        })?;
        let percent = |x: f32| format!("{:.0} %", 100.0 * x);
        facts.insert(
            format!("perplexity, K {} and V {} dropped", percent(k), percent(v)),
            format!("{ppl:.4}; {share:.2} of the memory of 16,384 positions"),
        );
    }
    Ok(Outcome::Passed { facts })
}

fn speed() -> Result<Outcome> {
    let plan = bench::Plan {
        turns: 15,
        time: Duration::from_secs(3),
        ..bench::Plan::whole()
    };
    let series = bench::measure(&plan)?;
    let gains = crate::report::gains(&series);
    let mut facts = BTreeMap::new();
    let mut short = Vec::new();
    for gain in &gains {
        let Name {
            kind,
            ty,
            percent,
            shape,
            m,
            ..
        } = &gain.name;
        let what = format!("{kind} {ty} {percent} % {shape}, {m} tokens");
        facts.insert(what.clone(), format!("{:.2}", gain.gain));
        let floor = crate::report::floor(&gain.name);
        if let Some(floor) = floor.filter(|&f| gain.gain < f) {
            short.push(format!("{what}: {:.2}, not {floor}", gain.gain));
        }
    }
    Ok(match short.is_empty() {
        true => Outcome::Passed { facts },
        false => Outcome::failed(short.join("; ")),
    })
}

/// Windows of held-out text that are scored.
const WINDOWS: usize = 24;

pub(crate) fn score(model: &Arc<Model>, text_: &str) -> Result<f64> {
    let options = EncodeOptions {
        add_special: true,
        parse_special: false,
    };
    let tokens = model.tokenizer().encode(text_, options);
    let context = ContextOptions {
        context: 512,
        ..ContextOptions::default()
    };
    let mut ctx = Context::new(Arc::clone(model), &context).map_err(text)?;
    let scored = perplexity(&mut ctx, &tokens, 512, WINDOWS, &mut |_, _, _| ());
    Ok(scored.map_err(text)?.ppl())
}

/// Ids that a model continues a prompt with, best first.
pub(crate) fn greedy(model: &Arc<Model>, count: usize) -> Result<Vec<u32>> {
    let options = EncodeOptions {
        add_special: true,
        parse_special: false,
    };
    let mut ids = model
        .tokenizer()
        .encode("An iterator adaptor that", options);
    let mut ctx = Context::new(Arc::clone(model), &ContextOptions::default()).map_err(text)?;
    let mut out = Vec::new();
    for _ in 0..count {
        let outputs = ctx.decode(&Batch::prompt(0, &ids)).map_err(text)?;
        let logits = outputs.logits(0).iter().enumerate();
        let best = logits
            .max_by(|a, b| a.1.total_cmp(b.1))
            .map_or(0, |(i, _)| i as u32);
        out.push(best);
        ids = vec![best];
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_are_fused() {
        experts().unwrap();
    }
}
