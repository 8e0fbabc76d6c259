//! The matrix products for AVX-512, with `vdpbf16ps` where the CPU has it.

use std::arch::x86_64::*;

use tegula_gguf::GgmlType;

use crate::{
    acts::{Forms, GROUP, Q8Dest},
    generic::matmul::{self as generic, OneStrip},
    mem::{self, LINE},
    scalar::matmul::q8_scale,
    strip::{
        ROWS,
        kernels::{MatmulKernels, PANEL_K, StripArgs},
    },
    tier::Features,
};

/// The kernels that this CPU can run.
pub(crate) fn kernels() -> MatmulKernels {
    let bf16 = Features::get().avx512bf16;
    MatmulKernels {
        name: if bf16 { "avx512+bf16" } else { "avx512" },
        quantize_q8,
        mul_strips: if bf16 {
            mul_strips::<true>
        } else {
            mul_strips::<false>
        },
        bf16_form: if bf16 { Forms::BF16 } else { Forms::F32 },
        sparse: super::sparse::takes,
        tiles: None,
    }
}

generic::tier_kernels!(
    Avx512,
    __m512i,
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,bmi2"
);

/// Pairs of inputs that a batch is taken through at a time: two strips of them (16 KiB) and
/// eight tokens' cache lines (8 KiB, which the next eight tokens share) stay in L1.
const BATCH_PAIRS: usize = 128;

/// # Safety
/// As [`MatmulKernels::mul_strips`]; with `BF16_DOTS` the CPU has bf16 dot products.
unsafe fn mul_strips<const BF16_DOTS: bool>(args: &StripArgs<'_>) {
    // SAFETY: the caller's.
    unsafe {
        if args.ty.is_sparse() {
            super::sparse::mul_strips(args);
        } else if BF16_DOTS && args.ty == GgmlType::BF16 {
            bf16(args);
        } else {
            generic::mul_strips::<Avx512>(args);
        }
    }
}

/// # Safety
/// As [`MatmulKernels::mul_strips`]; the CPU has bf16 dot products.
unsafe fn bf16(args: &StripArgs<'_>) {
    let acts = &args.acts;
    let pairs = args.k.div_ceil(2);
    if acts.m == 1 {
        return generic::streams(args.strips.len(), 4, |first, count| {
            // SAFETY: the caller's.
            unsafe {
                match count {
                    4 => bf16_token::<4>(args, first, pairs),
                    2 => bf16_token::<2>(args, first, pairs),
                    _ => bf16_token::<1>(args, first, pairs),
                }
            }
        });
    }
    let panel = if acts.m < 8 { PANEL_K / 2 } else { BATCH_PAIRS };
    let mut some = |first: usize, count: usize| {
        let at = |s: usize| first + s.min(count - 1);
        let tiles: [_; 2] = std::array::from_fn(|s| args.tile_of(at(s)));
        // SAFETY: the caller's; pairs and tokens are inside the strips and the view.
        unsafe {
            for tile in &tiles[..count] {
                tile.write_bytes(0, acts.m * ROWS);
            }
            for i in (0..pairs).step_by(panel) {
                let len = panel.min(pairs - i);
                let w: [_; 2] = std::array::from_fn(|s| args.strips[at(s)].add(i * 64));
                generic::token_runs(acts.m, (GROUP, 8), |base, stride, at, run| {
                    let x = acts.pairs.add(base * pairs + i * stride + at);
                    let to = tiles.map(|tile| tile.add((base + at) * ROWS));
                    match (count, run) {
                        (2, 8) => bf16_pairs::<2, 8>(w, len, x, stride, to),
                        (2, 4) => bf16_pairs::<2, 4>(w, len, x, stride, to),
                        (2, 2) => bf16_pairs::<2, 2>(w, len, x, stride, to),
                        (2, _) => bf16_pairs::<2, 1>(w, len, x, stride, to),
                        (_, 8) => bf16_pairs::<1, 8>([w[0]], len, x, stride, [to[0]]),
                        (_, 4) => bf16_pairs::<1, 4>([w[0]], len, x, stride, [to[0]]),
                        (_, 2) => bf16_pairs::<1, 2>([w[0]], len, x, stride, [to[0]]),
                        _ => bf16_pairs::<1, 1>([w[0]], len, x, stride, [to[0]]),
                    }
                });
            }
        }
    };
    generic::streams(args.strips.len(), 2, &mut some);
}

/// Strips `first .. first + S` times one token: memory is waited for, which wants several streams.
///
/// # Safety
/// As [`bf16`]; there are so many strips, of so many pairs of inputs.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn bf16_token<const S: usize>(args: &StripArgs<'_>, first: usize, pairs: usize) {
    let bytes = pairs * LINE;
    let strips: [OneStrip; S] = generic::one_strips(args, first, bytes);
    let ahead = strips[0].ahead.min(bytes);
    let own = (bytes - ahead) / LINE;
    let mut acc = [_mm512_setzero_ps(); S];
    // Towards the end the next strip is asked for, whose first line has its turn at the line `own`.
    for (lines, asks) in [
        (0..own, strips.map(|s| s.strip.wrapping_add(ahead))),
        (own..pairs, strips.map(|s| s.next.wrapping_sub(own * LINE))),
    ] {
        for i in lines {
            // SAFETY: the caller's; both bf16 vectors are 512 plain bits.
            unsafe {
                let x = _mm512_set1_epi32(*args.acts.pairs.add(i) as i32);
                let x = std::mem::transmute::<__m512i, __m512bh>(x);
                for ((acc, strip), ask) in acc.iter_mut().zip(strips).zip(asks) {
                    mem::ask::<_MM_HINT_T1>(ask.wrapping_add(i * LINE));
                    let w = _mm512_loadu_si512(strip.strip.add(i * LINE).cast());
                    let w = std::mem::transmute::<__m512i, __m512bh>(w);
                    *acc = _mm512_dpbf16_ps(*acc, w, x);
                }
            }
        }
    }
    for (acc, strip) in acc.into_iter().zip(strips) {
        // SAFETY: the caller's.
        unsafe { _mm512_storeu_ps(strip.tile, acc) };
    }
}

/// Adds the products of `len` pairs of inputs of `S` strips with `T` tokens to their sums
/// `[T][16]`.
///
/// # Safety
/// `w` are `len` times 64 bytes, `x` is `[len][stride]` of which `T` tokens are read.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(super) unsafe fn bf16_pairs<const S: usize, const T: usize>(
    w: [*const u8; S],
    len: usize,
    x: *const u32,
    stride: usize,
    tiles: [*mut f32; S],
) {
    // SAFETY: the caller's; both bf16 vectors are 512 plain bits.
    unsafe {
        let mut acc = [[_mm512_setzero_ps(); S]; T];
        for (t, acc) in acc.iter_mut().enumerate() {
            *acc = tiles.map(|tile| _mm512_loadu_ps(tile.add(t * ROWS)));
        }
        for i in 0..len {
            let w: [__m512bh; S] = w.map(|w| {
                generic::ask_ahead::<_MM_HINT_T0>(w.add(64 * i), 64);
                std::mem::transmute(_mm512_loadu_si512(w.add(64 * i).cast()))
            });
            let x = x.add(i * stride);
            for (t, acc) in acc.iter_mut().enumerate() {
                let x: __m512bh = std::mem::transmute(_mm512_set1_epi32(*x.add(t) as i32));
                for (acc, w) in acc.iter_mut().zip(w) {
                    *acc = _mm512_dpbf16_ps(*acc, w, x);
                }
            }
        }
        for (t, acc) in acc.iter().enumerate() {
            for (acc, tile) in acc.iter().zip(tiles) {
                _mm512_storeu_ps(tile.add(t * ROWS), *acc);
            }
        }
    }
}

/// # Safety
/// As [`MatmulKernels::quantize_q8`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn quantize_q8(x: &[f32], dest: &Q8Dest) {
    let magnitude = _mm512_set1_epi32(0x7fff_ffff);
    for (kb, x) in x.as_chunks::<32>().0.iter().enumerate() {
        // SAFETY: 32 values are two vectors; the destination is the caller's.
        unsafe {
            let v = [
                _mm512_loadu_ps(x.as_ptr()),
                _mm512_loadu_ps(x.as_ptr().add(16)),
            ];
            let bits = v.map(|v| _mm512_and_si512(_mm512_castps_si512(v), magnitude));
            let largest = _mm512_reduce_max_epi32(_mm512_max_epi32(bits[0], bits[1]));
            let (d, inverse) = q8_scale(f32::from_bits(largest as u32));
            let mut sums = [0; 2];
            for (h, v) in v.into_iter().enumerate() {
                let codes = if inverse == 0.0 {
                    _mm512_setzero_si512()
                } else {
                    _mm512_cvtps_epi32(_mm512_mul_ps(v, _mm512_set1_ps(inverse)))
                };
                sums[h] = _mm512_reduce_add_epi32(codes);
                let out = dest.q.add(kb * dest.tokens * 32 + 16 * h);
                _mm_storeu_si128(out.cast(), _mm512_cvtepi32_epi8(codes));
            }
            dest.put_sums(kb, d, sums[0], sums[1]);
        }
    }
}
