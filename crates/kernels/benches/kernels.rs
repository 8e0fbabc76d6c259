//! Speed of the kernels, on the data of the checkasm tests:
//! `cargo bench -p tegula-kernels --bench kernels -- FILTER`.
//!
//! One thread, except where the pool itself is measured: what several make of a kernel
//! depends on the memory more than on the kernel, and is what `tegula bench` shows. A matrix
//! times a vector is given in bytes of weights, a matrix times a matrix in multiply-adds.
//! Tile products appear with `TEGULA_TEST_AMX=silicon`; emulated ones would say nothing.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use data::{Codes, matrix_types, raw, weight_bytes};
use random::Random;
use std::{hint::black_box, time::Duration};
use tegula_gguf::GgmlType;
use tegula_kernels::{
    Acts, Amx, Compute, Pool, PoolConfig, Tier, Weights,
    kv::{KvCache, KvShape, KvType, PageTable},
    ops::{Attended, Token},
    pool::allowed_cpus,
};

#[path = "../tests/checkasm/data.rs"]
#[allow(dead_code, reason = "the tests use all of it")]
mod data;
#[path = "../tests/checkasm/random.rs"]
#[allow(dead_code, reason = "the tests use all of it")]
mod random;

/// Every table of kernels that this CPU can run, with its name.
fn tables() -> Vec<(String, Compute)> {
    let tiers = Tier::ALL.into_iter().filter(|t| t.available());
    let plain = tiers.map(|tier| (tier.to_string(), Compute::new(tier, PoolConfig::new(1))));
    let silicon = std::env::var("TEGULA_TEST_AMX").is_ok_and(|v| v == "silicon");
    let amx = silicon.then(|| {
        let tier = Tier::detect_max();
        let amx = Amx::acquire().expect("TEGULA_TEST_AMX=silicon wants AMX");
        let compute = Compute::with_amx(tier, amx, PoolConfig::new(1));
        (format!("{tier}+amx"), compute)
    });
    plain.chain(amx).collect()
}

/// Packed weights: random rows, the same few again and again.
fn weights(ty: GgmlType, n: usize, k: usize, pool: &Pool) -> Weights {
    const DISTINCT: usize = 16;
    let bytes = weight_bytes(ty, DISTINCT, k, Codes::Usual, &mut Random::new(1));
    raw(ty, n, k, 1, &bytes.repeat(n / DISTINCT)).pack(pool)
}

/// Products with `m` tokens.
fn products(c: &mut Criterion, group: &str, (n, k, m): (usize, usize, usize)) {
    let mut group = c.benchmark_group(group);
    let tables = tables();
    let x = Random::new(2).normals(m * k);
    for ty in matrix_types() {
        let w = weights(ty, n, k, &tables[0].1.pool);
        group.throughput(match m {
            1 => Throughput::Bytes(w.bytes() as u64),
            _ => Throughput::Elements((n * k * m) as u64),
        });
        for (name, compute) in &tables {
            let mut acts = Acts::new();
            compute.prepare(&mut acts, &x, m, k, compute.forms(m, [&w]));
            let mut y = vec![0.0; m * n];
            group.bench_function(BenchmarkId::new(ty.to_string(), name), |b| {
                b.iter(|| compute.matmul(&w, &acts, black_box(&mut y)));
            });
        }
    }
    group.finish();
}

/// 16 MiB of codes and more: a stream that the first two levels of caches can't hold.
fn matrix_vector(c: &mut Criterion) {
    products(c, "matrix_vector", (4096, 4096, 1));
}

fn matrix_matrix(c: &mut Criterion) {
    products(c, "matrix_matrix", (256, 2048, 128));
}

/// Activations to 8 bits, per value.
fn quantize(c: &mut Criterion) {
    let mut group = c.benchmark_group("quantize_q8");
    let (m, k) = (16, 4096);
    let x = Random::new(3).normals(m * k);
    group.throughput(Throughput::Elements((m * k) as u64));
    for (name, compute) in tables() {
        let w = weights(GgmlType::Q8_0, 16, k, &compute.pool);
        // As many tokens as still take no tiles.
        let forms = compute.forms(1, [&w]);
        let mut acts = Acts::new();
        group.bench_function(&name, |b| {
            b.iter(|| compute.prepare(black_box(&mut acts), &x, m, k, forms));
        });
    }
    group.finish();
}

/// One layer's attention of Qwen3-8B's shape over 2048 positions, for the last one and for
/// the last 64; per key.
fn attention(c: &mut Criterion) {
    const HEADS: usize = 32;
    const KV_HEADS: usize = 8;
    const DIM: usize = 128;
    const POSITIONS: usize = 2048;
    let mut group = c.benchmark_group("attention");
    let mut random = Random::new(4);
    let rows = random.normals(POSITIONS * KV_HEADS * DIM);
    let q = random.normals(64 * HEADS * DIM);
    let at = |position| Token {
        sequence: 0,
        position,
    };
    let tokens: Vec<_> = (0..POSITIONS).map(at).collect();
    for ty in [KvType::F16, KvType::BF16, KvType::Q8_0] {
        for (name, compute) in tables() {
            let shape = KvShape {
                layers: 1,
                heads: KV_HEADS,
                dim: DIM,
                k: ty,
                v: ty,
            };
            let mut cache = KvCache::new(shape, POSITIONS / 64).expect("a shape that fits");
            let mut table = PageTable::default();
            cache.extend(&mut table, POSITIONS).expect("pages for all");
            compute.kv_store(&mut cache, 0, &[&table], &tokens, &rows, &rows);
            for queries in [1, 64] {
                let tokens = &tokens[POSITIONS - queries..];
                let q = &q[..queries * HEADS * DIM];
                let mut out = vec![0.0; q.len()];
                group.throughput(Throughput::Elements((queries * HEADS * POSITIONS) as u64));
                group.bench_function(BenchmarkId::new(format!("{ty:?}x{queries}"), &name), |b| {
                    b.iter(|| {
                        let out = black_box(&mut out);
                        compute.attention(
                            &cache,
                            0,
                            &[&table],
                            tokens,
                            q,
                            HEADS,
                            0.1,
                            Attended::Rows(out),
                        );
                    });
                });
            }
        }
    }
    group.finish();
}

fn rms_norm(c: &mut Criterion) {
    let mut group = c.benchmark_group("rms_norm");
    let k = 4096;
    let w = Random::new(5).normals(k);
    for m in [1, 64] {
        let x = Random::new(6).normals(m * k);
        let mut out = vec![0.0; m * k];
        group.throughput(Throughput::Elements((m * k) as u64));
        for (name, compute) in tables() {
            group.bench_function(BenchmarkId::new(m.to_string(), name), |b| {
                b.iter(|| compute.rms_norm(&x, &w, 1e-6, black_box(&mut out)));
            });
        }
    }
    group.finish();
}

/// A job with nothing to do, from call to return.
fn dispatch(c: &mut Criterion) {
    let mut group = c.benchmark_group("dispatch");
    let most = allowed_cpus().len();
    let doubling = std::iter::successors(Some(1), |n| Some(2 * n));
    for threads in doubling.take_while(|&n| n < most).chain([most]) {
        let pool = Pool::new(PoolConfig::new(threads));
        group.bench_function(BenchmarkId::from_parameter(threads), |b| {
            b.iter(|| {
                pool.run(threads, &|task| {
                    black_box(task);
                })
            });
        });
    }
    group.finish();
}

criterion_group! {
    name = kernels;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800));
    targets = matrix_vector, matrix_matrix, quantize, attention, rms_norm, dispatch
}
criterion_main!(kernels);
