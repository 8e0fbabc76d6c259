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
//! processor's own prefetching ends with each 4 KiB; so during all steps, softmax too, what is read
//! a chunk later is asked for.

use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};

use super::vector::{Vector, exp};
use crate::{
    attn::{CHUNK, ChunkArgs},
    kv::KV_PAGE,
    mem::LINE,
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
///
/// What is read next is asked for a chunk ahead, a line of each page in turns: requests alone keep
/// too few lines on their way, and the processor's own prefetching helps the more the more pages it
/// follows (`docs/bench`).
pub(crate) struct Ahead<'a> {
    /// What of this chunk nobody has asked for, page after page.
    at: *const u8,
    end: *const u8,
    own: [&'a [u8]; 2 * PAGES],
    following: usize,
    /// The next chunk's pages, how far they are asked for, and whose turn it is.
    next: [&'a [u8]; 2 * PAGES],
    offset: usize,
    turn: usize,
    /// Lines a step, and all that are left.
    lines: usize,
    left: usize,
}

/// Pages of a chunk.
const PAGES: usize = CHUNK / KV_PAGE;

impl<'a> Ahead<'a> {
    pub(crate) fn nothing() -> Ahead<'a> {
        Ahead {
            at: std::ptr::null(),
            end: std::ptr::null(),
            own: [&[]; 2 * PAGES],
            following: 2 * PAGES,
            next: [&[]; 2 * PAGES],
            offset: 0,
            turn: 0,
            lines: 0,
            left: 0,
        }
    }

    /// All that is read behind the first page's keys, unless it was `asked` for before, and what is
    /// read next, in so many steps.
    fn of(
        pages: &[(&'a [u8], &'a [u8])],
        asked: bool,
        next: &[(&'a [u8], &'a [u8])],
        steps: usize,
    ) -> Ahead<'a> {
        let mut ahead = Ahead::nothing();
        let lines = |page: &[u8]| page.len().div_ceil(LINE);
        if !asked {
            let keys = pages.iter().skip(1).map(|p| p.0);
            let own = keys.chain(pages.iter().map(|p| p.1));
            ahead.following -= own.clone().count();
            for (to, page) in ahead.own[ahead.following..].iter_mut().zip(own) {
                *to = page;
                ahead.left += lines(page);
            }
        }
        if let [first, ..] = next {
            // Where there are fewer pages, some are asked for twice.
            let all = next.iter().chain(std::iter::repeat(first));
            for (to, (k, v)) in ahead.next.as_chunks_mut::<2>().0.iter_mut().zip(all) {
                *to = [k, v];
            }
            ahead.left += ahead.next.iter().map(|page| lines(page)).sum::<usize>();
        }
        ahead.lines = ahead.left.div_ceil(steps.max(1));
        ahead
    }

    #[inline(always)]
    pub(crate) fn step(&mut self) {
        let lines = self.lines.min(self.left);
        self.left -= lines;
        for _ in 0..lines {
            let line = match self.at < self.end || self.another() {
                true => {
                    let line = self.at;
                    self.at = line.wrapping_add(LINE);
                    line
                }
                false => self.beside(),
            };
            // SAFETY: prefetching reads nothing that the program could see, and never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(line.cast()) };
        }
    }

    /// To the next page of this chunk's own; false behind the last one.
    #[inline(always)]
    fn another(&mut self) -> bool {
        let Some(page) = self.own.get(self.following) else {
            return false;
        };
        self.following += 1;
        self.at = page.as_ptr();
        self.end = self.at.wrapping_add(page.len());
        true
    }

    /// A line of what is read next.
    #[inline(always)]
    fn beside(&mut self) -> *const u8 {
        let page = self.next[self.turn];
        let line = page.as_ptr().wrapping_add(self.offset.min(page.len()));
        self.turn = (self.turn + 1) % (2 * PAGES);
        if self.turn == 0 {
            self.offset += LINE;
        }
        line
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
    ahead: &mut Ahead<'_>,
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

/// Weighted values at `W` vectors of dimensions from `d`.
#[inline(always)]
unsafe fn value_block<V: Vector, F: Format, const R: usize, const W: usize>(
    pass: &Pass<'_, R>,
    d: usize,
    ahead: &mut Ahead<'_>,
) {
    unsafe {
        let mut acc = [[V::splat(0.0); W]; R];
        for t in (0..pass.reach).step_by(2) {
            ahead.step();
            let page = pass.pages[t / KV_PAGE].1.as_ptr();
            for w in 0..W {
                let (a, b) = F::v2::<V>(page, pass.dim, t % KV_PAGE, d + w * V::LANES);
                for r in 0..R {
                    acc[r][w] = a.fma(V::splat(*pass.scores[r].add(t)), acc[r][w]);
                    acc[r][w] = b.fma(V::splat(*pass.scores[r].add(t + 1)), acc[r][w]);
                }
            }
        }
        for r in 0..R {
            for w in 0..W {
                acc[r][w].store(pass.acc[r].add(d + w * V::LANES));
            }
        }
    }
}

/// What the steps of `R` rows read and write.
struct Pass<'a, const R: usize> {
    /// K and V of the pages that some row sees.
    pages: &'a [(&'a [u8], &'a [u8])],
    dim: usize,
    /// Positions that some row sees.
    reach: usize,
    /// Queries, `[dim]` each.
    q: [*const f32; R],
    /// Scores, which softmax turns into weights, [`CHUNK`] each.
    scores: [*mut f32; R],
    /// Weighted values, `[dim]` each.
    acc: [*mut f32; R],
}

/// Steps of [`Ahead`] that `R` rows take for a page: as long as two dimensions of its keys or two
/// positions of a vector's values take, or the softmax of a vector.
fn steps<V: Vector, const R: usize>(dim: usize) -> usize {
    let keys = KV_PAGE / (WIDTH * V::LANES) * dim / 2;
    let values = KV_PAGE / 2 * dim.div_ceil(WIDTH * V::LANES);
    keys + R * KV_PAGE / V::LANES + values
}

/// Scores of all positions of the pages, some behind `reach`, too.
#[inline(always)]
unsafe fn scores<V: Vector, F: Format, const R: usize>(pass: &Pass<'_, R>, ahead: &mut Ahead<'_>) {
    unsafe {
        let (dim, step) = (pass.dim, WIDTH * V::LANES);
        for start in (0..pass.reach).step_by(step) {
            let page = pass.pages[start / KV_PAGE].0.as_ptr();
            let out = pass.scores.map(|s| s.add(start));
            score_block::<V, F, R>(page, dim, start % KV_PAGE, pass.q, out, ahead);
        }
    }
}

/// Weighted values; weights behind what a row sees are zero.
#[inline(always)]
unsafe fn values<V: Vector, F: Format, const R: usize>(pass: &Pass<'_, R>, ahead: &mut Ahead<'_>) {
    unsafe {
        let mut d = 0;
        while d + WIDTH * V::LANES <= pass.dim {
            value_block::<V, F, R, WIDTH>(pass, d, ahead);
            d += WIDTH * V::LANES;
        }
        while d < pass.dim {
            value_block::<V, F, R, 1>(pass, d, ahead);
            d += V::LANES;
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
        let pass = Pass::<R> {
            pages: &args.pages[..reach.div_ceil(KV_PAGE)],
            dim,
            reach,
            q: std::array::from_fn(|r| args.q.as_ptr().add((row + r) * dim)),
            scores: std::array::from_fn(|r| args.scores.as_mut_ptr().add((row + r) * CHUNK)),
            acc: std::array::from_fn(|r| args.acc.as_mut_ptr().add((row + r) * dim)),
        };
        // Other rows find in a cache what the first ones have read.
        let mut ahead = match row == 0 {
            true => {
                let steps = pass.pages.len() * steps::<V, R>(dim);
                Ahead::of(pass.pages, args.asked, args.next, steps)
            }
            false => Ahead::nothing(),
        };
        scores::<V, K, R>(&pass, &mut ahead);
        let computed = pass.pages.len() * KV_PAGE;
        for r in 0..R {
            let scores = std::slice::from_raw_parts_mut(pass.scores[r], CHUNK);
            let (max, sum) = softmax_part::<V>(&mut scores[..computed], visible[r], &mut ahead);
            args.max[row + r] = max;
            args.sum[row + r] = sum;
        }
        values::<V, W, R>(&pass, &mut ahead);
    }
}

/// Turns the first `visible` scores into `e^(s - max)` and zeroes the others; returns the
/// maximum and the sum.
#[inline(always)]
pub(crate) unsafe fn softmax_part<V: Vector>(
    scores: &mut [f32],
    visible: usize,
    ahead: &mut Ahead<'_>,
) -> (f32, f32) {
    unsafe {
        scores[visible..].fill(f32::NEG_INFINITY);
        let mut max = V::splat(f32::NEG_INFINITY);
        for i in (0..scores.len()).step_by(V::LANES) {
            max = max.max(V::load(scores.as_ptr().add(i)));
        }
        let max = max.hmax();
        for i in (0..scores.len()).step_by(V::LANES) {
            ahead.step();
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
