//! The bookkeeping of pages: sharing, copy on write, exhaustion, state.

use tegula_kernels::{
    Compute, PoolConfig, Tier,
    kv::{KV_PAGE, KvCache, KvError, KvShape, KvType, PageTable},
    ops::Token,
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
    compute.attention(cache, 1, &[table], &[token], &[0.0; 32], 1, 1.0, &mut out);
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
