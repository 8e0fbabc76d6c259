//! Attention over pruned pages: `vpexpandw` puts the zeros back.
//!
//! A word of a bitmap is a mask of 64 positions (keys) or dimensions (values). The values are
//! loaded from the cursor as they lie, expanded in two halves, and become four vectors of f32
//! that all rows of a task multiply. Sums are made in the order of the dense kernel, so that a
//! page of which nothing was dropped gives its results bit for bit.

// Rows and vectors are indices of small arrays that live in registers.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use crate::{
    attn::{CHUNK, ChunkArgs},
    generic::{
        attention::{Ahead, Bf16, F16, Format, WIDTH, score_block, softmax_part},
        vector::Vector,
    },
    kv::{
        KV_PAGE, KvType,
        pruned::{Half, Side},
    },
    tier::Features,
};

/// Whether [`chunk`] runs on this CPU and takes heads of `dim`.
pub(crate) fn takes(dim: usize) -> bool {
    Features::get().avx512vbmi2 && dim.is_multiple_of(LANES)
}

const LANES: usize = <__m512 as Vector>::LANES;

/// A 16-bit type of the cache.
trait Bits {
    /// How the dense kernel reads it.
    type Dense: Format;
    /// The first or the second 16 of 32 values.
    unsafe fn floats(x: __m512i, second: bool) -> __m512;
}

/// 16 of 32 words.
#[inline(always)]
unsafe fn half(x: __m512i, second: bool) -> __m256i {
    // SAFETY: the caller's.
    unsafe {
        match second {
            false => _mm512_castsi512_si256(x),
            true => _mm512_extracti64x4_epi64::<1>(x),
        }
    }
}

impl Bits for F16 {
    type Dense = F16;
    #[inline(always)]
    unsafe fn floats(x: __m512i, second: bool) -> __m512 {
        // SAFETY: the caller's.
        unsafe { _mm512_cvtph_ps(half(x, second)) }
    }
}

impl Bits for Bf16 {
    type Dense = Bf16;
    #[inline(always)]
    unsafe fn floats(x: __m512i, second: bool) -> __m512 {
        // SAFETY: the caller's.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(half(x, second));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
}

/// How far ahead of the cursor values are asked for.
const AHEAD: usize = 1024;

/// The 64 values under a mask; moves the cursor behind those that are stored.
///
/// # Safety
/// 64 bytes may be read behind any value; inlined where the features are.
#[inline(always)]
unsafe fn expand(mask: u64, values: &mut *const u8) -> [__m512i; 2] {
    // SAFETY: the caller's.
    unsafe {
        _mm_prefetch::<_MM_HINT_T0>(values.wrapping_add(AHEAD).cast());
        let middle = values.add(2 * (mask as u32).count_ones() as usize);
        let low = _mm512_maskz_expand_epi16(mask as u32, _mm512_loadu_si512(values.cast()));
        let high =
            _mm512_maskz_expand_epi16((mask >> 32) as u32, _mm512_loadu_si512(middle.cast()));
        *values = values.add(2 * mask.count_ones() as usize);
        [low, high]
    }
}

/// The same as floats.
#[inline(always)]
unsafe fn floats<B: Bits>(mask: u64, values: &mut *const u8) -> [__m512; WIDTH] {
    // SAFETY: the caller's.
    unsafe {
        let [low, high] = expand(mask, values);
        [
            B::floats(low, false),
            B::floats(low, true),
            B::floats(high, false),
            B::floats(high, true),
        ]
    }
}

/// Scores of `R` rows at the positions of a pruned page.
///
/// # Safety
/// The page is whole; inlined where the features are.
#[inline(always)]
unsafe fn scores<K: Bits, const R: usize>(
    page: *const u8,
    dim: usize,
    q: [*const f32; R],
    out: [*mut f32; R],
) {
    // SAFETY: the caller's.
    unsafe {
        let bitmaps = page.cast::<u64>();
        let mut values = page.add(8 * dim);
        let mut acc = [[_mm512_setzero_ps(); WIDTH]; R];
        for d in 0..dim {
            let x = floats::<K>(bitmaps.add(d).read_unaligned(), &mut values);
            for r in 0..R {
                let q = _mm512_set1_ps(*q[r].add(d));
                for w in 0..WIDTH {
                    acc[r][w] = _mm512_fmadd_ps(x[w], q, acc[r][w]);
                }
            }
        }
        for r in 0..R {
            for w in 0..WIDTH {
                _mm512_storeu_ps(out[r].add(w * LANES), acc[r][w]);
            }
        }
    }
}

/// What [`sums`] runs over.
struct Values<'a, const R: usize> {
    pages: &'a [(&'a [u8], &'a [u8])],
    dim: usize,
    /// Positions that some row sees.
    reach: usize,
    p: [*const f32; R],
    out: [*mut f32; R],
}

/// `Σ p·v` of `R` rows at the `W` vectors of dimensions from `64 * block` on; `cursors` are
/// where the block's values begin in each of the pruned pages, the first ones, and then where
/// the next block's do.
///
/// # Safety
/// Pages are whole; inlined where the features are.
#[inline(always)]
unsafe fn sums<V: Bits, const R: usize, const W: usize>(
    x: &Values<'_, R>,
    block: usize,
    cursors: &mut [*const u8],
) {
    // SAFETY: the caller's.
    unsafe {
        let mut acc = [[_mm512_setzero_ps(); W]; R];
        for (i, values) in cursors.iter_mut().enumerate() {
            let bitmaps = x.pages[i].1.as_ptr().cast::<u64>().add(block * KV_PAGE);
            for t in 0..KV_PAGE {
                let v = floats::<V>(bitmaps.add(t).read_unaligned(), values);
                for r in 0..R {
                    let p = _mm512_set1_ps(*x.p[r].add(i * KV_PAGE + t));
                    for w in 0..W {
                        acc[r][w] = _mm512_fmadd_ps(v[w], p, acc[r][w]);
                    }
                }
            }
        }
        let d = block * 64;
        for t in (cursors.len() * KV_PAGE..x.reach).step_by(2) {
            let page = x.pages[t / KV_PAGE].1.as_ptr();
            for w in 0..W {
                let (a, b) = V::Dense::v2::<__m512>(page, x.dim, t % KV_PAGE, d + w * LANES);
                for r in 0..R {
                    let p = |t: usize| _mm512_set1_ps(*x.p[r].add(t));
                    acc[r][w] = _mm512_fmadd_ps(a, p(t), acc[r][w]);
                    acc[r][w] = _mm512_fmadd_ps(b, p(t + 1), acc[r][w]);
                }
            }
        }
        for r in 0..R {
            for w in 0..W {
                _mm512_storeu_ps(x.out[r].add(d + w * LANES), acc[r][w]);
            }
        }
    }
}

/// All three steps for the `R` rows from `row`.
///
/// # Safety
/// As [`chunk`]; inlined where the features are.
#[inline(always)]
unsafe fn rows<K: Bits, V: Bits, const R: usize>(
    args: &mut ChunkArgs<'_>,
    pruned: usize,
    row: usize,
) {
    let dim = args.dim;
    let visible = &args.visible[row..row + R];
    let reach = visible.iter().copied().max().unwrap_or(0);
    // SAFETY: the caller's; `ChunkArgs::check` has held lengths against each other.
    unsafe {
        let q: [_; R] = std::array::from_fn(|r| args.q.as_ptr().add((row + r) * dim));
        let scores_at: [_; R] =
            std::array::from_fn(|r| args.scores.as_mut_ptr().add((row + r) * CHUNK));
        let mut ahead = Ahead::nothing();
        for start in (0..reach).step_by(KV_PAGE) {
            let page = args.pages[start / KV_PAGE].0.as_ptr();
            let to = scores_at.map(|s| s.add(start));
            match start / KV_PAGE < pruned {
                true => scores::<K, R>(page, dim, q, to),
                false => score_block::<__m512, K::Dense, R>(page, dim, 0, q, to, &mut ahead),
            }
        }
        let computed = reach.next_multiple_of(KV_PAGE);
        for r in 0..R {
            let scores = std::slice::from_raw_parts_mut(scores_at[r], CHUNK);
            let (max, sum) =
                softmax_part::<__m512>(&mut scores[..computed], visible[r], &mut ahead);
            args.max[row + r] = max;
            args.sum[row + r] = sum;
        }
        let seen = pruned.min(reach.div_ceil(KV_PAGE));
        let blocks = dim.div_ceil(64);
        let mut cursors = [std::ptr::null(); CHUNK / KV_PAGE];
        for (cursor, page) in cursors.iter_mut().zip(args.pages) {
            *cursor = page.1.as_ptr().wrapping_add(8 * blocks * KV_PAGE);
        }
        let values = Values {
            pages: args.pages,
            dim,
            reach,
            p: scores_at.map(|s| s.cast_const()),
            out: std::array::from_fn(|r| args.acc.as_mut_ptr().add((row + r) * dim)),
        };
        for block in 0..blocks {
            let cursors = &mut cursors[..seen];
            match (dim - 64 * block) / LANES {
                1 => sums::<V, R, 1>(&values, block, cursors),
                2 => sums::<V, R, 2>(&values, block, cursors),
                3 => sums::<V, R, 3>(&values, block, cursors),
                _ => sums::<V, R, WIDTH>(&values, block, cursors),
            }
        }
    }
}

/// # Safety
/// As [`chunk`].
#[target_feature(
    enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi2,avx2,fma,f16c,bmi2,popcnt"
)]
unsafe fn all_rows<K: Bits, V: Bits>(args: &mut ChunkArgs<'_>, pruned: usize) {
    let count = args.visible.len();
    let mut row = 0;
    // SAFETY: the caller's.
    unsafe {
        while row + 4 <= count {
            rows::<K, V, 4>(args, pruned, row);
            row += 4;
        }
        while row < count {
            rows::<K, V, 1>(args, pruned, row);
            row += 1;
        }
    }
}

/// Scores, softmax and weighted values of a chunk whose first pages are pruned.
///
/// # Safety
/// [`takes`] holds of the dimension, and pruned pages are whole.
pub(crate) unsafe fn chunk(args: &mut ChunkArgs<'_>) {
    args.check();
    let pruned = args.pruned.map_or(0, |(_, count)| count);
    // SAFETY: the caller's.
    unsafe {
        match (args.k_type, args.v_type) {
            (KvType::BF16, KvType::BF16) => all_rows::<Bf16, Bf16>(args, pruned),
            (KvType::BF16, _) => all_rows::<Bf16, F16>(args, pruned),
            (_, KvType::BF16) => all_rows::<F16, Bf16>(args, pruned),
            _ => all_rows::<F16, F16>(args, pruned),
        }
    }
}

/// Unpacks a pruned page, see `AttnOps::unpack`.
///
/// # Safety
/// As stated there.
pub(crate) unsafe fn unpack(half: &Half, packed: &[u8], out: &mut [u8]) {
    let whole = half.dim.is_multiple_of(match half.side {
        Side::K => 2,
        Side::V => 64,
    });
    if !Features::get().avx512vbmi2 || !whole {
        return half.unpack(packed, out);
    }
    assert!(packed.len() >= half.bytes() && out.len() >= half.ty.page_bytes(half.dim));
    // SAFETY: the features are there, and lengths agree.
    unsafe { unpack_words(half, packed.as_ptr(), out.as_mut_ptr()) }
}

/// # Safety
/// The CPU has the features; the packed page is whole, `out` has room for a dense one.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,popcnt")]
unsafe fn unpack_words(half: &Half, packed: *const u8, out: *mut u8) {
    let words = half.words();
    let mut lanes = [[0u16; 32]; 2];
    for (i, lane) in lanes.iter_mut().flatten().enumerate() {
        *lane = (i / 2 + i % 2 * 32) as u16;
    }
    // SAFETY: the caller's. A word of keys is a row of 128 bytes; a word of values is 64
    // dimensions of a position's row. Two of them that follow each other are pairs of bf16.
    unsafe {
        let bitmaps = packed.cast::<u64>();
        let mut values = packed.add(8 * words);
        let [low, high] = lanes.map(|l| _mm512_loadu_si512(l.as_ptr().cast()));
        let store = |at: usize, x: __m512i| _mm512_storeu_si512(out.add(2 * at).cast(), x);
        for word in (0..words).step_by(2) {
            let a = expand(bitmaps.add(word).read_unaligned(), &mut values);
            let b = expand(bitmaps.add(word + 1).read_unaligned(), &mut values);
            let (d, t) = (word / KV_PAGE * 64, word % KV_PAGE);
            let pairs = half.ty == KvType::BF16;
            // Where the two words begin, or their pairs.
            let (at, next) = match half.side {
                Side::K => (word * KV_PAGE, KV_PAGE),
                Side::V if pairs => (t * half.dim + 2 * d, 0),
                Side::V => (t * half.dim + d, half.dim),
            };
            if pairs {
                for (i, (a, b)) in a.into_iter().zip(b).enumerate() {
                    store(at + 64 * i, _mm512_permutex2var_epi16(a, low, b));
                    store(at + 64 * i + 32, _mm512_permutex2var_epi16(a, high, b));
                }
            } else {
                for (i, (a, b)) in a.into_iter().zip(b).enumerate() {
                    store(at + 32 * i, a);
                    store(at + next + 32 * i, b);
                }
            }
        }
    }
}
