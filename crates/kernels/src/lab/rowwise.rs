//! Row by row: 32 weights of one row fill a 256-bit vector of bytes, products are added over
//! eight f32 lanes, and each dot product ends in a sum of these.

// The formats keep ggml's names.
#![allow(non_camel_case_types)]

use crate::{
    acts::ActsView,
    lab::Kernel,
    strip::ROWS,
    tier::{Features, Tier},
};
use half::f16;
use std::arch::x86_64::*;
use tegula_gguf::{
    GgmlType,
    blocks::{
        grids,
        layout::{unpack_scales_iq4_xs, unpack_scales_k4},
    },
};

/// Tokens that one row is multiplied with before the next row's turn.
const TOKENS: usize = 16;

/// 32 weights of one row.
#[derive(Clone, Copy)]
struct Group {
    /// Signed codes, in order.
    codes: __m256i,
    /// Scales of the first and the second 16.
    scales: [f32; 2],
    /// What is added to every weight.
    min: f32,
}

/// A format as its rows lie in a file.
///
/// # Safety
/// `block` is a whole block; the code is inlined into functions with AVX2.
trait Rows {
    const BYTES: usize;
    /// Groups of 32 in a block.
    const GROUPS: usize;
    const MIN: bool;
    /// What the groups of a block share: scales, unpacked.
    type Shared: Copy;
    unsafe fn shared(block: *const u8) -> Self::Shared;
    unsafe fn group(block: *const u8, shared: &Self::Shared, g: usize) -> Group;
}

/// The f16 at `p`.
///
/// # Safety
/// `p` is two bytes.
#[inline(always)]
unsafe fn half(p: *const u8) -> f32 {
    // SAFETY: the caller's.
    f16::from_bits(u16::from_le_bytes(unsafe { p.cast::<[u8; 2]>().read() })).to_f32()
}

/// Low nibbles of 16 bytes, then high ones.
///
/// # Safety
/// AVX2, and 16 bytes.
#[inline(always)]
unsafe fn nibbles(p: *const u8) -> __m256i {
    // SAFETY: the caller's.
    unsafe {
        let x = _mm_loadu_si128(p.cast());
        let both = _mm256_set_m128i(_mm_srli_epi16::<4>(x), x);
        _mm256_and_si256(both, _mm256_set1_epi8(15))
    }
}

struct Q4_0;

impl Rows for Q4_0 {
    const BYTES: usize = 18;
    const GROUPS: usize = 1;
    const MIN: bool = false;
    type Shared = f32;

    #[inline(always)]
    unsafe fn shared(block: *const u8) -> f32 {
        // SAFETY: the caller's.
        unsafe { half(block) }
    }
    #[inline(always)]
    unsafe fn group(block: *const u8, &d: &f32, _: usize) -> Group {
        // SAFETY: the caller's.
        let codes = unsafe { _mm256_sub_epi8(nibbles(block.add(2)), _mm256_set1_epi8(8)) };
        Group {
            codes,
            scales: [d; 2],
            min: 0.0,
        }
    }
}

struct Q8_0;

impl Rows for Q8_0 {
    const BYTES: usize = 34;
    const GROUPS: usize = 1;
    const MIN: bool = false;
    type Shared = f32;

    #[inline(always)]
    unsafe fn shared(block: *const u8) -> f32 {
        // SAFETY: the caller's.
        unsafe { half(block) }
    }
    #[inline(always)]
    unsafe fn group(block: *const u8, &d: &f32, _: usize) -> Group {
        Group {
            // SAFETY: the caller's.
            codes: unsafe { _mm256_loadu_si256(block.add(2).cast()) },
            scales: [d; 2],
            min: 0.0,
        }
    }
}

struct Q4_K;

impl Rows for Q4_K {
    const BYTES: usize = 144;
    const GROUPS: usize = 8;
    const MIN: bool = true;
    type Shared = ([f32; 8], [f32; 8]);

    #[inline(always)]
    unsafe fn shared(block: *const u8) -> Self::Shared {
        // SAFETY: the caller's.
        unsafe {
            let (d, dmin) = (half(block), half(block.add(2)));
            let (scales, mins) = unpack_scales_k4(&*block.add(4).cast());
            (
                scales.map(|s| d * f32::from(s)),
                mins.map(|m| -(dmin * f32::from(m))),
            )
        }
    }
    #[inline(always)]
    unsafe fn group(block: *const u8, (scales, mins): &Self::Shared, g: usize) -> Group {
        // SAFETY: the caller's.
        let codes = unsafe {
            let x = _mm256_loadu_si256(block.add(16 + g / 2 * 32).cast());
            let x = if g.is_multiple_of(2) {
                x
            } else {
                _mm256_srli_epi16::<4>(x)
            };
            _mm256_and_si256(x, _mm256_set1_epi8(15))
        };
        Group {
            codes,
            scales: [scales[g]; 2],
            min: mins[g],
        }
    }
}

struct Q6_K;

impl Rows for Q6_K {
    const BYTES: usize = 210;
    const GROUPS: usize = 8;
    const MIN: bool = false;
    type Shared = [f32; 16];

    #[inline(always)]
    unsafe fn shared(block: *const u8) -> [f32; 16] {
        // SAFETY: the caller's.
        unsafe {
            let d = half(block.add(208));
            let scales: [i8; 16] = block.add(192).cast::<[i8; 16]>().read();
            scales.map(|s| d * f32::from(s))
        }
    }
    #[inline(always)]
    unsafe fn group(block: *const u8, scales: &[f32; 16], g: usize) -> Group {
        let (half, s) = (g / 4, g % 4);
        // SAFETY: the caller's.
        let codes = unsafe {
            let low = _mm256_loadu_si256(block.add(half * 64 + s % 2 * 32).cast());
            let low = if s < 2 {
                low
            } else {
                _mm256_srli_epi16::<4>(low)
            };
            let high = _mm256_loadu_si256(block.add(128 + half * 32).cast());
            let high = match s {
                0 => _mm256_slli_epi16::<4>(high),
                1 => _mm256_slli_epi16::<2>(high),
                2 => high,
                _ => _mm256_srli_epi16::<2>(high),
            };
            let low = _mm256_and_si256(low, _mm256_set1_epi8(15));
            let high = _mm256_and_si256(high, _mm256_set1_epi8(0x30));
            _mm256_sub_epi8(_mm256_or_si256(low, high), _mm256_set1_epi8(32))
        };
        Group {
            codes,
            scales: [scales[2 * g], scales[2 * g + 1]],
            min: 0.0,
        }
    }
}

struct IQ4_XS;

impl Rows for IQ4_XS {
    const BYTES: usize = 136;
    const GROUPS: usize = 8;
    const MIN: bool = false;
    type Shared = [f32; 8];

    #[inline(always)]
    unsafe fn shared(block: *const u8) -> [f32; 8] {
        // SAFETY: the caller's.
        unsafe {
            let d = half(block);
            let low = block.add(4).cast::<[u8; 4]>().read();
            let high = block.add(2).cast::<[u8; 2]>().read();
            unpack_scales_iq4_xs(&low, high).map(|s| d * (f32::from(s) - 32.0))
        }
    }
    #[inline(always)]
    unsafe fn group(block: *const u8, scales: &[f32; 8], g: usize) -> Group {
        // SAFETY: the caller's; the table is 16 bytes.
        let codes = unsafe {
            let table = _mm_loadu_si128(grids::IQ4.as_ptr().cast());
            let table = _mm256_broadcastsi128_si256(table);
            _mm256_shuffle_epi8(table, nibbles(block.add(8 + 16 * g)))
        };
        Group {
            codes,
            scales: [scales[g]; 2],
            min: 0.0,
        }
    }
}

/// A dot product of bytes.
///
/// # Safety
/// Inlined into code with the instructions.
trait Dot {
    /// Per lane the sum of four products of signed bytes; none of `x` is -128.
    unsafe fn dot(codes: __m256i, x: __m256i) -> __m256i;
}

/// `vpmaddubsw` and `vpmaddwd`.
struct Widened;
/// `vpdpbusd` in its VEX form.
struct Vex;
/// `vpdpbusd` of AVX-512.
struct Evex;

impl Dot for Widened {
    #[inline(always)]
    unsafe fn dot(codes: __m256i, x: __m256i) -> __m256i {
        // SAFETY: the caller's.
        unsafe {
            let (a, b) = (_mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes));
            _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1))
        }
    }
}

impl Dot for Vex {
    #[inline(always)]
    unsafe fn dot(codes: __m256i, x: __m256i) -> __m256i {
        // SAFETY: the caller's.
        unsafe {
            let (a, b) = (_mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes));
            _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), a, b)
        }
    }
}

impl Dot for Evex {
    #[inline(always)]
    unsafe fn dot(codes: __m256i, x: __m256i) -> __m256i {
        // SAFETY: the caller's.
        unsafe {
            let (a, b) = (_mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes));
            _mm256_dpbusd_epi32(_mm256_setzero_si256(), a, b)
        }
    }
}

/// Tokens that stand one after the other.
#[derive(Clone, Copy)]
struct Tokens {
    k: usize,
    q: *const i8,
    d: *const f32,
    fsum: *const f32,
}

/// One row times `T` tokens.
///
/// # Safety
/// As [`Rows`] and [`Dot`]; the row has so many blocks, `x` so many tokens, `out` one sum per
/// token, 16 apart.
#[inline(always)]
unsafe fn row<D: Dot, R: Rows, const T: usize>(
    row: *const u8,
    blocks: usize,
    x: &Tokens,
    out: *mut f32,
) {
    // SAFETY: the caller's.
    unsafe {
        let mut acc = [_mm256_setzero_ps(); T];
        let mut mins = [0f32; T];
        for b in 0..blocks {
            let block = row.add(b * R::BYTES);
            let shared = R::shared(block);
            for g in 0..R::GROUPS {
                let group = R::group(block, &shared, g);
                let [low, high] = group.scales.map(|s| _mm_set1_ps(s));
                let scale = _mm256_set_m128(high, low);
                let kb = b * R::GROUPS + g;
                for t in 0..T {
                    let q = _mm256_loadu_si256(x.q.add(t * x.k + kb * 32).cast());
                    let sum = _mm256_cvtepi32_ps(D::dot(group.codes, q));
                    let at = t * (x.k / 32) + kb;
                    let scale = _mm256_mul_ps(scale, _mm256_set1_ps(*x.d.add(at)));
                    acc[t] = _mm256_fmadd_ps(sum, scale, acc[t]);
                    if R::MIN {
                        mins[t] += group.min * *x.fsum.add(at);
                    }
                }
            }
        }
        for t in 0..T {
            let half = _mm_add_ps(
                _mm256_castps256_ps128(acc[t]),
                _mm256_extractf128_ps::<1>(acc[t]),
            );
            let half = _mm_add_ps(half, _mm_movehl_ps(half, half));
            let sum = _mm_add_ss(half, _mm_movehdup_ps(half));
            *out.add(t * ROWS) = _mm_cvtss_f32(sum) + mins[t];
        }
    }
}

/// [`row`], compiled for one set of features.
///
/// # Safety
/// The CPU has the features; the rest as [`row`].
trait Machine {
    unsafe fn row<R: Rows, const T: usize>(
        bytes: *const u8,
        blocks: usize,
        x: &Tokens,
        out: *mut f32,
    );
}

macro_rules! machine {
    ($name:ident, $dot:ident, $features:literal) => {
        struct $name;

        impl Machine for $name {
            #[inline(never)]
            #[target_feature(enable = $features)]
            unsafe fn row<R: Rows, const T: usize>(
                bytes: *const u8,
                blocks: usize,
                x: &Tokens,
                out: *mut f32,
            ) {
                // SAFETY: the features are the function's own; the rest is the caller's.
                unsafe { row::<$dot, R, T>(bytes, blocks, x, out) }
            }
        }
    };
}

machine!(Plain, Widened, "avx2,fma,f16c");
machine!(Vnni, Vex, "avx2,fma,f16c,avxvnni");
machine!(
    Avx512,
    Evex,
    "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"
);

/// 16 rows times all tokens, 16 tokens at a time.
///
/// # Safety
/// As [`Kernel`], with the q8 form and every token a segment of its own.
unsafe fn all<M: Machine, R: Rows, const MOST: usize>(
    rows: *const u8,
    k: usize,
    acts: &ActsView<'_>,
    tile: *mut f32,
) {
    let blocks = k / (R::GROUPS * 32);
    for first in (0..acts.m).step_by(TOKENS) {
        let end = acts.m.min(first + TOKENS);
        for r in 0..ROWS {
            let mut t = first;
            while t < end {
                let run = if end - t >= MOST { MOST } else { 1 };
                // SAFETY: rows and tokens are inside what the caller vouches for.
                unsafe {
                    let row = rows.add(r * blocks * R::BYTES);
                    let x = Tokens {
                        k,
                        q: acts.q.add(t * k),
                        d: acts.d.add(t * (k / 32)),
                        fsum: acts.fsum32.add(t * (k / 32)),
                    };
                    let out = tile.add(t * ROWS + r);
                    match run {
                        1 => M::row::<R, 1>(row, blocks, &x, out),
                        _ => M::row::<R, MOST>(row, blocks, &x, out),
                    }
                }
                t += run;
            }
        }
    }
}

/// Evaluates `$body` with `$R` naming the format of `$ty` and `$M` the machine of `$tier`.
macro_rules! with {
    ($tier:expr, $ty:expr, $M:ident, $R:ident => $body:expr) => {
        match $tier {
            Tier::Scalar => None,
            Tier::Avx2 if Features::get().avxvnni => with!(@ty $ty, Vnni, $M, $R => $body),
            Tier::Avx2 => with!(@ty $ty, Plain, $M, $R => $body),
            Tier::Avx512 => with!(@ty $ty, Avx512, $M, $R => $body),
        }
    };
    (@ty $ty:expr, $machine:ident, $M:ident, $R:ident => $body:expr) => {{
        type $M = $machine;
        with!(@types $ty, $R => $body, [Q4_0 Q8_0 Q4_K Q6_K IQ4_XS])
    }};
    (@types $ty:expr, $R:ident => $body:expr, [$($name:ident)*]) => {
        match $ty {
            $(GgmlType::$name => {
                type $R = $name;
                Some($body)
            })*
            _ => None,
        }
    };
}

/// The kernel, for 1 or 8 tokens at a time.
pub(super) fn kernel(tier: Tier, ty: GgmlType, tokens: usize) -> Option<Kernel> {
    match tokens {
        1 => with!(tier, ty, M, R => all::<M, R, 1> as Kernel),
        _ => with!(tier, ty, M, R => all::<M, R, 8> as Kernel),
    }
}

type Inner = unsafe fn(*const u8, usize, &Tokens, *mut f32);

pub(super) fn address(tier: Tier, ty: GgmlType, tokens: usize) -> Option<usize> {
    match tokens {
        1 => with!(tier, ty, M, R => M::row::<R, 1> as Inner as usize),
        _ => with!(tier, ty, M, R => M::row::<R, 8> as Inner as usize),
    }
}
