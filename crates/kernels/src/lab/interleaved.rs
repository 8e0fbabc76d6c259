//! Interleaved rows: decoded to registers, then multiplied with up to eight tokens.

use crate::{
    acts::{ActsView, GROUP},
    generic::{
        format::{self, Format, Shape},
        lanes::{Lanes, Pair},
        matmul::{Tokens, add_strip_group, q8_runs, token_runs},
    },
    lab::Kernel,
    strip::ROWS,
    tier::{Features, Tier},
};
use std::arch::x86_64::__m512i;
use tegula_gguf::GgmlType;

/// A whole strip times `T` tokens.
///
/// # Safety
/// As [`Lanes`]; the strip has so many blocks, and `tokens` so many tokens.
#[inline(always)]
unsafe fn strip<L: Lanes, F: Format, const T: usize>(
    strip: *const u8,
    blocks: usize,
    tokens: &Tokens,
) {
    // SAFETY: the caller's.
    unsafe {
        let mut acc = [L::fsplat(0.0); T];
        for b in 0..blocks {
            let block = strip.add(b * F::BYTES);
            for g in 0..F::GROUPS {
                add_strip_group::<L, F, T>(&mut acc, block, (b, g), tokens);
            }
        }
        for (t, acc) in acc.into_iter().enumerate() {
            L::fstore(acc, tokens.tile.add(t * ROWS));
        }
    }
}

/// `T` tokens' f32 activations: `[input][stride]`, and their sums `[T][16]`.
#[derive(Clone, Copy)]
struct Values {
    x: *const f32,
    stride: usize,
    tile: *mut f32,
}

/// The same with weights as f32.
///
/// # Safety
/// As [`strip`].
#[inline(always)]
unsafe fn strip_floats<L: Lanes, F: Format, const T: usize>(
    strip: *const u8,
    blocks: usize,
    values: &Values,
) {
    let zero = if F::Shape::MIN { 0 } else { 1 << F::ZERO };
    let parts = if F::Shape::HALVES { 2 } else { 1 };
    // SAFETY: the caller's.
    unsafe {
        let mut acc = [L::fsplat(0.0); T];
        for b in 0..blocks {
            let block = strip.add(b * F::BYTES);
            for g in 0..F::GROUPS {
                let codes = F::codes::<L>(block, g);
                for (e, code) in codes.into_iter().enumerate() {
                    let (scale, min) = F::scale::<L>(block, g * parts + e * parts / 8);
                    for i in 0..4 {
                        let code = code.shr(8 * i as u32).and(L::splat(0xff));
                        let code = code.add(L::splat(-zero)).to_floats();
                        let weight = if F::Shape::MIN {
                            L::fma(code, scale, min)
                        } else {
                            L::fmul(code, scale)
                        };
                        let at = (b * F::GROUPS + g) * 32 + e * 4 + i;
                        let x = values.x.add(at * values.stride);
                        for (t, acc) in acc.iter_mut().enumerate() {
                            *acc = L::fma(weight, L::fbroadcast(x.add(t)), *acc);
                        }
                    }
                }
            }
        }
        for (t, acc) in acc.into_iter().enumerate() {
            L::fstore(acc, values.tile.add(t * ROWS));
        }
    }
}

/// The code above, compiled for one set of features.
///
/// # Safety
/// The CPU has the features; the rest as [`strip`].
trait Machine {
    unsafe fn strip<F: Format, const T: usize>(rows: *const u8, blocks: usize, tokens: &Tokens);
    unsafe fn floats<F: Format, const T: usize>(rows: *const u8, blocks: usize, values: &Values);
}

macro_rules! machine {
    ($name:ident, $lanes:ty, $features:literal) => {
        struct $name;

        // SAFETY (both): the features are the function's own; the rest is the caller's.
        impl Machine for $name {
            #[inline(never)]
            #[target_feature(enable = $features)]
            unsafe fn strip<F: Format, const T: usize>(
                rows: *const u8,
                blocks: usize,
                tokens: &Tokens,
            ) {
                // SAFETY: see above.
                unsafe { strip::<$lanes, F, T>(rows, blocks, tokens) }
            }

            #[inline(never)]
            #[target_feature(enable = $features)]
            unsafe fn floats<F: Format, const T: usize>(
                rows: *const u8,
                blocks: usize,
                values: &Values,
            ) {
                // SAFETY: see above.
                unsafe { strip_floats::<$lanes, F, T>(rows, blocks, values) }
            }
        }
    };
}

machine!(Plain, Pair<false>, "avx2,fma,f16c,bmi2");
machine!(Vnni, Pair<true>, "avx2,fma,f16c,bmi2,avxvnni");
machine!(
    Avx512,
    __m512i,
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,bmi2"
);

/// # Safety
/// As [`Kernel`], with the q8 form.
unsafe fn all<M: Machine, F: Format, const MOST: usize>(
    rows: *const u8,
    k: usize,
    acts: &ActsView<'_>,
    tile: *mut f32,
) {
    let blocks = k / (F::GROUPS * 32);
    // SAFETY: the caller's.
    unsafe {
        q8_runs::<F::Shape>(acts, MOST, tile, |run, x| match run {
            8 => M::strip::<F, 8>(rows, blocks, x),
            4 => M::strip::<F, 4>(rows, blocks, x),
            2 => M::strip::<F, 2>(rows, blocks, x),
            _ => M::strip::<F, 1>(rows, blocks, x),
        });
    }
}

/// # Safety
/// As [`Kernel`], with the f32 form.
unsafe fn all_floats<M: Machine, F: Format>(
    rows: *const u8,
    k: usize,
    acts: &ActsView<'_>,
    tile: *mut f32,
) {
    let blocks = k / (F::GROUPS * 32);
    token_runs(acts.m, (GROUP, 8), |base, stride, at, run| {
        // SAFETY: as above.
        unsafe {
            let x = Values {
                x: acts.floats.add(base * k + at),
                stride,
                tile: tile.add((base + at) * ROWS),
            };
            match run {
                8 => M::floats::<F, 8>(rows, blocks, &x),
                4 => M::floats::<F, 4>(rows, blocks, &x),
                2 => M::floats::<F, 2>(rows, blocks, &x),
                _ => M::floats::<F, 1>(rows, blocks, &x),
            }
        }
    });
}

/// Evaluates `$body` with `$F` naming the format of `$ty` and `$M` the machine of `$tier`.
macro_rules! with {
    ($tier:expr, $ty:expr, $M:ident, $F:ident => $body:expr) => {
        match $tier {
            Tier::Scalar => None,
            Tier::Avx2 if Features::get().avxvnni => with!(@ty $ty, Vnni, $M, $F => $body),
            Tier::Avx2 => with!(@ty $ty, Plain, $M, $F => $body),
            Tier::Avx512 => with!(@ty $ty, Avx512, $M, $F => $body),
        }
    };
    (@ty $ty:expr, $machine:ident, $M:ident, $F:ident => $body:expr) => {{
        type $M = $machine;
        with!(@types $ty, $F => $body, [Q4_0 Q8_0 Q4_K Q6_K IQ4_XS])
    }};
    (@types $ty:expr, $F:ident => $body:expr, [$($name:ident)*]) => {
        match $ty {
            $(GgmlType::$name => {
                type $F = format::$name;
                Some($body)
            })*
            _ => None,
        }
    };
}

/// The kernel with byte activations, for 1 or 8 tokens at a time.
pub(super) fn kernel(tier: Tier, ty: GgmlType, tokens: usize) -> Option<Kernel> {
    match tokens {
        1 => with!(tier, ty, M, F => all::<M, F, 1> as Kernel),
        _ => with!(tier, ty, M, F => all::<M, F, 8> as Kernel),
    }
}

/// The kernel with f32 activations.
pub(super) fn floats_kernel(tier: Tier, ty: GgmlType) -> Option<Kernel> {
    with!(tier, ty, M, F => all_floats::<M, F> as Kernel)
}

type Inner = unsafe fn(*const u8, usize, &Tokens);
type InnerFloats = unsafe fn(*const u8, usize, &Values);

pub(super) fn address(tier: Tier, ty: GgmlType, tokens: usize) -> Option<usize> {
    match tokens {
        1 => with!(tier, ty, M, F => M::strip::<F, 1> as Inner as usize),
        _ => with!(tier, ty, M, F => M::strip::<F, 8> as Inner as usize),
    }
}

pub(super) fn floats_address(tier: Tier, ty: GgmlType) -> Option<usize> {
    with!(tier, ty, M, F => M::floats::<F, 8> as InnerFloats as usize)
}
