//! What the matrix claims of products on AMX tiles, looked at: on silicon where there is AMX,
//! else by the emulator, which executes the same machine code.

use std::{collections::BTreeMap, fs::File, io, os::unix::fs::FileExt as _};

use tegula_gguf::{Bytes, GgmlType, blocks, fuzz::driver};
use tegula_kernels::{
    Acts, Amx, Compute, Forms, PoolConfig, Tier, Weights,
    kv::{KvCache, KvShape, KvType, PageTable},
    ops::{
        Attended, Token,
        moe::{MoeScratch, Routing},
    },
    strip,
};

use crate::compare::relative_l2;

/// Relative L2 distance of products on tiles from exact ones: weights and activations are
/// rounded to bf16, each to 2^-9 of itself at most, sums are f32.
pub const PRODUCTS_WITHIN: f64 = 4e-3;
/// The same where experts multiply twice, with activations rounded in between.
pub const EXPERTS_WITHIN: f64 = 8e-3;
/// The same of attention, whose queries, keys, values and weights are rounded.
pub const ATTENTION_WITHIN: f64 = 8e-3;

/// Kernels of the best tier with AMX.
///
/// # Errors
/// When AMX can be neither had nor emulated, or the CPU has no tier that feeds it.
pub fn compute(threads: usize) -> Result<Compute, String> {
    let tier = Tier::detect_max();
    if tier == Tier::Scalar {
        return Err("the scalar kernels have no decoder for tiles".to_owned());
    }
    let amx = Amx::acquire().or_else(|_| Amx::emulate());
    let amx = amx.map_err(|e| e.to_string())?;
    Ok(Compute::with_amx(tier, amx, PoolConfig::new(threads)))
}

/// Numbers that look random and are the same every time.
struct Random(driver::Random);

impl Random {
    fn new(seed: u64) -> Random {
        Random(driver::Random::new(seed))
    }

    /// Sums of four: near enough to normal, of variance 1.
    fn values(&mut self, n: usize) -> Vec<f32> {
        let mut one = || (self.0.next_u64() >> 40) as f32 / (1 << 24) as f32 - 0.5;
        (0..n)
            .map(|_| (one() + one() + one() + one()) * 3f32.sqrt())
            .collect()
    }

    /// `n` rows of `k` weights of any type: random bytes, block by block, as long as no weight
    /// is absurd.
    fn weights(&mut self, ty: GgmlType, n: usize, k: usize) -> Vec<u8> {
        let mut bytes = vec![0; n * k / ty.block_len() * ty.block_bytes()];
        let mut plain = vec![0.0; ty.block_len()];
        for block in bytes.chunks_exact_mut(ty.block_bytes()) {
            loop {
                block.fill_with(|| self.0.next_u64() as u8);
                let decoded = blocks::dequantize(ty, block, &mut plain);
                if decoded.is_ok() && plain.iter().all(|w| w.abs() < 100.0) {
                    break;
                }
            }
        }
        bytes
    }
}

fn plain(ty: GgmlType, bytes: &[u8]) -> Result<Vec<f32>, String> {
    let mut plain = vec![0.0; bytes.len() / ty.block_bytes() * ty.block_len()];
    blocks::dequantize(ty, bytes, &mut plain).map_err(|e| format!("{ty}: {e}"))?;
    Ok(plain)
}

/// `x · wᵀ` in f64: `x` `[m][k]`, `w` `[n][k]`, the result `[m][n]`.
fn product(x: &[f32], w: &[f32], k: usize) -> Vec<f32> {
    let dot = |x: &[f32], w: &[f32]| {
        let terms = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w));
        terms.sum::<f64>() as f32
    };
    let rows = x.chunks_exact(k);
    rows.flat_map(|x| w.chunks_exact(k).map(move |w| dot(x, w)))
        .collect()
}

fn weights(
    ty: GgmlType,
    (n, k): (usize, usize),
    experts: usize,
    bytes: &[u8],
) -> Result<Weights, String> {
    let bytes = Bytes::from_vec(bytes.to_vec());
    Weights::raw(ty, n, k, experts, bytes).map_err(|e| e.to_string())
}

fn multiply(c: &Compute, w: &Weights, x: &[f32]) -> Result<Vec<f32>, String> {
    let m = x.len() / w.k();
    let forms = c.forms(m, [w]);
    if forms != Forms::TILES {
        return Err(format!("{} weights, {m} tokens: no tiles", w.ty()));
    }
    let mut acts = Acts::new();
    c.prepare(&mut acts, x, m, w.k(), forms);
    let mut y = vec![f32::NAN; m * w.n()];
    c.matmul(w, &acts, &mut y);
    Ok(y)
}

fn within(what: &str, distance: f64, bound: f64) -> Result<f64, String> {
    match distance <= bound {
        true => Ok(distance),
        false => Err(format!(
            "{what}: {distance:.1e} apart, more than {bound:.0e}"
        )),
    }
}

/// Distances of each of these types' products, ragged in every direction, from exact ones.
fn distances(types: &[GgmlType]) -> Result<BTreeMap<String, f64>, String> {
    let c = compute(2)?;
    let mut random = Random::new(4);
    let mut all = BTreeMap::new();
    for &ty in types {
        // Strips that are not full, more inputs than are decoded at a time, tokens over tiles.
        let (n, k, m) = (37, 1280, 19);
        let bytes = random.weights(ty, n, k);
        let x = random.values(m * k);
        let w = weights(ty, (n, k), 1, &bytes)?;
        let got = multiply(&c, &w.pack(&c.pool), &x)?;
        if multiply(&c, &w, &x)? != got {
            return Err(format!("{ty}: packed and raw weights differ"));
        }
        let want = product(&x, &plain(ty, &bytes)?, k);
        let distance = within(ty.name(), relative_l2(&want, &got), PRODUCTS_WITHIN)?;
        all.insert(ty.name().to_owned(), distance);
    }
    Ok(all)
}

/// The worst of some types, in words.
fn worst(types: &[GgmlType]) -> Result<String, String> {
    let all = distances(types)?;
    let worst = all.values().copied().fold(0.0, f64::max);
    let names: Vec<&str> = all.keys().map(String::as_str).collect();
    Ok(format!("{}: at most {worst:.1e} apart", names.join(" ")))
}

/// Every type that products take but F32, which stays on vectors.
///
/// # Errors
/// Names the type that is too far off.
pub fn every_type() -> Result<BTreeMap<String, f64>, String> {
    let taken = |ty: &GgmlType| *ty != GgmlType::F32 && strip::layout(*ty).is_some();
    let types: Vec<_> = GgmlType::ALL.iter().copied().filter(taken).collect();
    distances(&types)
}

/// Row 1: the types that upstream multiplies by int8 tiles.
pub fn upstreams_types() -> Result<String, String> {
    use GgmlType as T;
    worst(&[
        T::Q4_0,
        T::Q4_1,
        T::Q8_0,
        T::Q4_K,
        T::Q5_K,
        T::Q6_K,
        T::IQ4_XS,
    ])
}

/// Row 2.
pub fn more_k_types() -> Result<String, String> {
    use GgmlType as T;
    worst(&[T::Q2_K, T::Q3_K, T::Q5_0, T::Q5_1])
}

/// Row 3.
pub fn codebooks() -> Result<String, String> {
    use GgmlType as T;
    let one_and_two = [T::IQ1_S, T::IQ1_M, T::IQ2_XXS, T::IQ2_XS, T::IQ2_S];
    let more = [T::IQ3_XXS, T::IQ3_S, T::IQ4_NL, T::MXFP4, T::NVFP4];
    worst(&[&one_and_two[..], &more].concat())
}

/// Row 5.
pub fn bf16() -> Result<String, String> {
    worst(&[GgmlType::BF16])
}

/// Row 6.
pub fn f16() -> Result<String, String> {
    worst(&[GgmlType::F16])
}

/// Row 10: from how many tokens on tiles are used.
pub fn crossover() -> Result<String, String> {
    let c = compute(1)?;
    let tiles = c.table.matmul.tiles.as_ref().ok_or("no tiles")?;
    let mut by_count: BTreeMap<usize, Vec<&str>> = BTreeMap::new();
    for &ty in GgmlType::ALL {
        let Some(fewest) = (tiles.fewest_tokens)(ty) else {
            continue;
        };
        let bytes = vec![0; 16 * 256 / ty.block_len() * ty.block_bytes()];
        let w = weights(ty, (16, 256), 1, &bytes)?;
        let tiles_take = |m| c.table.matmul.tiles_for(&w, m).is_some();
        if fewest < 2 || tiles_take(fewest - 1) || !tiles_take(fewest) {
            return Err(format!("{ty}: {fewest} tokens are not the fewest"));
        }
        by_count.entry(fewest).or_default().push(ty.name());
    }
    let text = |(n, types): (&usize, &Vec<&str>)| format!("from {n} tokens: {}", types.join(" "));
    Ok(by_count.iter().map(text).collect::<Vec<_>>().join("; "))
}

/// Row 11: one token, 4096 rows, more threads than would divide blocks of 64 rows.
pub fn balance() -> Result<String, String> {
    const THREADS: usize = 60;
    let c = Compute::new(Tier::detect_max(), PoolConfig::new(THREADS));
    let (n, k) = (4096, 32);
    let bytes = vec![0; n * GgmlType::Q4_0.block_bytes()];
    let w = weights(GgmlType::Q4_0, (n, k), 1, &bytes)?;
    let mut acts = Acts::new();
    c.prepare(&mut acts, &[1.0; 32], 1, k, c.forms(1, [&w]));
    let before = c.pool.dispatched();
    c.matmul(&w, &acts, &mut vec![0.0; n]);
    let tasks = c.pool.dispatched().tasks - before.tasks;
    match tasks as usize > 2 * THREADS {
        true => Ok(format!(
            "{n} rows, {THREADS} threads: {tasks} tasks from one counter"
        )),
        false => Err(format!("{n} rows, {THREADS} threads: only {tasks} tasks")),
    }
}

/// Row 19: strips give back the file's bytes, rows and all.
pub fn inverse() -> Result<String, String> {
    let c = compute(2)?;
    let mut random = Random::new(19);
    let mut count = 0;
    for &ty in GgmlType::ALL {
        if strip::layout(ty).is_none() {
            continue;
        }
        let (n, k, experts) = (21, 512, 3);
        let len = n * experts * k / ty.block_len() * ty.block_bytes();
        let bytes: Vec<u8> = (0..len).map(|_| random.0.next_u64() as u8).collect();
        let packed = weights(ty, (n, k), experts, &bytes)?.pack(&c.pool);
        if packed.unpack_raw(&c.pool) != bytes {
            return Err(format!("{ty}: unpacked are other bytes"));
        }
        let mut row = vec![0; len / (n * experts)];
        packed.read_row(2, 20, &mut row);
        if !bytes.ends_with(&row) {
            return Err(format!("{ty}: the last row is another"));
        }
        count += 1;
    }
    Ok(format!("{count} types"))
}

/// Experts of random weights, and tokens for them.
struct Experts {
    ty: GgmlType,
    experts: usize,
    k: usize,
    ff: usize,
    n: usize,
    /// Bytes of all experts.
    gate: Vec<u8>,
    up: Vec<u8>,
    down: Vec<u8>,
}

impl Experts {
    fn new(ty: GgmlType, experts: usize, (k, ff, n): (usize, usize, usize)) -> Experts {
        let mut random = Random::new(7);
        // Small enough that the activation function is not a step.
        let mut stack = |rows: usize, k: usize| random.weights(ty, experts * rows, k);
        Experts {
            ty,
            experts,
            k,
            ff,
            n,
            gate: stack(ff, k),
            up: stack(ff, k),
            down: stack(n, ff),
        }
    }

    /// The part of a stack that is one expert's.
    fn of<'a>(&self, stack: &'a [u8], expert: usize) -> &'a [u8] {
        let len = stack.len() / self.experts;
        &stack[expert * len..(expert + 1) * len]
    }

    /// The definition, in f64 but for the results of products: `[m][n]`.
    fn want(&self, x: &[f32], routing: &Routing) -> Result<Vec<f32>, String> {
        let mut out = Vec::new();
        for (t, x) in x.chunks_exact(self.k).enumerate() {
            let mut sum = vec![0f64; self.n];
            for u in t * routing.used..(t + 1) * routing.used {
                let expert = routing.ids[u] as usize;
                let of = |stack| plain(self.ty, self.of(stack, expert));
                let gate = product(x, &of(&self.gate)?, self.k);
                let up = product(x, &of(&self.up)?, self.k);
                let silu = |g: f32| f64::from(g) / (1.0 + (-f64::from(g)).exp());
                let hidden: Vec<f32> = gate
                    .iter()
                    .zip(&up)
                    .map(|(&g, &u)| (silu(g) * f64::from(u)) as f32)
                    .collect();
                let down = product(&hidden, &of(&self.down)?, self.ff);
                for (sum, y) in sum.iter_mut().zip(down) {
                    *sum += f64::from(routing.weights[u]) * f64::from(y);
                }
            }
            out.extend(sum.iter().map(|&s| s as f32));
        }
        Ok(out)
    }

    fn got(&self, c: &Compute, x: &[f32], routing: &Routing) -> Result<Vec<f32>, String> {
        let stack = |bytes: &[u8], rows, k| {
            let raw = weights(self.ty, (rows, k), self.experts, bytes)?;
            Ok::<_, String>(raw.pack(&c.pool))
        };
        let gate = stack(&self.gate, self.ff, self.k)?;
        let up = stack(&self.up, self.ff, self.k)?;
        let down = stack(&self.down, self.n, self.ff)?;
        Ok(run_experts(c, x, routing, [&gate, &up, &down]))
    }
}

fn run_experts(c: &Compute, x: &[f32], routing: &Routing, w: [&Weights; 3]) -> Vec<f32> {
    let m = routing.ids.len() / routing.used;
    let mut out = vec![0.0; m * w[2].n()];
    let mut scratch = MoeScratch::default();
    c.moe_ffn(x, routing, w[0], w[1], w[2], &mut scratch, &mut out);
    out
}

/// Rows 7 and 8: experts with many tokens, with one, and with none.
pub fn experts() -> Result<String, String> {
    let c = compute(2)?;
    let mut facts = Vec::new();
    for ty in [GgmlType::Q4_0, GgmlType::Q4_K, GgmlType::BF16] {
        let e = Experts::new(ty, 4, (256, 256, 40));
        let m = 33;
        let x = Random::new(8).values(m * e.k);
        // Expert 0 gets every token, expert 1 one, expert 2 the others, expert 3 none.
        let routing = Routing {
            used: 2,
            ids: (0..m as u32)
                .flat_map(|t| [0, 1 + u32::from(t > 0)])
                .collect(),
            weights: (0..m).flat_map(|_| [0.75, 0.25]).collect(),
        };
        let got = e.got(&c, &x, &routing)?;
        // One token is multiplied on vectors, by 8-bit activations: it has its own bound.
        let want = e.want(&x, &routing)?;
        let distance = relative_l2(&want[e.n..], &got[e.n..]);
        let distance = within(&format!("experts of {ty}"), distance, EXPERTS_WITHIN)?;
        within(
            "the expert with one token",
            relative_l2(&want[..e.n], &got[..e.n]),
            2e-2,
        )?;
        facts.push(format!("{ty} {distance:.1e}"));
    }
    Ok(format!(
        "33, 32, 1 and 0 tokens: {} apart",
        facts.join(", ")
    ))
}

/// Row 14, batched and broadcast: queries of several sequences of one batch, heads in groups
/// that share keys and values.
pub fn attention() -> Result<String, String> {
    const HEADS: usize = 6;
    const KV_HEADS: usize = 2;
    const DIM: usize = 64;
    let c = compute(2)?;
    let mut random = Random::new(14);
    let shape = KvShape {
        layers: 1,
        heads: KV_HEADS,
        dim: DIM,
        k: KvType::BF16,
        v: KvType::BF16,
    };
    let lengths = [70usize, 19, 130];
    let mut cache = KvCache::new(shape, 16).map_err(|e| e.to_string())?;
    let (mut tables, mut tokens, mut stored) = (Vec::new(), Vec::new(), Vec::new());
    for (sequence, &length) in lengths.iter().enumerate() {
        let mut table = PageTable::default();
        cache
            .extend(&mut table, length)
            .map_err(|e| e.to_string())?;
        let [k, v] = [(); 2].map(|()| random.values(length * KV_HEADS * DIM));
        let own: Vec<Token> = (0..length)
            .map(|position| Token {
                sequence: 0,
                position,
            })
            .collect();
        c.kv_store(&mut cache, 0, &[&table], &own, &k, &v);
        tokens.extend((length - 18..length).map(|position| Token { sequence, position }));
        tables.push(table);
        stored.push((k, v));
    }
    let tables: Vec<&PageTable> = tables.iter().collect();
    let q = random.values(tokens.len() * HEADS * DIM);
    let scale = 1.0 / (DIM as f32).sqrt();
    let mut got = vec![f32::NAN; q.len()];
    c.attention(
        &cache,
        0,
        &tables,
        &tokens,
        &q,
        HEADS,
        scale,
        Attended::Rows(&mut got),
    );
    let mut want = Vec::new();
    for (t, token) in tokens.iter().enumerate() {
        let (k, v) = &stored[token.sequence];
        for head in 0..HEADS {
            let at = |p: usize| (p * KV_HEADS + head / (HEADS / KV_HEADS)) * DIM;
            let q = &q[(t * HEADS + head) * DIM..][..DIM];
            let weight = |p: usize| {
                let terms = q.iter().zip(&k[at(p)..]);
                let dot: f64 = terms.map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
                (dot * f64::from(scale)).exp()
            };
            let weights: Vec<f64> = (0..=token.position).map(weight).collect();
            let total: f64 = weights.iter().sum();
            for d in 0..DIM {
                let terms = weights.iter().enumerate();
                let sum: f64 = terms.map(|(p, w)| w * f64::from(v[at(p) + d])).sum();
                want.push((sum / total) as f32);
            }
        }
    }
    let distance = within("attention", relative_l2(&want, &got), ATTENTION_WITHIN)?;
    Ok(format!(
        "3 sequences in one batch, {HEADS} heads over {KV_HEADS}: {distance:.1e} apart"
    ))
}

/// A file of `len` zero bytes that takes no room, but for `data` at its end; mapped.
fn sparse(len: usize, data: &[u8]) -> io::Result<Bytes> {
    let file: File = tempfile::tempfile()?;
    file.set_len(len as u64)?;
    file.write_all_at(data, (len - data.len()) as u64)?;
    Bytes::map(&file)
}

/// Row 14, 3-D and more than 2 GiB: the last expert of a stack that goes past 2^32 bytes gives
/// what it gives alone, bit for bit, as rows of the file and as strips.
pub fn beyond_two_gib() -> Result<String, String> {
    let c = compute(2)?;
    let e = Experts::new(GgmlType::Q8_0, 1, (4096, 256, 32));
    let count = 4100;
    let m = 17;
    let x = Random::new(9).values(m * e.k);
    let routing = |expert: usize| Routing {
        used: 1,
        ids: vec![expert as u32; m],
        weights: vec![1.0; m],
    };
    let alone = e.got(&c, &x, &routing(0))?;
    let want = e.want(&x, &routing(0))?;
    within("one expert", relative_l2(&want, &alone), EXPERTS_WITHIN)?;
    let fail = |e: &dyn std::fmt::Display| format!("a sparse file: {e}");
    let mut largest = 0;
    let mut stack = |bytes: &[u8], rows: usize, k: usize, packed: bool| {
        let (mut data, make) = (
            bytes.to_vec(),
            match packed {
                true => Weights::from_strips,
                false => Weights::raw,
            },
        );
        if packed {
            data.clear();
            let strips = weights(e.ty, (rows, k), 1, bytes)?.pack(&c.pool);
            strips.write_strips(&mut data).map_err(|e| fail(&e))?;
        }
        let bytes = sparse(data.len() * count, &data).map_err(|e| fail(&e))?;
        largest = largest.max(bytes.len());
        make(e.ty, rows, k, count, bytes).map_err(|e| fail(&e))
    };
    for packed in [false, true] {
        let gate = stack(&e.gate, e.ff, e.k, packed)?;
        let up = stack(&e.up, e.ff, e.k, packed)?;
        let down = stack(&e.down, e.n, e.ff, packed)?;
        let last = run_experts(&c, &x, &routing(count - 1), [&gate, &up, &down]);
        if last != alone {
            return Err(format!("packed {packed}: the last expert is not as alone"));
        }
        // Its neighbour is all zero.
        let before = run_experts(&c, &x, &routing(count - 2), [&gate, &up, &down]);
        if before.iter().any(|&y| y != 0.0) {
            return Err(format!("packed {packed}: another expert's weights"));
        }
        let mut row = vec![0; e.gate.len() / e.ff];
        gate.read_row(count - 1, e.ff - 1, &mut row);
        if !e.gate.ends_with(&row) {
            return Err(format!("packed {packed}: another row was looked up"));
        }
    }
    match largest > 1 << 32 {
        true => Ok(format!(
            "{count} experts, {largest} bytes, rows and strips: equal"
        )),
        false => Err(format!("{largest} bytes are not more than 2^32")),
    }
}
