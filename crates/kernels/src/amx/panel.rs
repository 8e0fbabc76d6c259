//! Weights as bf16 tiles: a stretch of a strip decoded to `[k / 32][16 pairs][16 outputs]`
//! dwords, each two inputs of one output, which is what `tdpbf16ps` reads.
//!
//! BF16 strips have this very order; they are read in place.

use std::arch::x86_64::{__m256, __m512, __m512i, _MM_HINT_T1, _mm_prefetch};

use super::{bytes::Sums, tile::TILE_K};
use crate::{
    generic::{
        float::gated,
        format::{Format, Shape},
        lanes::{Lanes, Pair, WithBf16},
        matmul::{self as generic, FloatWeights, Panel, Tokens},
        vector::Vector,
    },
    strip::ROWS,
    tier::{Features, Tier},
};

/// Decoders compiled for one set of features: what [`decoders`] writes.
///
/// # Safety
/// The CPU has the features, pointers are valid: `out` for the tiles of all inputs that are
/// read, 64 bytes per two of them.
pub(crate) trait Decoders {
    /// Asks, on the way, for as many bytes at `next` as it reads: what is decoded next. That
    /// need not be valid memory.
    unsafe fn quantized<F: Format>(block: *const u8, blocks: usize, out: *mut u8, next: *const u8);
    unsafe fn codes<S: Shape>(panel: &Panel, out: *mut u8);
    /// See [`super::bytes`]: to a panel of signed codes.
    unsafe fn signed<F: Format>(block: *const u8, blocks: usize, panel: &Panel);
    /// See [`super::bytes`].
    unsafe fn byte_products<S: Shape>(panel: &Panel, x: &Tokens, sums: *mut Sums);
    unsafe fn floats<W: FloatWeights>(w: *const u8, k: usize, out: *mut u8);
    /// 32 values at a time, `step` elements apart in `out`.
    unsafe fn pack(x: &[f32], out: *mut u16, step: usize);
    /// See `Tiles::swiglu`.
    unsafe fn swiglu(gate: *const f32, up: *const f32, step: usize, m: usize, out: *mut u16);
}

macro_rules! decoders {
    ($name:ident, $lanes:ty, $vector:ty, $features:literal) => {
        pub(super) struct $name;

        // SAFETY (all seven): the features are the function's own; the rest is the caller's.
        impl Decoders for $name {
            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn quantized<F: Format>(
                block: *const u8,
                blocks: usize,
                out: *mut u8,
                next: *const u8,
            ) {
                // SAFETY: see above.
                unsafe { quantized::<$lanes, F>(block, blocks, out, next) }
            }

            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn codes<S: Shape>(panel: &Panel, out: *mut u8) {
                // SAFETY: see above.
                unsafe { codes::<$lanes, S>(panel, out) }
            }

            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn signed<F: Format>(block: *const u8, blocks: usize, panel: &Panel) {
                // SAFETY: see above.
                unsafe { generic::decode::<$lanes, F, true>(block, blocks, panel) }
            }

            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn byte_products<S: Shape>(panel: &Panel, x: &Tokens, sums: *mut Sums) {
                // SAFETY: see above.
                unsafe { super::bytes::products::<$lanes, S>(panel, x, sums) }
            }

            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn floats<W: FloatWeights>(w: *const u8, k: usize, out: *mut u8) {
                // SAFETY: see above.
                unsafe { floats::<$lanes, W>(w, k, out) }
            }

            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn pack(x: &[f32], out: *mut u16, step: usize) {
                for (i, x) in x.as_chunks::<32>().0.iter().enumerate() {
                    // SAFETY: see above.
                    unsafe { <$lanes>::pack_bf16(x.as_ptr(), out.add(i * step)) };
                }
            }

            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn swiglu(
                gate: *const f32,
                up: *const f32,
                step: usize,
                tokens: usize,
                out: *mut u16,
            ) {
                // SAFETY: see above.
                unsafe { swiglu::<$lanes, $vector>(gate, up, step, tokens, out) }
            }
        }
    };
}

// Every processor with AMX has bf16 conversions; the others serve emulation.
decoders!(
    Bf16,
    WithBf16,
    __m512,
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c,bmi2"
);
decoders!(
    Avx512,
    __m512i,
    __m512,
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,bmi2"
);
decoders!(Avx2, Pair<false>, __m256, "avx2,fma,f16c,bmi2");

/// Which decoders this CPU can run at `tier`.
pub(super) enum Choice {
    Bf16,
    Avx512,
    Avx2,
}

/// The best decoders of `tier`, or `None` below AVX2.
pub(super) fn choose(tier: Tier) -> Option<Choice> {
    match tier {
        Tier::Scalar => None,
        Tier::Avx2 => Some(Choice::Avx2),
        Tier::Avx512 if Features::get().avx512bf16 => Some(Choice::Bf16),
        Tier::Avx512 => Some(Choice::Avx512),
    }
}

/// Four inputs of 16 rows, from a dword of codes each: `(code - zero point) * scale`, or
/// `code * scale + min`, with one rounding to f32 and one to bf16; `line` is [`line`]'s.
///
/// Without a minimum a code is not converted but put into the mantissa of 1, which makes it
/// `1 + code / 256`.
#[inline(always)]
unsafe fn four<L: Lanes, S: Shape>(codes: L, line: (L::Floats, L::Floats), out: *mut u8) {
    // SAFETY: the caller's.
    unsafe {
        let mut value = [line.1; 4];
        if S::MIN {
            let byte = L::splat(0xff);
            let bytes = [codes, codes.shr(8), codes.shr(16), codes.shr(24)];
            for (value, code) in value.iter_mut().zip(bytes) {
                *value = L::fma(code.and(byte).to_floats(), line.0, line.1);
            }
        } else {
            let (mantissa, one) = (L::splat(0xff << 15), L::splat(0x3f80_0000));
            let placed = [codes.shl(15), codes.shl(7), codes.shr(1), codes.shr(9)];
            for (value, code) in value.iter_mut().zip(placed) {
                *value = L::fma(code.and(mantissa).or(one).as_floats(), line.0, line.1);
            }
        }
        L::bf16_pair(value[0], value[1]).store(out);
        L::bf16_pair(value[2], value[3]).store(out.add(64));
    }
}

/// Factor and summand that make a code, as [`four`] takes it, the weight. Both are exact: scales
/// have 17 bits at most, so that they leave room for a zero point. A minimum does not.
#[inline(always)]
unsafe fn line<L: Lanes, S: Shape>(
    scale: L::Floats,
    min: L::Floats,
    zero: u32,
) -> (L::Floats, L::Floats) {
    // SAFETY: the caller's.
    unsafe {
        if S::MIN {
            return (scale, min);
        }
        let below = -((256 + (1u32 << zero)) as f32);
        let factor = L::fmul(scale, L::fsplat(256.0));
        (factor, L::fmul(scale, L::fsplat(below)))
    }
}

#[inline(always)]
unsafe fn quantized<L: Lanes, F: Format>(
    block: *const u8,
    blocks: usize,
    out: *mut u8,
    next: *const u8,
) {
    let parts = if F::Shape::HALVES { 2 } else { 1 };
    let dwords = 8 / parts;
    // SAFETY: the caller's.
    unsafe {
        for b in 0..blocks {
            let block = block.add(b * F::BYTES);
            for g in 0..F::GROUPS {
                // This group's share of the block's lines, a stretch later.
                let lines = (g * F::BYTES / F::GROUPS)..((g + 1) * F::BYTES / F::GROUPS);
                for line in lines.step_by(64) {
                    _mm_prefetch::<_MM_HINT_T1>(next.wrapping_add(b * F::BYTES + line).cast());
                }
                let out = out.add((b * F::GROUPS + g) * 1024);
                let codes = F::codes::<L>(block, g);
                for h in 0..parts {
                    let (scale, min) = F::scale::<L>(block, g * parts + h);
                    let line = line::<L, F::Shape>(scale, min, F::ZERO);
                    for (e, &codes) in codes.iter().enumerate().skip(h * dwords).take(dwords) {
                        four::<L, F::Shape>(codes, line, out.add(128 * e));
                    }
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn codes<L: Lanes, S: Shape>(panel: &Panel, out: *mut u8) {
    let parts = if S::HALVES { 2 } else { 1 };
    let dwords = 8 / parts;
    // SAFETY: the caller's.
    unsafe {
        for g in 0..panel.groups * parts {
            let scale = L::fload(panel.scales.add(g * ROWS));
            let line = line::<L, S>(scale, scale, panel.zero);
            for e in g * dwords..(g + 1) * dwords {
                four::<L, S>(L::load(panel.codes.add(64 * e)), line, out.add(128 * e));
            }
        }
    }
}

#[inline(always)]
unsafe fn floats<L: Lanes, W: FloatWeights>(w: *const u8, k: usize, out: *mut u8) {
    // SAFETY: the caller's.
    unsafe {
        for i in 0..k / 2 {
            let (even, odd) = W::pair::<L>(w.add(i * W::PAIR_BYTES));
            L::bf16_pair(even, odd).store(out.add(64 * i));
        }
    }
}

#[inline(always)]
unsafe fn swiglu<L: Lanes, V: Vector>(
    gate: *const f32,
    up: *const f32,
    step: usize,
    tokens: usize,
    out: *mut u16,
) {
    // SAFETY: the caller's.
    unsafe {
        for t in 0..tokens {
            let mut values = [0f32; TILE_K];
            for (i, value) in values.iter_mut().enumerate().step_by(V::LANES) {
                let at = i / ROWS * step + t * ROWS + i % ROWS;
                gated(V::load(gate.add(at)), V::load(up.add(at))).store(value);
            }
            L::pack_bf16(values.as_ptr(), out.add(t * TILE_K));
        }
    }
}
