//! The bookkeeping of pages: sharing, copy on write, exhaustion, state.

use tegula_kernels::{
    Compute, PoolConfig, Tier,
    kv::{
        KV_PAGE, KvCache, KvError, KvShape, KvType, PageTable,
        pruned::{Halves, KvSparsity},
    },
    ops::{Attended, Token},
};

fn cache(pages: usize) -> KvCache {
    let shape = KvShape {
        layers: 2,
        heads: 1,
        dim: 32,
        k: KvType::F16,
        v: KvType::Q8_0,
    };
    KvCache::new(shape, pages).unwrap()
}

/// Reads 65 exported positions; no layer is elsewhere.
fn import(cache: &mut KvCache, data: &[u8]) -> Result<PageTable, KvError> {
    cache.import(data, 65, |_, _, _| unreachable!("all layers are here"))
}

fn fill(compute: &Compute, cache: &mut KvCache, table: &PageTable, from: usize, value: f32) {
    let tokens: Vec<_> = (from..table.len())
        .map(|position| Token {
            sequence: 0,
            position,
        })
        .collect();
    let rows = vec![value; tokens.len() * 32];
    for layer in 0..2 {
        compute.kv_store(cache, layer, &[table], &tokens, &rows, &rows);
    }
}

/// What attention reads at the last position when all keys are equal: the mean of V.
fn mean(compute: &Compute, cache: &KvCache, table: &PageTable) -> f32 {
    let mut out = vec![0.0; 32];
    let token = Token {
        sequence: 0,
        position: table.len() - 1,
    };
    compute.attention(
        cache,
        1,
        &[table],
        &[token],
        &[0.0; 32],
        1,
        1.0,
        Attended::Rows(&mut out),
    );
    out[0]
}

#[test]
fn shared_prefixes_are_copied_when_one_of_them_writes() {
    let compute = Compute::new(Tier::Scalar, PoolConfig::new(1));
    let mut cache = cache(4);
    let mut first = PageTable::default();
    cache.extend(&mut first, 70).unwrap();
    fill(&compute, &mut cache, &first, 0, 1.0);
    let mut second = cache.share(&first, 66);
    assert_eq!(cache.free_pages(), 2, "nothing is copied yet");
    cache.extend(&mut second, 2).unwrap();
    assert_eq!(cache.free_pages(), 1, "only the partial page is copied");
    fill(&compute, &mut cache, &second, 66, 69.0);
    assert!(
        (mean(&compute, &cache, &first) - 1.0).abs() < 1e-2,
        "the first did not change"
    );
    assert!(
        (mean(&compute, &cache, &second) - 3.0).abs() < 2e-2,
        "(66 · 1 + 2 · 69) / 68"
    );
    cache.truncate(&mut first, 0);
    cache.truncate(&mut second, 0);
    assert_eq!(cache.free_pages(), 4);
}

#[test]
fn a_full_cache_refuses_and_changes_nothing() {
    let mut cache = cache(2);
    let mut table = PageTable::default();
    cache.extend(&mut table, KV_PAGE + 1).unwrap();
    let before = table.clone();
    assert_eq!(
        cache.extend(&mut table, KV_PAGE),
        Err(KvError::Full { pages: 2 })
    );
    assert_eq!(table, before);
    cache.extend(&mut table, KV_PAGE - 1).unwrap();
    let mut shared = cache.share(&table, KV_PAGE + 3);
    assert!(
        cache.extend(&mut shared, 1).is_err(),
        "a copy needs a page too"
    );
    assert_eq!(shared.len(), KV_PAGE + 3);
}

#[test]
fn state_goes_out_and_comes_back() {
    let compute = Compute::new(Tier::Scalar, PoolConfig::new(1));
    let mut cache = cache(4);
    let mut table = PageTable::default();
    cache.extend(&mut table, 65).unwrap();
    fill(&compute, &mut cache, &table, 0, 5.0);
    let saved = cache
        .export(&table, |_, _, _| -> Result<(), KvError> {
            unreachable!("all layers are here")
        })
        .unwrap();
    let restored = import(&mut cache, &saved).unwrap();
    assert_eq!(
        mean(&compute, &cache, &restored),
        mean(&compute, &cache, &table)
    );
    let short = import(&mut cache, &saved[1..]).unwrap_err();
    assert_eq!(
        short,
        KvError::StateSize {
            got: saved.len() - 1,
            want: saved.len()
        }
    );
}

#[test]
fn unsuitable_heads_are_refused() {
    let shape = KvShape {
        layers: 1,
        heads: 1,
        dim: 48,
        k: KvType::F16,
        v: KvType::Q8_0,
    };
    assert!(matches!(
        KvCache::new(shape, 1),
        Err(KvError::Dimension { dim: 48, .. })
    ));
}

const PRUNED: KvShape = KvShape {
    layers: 1,
    heads: 2,
    dim: 64,
    k: KvType::F16,
    v: KvType::BF16,
};

fn rows(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn tokens(positions: std::ops::Range<usize>) -> Vec<Token> {
    let token = |position| Token {
        sequence: 0,
        position,
    };
    positions.map(token).collect()
}

/// Stores `k` and `v` in steps of so many positions, as the engine does.
fn store(
    compute: &Compute,
    cache: &mut KvCache,
    table: &mut PageTable,
    (k, v): (&[f32], &[f32]),
    step: usize,
) {
    let row = PRUNED.heads * PRUNED.dim;
    let all = k.len() / row;
    for first in (0..all).step_by(step) {
        let last = all.min(first + step);
        cache.extend(table, last - first).unwrap();
        let part = first * row..last * row;
        let tokens = tokens(first..last);
        compute.kv_store(cache, 0, &[table], &tokens, &k[part.clone()], &v[part]);
        cache.settle(table);
    }
}

fn attend(compute: &Compute, cache: &KvCache, table: &PageTable, tokens: &[Token]) -> Vec<f32> {
    let q = rows(tokens.len() * 4 * PRUNED.dim, 9);
    let mut out = vec![f32::NAN; q.len()];
    compute.attention(
        cache,
        0,
        &[table],
        tokens,
        &q,
        4,
        0.125,
        Attended::Rows(&mut out),
    );
    out
}

fn no_device(_: usize, _: u32, _: &mut [u8]) -> Result<(), KvError> {
    unreachable!("all layers are here")
}

/// A position sees its own page as it was stored and those before it as they were packed.
#[test]
fn attention_sees_pruned_pages_as_they_are_saved() {
    let row = PRUNED.heads * PRUNED.dim;
    let length = 200;
    let (k, v) = (rows(length * row, 1), rows(length * row, 2));
    for sparsity in [(0.0, 0.0), (0.3, 0.5), (0.8, 0.9)] {
        let sparsity = KvSparsity::new(sparsity.0, sparsity.1).unwrap();
        let halves = Halves::new(&PRUNED, sparsity).unwrap();
        let mut sparse = KvCache::pruned(PRUNED, sparsity, 4, 3).unwrap();
        let mut table = PageTable::default();
        let scalar = Compute::new(Tier::Scalar, PoolConfig::new(1));
        store(&scalar, &mut sparse, &mut table, (&k, &v), 70);
        let saved = sparse.export(&table, no_device).unwrap();
        // What is left of the finished pages, as rows again.
        let (mut k_left, mut v_left) = (k.clone(), v.clone());
        let page_bytes = PRUNED.heads * halves.head_bytes();
        for (i, page) in saved.chunks(page_bytes).take(length / KV_PAGE).enumerate() {
            for (head, bytes) in page.chunks(halves.head_bytes()).enumerate() {
                let (k_bytes, v_bytes) = halves.split(bytes);
                let mut dense = [(); 2].map(|()| vec![0; KV_PAGE * PRUNED.dim * 2]);
                halves.k.unpack(k_bytes, &mut dense[0]);
                halves.v.unpack(v_bytes, &mut dense[1]);
                let bits = |side: usize, at: usize| {
                    u16::from_le_bytes([dense[side][2 * at], dense[side][2 * at + 1]])
                };
                for (t, d) in (0..KV_PAGE).flat_map(|t| (0..PRUNED.dim).map(move |d| (t, d))) {
                    let at = (i * KV_PAGE + t) * row + head * PRUNED.dim + d;
                    k_left[at] = half::f16::from_bits(bits(0, d * KV_PAGE + t)).to_f32();
                    let at_v = (t / 2 * PRUNED.dim + d) * 2 + t % 2;
                    v_left[at] = half::bf16::from_bits(bits(1, at_v)).to_f32();
                }
            }
        }
        let zeros = k_left.iter().filter(|x| **x == 0.0).count() as f32;
        let finished = (length / KV_PAGE * KV_PAGE * row) as f32;
        assert!((zeros / finished - sparsity.k()).abs() < 0.01);
        let mut dense = KvCache::new(PRUNED, 4).unwrap();
        let mut dense_table = PageTable::default();
        store(
            &scalar,
            &mut dense,
            &mut dense_table,
            (&k_left, &v_left),
            200,
        );
        let last = tokens(length / KV_PAGE * KV_PAGE..length);
        for tier in [Tier::Scalar, Tier::Avx2, Tier::detect_max()] {
            let want = {
                let one = Compute::new(tier, PoolConfig::new(1));
                attend(&one, &dense, &dense_table, &last)
            };
            for threads in [1, 2, 5] {
                let compute = Compute::new(tier, PoolConfig::new(threads));
                // Packed by this tier and in steps of other lengths: the same.
                let mut cache = KvCache::pruned(PRUNED, sparsity, 4, 5).unwrap();
                let mut table = PageTable::default();
                store(&compute, &mut cache, &mut table, (&k, &v), 37 * threads);
                assert!(
                    attend(&compute, &cache, &table, &last) == want,
                    "{tier} {sparsity}"
                );
                // Behind the last position lies what was there before.
                let packed = length / KV_PAGE * page_bytes;
                let again = cache.export(&table, no_device).unwrap();
                assert!(again[..packed] == saved[..packed]);
            }
        }
    }
}

#[test]
fn finished_pages_give_their_dense_memory_back() {
    let sparsity = KvSparsity::new(0.5, 0.5).unwrap();
    let compute = Compute::new(Tier::Scalar, PoolConfig::new(1));
    let mut cache = KvCache::pruned(PRUNED, sparsity, 10, 2).unwrap();
    assert!(cache.bytes() < PRUNED.bytes(2 + 7));
    let row = PRUNED.heads * PRUNED.dim;
    let (k, v) = (rows(7 * KV_PAGE * row, 3), rows(7 * KV_PAGE * row, 4));
    let mut table = PageTable::default();
    // Two dense pages are enough for seven.
    store(&compute, &mut cache, &mut table, (&k, &v), 40);
    assert_eq!((cache.pages(), cache.free_pages()), (10, 3));
    // A copy shares packed pages; what is inside of one can't be kept.
    let mut copy = cache.share(&table, 3 * KV_PAGE + 5);
    assert_eq!((copy.len(), cache.free_pages()), (3 * KV_PAGE, 3));
    cache.truncate(&mut table, 5 * KV_PAGE);
    assert_eq!((table.len(), cache.free_pages()), (5 * KV_PAGE, 5));
    cache.truncate(&mut table, 4 * KV_PAGE + 63);
    assert_eq!((table.len(), cache.free_pages()), (4 * KV_PAGE, 6));
    // The dense tail can be cut anywhere, and is copied when two sequences write to it.
    cache.extend(&mut table, 10).unwrap();
    cache.truncate(&mut table, 4 * KV_PAGE + 3);
    assert_eq!(table.len(), 4 * KV_PAGE + 3);
    let mut twin = cache.share(&table, table.len());
    assert_eq!(cache.free_pages(), 5);
    cache.extend(&mut twin, 1).unwrap();
    assert_eq!(cache.free_pages(), 4);
    for table in [&mut table, &mut twin, &mut copy] {
        cache.truncate(table, 0);
    }
    assert_eq!(cache.free_pages(), 10);
    // All dense pages are free, too.
    cache.extend(&mut table, 2 * KV_PAGE).unwrap();
    assert!(cache.extend(&mut table, 1).is_err(), "no third dense page");
}

#[test]
fn damaged_pruned_pages_are_refused() {
    let sparsity = KvSparsity::new(0.5, 0.5).unwrap();
    let compute = Compute::new(Tier::Scalar, PoolConfig::new(1));
    let mut cache = KvCache::pruned(PRUNED, sparsity, 4, 2).unwrap();
    let row = PRUNED.heads * PRUNED.dim;
    let (k, v) = (rows(70 * row, 3), rows(70 * row, 4));
    let mut table = PageTable::default();
    store(&compute, &mut cache, &mut table, (&k, &v), 64);
    let saved = cache.export(&table, no_device).unwrap();
    let load = |cache: &mut KvCache, data: &[u8]| -> Result<PageTable, KvError> {
        cache.import(data, 70, |_, _, _| unreachable!("all layers are here"))
    };
    let restored = load(&mut cache, &saved).unwrap();
    let last = tokens(69..70);
    assert_eq!(
        attend(&compute, &cache, &restored, &last),
        attend(&compute, &cache, &table, &last)
    );
    assert_eq!(cache.free_pages(), 0);
    cache.truncate(&mut table, 0);
    let mut damaged = saved.clone();
    damaged[9] ^= 4;
    assert_eq!(load(&mut cache, &damaged), Err(KvError::Damaged));
    assert_eq!(cache.free_pages(), 2, "nothing is left behind");
    let other = KvShape {
        v: KvType::Q8_0,
        ..PRUNED
    };
    let refused = KvCache::pruned(other, sparsity, 4, 2).err();
    assert_eq!(refused, Some(KvError::Pruned { ty: "q8_0" }));
}
