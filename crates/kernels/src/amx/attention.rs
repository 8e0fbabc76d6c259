//! Attention of many queries on tiles: scores and weighted values in bf16 with f32 sums,
//! softmax in f32.
//!
//! A chunk of the cache is brought into tiles of bf16 once for all query rows of a task. Then
//! 32 rows at a time go through it: scores, weights, weighted values. The softmax runs along:
//! when a row's maximum grows, what it has summed up so far is scaled down. Scores are base 2
//! exponents: queries come multiplied by log2 e.

use std::arch::x86_64::{__m256, __m512, __m512i};

use super::{
    panel::{self, Choice},
    tile::{self, Contraction, MOST_TOKENS, TILE_BYTES, TILE_K, TILE_ROWS},
};
use crate::{
    attn::{SCORE_ROW, TILE_CHUNK, TILE_QUERIES, TileAttention, TileChunk},
    generic::{
        lanes::{Lanes, Pair, WithBf16},
        vector::{Vector, exp2},
    },
    kv::{KV_PAGE, KvType},
    tier::Tier,
};

/// Attention on tiles with the vector instructions of `tier`, if there are any.
pub(crate) fn kernels(tier: Tier) -> Option<TileAttention> {
    let chunk: unsafe fn(&mut TileChunk<'_>) = match panel::choose(tier)? {
        Choice::Bf16 => chunk::<Bf16>,
        Choice::Avx512 => chunk::<Avx512>,
        Choice::Avx2 => chunk::<Avx2>,
    };
    Some(TileAttention {
        chunk,
        fewest_tokens: 16,
    })
}

/// The vector parts, compiled for one set of features: what [`vector_parts`] writes.
///
/// # Safety
/// The CPU has the features; pointers are valid as the functions below state.
trait VectorParts {
    unsafe fn keys(ty: KvType, page: *const u8, dim: usize, start: usize, out: *mut u32);
    unsafe fn values(ty: KvType, page: *const u8, dim: usize, seen: Seen, out: *mut u32);
    unsafe fn softmax(row: &mut Row<'_>);
}

macro_rules! vector_parts {
    ($name:ident, $lanes:ty, $vector:ty, $features:literal) => {
        struct $name;

        // SAFETY (all three): the features are the function's own; the rest is the caller's.
        impl VectorParts for $name {
            #[target_feature(enable = $features)]
            unsafe fn keys(ty: KvType, page: *const u8, dim: usize, start: usize, out: *mut u32) {
                // SAFETY: see above.
                unsafe {
                    match ty {
                        KvType::F16 => keys::<$lanes, F16>(page, dim, start, out),
                        KvType::BF16 => keys::<$lanes, BF16>(page, dim, start, out),
                        KvType::Q8_0 => keys::<$lanes, Q8>(page, dim, start, out),
                    }
                }
            }

            #[target_feature(enable = $features)]
            unsafe fn values(ty: KvType, page: *const u8, dim: usize, seen: Seen, out: *mut u32) {
                // SAFETY: see above.
                unsafe {
                    match ty {
                        KvType::F16 => values::<$lanes, F16>(page, dim, seen, out),
                        KvType::BF16 => values::<$lanes, BF16>(page, dim, seen, out),
                        KvType::Q8_0 => values::<$lanes, Q8>(page, dim, seen, out),
                    }
                }
            }

            #[target_feature(enable = $features)]
            unsafe fn softmax(row: &mut Row<'_>) {
                // SAFETY: see above.
                unsafe { softmax::<$vector, $lanes>(row) }
            }
        }
    };
}

vector_parts!(
    Bf16,
    WithBf16,
    __m512,
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c,bmi2"
);
vector_parts!(
    Avx512,
    __m512i,
    __m512,
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,bmi2"
);
vector_parts!(Avx2, Pair<false>, __m256, "avx2,fma,f16c,bmi2");

/// Elements of a cache type, 16 at a time.
///
/// # Safety
/// As [`Lanes`]; indices are inside the page.
trait Cells {
    /// Dimension `d` of keys from `slot`.
    unsafe fn key<L: Lanes>(page: *const u8, dim: usize, d: usize, slot: usize) -> L::Floats;
    /// Dimensions from `d` of the value at `slot`.
    unsafe fn value<L: Lanes>(page: *const u8, dim: usize, slot: usize, d: usize) -> L::Floats;
}

struct F16;
struct BF16;
struct Q8;

impl Cells for F16 {
    #[inline(always)]
    unsafe fn key<L: Lanes>(page: *const u8, _: usize, d: usize, slot: usize) -> L::Floats {
        // SAFETY: the caller's.
        unsafe { L::load_f16(page.add((d * KV_PAGE + slot) * 2)) }
    }
    #[inline(always)]
    unsafe fn value<L: Lanes>(page: *const u8, dim: usize, slot: usize, d: usize) -> L::Floats {
        // SAFETY: the caller's.
        unsafe { L::load_f16(page.add((slot * dim + d) * 2)) }
    }
}

/// One half of each of 16 pairs.
#[inline(always)]
unsafe fn half_of_pairs<L: Lanes>(pairs: *const u8, high: bool) -> L::Floats {
    // SAFETY: the caller's.
    unsafe {
        let x = L::load(pairs);
        if high {
            x.and(L::splat(0xffff_0000_u32 as i32)).as_floats()
        } else {
            x.shl(16).as_floats()
        }
    }
}

impl Cells for BF16 {
    #[inline(always)]
    unsafe fn key<L: Lanes>(page: *const u8, _: usize, d: usize, slot: usize) -> L::Floats {
        // SAFETY: the caller's.
        unsafe { half_of_pairs::<L>(page.add((d / 2 * KV_PAGE + slot) * 4), d % 2 == 1) }
    }
    #[inline(always)]
    unsafe fn value<L: Lanes>(page: *const u8, dim: usize, slot: usize, d: usize) -> L::Floats {
        // SAFETY: the caller's.
        unsafe { half_of_pairs::<L>(page.add((slot / 2 * dim + d) * 4), slot % 2 == 1) }
    }
}

impl Cells for Q8 {
    #[inline(always)]
    unsafe fn key<L: Lanes>(page: *const u8, dim: usize, d: usize, slot: usize) -> L::Floats {
        // SAFETY: the caller's.
        unsafe {
            let scales = page.add(dim * KV_PAGE).cast::<f32>();
            let codes = L::load_u8(page.add(d * KV_PAGE + slot)).sign_extend_u8();
            let scale = L::fload(scales.add(d / 32 * KV_PAGE + slot));
            L::fmul(codes.to_floats(), scale)
        }
    }
    #[inline(always)]
    unsafe fn value<L: Lanes>(page: *const u8, dim: usize, slot: usize, d: usize) -> L::Floats {
        // SAFETY: the caller's.
        unsafe {
            let scales = page.add(dim * KV_PAGE).cast::<f32>();
            let codes = L::load_u8(page.add(slot * dim + d)).sign_extend_u8();
            let scale = L::fbroadcast(scales.add(slot * (dim / 32) + d / 32));
            L::fmul(codes.to_floats(), scale)
        }
    }
}

/// Dwords of a weight tile, and of one of its rows.
const TILE_PAIRS: usize = TILE_BYTES / 4;
const ROW_PAIRS: usize = TILE_PAIRS / TILE_ROWS;

/// The positions of a page that anybody sees: the chunk's from `start`, `slots` of them.
#[derive(Clone, Copy)]
struct Seen {
    start: usize,
    slots: usize,
}

/// Writes a page's keys, the chunk's from position `start`, to tiles
/// `[position / 16][dim / 32]` of pairs of dimensions.
#[inline(always)]
unsafe fn keys<L: Lanes, C: Cells>(page: *const u8, dim: usize, start: usize, out: *mut u32) {
    // SAFETY: the caller's.
    unsafe {
        for slot in (0..KV_PAGE).step_by(16) {
            let column = out.add((start + slot) / 16 * (dim / TILE_K) * TILE_PAIRS);
            for d in (0..dim).step_by(2) {
                let even = C::key::<L>(page, dim, d, slot);
                let odd = C::key::<L>(page, dim, d + 1, slot);
                // Tiles follow each other along the dimensions, and so do their rows.
                L::bf16_pair(even, odd).store(column.add(d / 2 * ROW_PAIRS).cast());
            }
        }
    }
}

/// Writes a page's values to tiles `[dim / 16][position / 32]` of pairs of positions.
#[inline(always)]
unsafe fn values<L: Lanes, C: Cells>(page: *const u8, dim: usize, seen: Seen, out: *mut u32) {
    // SAFETY: the caller's.
    unsafe {
        for slot in (0..seen.slots).step_by(2) {
            for d in (0..dim).step_by(16) {
                let even = C::value::<L>(page, dim, slot, d);
                // What lies behind the last position is not to be multiplied, not even by 0.
                let odd = if slot + 1 < seen.slots {
                    C::value::<L>(page, dim, slot + 1, d)
                } else {
                    L::fsplat(0.0)
                };
                let to = out.add(value_row(d, (seen.start + slot) / 2));
                L::bf16_pair(even, odd).store(to.cast());
            }
        }
    }
}

/// Where the row of pair `pair` of positions begins in the tiles of dimension `d`.
fn value_row(d: usize, pair: usize) -> usize {
    d / 16 * (TILE_CHUNK / TILE_K) * TILE_PAIRS + pair * ROW_PAIRS
}

/// One query row between its scores and its weights.
struct Row<'a> {
    /// Scores of the chunk, a multiple of 32.
    scores: &'a mut [f32],
    /// How many of them the row sees, at least one.
    visible: usize,
    /// Largest score and sum of weights so far.
    max: &'a mut f32,
    sum: &'a mut f32,
    /// Weighted values so far.
    acc: &'a mut [f32],
    /// Receives the weights, 32 at a time, a tile apart.
    weights: *mut u16,
}

/// bf16 elements of a tile.
const TILE: usize = TILE_ROWS * TILE_K;

/// The softmax takes longer than the products beside it: each score is touched twice, and what
/// the row does not see not at all, but for zeros among the weights.
#[inline(always)]
unsafe fn softmax<V: Vector, L: Lanes>(row: &mut Row<'_>) {
    // SAFETY: slices are whole vectors; the weights are the caller's.
    unsafe {
        let blocks = row.visible.div_ceil(TILE_K);
        let (seen, hidden) = row.scores.split_at_mut(blocks * TILE_K);
        seen[row.visible..].fill(f32::NEG_INFINITY);
        // Two of each, so that one need not wait for the other.
        let mut largest = [V::splat(f32::NEG_INFINITY); 2];
        for x in seen.chunks_exact(2 * V::LANES) {
            for (i, largest) in largest.iter_mut().enumerate() {
                *largest = largest.max(V::load(x.as_ptr().add(i * V::LANES)));
            }
        }
        let before = *row.max;
        let max = before.max(largest[0].max(largest[1]).hmax());
        let mut sums = [V::splat(0.0); 2];
        for (i, x) in seen.chunks_exact_mut(TILE_K).enumerate() {
            for x in x.chunks_exact_mut(V::LANES) {
                exp2(V::load(x.as_ptr()).sub(V::splat(max))).store(x.as_mut_ptr());
            }
            if i + 1 == blocks {
                // The polynomial's floor is not quite zero.
                x[row.visible - i * TILE_K..].fill(0.0);
            }
            for x in x.chunks_exact(2 * V::LANES) {
                for (i, sum) in sums.iter_mut().enumerate() {
                    *sum = sum.add(V::load(x.as_ptr().add(i * V::LANES)));
                }
            }
            L::pack_bf16(x.as_ptr(), row.weights.add(i * TILE));
        }
        for i in 0..hidden.len() / TILE_K {
            row.weights.add((blocks + i) * TILE).write_bytes(0, TILE_K);
        }
        if before != max {
            // The first time there is nothing yet.
            let shrink = exp2(V::splat(before - max));
            *row.sum *= shrink.hmax();
            for x in row.acc.chunks_exact_mut(V::LANES) {
                V::load(x.as_ptr()).mul(shrink).store(x.as_mut_ptr());
            }
            *row.max = max;
        }
        *row.sum += sums[0].add(sums[1]).sum();
    }
}

/// Adds one chunk to all rows.
///
/// # Safety
/// The CPU has what `P` is compiled for, and AMX may be executed.
unsafe fn chunk<P: VectorParts>(args: &mut TileChunk<'_>) {
    args.check();
    let reach = args.visible.iter().copied().max().unwrap_or(0);
    if reach == 0 {
        return;
    }
    let dim = args.dim;
    let s = &mut *args.scratch;
    s.fit(dim);
    let (k, v) = (s.keys.as_mut_ptr(), s.values.as_mut_ptr());
    // SAFETY: `fit` made room for every row and column; pages are whole (`check`).
    unsafe {
        for (i, (keys, values)) in args.pages.iter().enumerate() {
            let start = i * KV_PAGE;
            if start < reach {
                let slots = KV_PAGE.min(reach - start);
                P::keys(args.k_type, keys.as_ptr(), dim, start, k);
                P::values(args.v_type, values.as_ptr(), dim, Seen { start, slots }, v);
            }
        }
        for pair in reach.div_ceil(2)..reach.next_multiple_of(TILE_K) / 2 {
            for d in (0..dim).step_by(16) {
                v.add(value_row(d, pair)).write_bytes(0, ROW_PAIRS);
            }
        }
        tile::configure(MOST_TOKENS);
        let rows = args.visible.len();
        for first in (0..rows).step_by(TILE_QUERIES) {
            let visible = &args.visible[first..rows.min(first + TILE_QUERIES)];
            let reach = visible.iter().copied().max().unwrap_or(0);
            if reach == 0 {
                continue;
            }
            let columns = reach.next_multiple_of(TILE_K);
            let two = visible.len() > TILE_ROWS;
            let q = args.q.as_ptr().add(first * dim);
            let q = [q, q.wrapping_add(TILE_ROWS * dim)].map(<*const u16>::cast::<u8>);
            for column in (0..columns).step_by(2 * 16) {
                let b = |column: usize| k.add(column / 16 * (dim / TILE_K) * TILE_PAIRS).cast();
                tile::contract(
                    two,
                    &Contraction {
                        a: q,
                        b: [b(column), b(column + 16)],
                        c: s.scores.as_mut_ptr().add(column),
                        c_row: SCORE_ROW * 4,
                        steps: dim / TILE_K,
                        fresh: true,
                    },
                );
            }
            let p_tile = TILE_CHUNK / TILE_K * TILE;
            for (row, &visible) in visible.iter().enumerate() {
                let weights = s.weights.as_mut_ptr();
                let weights = weights.add(row / TILE_ROWS * p_tile + row % TILE_ROWS * TILE_K);
                if visible == 0 {
                    for step in 0..columns / TILE_K {
                        weights.add(step * TILE).write_bytes(0, TILE_K);
                    }
                    continue;
                }
                let of = first + row;
                P::softmax(&mut Row {
                    scores: &mut s.scores[row * SCORE_ROW..row * SCORE_ROW + columns],
                    visible,
                    max: &mut args.max[of],
                    sum: &mut args.sum[of],
                    acc: &mut args.acc[of * dim..(of + 1) * dim],
                    weights,
                });
            }
            let p = s.weights.as_ptr();
            let p = [p, p.add(p_tile)].map(<*const u16>::cast::<u8>);
            for d in (0..dim).step_by(2 * 16) {
                let b = |d| v.add(value_row(d, 0)).cast_const().cast::<u8>();
                tile::contract(
                    two,
                    &Contraction {
                        a: p,
                        b: [b(d), b(d + 16)],
                        c: args.acc.as_mut_ptr().add(first * dim + d),
                        c_row: dim * 4,
                        steps: columns / TILE_K,
                        fresh: false,
                    },
                );
            }
        }
        tile::release();
    }
}
