//! The matrix products' definition: plain loops over decoded blocks.

use half::f16;
use tegula_gguf::{GgmlType, blocks};

use crate::{
    acts::{ActsView, Forms, GROUP, Q8_GROUP, Q8Dest},
    strip::{
        self, ROWS,
        kernels::{MatmulKernels, StripArgs},
    },
};

/// The scalar tier.
pub const KERNELS: MatmulKernels = MatmulKernels {
    name: "scalar",
    quantize_q8,
    mul_strips,
    bf16_form: Forms::F32,
    sparse: |_| false,
    tiles: None,
};

/// Groups whose largest magnitude is below this are zero: its reciprocal times 127 is finite.
pub(crate) const TINY: f32 = 1e-30;

/// # Safety
/// `dest` is valid for `x.len()` values, a multiple of 32.
unsafe fn quantize_q8(x: &[f32], dest: &Q8Dest) {
    for (kb, x) in x.as_chunks::<32>().0.iter().enumerate() {
        let mut bits = 0;
        for v in x {
            bits = bits.max(v.to_bits() & 0x7fff_ffff);
        }
        let largest = f32::from_bits(bits);
        let (d, inverse) = q8_scale(largest);
        let mut sums = [0i32; 2];
        for (i, &v) in x.iter().enumerate() {
            let code = if inverse == 0.0 {
                0
            } else {
                (v * inverse).round_ties_even() as i8
            };
            sums[i / 16] += i32::from(code);
            // SAFETY: the caller vouches for the destination.
            unsafe { *dest.q.add(kb * dest.tokens * 32 + i) = code };
        }
        // SAFETY: as above.
        unsafe { dest.put_sums(kb, d, sums[0], sums[1]) };
    }
}

/// Scale and reciprocal for 32 values of largest magnitude `largest`; a reciprocal of zero
/// means that all codes are zero.
#[inline(always)]
pub(crate) fn q8_scale(largest: f32) -> (f32, f32) {
    if !largest.is_finite() {
        (f32::NAN, 0.0)
    } else if largest < TINY {
        (0.0, 0.0)
    } else {
        (largest / 127.0, 127.0 / largest)
    }
}

/// Calls `f(token, tokens in its group, base of its group)` for every token.
fn for_tokens(m: usize, group: usize, mut f: impl FnMut(usize, usize, usize)) {
    for t in 0..m {
        let base = t / group * group;
        f(t, group.min(m - base), base);
    }
}

/// # Safety
/// As [`MatmulKernels::mul_strips`].
unsafe fn mul_strips(args: &StripArgs<'_>) {
    let layout = strip::layout(args.ty).expect("a type that products take");
    let len = layout.strip_bytes(args.k);
    for (s, &ptr) in args.strips.iter().enumerate() {
        // SAFETY: the caller vouches for the strips and for the tile.
        let (strip, tile) = unsafe {
            (
                std::slice::from_raw_parts(ptr, len),
                std::slice::from_raw_parts_mut(args.tile_of(s), args.acts.m * ROWS),
            )
        };
        tile.fill(0.0);
        // SAFETY: the view holds the form that the type takes.
        unsafe {
            if args.ty.is_quantized() {
                quantized(args.ty, strip, &args.acts, tile);
            } else {
                floats(args.ty, args.k, strip, &args.acts, tile);
            }
        }
    }
}

/// # Safety
/// The view holds the q8 form.
unsafe fn quantized(ty: GgmlType, strip: &[u8], acts: &ActsView<'_>, tile: &mut [f32]) {
    let layout = strip::layout(ty).expect("a type that products take");
    let len = layout.block_len();
    let group = blocks::group_len(ty).expect("a quantised type");
    let has_min = blocks::has_min(ty);
    let groups = len / group;
    let mut raw = vec![0; ty.block_bytes()];
    let mut codes = vec![0; len];
    let (mut scales, mut mins) = (
        vec![0.0; groups],
        vec![0.0; if has_min { groups } else { 0 }],
    );
    let k = acts.k;
    for (b, block) in strip.chunks_exact(layout.strip_block_bytes()).enumerate() {
        for row in 0..ROWS {
            strip::unpack_block_row(layout, block, row, &mut raw);
            blocks::decode_codes(ty, &raw, &mut codes, &mut scales, &mut mins)
                .expect("one block of a quantised type");
            for_tokens(acts.m, Q8_GROUP, |t, tokens, base| {
                let acc = &mut tile[t * ROWS + row];
                let t = t - base;
                for g in 0..groups {
                    let at = b * len + g * group;
                    let kb = at / 32;
                    // SAFETY: offsets of a token, block and sub-block inside the view.
                    let (sum, d, fsum) = unsafe {
                        let q = acts.q.add(base * k + (kb * tokens + t) * 32 + at % 32);
                        let q = std::slice::from_raw_parts(q, group);
                        let dot = |(&c, &a): (&i8, &i8)| i32::from(c) * i32::from(a);
                        let sum: i32 = codes[g * group..][..group].iter().zip(q).map(dot).sum();
                        let d = *acts.d.add(base * (k / 32) + kb * tokens + t);
                        let fsum = match group {
                            32 => *acts.fsum32.add(base * (k / 32) + kb * tokens + t),
                            _ => *acts.fsum16.add(base * (k / 16) + at / 16 * tokens + t),
                        };
                        (sum, d, fsum)
                    };
                    *acc = (sum as f32).mul_add(scales[g] * d, *acc);
                    if has_min {
                        *acc = mins[g].mul_add(fsum, *acc);
                    }
                }
            });
        }
    }
}

/// # Safety
/// The view holds the f32 form.
unsafe fn floats(ty: GgmlType, k: usize, strip: &[u8], acts: &ActsView<'_>, tile: &mut [f32]) {
    let mut w = [0f32; ROWS];
    for i in 0..k {
        for (r, w) in w.iter_mut().enumerate() {
            let half = |at: usize| u16::from_le_bytes([strip[at], strip[at + 1]]);
            *w = match ty {
                GgmlType::F16 => f16::from_bits(half((i * ROWS + r) * 2)).to_f32(),
                GgmlType::BF16 => {
                    let bits = half((i / 2 * ROWS + r) * 4 + i % 2 * 2);
                    f32::from_bits(u32::from(bits) << 16)
                }
                _ => {
                    let at = (i * ROWS + r) * 4;
                    f32::from_le_bytes([strip[at], strip[at + 1], strip[at + 2], strip[at + 3]])
                }
            };
        }
        for_tokens(acts.m, GROUP, |t, tokens, base| {
            // SAFETY: the offset of a token and column inside the view.
            let x = unsafe { *acts.floats.add(base * k + i * tokens + t - base) };
            for (acc, &w) in tile[t * ROWS..][..ROWS].iter_mut().zip(&w) {
                *acc = w.mul_add(x, *acc);
            }
        });
    }
}
