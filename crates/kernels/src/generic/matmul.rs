//! Strips times tokens, over [`Lanes`]: 16 rows share each broadcast of four activations,
//! and there are no sums across lanes.
//!
//! One token multiplies codes straight from the strip, which is read once as one stream.
//! More tokens decode a stretch of the strip to a panel (codes, scales and minima, 24 KiB)
//! that stays in the first-level cache while groups of tokens pass over it. Both add the
//! sub-blocks up in the same order, so results do not depend on the batch.

use super::{
    format::{self, Format, Shape, Visitor},
    lanes::Lanes,
};
use crate::{
    acts::{ActsView, GROUP, Q8_GROUP},
    mem::{self, LINE},
    strip::{
        ROWS,
        kernels::{PANEL_K, StripArgs},
    },
};
use std::{
    arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1},
    marker::PhantomData,
    sync::atomic::{Ordering::SeqCst, compiler_fence},
};
use tegula_gguf::{GgmlType, blocks};

/// How far ahead of a token's reading memory is asked for, in bytes. Instructions in flight
/// cover less than the memory's latency, and the processor's own prefetching ends with each
/// page of 4 KiB.
pub(crate) const AHEAD: usize = 4096;

/// Asks for what lies [`AHEAD`] of `bytes` bytes at `p`, which need not be valid memory.
///
/// Mostly `_MM_HINT_T1` is best, since more lines can be on their way to the second-level cache
/// than to the first.
#[inline(always)]
pub(crate) fn ask_ahead<const HINT: i32>(p: *const u8, bytes: usize) {
    ask::<HINT>(p.wrapping_add(AHEAD), bytes);
}

/// Asks for `bytes` bytes at `p`, which need not be valid memory.
#[inline(always)]
fn ask<const HINT: i32>(p: *const u8, bytes: usize) {
    for line in (0..bytes).step_by(LINE) {
        mem::ask::<HINT>(p.wrapping_add(line));
    }
}

/// Asks at once for the first `ahead` bytes of strips, each with its bytes: what requests at an even
/// pace do not reach, and nothing can begin without.
#[inline(always)]
pub(crate) fn ask_beginnings(
    strips: impl Iterator<Item = (*const u8, usize)> + Clone,
    ahead: usize,
) {
    for line in (0..ahead).step_by(LINE) {
        for (strip, _) in strips.clone().filter(|&(_, bytes)| line < bytes) {
            ask::<_MM_HINT_T0>(strip.wrapping_add(line), LINE);
        }
    }
}

/// Bytes of the codes of 32 weights of 16 rows.
const CODES: usize = 32 * ROWS;

/// Decoded weights of up to [`PANEL_K`] inputs of 16 rows.
#[derive(Clone, Copy)]
pub(crate) struct Panel {
    /// `[group of 32][8][16]` dwords of codes.
    pub codes: *mut u8,
    /// `[scale][16]`.
    pub scales: *mut f32,
    /// `[scale][16]`.
    pub mins: *mut f32,
    /// Groups of 32.
    pub groups: usize,
    /// Index of the first one in the row.
    pub first: usize,
    /// log2 of the zero point.
    pub zero: u32,
    /// Codes are below 32.
    pub small: bool,
    /// What the first product with the panel asks for on its way, which need not be valid
    /// memory: the weights that are decoded next.
    pub next: *const u8,
    /// Bytes of that per group; 0: nothing.
    pub next_bytes: usize,
}

/// Tokens of one group, as products with q8 activations read them.
#[derive(Clone, Copy)]
pub(crate) struct Tokens {
    /// The interleave.
    pub stride: usize,
    pub q: *const i8,
    pub d: *const f32,
    /// Minus the sums of 32 or, for two scales per 32, of 16.
    pub nsum: *const i32,
    /// Scaled sums, likewise.
    pub fsum: *const f32,
    /// `[token][16]`: the sums so far.
    pub tile: *mut f32,
}

/// A float type of weights.
///
/// # Safety
/// As [`Lanes`].
pub(crate) trait FloatWeights {
    /// Bytes of two inputs of 16 rows.
    const PAIR_BYTES: usize;
    /// Two inputs.
    unsafe fn pair<L: Lanes>(p: *const u8) -> (L::Floats, L::Floats);
    /// The first of two inputs; the second may not exist.
    unsafe fn first<L: Lanes>(p: *const u8) -> L::Floats;
}

pub(crate) struct F32;
pub(crate) struct F16;
pub(crate) struct BF16;

impl FloatWeights for F32 {
    const PAIR_BYTES: usize = 128;

    #[inline(always)]
    unsafe fn pair<L: Lanes>(p: *const u8) -> (L::Floats, L::Floats) {
        unsafe { (Self::first::<L>(p), Self::first::<L>(p.add(64))) }
    }
    #[inline(always)]
    unsafe fn first<L: Lanes>(p: *const u8) -> L::Floats {
        unsafe { L::load(p).as_floats() }
    }
}

impl FloatWeights for F16 {
    const PAIR_BYTES: usize = 64;

    #[inline(always)]
    unsafe fn pair<L: Lanes>(p: *const u8) -> (L::Floats, L::Floats) {
        unsafe { (L::load_f16(p), L::load_f16(p.add(32))) }
    }
    #[inline(always)]
    unsafe fn first<L: Lanes>(p: *const u8) -> L::Floats {
        unsafe { L::load_f16(p) }
    }
}

impl FloatWeights for BF16 {
    const PAIR_BYTES: usize = 64;

    #[inline(always)]
    unsafe fn pair<L: Lanes>(p: *const u8) -> (L::Floats, L::Floats) {
        unsafe {
            let x = L::load(p);
            (
                x.shl(16).as_floats(),
                x.and(L::splat(0xffff_0000_u32 as i32)).as_floats(),
            )
        }
    }
    #[inline(always)]
    unsafe fn first<L: Lanes>(p: *const u8) -> L::Floats {
        unsafe { L::load(p).shl(16).as_floats() }
    }
}

/// The kernels below, compiled for one set of features: what [`tier_kernels`] writes.
///
/// # Safety
/// The CPU has the features; pointers are valid as the functions of this module state.
pub(crate) trait Machine {
    type Lanes: Lanes;
    unsafe fn one_token<F: Format, const S: usize>(
        strips: &[OneStrip; S],
        blocks: usize,
        tokens: &Tokens,
    );
    unsafe fn decode<F: Format>(block: *const u8, blocks: usize, panel: &Panel);
    unsafe fn product<S: Shape, const T: usize>(panel: &Panel, tokens: &Tokens);
    unsafe fn floats<W: FloatWeights, const T: usize>(w: *const u8, k: usize, x: &Floats);
}

/// A strip that meets one token.
#[derive(Clone, Copy)]
pub(crate) struct OneStrip {
    pub strip: *const u8,
    /// What is asked for towards its end, which need not be valid memory.
    pub next: *const u8,
    /// Its sums are written there.
    pub tile: *mut f32,
    /// How far ahead of the reading memory is asked for: what of its beginning was, and at least
    /// [`AHEAD`].
    pub ahead: usize,
}

/// How strips become panels, and panels meet several tokens.
///
/// # Safety
/// As [`Machine`].
pub(crate) trait Panels {
    /// Codes have their zero point taken off: they are signed bytes.
    const SIGNED: bool;
    unsafe fn decode<F: Format>(block: *const u8, blocks: usize, panel: &Panel);
    /// Adds the products of all tokens with a panel of strip `s` to its tile.
    unsafe fn products<S: Shape>(panel: &Panel, args: &StripArgs<'_>, s: usize);
}

/// Panels of a [`Machine`].
pub(crate) struct Vectors<M>(PhantomData<M>);

impl<M: Machine> Panels for Vectors<M> {
    const SIGNED: bool = false;

    #[inline(always)]
    unsafe fn decode<F: Format>(block: *const u8, blocks: usize, panel: &Panel) {
        // SAFETY: the caller's.
        unsafe { M::decode::<F>(block, blocks, panel) }
    }
    unsafe fn products<S: Shape>(panel: &Panel, args: &StripArgs<'_>, s: usize) {
        let mut panel = *panel;
        // SAFETY: the caller's.
        unsafe {
            q8_runs::<S>(&args.acts, M::Lanes::TOKENS, args.tile_of(s), |run, x| {
                match run {
                    8 => M::product::<S, 8>(&panel, x),
                    4 => M::product::<S, 4>(&panel, x),
                    2 => M::product::<S, 2>(&panel, x),
                    _ => M::product::<S, 1>(&panel, x),
                }
                panel.next_bytes = 0;
            });
        }
    }
}

/// Writes `$name`, a [`Machine`] whose functions are compiled with `$features`, and its
/// `mul_strips`.
macro_rules! tier_kernels {
    ($name:ident, $lanes:ty, $features:literal) => {
        pub(crate) struct $name;

        // SAFETY (all four): the features are the function's own; the rest is the caller's.
        impl $crate::generic::matmul::Machine for $name {
            type Lanes = $lanes;

            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn one_token<F: $crate::generic::format::Format, const S: usize>(
                strips: &[$crate::generic::matmul::OneStrip; S],
                blocks: usize,
                tokens: &$crate::generic::matmul::Tokens,
            ) {
                // SAFETY: see above.
                unsafe {
                    $crate::generic::matmul::one_token::<$lanes, F, S>(strips, blocks, tokens);
                }
            }

            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn decode<F: $crate::generic::format::Format>(
                block: *const u8,
                blocks: usize,
                panel: &$crate::generic::matmul::Panel,
            ) {
                // SAFETY: see above.
                unsafe { $crate::generic::matmul::decode::<$lanes, F, false>(block, blocks, panel) }
            }

            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn product<S: $crate::generic::format::Shape, const T: usize>(
                panel: &$crate::generic::matmul::Panel,
                tokens: &$crate::generic::matmul::Tokens,
            ) {
                // SAFETY: see above.
                unsafe { $crate::generic::matmul::product::<$lanes, S, T>(panel, tokens) }
            }

            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn floats<W: $crate::generic::matmul::FloatWeights, const T: usize>(
                w: *const u8,
                k: usize,
                x: &$crate::generic::matmul::Floats,
            ) {
                // SAFETY: see above.
                unsafe { $crate::generic::matmul::floats::<$lanes, W, T>(w, k, x) }
            }
        }
    };
}
pub(crate) use tier_kernels;

/// What [`add_group`] is to know of a group's codes.
#[derive(Clone, Copy)]
pub(crate) struct Kind {
    /// log2 of the zero point.
    pub zero: u32,
    /// Codes are below 32.
    pub small: bool,
    /// [`Format::sixteenfold`]
    pub sixteenfold: [bool; 2],
}

/// Adds one group of 32 to `T` sums. `scale` and `min` are those of the group, or of its two
/// halves. `IN_PLACE` says that some codes may be sixteenfold: where none are, a choice of sums
/// that the compiler can't see through would keep all of them in memory.
///
/// # Safety
/// `t` points at the group's first token.
#[inline(always)]
pub(crate) unsafe fn add_group<L: Lanes, S: Shape, const T: usize, const IN_PLACE: bool>(
    acc: &mut [L::Floats; T],
    codes: impl Fn(usize) -> L,
    scales: [(L::Floats, L::Floats); 2],
    kind: Kind,
    kb: usize,
    x: &Tokens,
) {
    let parts = if S::HALVES { 2 } else { 1 };
    let dwords = 8 / parts;
    unsafe {
        let q = x.q.add(kb * x.stride * 32);
        let d = x.d.add(kb * x.stride);
        for h in 0..parts {
            let at = (kb * parts + h) * x.stride;
            let mut sums = [L::splat(0); T];
            if !S::MIN && (!S::FULL || L::FULL_ZERO.is_some()) {
                for t in 0..T {
                    sums[t] = L::broadcast(x.nsum.add(at + t)).shl(kind.zero);
                }
            }
            let mut sixteenfold = [L::splat(0); T];
            let mut first = h * dwords;
            while L::SMALL && kind.small && first < (h + 1) * dwords {
                let mut few = [L::splat(0); T];
                for e in first..first + 4 {
                    let c = codes(e);
                    for t in 0..T {
                        few[t] = few[t].dot_small(c, q.add(t * 32 + e * 4));
                    }
                }
                for t in 0..T {
                    sums[t] = sums[t].add_small(few[t]);
                }
                first += 4;
            }
            for e in first..(h + 1) * dwords {
                let c = codes(e);
                let sums = match IN_PLACE && kind.sixteenfold[e / 4] {
                    true => &mut sixteenfold,
                    false => &mut sums,
                };
                for t in 0..T {
                    let q = q.add(t * 32 + e * 4);
                    sums[t] = if S::FULL {
                        sums[t].dot_full(c, q)
                    } else {
                        sums[t].dot(c, q)
                    };
                }
                // Here the compiler would put the products of one token behind each other, each of
                // which waits for the one before; elsewhere it does what is best.
                if T > 1 && !S::MIN && !S::HALVES {
                    compiler_fence(SeqCst);
                }
            }
            let (scale, min) = scales[h];
            for t in 0..T {
                if IN_PLACE && kind.sixteenfold != [false; 2] {
                    sums[t] = sums[t].add(sixteenfold[t].sar(4));
                }
                let scale = L::fmul(scale, L::fbroadcast(d.add(t)));
                acc[t] = L::fma(sums[t].to_floats(), scale, acc[t]);
                if S::MIN {
                    acc[t] = L::fma(min, L::fbroadcast(x.fsum.add(at + t)), acc[t]);
                }
            }
        }
    }
}

/// Adds group `g` of a strip's block `b` times `T` tokens.
///
/// # Safety
/// As [`Lanes`]; `block` is that block, and `tokens` are the row's.
#[inline(always)]
pub(crate) unsafe fn add_strip_group<L: Lanes, F: Format, const T: usize>(
    acc: &mut [L::Floats; T],
    block: *const u8,
    (b, g): (usize, usize),
    tokens: &Tokens,
) {
    // SAFETY: the caller's.
    unsafe {
        let codes = match L::WIDE {
            true => F::codes_in_place::<L>(block, g),
            false => F::codes::<L>(block, g),
        };
        let kind = Kind {
            zero: F::ZERO,
            small: F::SMALL,
            sixteenfold: F::sixteenfold(g).map(|high| high && L::WIDE),
        };
        let scales = if F::Shape::HALVES {
            [F::scale::<L>(block, 2 * g), F::scale::<L>(block, 2 * g + 1)]
        } else {
            [F::scale::<L>(block, g); 2]
        };
        add_group::<L, F::Shape, T, true>(
            acc,
            #[inline(always)]
            |e| codes[e],
            scales,
            kind,
            b * F::GROUPS + g,
            tokens,
        );
    }
}

/// Groups `g` and `g + 1`, if there is one, of a strip's block `b` times one token, asking for as
/// much ahead of them, or at the next strip behind the strip's `bytes`.
#[inline(always)]
unsafe fn two_groups<L: Lanes, F: Format>(
    acc: &mut [L::Floats; 1],
    from: &OneStrip,
    bytes: usize,
    (b, g): (usize, usize),
    tokens: &Tokens,
) {
    let at = b * F::BYTES;
    let block = from.strip.wrapping_add(at);
    let later = match (at + from.ahead).checked_sub(bytes) {
        None => block.wrapping_add(from.ahead),
        Some(beyond) => from.next.wrapping_add(beyond),
    };
    let together = F::GROUPS.min(2);
    let bytes = F::BYTES / F::GROUPS;
    ask::<_MM_HINT_T1>(later.wrapping_add(g * bytes), together * bytes);
    for g in g..g + together {
        // SAFETY: the caller's.
        unsafe { add_strip_group::<L, F, 1>(acc, block, (b, g), tokens) };
    }
}

/// Whole strips times one token; the tiles are written, not added to.
///
/// All strips in turns, two groups of each, since neighbours share bytes: one of them alone keeps
/// too few cache lines on their way from memory, and so do turns of whole blocks (`docs/bench`).
#[inline(always)]
pub(crate) unsafe fn one_token<L: Lanes, F: Format, const S: usize>(
    strips: &[OneStrip; S],
    blocks: usize,
    tokens: &Tokens,
) {
    let bytes = blocks * F::BYTES;
    // Copies of its own need not be read again behind fences.
    let (strips, tokens) = (&{ *strips }, &{ *tokens });
    unsafe {
        let mut acc = [[L::fsplat(0.0)]; S];
        for b in 0..blocks {
            // Written out, so that groups are known when this is compiled.
            macro_rules! turns {
                ($($g:literal)*) => {$(
                    if $g < F::GROUPS {
                        for (acc, strip) in acc.iter_mut().zip(strips) {
                            two_groups::<L, F>(acc, strip, bytes, (b, $g), tokens);
                            // Or the compiler gathers the turns' reading and asking in one place.
                            compiler_fence(SeqCst);
                        }
                    }
                )*};
            }
            // One, or pairs that the turns below cover.
            const { assert!(matches!(F::GROUPS, 1 | 2 | 4 | 6 | 8)) };
            turns!(0 2 4 6);
        }
        for (acc, strip) in acc.iter().zip(strips) {
            L::fstore(acc[0], strip.tile);
        }
    }
}

/// Decodes blocks to a panel, to signed codes or not.
#[inline(always)]
pub(crate) unsafe fn decode<L: Lanes, F: Format, const SIGNED: bool>(
    block: *const u8,
    blocks: usize,
    panel: &Panel,
) {
    let parts = if F::Shape::HALVES { 2 } else { 1 };
    unsafe {
        for b in 0..blocks {
            let block = block.add(b * F::BYTES);
            for g in 0..F::GROUPS {
                let out = panel.codes.add((b * F::GROUPS + g) * CODES);
                let codes = F::codes::<L>(block, g);
                for e in 0..8 {
                    let codes = match SIGNED && !F::Shape::MIN {
                        true => codes[e].sub_bytes(1 << F::ZERO),
                        false => codes[e],
                    };
                    codes.store(out.add(64 * e));
                }
            }
            for g in 0..F::GROUPS * parts {
                let at = (b * F::GROUPS * parts + g) * ROWS;
                let (scale, min) = F::scale::<L>(block, g);
                L::fstore(scale, panel.scales.add(at));
                if F::Shape::MIN {
                    L::fstore(min, panel.mins.add(at));
                }
            }
        }
    }
}

/// Adds a panel's products with `T` tokens to their sums.
#[inline(always)]
pub(crate) unsafe fn product<L: Lanes, S: Shape, const T: usize>(panel: &Panel, x: &Tokens) {
    // SAFETY: the caller's.
    unsafe {
        // Two loops, each without the other's code, where they differ.
        if L::SMALL && !S::FULL && panel.small {
            product_of::<L, S, T>(panel, true, x);
        } else {
            product_of::<L, S, T>(panel, false, x);
        }
    }
}

/// [`product`], of small codes or any.
#[inline(always)]
unsafe fn product_of<L: Lanes, S: Shape, const T: usize>(panel: &Panel, small: bool, x: &Tokens) {
    let parts = if S::HALVES { 2 } else { 1 };
    let kind = Kind {
        zero: panel.zero,
        small,
        sixteenfold: [false; 2],
    };
    unsafe {
        let mut acc = [L::fsplat(0.0); T];
        for t in 0..T {
            acc[t] = L::fload(x.tile.add(t * ROWS));
        }
        for g in 0..panel.groups {
            let next = panel.next.wrapping_add(g * panel.next_bytes);
            ask::<_MM_HINT_T1>(next, panel.next_bytes);
            let codes = panel.codes.add(g * CODES);
            let mut scales = [(L::fsplat(0.0), L::fsplat(0.0)); 2];
            for h in 0..parts {
                let at = (g * parts + h) * ROWS;
                scales[h].0 = L::fload(panel.scales.add(at));
                if S::MIN {
                    scales[h].1 = L::fload(panel.mins.add(at));
                }
            }
            add_group::<L, S, T, false>(
                &mut acc,
                #[inline(always)]
                |e| L::load(codes.add(64 * e)),
                scales,
                kind,
                panel.first + g,
                x,
            );
        }
        for t in 0..T {
            L::fstore(acc[t], x.tile.add(t * ROWS));
        }
    }
}

/// Tokens of one group, as products with f32 activations read them.
#[derive(Clone, Copy)]
pub(crate) struct Floats {
    /// The interleave.
    stride: usize,
    /// `[input][stride]`.
    x: *const f32,
    /// `[token][16]`: the sums so far.
    tile: *mut f32,
}

/// Adds `k` inputs' products with `T` tokens to their sums.
#[inline(always)]
pub(crate) unsafe fn floats<L: Lanes, W: FloatWeights, const T: usize>(
    w: *const u8,
    k: usize,
    x: &Floats,
) {
    unsafe {
        let mut acc = [L::fsplat(0.0); T];
        for t in 0..T {
            acc[t] = L::fload(x.tile.add(t * ROWS));
        }
        for i in 0..k / 2 {
            ask_ahead::<_MM_HINT_T1>(w.add(i * W::PAIR_BYTES), W::PAIR_BYTES);
            let (a, b) = W::pair::<L>(w.add(i * W::PAIR_BYTES));
            let even = x.x.add(2 * i * x.stride);
            let odd = even.add(x.stride);
            for t in 0..T {
                acc[t] = L::fma(a, L::fbroadcast(even.add(t)), acc[t]);
            }
            for t in 0..T {
                acc[t] = L::fma(b, L::fbroadcast(odd.add(t)), acc[t]);
            }
        }
        if k % 2 == 1 {
            let a = W::first::<L>(w.add(k / 2 * W::PAIR_BYTES));
            let x = x.x.add((k - 1) * x.stride);
            for t in 0..T {
                acc[t] = L::fma(a, L::fbroadcast(x.add(t)), acc[t]);
            }
        }
        for t in 0..T {
            L::fstore(acc[t], x.tile.add(t * ROWS));
        }
    }
}

/// Cuts the tokens of a segment into runs that stay inside a group and have a length that
/// kernels are compiled for: `f(first token of the group, tokens in it, offset, run)`.
#[inline(always)]
pub(crate) fn token_runs(
    m: usize,
    (group, most): (usize, usize),
    mut f: impl FnMut(usize, usize, usize, usize),
) {
    for base in (0..m).step_by(group) {
        let stride = group.min(m - base);
        let (mut at, mut run) = (0, most);
        while at < stride {
            while run > stride - at {
                run /= 2;
            }
            f(base, stride, at, run);
            at += run;
        }
    }
}

/// The strip kernel of a tier.
///
/// # Safety
/// As `MatmulKernels::mul_strips`.
pub(crate) unsafe fn mul_strips<M: Machine>(args: &StripArgs<'_>) {
    use GgmlType as T;
    // SAFETY: the caller's.
    unsafe {
        match args.ty {
            T::F32 => all_floats::<M, F32>(args),
            T::F16 => all_floats::<M, F16>(args),
            T::BF16 => all_floats::<M, BF16>(args),
            ty => format::visit(ty, OnVectors::<M>(args, PhantomData)),
        }
    }
}

/// The products of [`mul_strips`] with quantised weights.
struct OnVectors<'a, M>(&'a StripArgs<'a>, PhantomData<M>);

impl<M: Machine> Visitor for OnVectors<'_, M> {
    unsafe fn blocks<F: Format>(self) {
        // SAFETY: the caller's.
        unsafe {
            match self.0.acts.m {
                1 => one_at_a_time::<M, F>(self.0),
                _ => by_panels::<Vectors<M>, F>(self.0),
            }
        }
    }
    unsafe fn grids<S: Shape>(self) {
        // SAFETY: the caller's.
        unsafe { from_grids::<Vectors<M>, S>(self.0) }
    }
}

/// The tokens at `base` of a segment.
///
/// # Safety
/// The view holds the q8 form.
pub(crate) unsafe fn tokens_at<S: Shape>(
    acts: &ActsView<'_>,
    base: usize,
    stride: usize,
) -> Tokens {
    let (nsum, fsum, per) = if S::HALVES {
        (acts.nsum16, acts.fsum16, 16)
    } else {
        (acts.nsum32, acts.fsum32, 32)
    };
    // SAFETY: the offset of a group inside the view.
    unsafe {
        Tokens {
            stride,
            q: acts.q.add(base * acts.k),
            d: acts.d.add(base * (acts.k / 32)),
            nsum: nsum.add(base * (acts.k / per)),
            fsum: fsum.add(base * (acts.k / per)),
            tile: std::ptr::null_mut(),
        }
    }
}

/// [`token_runs`] of the q8 form, of at most `most`: `f(run, its tokens)`, whose sums are in `tile`,
/// `[m][16]`.
///
/// # Safety
/// The view holds the q8 form, the tile is as long.
#[inline(always)]
pub(crate) unsafe fn q8_runs<S: Shape>(
    acts: &ActsView<'_>,
    most: usize,
    tile: *mut f32,
    mut f: impl FnMut(usize, &Tokens),
) {
    token_runs(acts.m, (Q8_GROUP, most), |base, stride, at, run| {
        // SAFETY: tokens `base + at ..` of the view.
        let x = unsafe {
            let x = tokens_at::<S>(acts, base, stride);
            Tokens {
                q: x.q.add(at * 32),
                d: x.d.add(at),
                nsum: x.nsum.add(at),
                fsum: x.fsum.add(at),
                tile: tile.add((base + at) * ROWS),
                ..x
            }
        };
        f(run, &x);
    });
}

/// Cuts strips into runs of at most `most` that are read at once: `f(first, count)`, with counts
/// that kernels are compiled for.
#[inline(always)]
pub(crate) fn streams(strips: usize, most: usize, mut f: impl FnMut(usize, usize)) {
    let mut first = 0;
    for count in [4, 2, 1].into_iter().filter(|&count| count <= most) {
        while strips - first >= count {
            f(first, count);
            first += count;
        }
    }
}

/// Strips `first .. first + S`, of `bytes` bytes each, for one token; their beginnings are asked
/// for.
pub(crate) fn one_strips<const S: usize>(
    args: &StripArgs<'_>,
    first: usize,
    bytes: usize,
) -> [OneStrip; S] {
    let strips = std::array::from_fn(|s| {
        let strip = args.strips[first + s];
        let next = args.strips.get(first + S + s).or(args.next.get(s));
        OneStrip {
            strip,
            // If it is not known, what is there already.
            next: next.copied().unwrap_or(strip),
            tile: args.tile_of(first + s),
            ahead: args.asked.max(AHEAD),
        }
    });
    if args.asked < AHEAD {
        ask_beginnings(strips.iter().map(|s| (s.strip, bytes)), AHEAD);
    }
    strips
}

/// Strips `first .. first + S` times the one token.
///
/// # Safety
/// As `MatmulKernels::mul_strips`; there are so many strips.
unsafe fn one_run<M: Machine, F: Format, const S: usize>(
    args: &StripArgs<'_>,
    first: usize,
    blocks: usize,
    tokens: &Tokens,
) {
    let strips = one_strips(args, first, blocks * F::BYTES);
    // SAFETY: the caller's.
    unsafe { M::one_token::<F, S>(&strips, blocks, tokens) };
}

/// All strips times the one token.
///
/// # Safety
/// As `MatmulKernels::mul_strips`.
unsafe fn one_at_a_time<M: Machine, F: Format>(args: &StripArgs<'_>) {
    // SAFETY: the caller's.
    unsafe {
        let tokens = tokens_at::<F::Shape>(&args.acts, 0, 1);
        let blocks = args.k / (F::GROUPS * 32);
        streams(args.strips.len(), 4, |first, count| match count {
            4 => one_run::<M, F, 4>(args, first, blocks, &tokens),
            2 => one_run::<M, F, 2>(args, first, blocks, &tokens),
            _ => one_run::<M, F, 1>(args, first, blocks, &tokens),
        });
    }
}

/// All strips times several tokens, strip by strip and panel by panel.
///
/// # Safety
/// As `MatmulKernels::mul_strips`, with q8 activations.
pub(crate) unsafe fn by_panels<P: Panels, F: Format>(args: &StripArgs<'_>) {
    let per_block = F::GROUPS * 32;
    for (s, &strip) in args.strips.iter().enumerate() {
        // SAFETY: the caller's; blocks and groups are inside the strip.
        unsafe {
            args.tile_of(s).write_bytes(0, args.acts.m * ROWS);
            for k in (0..args.k).step_by(PANEL_K) {
                let len = PANEL_K.min(args.k - k);
                let blocks = strip.add(k / per_block * F::BYTES);
                // Asked for while this panel is multiplied: in a burst, while it is decoded,
                // the requests would fill the queues and decoding wait for memory.
                let panel = Panel {
                    next: blocks.wrapping_add(len / per_block * F::BYTES),
                    next_bytes: F::BYTES / F::GROUPS,
                    small: F::SMALL,
                    ..panel_at(args.panel, k / 32, len / 32, F::ZERO)
                };
                P::decode::<F>(blocks, len / per_block, &panel);
                P::products::<F::Shape>(&panel, args, s);
            }
        }
    }
}

/// The panel in scratch of `PANEL_BYTES`.
pub(crate) unsafe fn panel_at(scratch: *mut u8, first: usize, groups: usize, zero: u32) -> Panel {
    let scales = PANEL_K / 16 * ROWS;
    // SAFETY: the scratch holds codes, scales and minima in this order.
    unsafe {
        let floats = scratch.add(PANEL_K * ROWS).cast::<f32>();
        Panel {
            codes: scratch,
            scales: floats,
            mins: floats.add(scales),
            groups,
            first,
            zero,
            small: false,
            next: std::ptr::null(),
            next_bytes: 0,
        }
    }
}

/// Zero point of grid codes, which are within ±62: log2 of 64.
const GRID_ZERO: u32 = 6;

/// Decodes inputs `k .. k + len` of a strip of codebook indices, row by row, to signed codes or
/// not.
///
/// # Safety
/// `strip` is a strip of `ty`, `scratch` is `PANEL_BYTES`.
pub(crate) unsafe fn decode_grids<S: Shape>(
    (ty, signed): (GgmlType, bool),
    strip: *const u8,
    k: usize,
    len: usize,
    scratch: *mut u8,
) -> Panel {
    const LEN: usize = 256;
    let scales_per_block = if S::HALVES { 16 } else { 8 };
    let bytes = ty.block_bytes();
    let zero = if signed { 0 } else { 1 << GRID_ZERO };
    let mut codes = [0i8; LEN];
    let mut scales = [0f32; 16];
    let scales = &mut scales[..scales_per_block];
    // SAFETY: blocks and rows are inside strip and panel.
    unsafe {
        let panel = panel_at(scratch, k / 32, len / 32, GRID_ZERO);
        for b in 0..len / LEN {
            let block = strip.add((k / LEN + b) * bytes * ROWS);
            for row in 0..ROWS {
                let raw = std::slice::from_raw_parts(block.add(row * bytes), bytes);
                blocks::decode_codes(ty, raw, &mut codes, scales, &mut [])
                    .expect("one block of a quantised type");
                let out = panel.codes.add(b * LEN * ROWS).cast::<[i8; 4]>();
                for (e, &four) in codes.as_chunks::<4>().0.iter().enumerate() {
                    *out.add(e * ROWS + row) = four.map(|c| c + zero);
                }
                let out = panel.scales.add(b * scales_per_block * ROWS);
                for (g, &scale) in scales.iter().enumerate() {
                    *out.add(g * ROWS + row) = scale;
                }
            }
        }
        panel
    }
}

/// [`by_panels`] of codebook indices.
///
/// # Safety
/// As that.
pub(crate) unsafe fn from_grids<P: Panels, S: Shape>(args: &StripArgs<'_>) {
    for (s, &strip) in args.strips.iter().enumerate() {
        // SAFETY: the caller's.
        unsafe {
            args.tile_of(s).write_bytes(0, args.acts.m * ROWS);
            for k in (0..args.k).step_by(PANEL_K) {
                let len = PANEL_K.min(args.k - k);
                let ty = (args.ty, P::SIGNED);
                let panel = decode_grids::<S>(ty, strip, k, len, args.panel);
                P::products::<S>(&panel, args, s);
            }
        }
    }
}

/// # Safety
/// As `MatmulKernels::mul_strips`, with f32 activations.
unsafe fn all_floats<M: Machine, W: FloatWeights>(args: &StripArgs<'_>) {
    let acts = &args.acts;
    for (s, &strip) in args.strips.iter().enumerate() {
        let tile = args.tile_of(s);
        // SAFETY: the caller's; inputs and tokens are inside the strip and the view.
        unsafe {
            tile.write_bytes(0, acts.m * ROWS);
            for k in (0..args.k).step_by(PANEL_K) {
                let len = PANEL_K.min(args.k - k);
                let w = strip.add(k / 2 * W::PAIR_BYTES);
                token_runs(
                    acts.m,
                    (GROUP, M::Lanes::TOKENS),
                    |base, stride, at, run| {
                        let x = Floats {
                            stride,
                            x: acts.floats.add(base * acts.k + k * stride + at),
                            tile: tile.add((base + at) * ROWS),
                        };
                        match run {
                            8 => M::floats::<W, 8>(w, len, &x),
                            4 => M::floats::<W, 4>(w, len, &x),
                            2 => M::floats::<W, 2>(w, len, &x),
                            _ => M::floats::<W, 1>(w, len, &x),
                        }
                    },
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cover_every_token_once_inside_its_group() {
        for (group, most) in [(8, 4), (8, 8), (16, 4), (16, 8)] {
            for m in 0..40 {
                let mut next = 0;
                token_runs(m, (group, most), |base, stride, at, run| {
                    assert_eq!(base + at, next);
                    assert_eq!((base % group, stride), (0, group.min(m - base)));
                    assert!(run <= most && run.is_power_of_two() && at + run <= stride);
                    next += run;
                });
                assert_eq!(next, m);
            }
        }
    }
}
