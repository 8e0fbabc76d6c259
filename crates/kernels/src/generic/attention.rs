//! Attention over one chunk, written once over a vector type.
//!
//! 1. Scores: K is stored with positions along the lanes, so a block of positions needs one
//!    broadcast of `q[d]` per row and no horizontal sums; several rows share each load of K.
//! 2. Softmax within the chunk.
//! 3. Values: lanes along the head dimension, one broadcast of `p[t]` per row; rows share
//!    each load of V.
//!
//! Every row's arithmetic is the same however many rows stand beside it.
//!
//! The cache is read once, from memory where contexts are long. Its pages lie anywhere, and the
//! processor's own prefetching ends with each 4 KiB; so while one half of a page is read, what is
//! read after it is asked for at the same pace.

use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};

use super::vector::{Vector, exp};
use crate::{
    attn::{CHUNK, ChunkArgs},
    kv::KV_PAGE,
};

/// How a cache type is read. Two neighbours at a time, because bf16 is stored in pairs.
///
/// # Safety
/// As [`Vector`]; the page has the type's layout and the indices are inside it.
pub(crate) trait Format {
    /// Dimensions that share a scale; 0 without scales.
    const SCALED: usize;
    /// K at dimensions `d` and `d + 1` (`d` even) of `LANES` positions from `slot`.
    unsafe fn k2<V: Vector>(page: *const u8, slot: usize, d: usize) -> (V, V);
    /// Scales of K at dimensions `d..d + 32` for `LANES` positions from `slot`.
    unsafe fn k_scale<V: Vector>(page: *const u8, dim: usize, slot: usize, d: usize) -> V;
    /// V of positions `slot` and `slot + 1` (`slot` even) at `LANES` dimensions from `d`.
    unsafe fn v2<V: Vector>(page: *const u8, dim: usize, slot: usize, d: usize) -> (V, V);
}

pub(crate) struct F16;
pub(crate) struct Bf16;
struct Q8;

impl Format for F16 {
    const SCALED: usize = 0;
    #[inline(always)]
    unsafe fn k2<V: Vector>(page: *const u8, slot: usize, d: usize) -> (V, V) {
        unsafe {
            let p = page.cast::<u16>().add(d * KV_PAGE + slot);
            (V::load_f16(p), V::load_f16(p.add(KV_PAGE)))
        }
    }
    #[inline(always)]
    unsafe fn k_scale<V: Vector>(_: *const u8, _: usize, _: usize, _: usize) -> V {
        unsafe { V::splat(1.0) }
    }
    #[inline(always)]
    unsafe fn v2<V: Vector>(page: *const u8, dim: usize, slot: usize, d: usize) -> (V, V) {
        unsafe {
            let p = page.cast::<u16>().add(slot * dim + d);
            (V::load_f16(p), V::load_f16(p.add(dim)))
        }
    }
}

impl Format for Bf16 {
    const SCALED: usize = 0;
    #[inline(always)]
    unsafe fn k2<V: Vector>(page: *const u8, slot: usize, d: usize) -> (V, V) {
        unsafe { V::load_bf16_pairs(page.cast::<u16>().add((d / 2 * KV_PAGE + slot) * 2)) }
    }
    #[inline(always)]
    unsafe fn k_scale<V: Vector>(_: *const u8, _: usize, _: usize, _: usize) -> V {
        unsafe { V::splat(1.0) }
    }
    #[inline(always)]
    unsafe fn v2<V: Vector>(page: *const u8, dim: usize, slot: usize, d: usize) -> (V, V) {
        unsafe { V::load_bf16_pairs(page.cast::<u16>().add((slot / 2 * dim + d) * 2)) }
    }
}

impl Format for Q8 {
    const SCALED: usize = 32;
    #[inline(always)]
    unsafe fn k2<V: Vector>(page: *const u8, slot: usize, d: usize) -> (V, V) {
        unsafe {
            let p = page.cast::<i8>().add(d * KV_PAGE + slot);
            (V::load_i8(p), V::load_i8(p.add(KV_PAGE)))
        }
    }
    #[inline(always)]
    unsafe fn k_scale<V: Vector>(page: *const u8, dim: usize, slot: usize, d: usize) -> V {
        unsafe {
            let scales = page.add(dim * KV_PAGE).cast::<f32>();
            V::load(scales.add(d / 32 * KV_PAGE + slot))
        }
    }
    #[inline(always)]
    unsafe fn v2<V: Vector>(page: *const u8, dim: usize, slot: usize, d: usize) -> (V, V) {
        unsafe {
            let p = page.cast::<i8>().add(slot * dim + d);
            let scales = page
                .add(dim * KV_PAGE)
                .cast::<f32>()
                .add(slot * (dim / 32) + d / 32);
            let (a, b) = (
                V::splat(scales.read_unaligned()),
                V::splat(scales.add(dim / 32).read_unaligned()),
            );
            (V::load_i8(p).mul(a), V::load_i8(p.add(dim)).mul(b))
        }
    }
}

/// Memory that is asked for a few lines a step, for the second-level cache: what is read and what
/// is read next would fill the first one, which two threads may share.
pub(crate) struct Ahead {
    at: *const u8,
    lines: usize,
}

impl Ahead {
    pub(crate) fn nothing() -> Ahead {
        Ahead {
            at: std::ptr::null(),
            lines: 0,
        }
    }

    /// All of `next` in so many steps.
    fn of(next: Option<&[u8]>, steps: usize) -> Ahead {
        next.map_or_else(Ahead::nothing, |next| Ahead {
            at: next.as_ptr(),
            lines: next.len().div_ceil(64).div_ceil(steps),
        })
    }

    #[inline(always)]
    fn step(&mut self) {
        for _ in 0..self.lines {
            // SAFETY: prefetching reads nothing that the program could see, and never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(self.at.cast()) };
            self.at = self.at.wrapping_add(64);
        }
    }
}

/// Vectors of positions or dimensions that are in flight per row.
pub(crate) const WIDTH: usize = 4;

/// Scores of `R` rows at `WIDTH * LANES` positions from `slot` of one page; a step of `ahead` every
/// two dimensions.
#[inline(always)]
pub(crate) unsafe fn score_block<V: Vector, F: Format, const R: usize>(
    page: *const u8,
    dim: usize,
    slot: usize,
    q: [*const f32; R],
    out: [*mut f32; R],
    ahead: &mut Ahead,
) {
    unsafe {
        let zero = V::splat(0.0);
        let mut acc = [[zero; WIDTH]; R];
        let step = if F::SCALED == 0 { dim } else { F::SCALED };
        for block in (0..dim).step_by(step) {
            let mut part = [[zero; WIDTH]; R];
            for d in (block..block + step).step_by(2) {
                ahead.step();
                for w in 0..WIDTH {
                    let (a, b) = F::k2::<V>(page, slot + w * V::LANES, d);
                    for r in 0..R {
                        part[r][w] = a.fma(V::splat(*q[r].add(d)), part[r][w]);
                        part[r][w] = b.fma(V::splat(*q[r].add(d + 1)), part[r][w]);
                    }
                }
            }
            for w in 0..WIDTH {
                let scale = F::k_scale::<V>(page, dim, slot + w * V::LANES, block);
                for r in 0..R {
                    acc[r][w] = if F::SCALED == 0 {
                        part[r][w]
                    } else {
                        part[r][w].fma(scale, acc[r][w])
                    };
                }
            }
        }
        for r in 0..R {
            for w in 0..WIDTH {
                acc[r][w].store(out[r].add(w * V::LANES));
            }
        }
    }
}

/// `acc[r][d..] = Σ_t p[r][t] · v[t][d..]` for `R` rows and `W` vectors of dimensions. `after` says
/// what is read after which page.
#[inline(always)]
unsafe fn value_block<'a, V: Vector, F: Format, const R: usize, const W: usize>(
    pages: &[(&[u8], &[u8])],
    dim: usize,
    reach: usize,
    d: usize,
    p: [*const f32; R],
    out: [*mut f32; R],
    after: impl Fn(usize) -> Option<&'a [u8]>,
) {
    unsafe {
        let mut acc = [[V::splat(0.0); W]; R];
        let mut ahead = Ahead::nothing();
        for t in (0..reach).step_by(2) {
            if t % KV_PAGE == 0 {
                ahead = Ahead::of(after(t / KV_PAGE), KV_PAGE / 2);
            }
            ahead.step();
            let page = pages[t / KV_PAGE].1.as_ptr();
            for w in 0..W {
                let (a, b) = F::v2::<V>(page, dim, t % KV_PAGE, d + w * V::LANES);
                for r in 0..R {
                    acc[r][w] = a.fma(V::splat(*p[r].add(t)), acc[r][w]);
                    acc[r][w] = b.fma(V::splat(*p[r].add(t + 1)), acc[r][w]);
                }
            }
        }
        for r in 0..R {
            for w in 0..W {
                acc[r][w].store(out[r].add(w * V::LANES));
            }
        }
    }
}

/// All three steps for the `R` rows from `row`.
#[inline(always)]
unsafe fn rows<V: Vector, K: Format, W: Format, const R: usize>(
    args: &mut ChunkArgs<'_>,
    row: usize,
) {
    let dim = args.dim;
    let visible = &args.visible[row..row + R];
    let reach = visible.iter().copied().max().unwrap_or(0);
    unsafe {
        let q: [_; R] = std::array::from_fn(|r| args.q.as_ptr().add((row + r) * dim));
        let scores: [_; R] =
            std::array::from_fn(|r| args.scores.as_mut_ptr().add((row + r) * CHUNK));
        let step = WIDTH * V::LANES;
        // Other rows find in a cache what the first ones have read.
        let first = row == 0;
        let pages = args.pages;
        let seen = &pages[..reach.div_ceil(KV_PAGE)];
        let mut ahead = Ahead::nothing();
        for start in (0..reach).step_by(step) {
            let at = start / KV_PAGE;
            if first && start % KV_PAGE == 0 {
                let next = seen.get(at + 1).map_or(seen[0].1, |page| page.0);
                ahead = Ahead::of(Some(next), KV_PAGE / step * dim / 2);
            }
            let (page, out) = (seen[at].0.as_ptr(), scores.map(|s| s.add(start)));
            score_block::<V, K, R>(page, dim, start % KV_PAGE, q, out, &mut ahead);
        }
        let computed = reach.next_multiple_of(step);
        for r in 0..R {
            let scores = std::slice::from_raw_parts_mut(scores[r], CHUNK);
            let (max, sum) = softmax_part::<V>(&mut scores[..computed], visible[r]);
            args.max[row + r] = max;
            args.sum[row + r] = sum;
        }
        let p = scores.map(|s| s.cast_const());
        let acc: [_; R] = std::array::from_fn(|r| args.acc.as_mut_ptr().add((row + r) * dim));
        let mut d = 0;
        while d + WIDTH * V::LANES <= dim {
            // The first pass brings the others' lines, too.
            let after = |at: usize| match (first && d == 0, seen.get(at + 1)) {
                (true, Some(page)) => Some(page.1),
                (true, None) => args.next,
                (false, _) => None,
            };
            let out = acc.map(|a| a.add(d));
            value_block::<V, W, R, WIDTH>(pages, dim, reach, d, p, out, after);
            d += WIDTH * V::LANES;
        }
        while d < dim {
            value_block::<V, W, R, 1>(pages, dim, reach, d, p, acc.map(|a| a.add(d)), |_| None);
            d += V::LANES;
        }
    }
}

/// Turns the first `visible` scores into `e^(s - max)` and zeroes the others; returns the
/// maximum and the sum.
#[inline(always)]
pub(crate) unsafe fn softmax_part<V: Vector>(scores: &mut [f32], visible: usize) -> (f32, f32) {
    unsafe {
        scores[visible..].fill(f32::NEG_INFINITY);
        let mut max = V::splat(f32::NEG_INFINITY);
        for i in (0..scores.len()).step_by(V::LANES) {
            max = max.max(V::load(scores.as_ptr().add(i)));
        }
        let max = max.hmax();
        for i in (0..scores.len()).step_by(V::LANES) {
            let p = scores.as_mut_ptr().add(i);
            exp(V::load(p).sub(V::splat(max))).store(p);
        }
        // The polynomial's floor is not quite zero.
        scores[visible..].fill(0.0);
        let mut sum = V::splat(0.0);
        for i in (0..scores.len()).step_by(V::LANES) {
            sum = sum.add(V::load(scores.as_ptr().add(i)));
        }
        (max, sum.sum())
    }
}

#[inline(always)]
unsafe fn all_rows<V: Vector, K: Format, W: Format, const R: usize>(args: &mut ChunkArgs<'_>) {
    let count = args.visible.len();
    let mut row = 0;
    unsafe {
        while row + R <= count {
            rows::<V, K, W, R>(args, row);
            row += R;
        }
        while row < count {
            rows::<V, K, W, 1>(args, row);
            row += 1;
        }
    }
}

/// The kernel; `R` rows share each load.
///
/// # Safety
/// As [`Vector`].
#[inline(always)]
pub(crate) unsafe fn chunk<V: Vector, const R: usize>(args: &mut ChunkArgs<'_>) {
    use crate::kv::KvType::{BF16, F16 as Half, Q8_0};
    if args.pruned.is_some() {
        // SAFETY: the caller's.
        return unsafe { args.unpacked(chunk::<V, R>) };
    }
    if !args.dim.is_multiple_of(V::LANES) {
        // SAFETY: the scalar kernel needs no tier.
        return unsafe { crate::scalar::attention::chunk(args) };
    }
    args.check();
    unsafe {
        match (args.k_type, args.v_type) {
            (Half, Half) => all_rows::<V, F16, F16, R>(args),
            (Half, BF16) => all_rows::<V, F16, Bf16, R>(args),
            (Half, Q8_0) => all_rows::<V, F16, Q8, R>(args),
            (BF16, Half) => all_rows::<V, Bf16, F16, R>(args),
            (BF16, BF16) => all_rows::<V, Bf16, Bf16, R>(args),
            (BF16, Q8_0) => all_rows::<V, Bf16, Q8, R>(args),
            (Q8_0, Half) => all_rows::<V, Q8, F16, R>(args),
            (Q8_0, BF16) => all_rows::<V, Q8, Bf16, R>(args),
            (Q8_0, Q8_0) => all_rows::<V, Q8, Q8, R>(args),
        }
    }
}
