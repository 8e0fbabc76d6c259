//! The chunk kernel, and the whole operation over pages, batches and threads.

use crate::{
    Random,
    data::{Codes, raw, weight_bytes},
    guard::Guarded,
    matmul::product,
    per_tier,
};
use libtest_mimic::{Failed, Trial};
use tegula_gguf::GgmlType;
use tegula_kernels::{
    Acts, Compute, Kernels, PoolConfig, Tier,
    attn::{CHUNK, ChunkArgs},
    check,
    kv::{
        KV_PAGE, KvCache, KvShape, KvType, PageTable,
        pruned::{Halves, KvSparsity, PackScratch},
    },
    ops::{Attended, Token},
};

const TYPES: [KvType; 3] = [KvType::F16, KvType::BF16, KvType::Q8_0];

pub fn trials(trials: &mut Vec<Trial>) {
    per_tier(trials, "attention_chunk", chunk);
    per_tier(trials, "attention_pruned", pruned);
    per_tier(trials, "attention_whole", whole);
    per_tier(trials, "attention_independent", independent);
}

/// A page with valid numbers in every slot.
fn page(random: &mut Random, ty: KvType, dim: usize) -> Vec<u8> {
    let values = dim * KV_PAGE;
    match ty {
        KvType::F16 => {
            let bits = |x| half::f16::from_f32(x).to_bits().to_le_bytes();
            random.normals(values).into_iter().flat_map(bits).collect()
        }
        KvType::BF16 => {
            let bits = |x| half::bf16::from_f32(x).to_bits().to_le_bytes();
            random.normals(values).into_iter().flat_map(bits).collect()
        }
        KvType::Q8_0 => {
            let mut bytes: Vec<u8> = (0..values).map(|_| random.bits() as u8).collect();
            let scales = (0..values / 32).map(|_| 0.01 + random.below(100) as f32 * 1e-4);
            bytes.extend(scales.flat_map(f32::to_le_bytes));
            bytes
        }
    }
}

fn chunk(tier: Tier) -> Result<(), Failed> {
    let kernels = Kernels::for_tier(tier);
    let mut random = Random::new(3);
    for dim in [32, 64, 80, 96, 128, 256] {
        for (k_type, v_type) in TYPES.into_iter().flat_map(|k| TYPES.map(|v| (k, v))) {
            if dim % 32 != 0 && (k_type == KvType::Q8_0 || v_type == KvType::Q8_0) {
                continue;
            }
            for rows in [1, 2, 3, 4, 5, 9] {
                let count = 1 + random.below(2);
                let pages: Vec<_> = (0..count)
                    .map(|_| {
                        let k = Guarded::at_end(&page(&mut random, k_type, dim));
                        (k, Guarded::at_start(&page(&mut random, v_type, dim)))
                    })
                    .collect();
                let pages: Vec<_> = pages.iter().map(|(k, v)| (&**k, &**v)).collect();
                let reach = count * KV_PAGE;
                let visible: Vec<_> = (0..rows)
                    .map(|r| match r {
                        0 => reach,
                        1 => 1,
                        2 => 0,
                        _ => random.below(reach + 1),
                    })
                    .collect();
                let scale = 1.0 / (dim as f32).sqrt();
                let q: Vec<_> = random
                    .normals(rows * dim)
                    .iter()
                    .map(|x| x * scale)
                    .collect();
                let q = Guarded::at_end(&q);
                let mut scores = Guarded::at_end(&vec![f32::NAN; rows * CHUNK]);
                let mut acc = Guarded::at_end(&vec![f32::NAN; rows * dim]);
                let mut max = Guarded::at_end(&vec![f32::NAN; rows]);
                let mut sum = Guarded::at_end(&vec![f32::NAN; rows]);
                let mut args = ChunkArgs {
                    k_type,
                    v_type,
                    dim,
                    q: &q,
                    visible: &visible,
                    pages: &pages,
                    asked: false,
                    next: &pages,
                    pruned: None,
                    scores: &mut scores,
                    acc: &mut acc,
                    max: &mut max,
                    sum: &mut sum,
                };
                // SAFETY: the tier is available, else this trial is ignored.
                unsafe { (kernels.attn.chunk)(&mut args) };
                check::chunk(&args)?;
            }
        }
    }
    Ok(())
}

/// Chunks whose first pages are pruned: near scalar, and bit for bit what the tier makes of
/// the same pages unpacked.
fn pruned(tier: Tier) -> Result<(), Failed> {
    let kernels = Kernels::for_tier(tier);
    let mut random = Random::new(5);
    let types = [KvType::F16, KvType::BF16];
    for dim in [16, 64, 80, 96, 128, 192, 20] {
        for (k_type, v_type) in types.into_iter().flat_map(|k| types.map(|v| (k, v))) {
            for (share, rows, seen) in [
                ((0.0, 0.5), 1, 2 * KV_PAGE),
                ((0.3, 0.5), 4, KV_PAGE + 7),
                ((0.9, 0.0), 6, KV_PAGE + 1),
                ((0.6, 0.99), 5, KV_PAGE),
            ] {
                let shape = KvShape {
                    layers: 1,
                    heads: 1,
                    dim,
                    k: k_type,
                    v: v_type,
                };
                let sparsity = KvSparsity::new(share.0, share.1).ok_or("shares")?;
                let halves = Halves::new(&shape, sparsity)?;
                let count = seen.div_ceil(KV_PAGE);
                // A chunk of pruned pages alone, or with a dense one behind.
                let packed = if seen.is_multiple_of(KV_PAGE) {
                    count
                } else {
                    1
                };
                let mut given = Vec::new();
                let mut dense = Vec::new();
                for i in 0..count {
                    let page = [(halves.k, k_type), (halves.v, v_type)].map(|(half, ty)| {
                        let page = page(&mut random, ty, dim);
                        if i >= packed {
                            return (Guarded::at_end(&page), page);
                        }
                        let mut packed = vec![0; half.bytes()];
                        half.pack(&page, &mut PackScratch::default(), &mut packed);
                        let mut unpacked = vec![0xee; page.len()];
                        half.unpack(&packed, &mut unpacked);
                        let guarded = Guarded::at_end(&packed);
                        let mut out = Guarded::at_end(&vec![0xee; page.len()]);
                        // SAFETY: the tier is available; whole pages.
                        unsafe { (kernels.attn.unpack)(&half, &guarded, &mut out) };
                        assert!(*out == unpacked[..], "{half:?}");
                        (guarded, unpacked)
                    });
                    let [(k, k_dense), (v, v_dense)] = page;
                    given.push((k, v));
                    dense.push((k_dense, v_dense));
                }
                let given: Vec<_> = given.iter().map(|(k, v)| (&**k, &**v)).collect();
                let dense: Vec<_> = dense.iter().map(|(k, v)| (&k[..], &v[..])).collect();
                let visible: Vec<_> = (0..rows).map(|r| seen - r.min(3)).collect();
                let q = Guarded::at_end(&random.normals(rows * dim));
                let run = |pages: &[(&[u8], &[u8])], pruned| -> Result<_, Failed> {
                    let mut scores = Guarded::at_end(&vec![f32::NAN; rows * CHUNK]);
                    let mut acc = Guarded::at_end(&vec![f32::NAN; rows * dim]);
                    let mut max = Guarded::at_end(&vec![f32::NAN; rows]);
                    let mut sum = Guarded::at_end(&vec![f32::NAN; rows]);
                    let mut args = ChunkArgs {
                        k_type,
                        v_type,
                        dim,
                        q: &q,
                        visible: &visible,
                        pages,
                        asked: true,
                        next: &[],
                        pruned,
                        scores: &mut scores,
                        acc: &mut acc,
                        max: &mut max,
                        sum: &mut sum,
                    };
                    // SAFETY: the tier is available, else this trial is ignored.
                    unsafe { (kernels.attn.chunk)(&mut args) };
                    check::chunk(&args)?;
                    Ok([acc.to_vec(), max.to_vec(), sum.to_vec()])
                };
                let got = run(&given, Some((halves, packed)))?;
                if got != run(&dense, None)? {
                    let what = format!("dim {dim} {k_type:?}/{v_type:?} {sparsity}, {rows} rows");
                    return Err(format!("{what}: not as unpacked").into());
                }
            }
        }
    }
    Ok(())
}

struct Case {
    cache: KvCache,
    tables: Vec<PageTable>,
    tokens: Vec<Token>,
    /// Per sequence `[position][heads][dim]`, rounded as the cache rounds.
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
    q: Vec<f32>,
}

const HEADS: usize = 6;
const KV_HEADS: usize = 2;
const DIM: usize = 64;

/// Sequences of the given lengths, and queries for their last `queries` positions.
fn case(compute: &Compute, (k, v): (KvType, KvType), lengths: &[usize], queries: usize) -> Case {
    let mut random = Random::new(11);
    let shape = KvShape {
        layers: 2,
        heads: KV_HEADS,
        dim: DIM,
        k,
        v,
    };
    let pages = lengths.iter().map(|n| n.div_ceil(KV_PAGE)).sum();
    let mut cache = KvCache::new(shape, pages).unwrap();
    let (mut keys, mut values, mut tokens) = (Vec::new(), Vec::new(), Vec::new());
    let mut tables = Vec::new();
    for (sequence, &length) in lengths.iter().enumerate() {
        let mut table = PageTable::default();
        cache.extend(&mut table, length).unwrap();
        let k = random.normals(length * KV_HEADS * DIM);
        let v = random.normals(length * KV_HEADS * DIM);
        let all: Vec<_> = (0..length)
            .map(|position| Token {
                sequence: 0,
                position,
            })
            .collect();
        compute.kv_store(&mut cache, 1, &[&table], &all, &k, &v);
        tokens.extend(
            (length - queries.min(length)..length).map(|position| Token { sequence, position }),
        );
        keys.push(k);
        values.push(v);
        tables.push(table);
    }
    let q = random.normals(tokens.len() * HEADS * DIM);
    Case {
        cache,
        tables,
        tokens,
        keys,
        values,
        q,
    }
}

/// Attention as rows, and the same products from what went to activations right away.
fn attend(compute: &Compute, case: &Case, tokens: &[Token], q: &[f32]) -> Vec<f32> {
    let mut out = vec![f32::NAN; q.len()];
    let tables: Vec<_> = case.tables.iter().collect();
    compute.attention(
        &case.cache,
        1,
        &tables,
        tokens,
        q,
        HEADS,
        0.125,
        Attended::Rows(&mut out),
    );
    let m = tokens.len();
    for ty in [GgmlType::F32, GgmlType::BF16, GgmlType::Q8_0] {
        let (n, k) = (8, HEADS * DIM);
        let bytes = weight_bytes(ty, n, k, Codes::Usual, &mut Random::new(12));
        let w = raw(ty, n, k, 1, &bytes);
        let (mut acts, mut y) = (Acts::new(), vec![f32::NAN; m * n]);
        let to = Attended::Acts(&mut acts, compute.forms(m, [&w]));
        compute.attention(&case.cache, 1, &tables, tokens, q, HEADS, 0.125, to);
        compute.matmul(&w, &acts, &mut y);
        assert_eq!(y, product(compute, &w, &out, m), "{ty}, {m} tokens");
    }
    out
}

/// Against the definition.
fn whole(tier: Tier) -> Result<(), Failed> {
    let compute = Compute::new(tier, PoolConfig::new(3));
    for (k, bound) in [
        (KvType::F16, 2e-3),
        (KvType::BF16, 1e-2),
        (KvType::Q8_0, 1e-2),
    ] {
        let case = case(&compute, (k, KvType::F16), &[1, 63, 64, 65, 300, 129], 40);
        let got = attend(&compute, &case, &case.tokens, &case.q);
        let want = definition(&case);
        let within = check::relative(&want, bound, 1.0);
        check::equal(&got, &want, within, |i| format!("attention {k:?}: {i}"))?;
    }
    Ok(())
}

/// Attention written down directly, in f64.
fn definition(case: &Case) -> Vec<f32> {
    let mut want = Vec::new();
    for (t, token) in case.tokens.iter().enumerate() {
        for head in 0..HEADS {
            let at = |position: usize| (position * KV_HEADS + head / (HEADS / KV_HEADS)) * DIM;
            let q = &case.q[(t * HEADS + head) * DIM..][..DIM];
            let score = |p: usize| -> f64 {
                let k = &case.keys[token.sequence][at(p)..][..DIM];
                q.iter().zip(k).map(|(a, b)| f64::from(a * b)).sum::<f64>() * 0.125
            };
            let weights: Vec<_> = (0..=token.position).map(|p| score(p).exp()).collect();
            let total: f64 = weights.iter().sum();
            for d in 0..DIM {
                let value = |p: usize| f64::from(case.values[token.sequence][at(p) + d]);
                let sum: f64 = weights.iter().enumerate().map(|(p, w)| w * value(p)).sum();
                want.push((sum / total) as f32);
            }
        }
    }
    want
}

/// On tiles: near the definition, for every cache type; the same for every thread count, and
/// for a batch as long as tiles are used.
pub fn on_tiles(make: impl Fn(usize) -> Compute) -> Result<(), Failed> {
    let one = make(1);
    for k in TYPES {
        for v in TYPES {
            // Lengths around pages, chunks and tiles; sequences with a single query.
            let case = case(&one, (k, v), &[1, 17, 63, 64, 65, 700, 129], 40);
            let got = attend(&one, &case, &case.tokens, &case.q);
            let want = definition(&case);
            let within = check::relative(&want, check::TILE_ATTENTION, 1.0);
            let at = |i| format!("attention on tiles {k:?} {v:?}: {i}");
            check::equal(&got, &want, within, at)?;
            let three = attend(&make(3), &case, &case.tokens, &case.q);
            if three != got {
                return Err(format!("{k:?} {v:?}: 3 threads differ from one").into());
            }
            let some = case.tokens.len() - 20;
            let q = &case.q[some * HEADS * DIM..];
            let last = attend(&one, &case, &case.tokens[some..], q);
            if last != got[some * HEADS * DIM..] {
                return Err(format!("{k:?} {v:?}: a part of the batch differs").into());
            }
            let vectors = attend(&one, &case, &case.tokens[..1], &case.q[..HEADS * DIM]);
            if vectors.iter().any(|x| !x.is_finite()) {
                return Err(format!("{k:?} {v:?}: a single token").into());
            }
        }
    }
    Ok(())
}

/// Bit for bit the same for every thread count, batch and split.
fn independent(tier: Tier) -> Result<(), Failed> {
    let one = Compute::new(tier, PoolConfig::new(1));
    for k in TYPES {
        let case = case(&one, (k, KvType::F16), &[2000, 3, 260], 9);
        let together = attend(&one, &case, &case.tokens, &case.q);
        for threads in [2, 3, 8] {
            let compute = Compute::new(tier, PoolConfig::new(threads));
            if attend(&compute, &case, &case.tokens, &case.q) != together {
                return Err(format!("{k:?}: {threads} threads differ from one").into());
            }
            let row = HEADS * DIM;
            for (t, token) in case.tokens.iter().enumerate() {
                let range = t * row..(t + 1) * row;
                let alone = attend(&compute, &case, &[*token], &case.q[range.clone()]);
                if alone != together[range] {
                    return Err(format!("{k:?}: {token:?} alone differs from the batch").into());
                }
            }
        }
    }
    Ok(())
}
