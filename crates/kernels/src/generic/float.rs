//! Row kernels over f32: norm, activation, softmax.
//!
//! Closures over vectors are `#[inline(always)]`: one that stays a function of its own lacks
//! the tier's features, and then every intrinsic in it is a call.

use super::vector::{Vector, exp};
use crate::{scalar, strip::ROWS};

/// Runs `f` over whole vectors, then over a tail that is padded with `fill`.
///
/// # Safety
/// As [`Vector`]; `dst` holds as many values as `a` and `b` each (`b` may equal `a`).
#[inline(always)]
unsafe fn map2<V: Vector>(a: &[f32], b: &[f32], dst: &mut [f32], f: impl Fn(V, V) -> V) {
    assert!(a.len() == b.len() && a.len() == dst.len());
    let whole = a.len() / V::LANES * V::LANES;
    unsafe {
        for i in (0..whole).step_by(V::LANES) {
            f(V::load(a.as_ptr().add(i)), V::load(b.as_ptr().add(i)))
                .store(dst.as_mut_ptr().add(i));
        }
        let rest = a.len() - whole;
        if rest != 0 {
            let (mut x, mut y, mut z) = ([0f32; 16], [0f32; 16], [0f32; 16]);
            x[..rest].copy_from_slice(&a[whole..]);
            y[..rest].copy_from_slice(&b[whole..]);
            f(V::load(x.as_ptr()), V::load(y.as_ptr())).store(z.as_mut_ptr());
            dst[whole..].copy_from_slice(&z[..rest]);
        }
    }
}

/// Four partial sums of `f` over whole vectors, and the tail padded with zeros.
///
/// # Safety
/// As [`Vector`]; `f` maps zero to zero.
#[inline(always)]
unsafe fn reduce_sum<V: Vector>(x: &[f32], f: impl Fn(V, V) -> V) -> f32 {
    unsafe {
        let mut acc = [V::splat(0.0); 4];
        let step = 4 * V::LANES;
        let whole = x.len() / step * step;
        for i in (0..whole).step_by(step) {
            for (j, acc) in acc.iter_mut().enumerate() {
                *acc = f(V::load(x.as_ptr().add(i + j * V::LANES)), *acc);
            }
        }
        for chunk in x[whole..].chunks(V::LANES) {
            let mut padded = [0f32; 16];
            padded[..chunk.len()].copy_from_slice(chunk);
            acc[0] = f(V::load(padded.as_ptr()), acc[0]);
        }
        acc[0].add(acc[1]).add(acc[2].add(acc[3])).sum()
    }
}

/// `dst = x / sqrt(mean(x²) + eps) * w`.
///
/// # Safety
/// As [`Vector`].
#[inline(always)]
pub(crate) unsafe fn rms_norm<V: Vector>(x: &[f32], w: &[f32], eps: f32, dst: &mut [f32]) {
    unsafe {
        let squares = reduce_sum::<V>(
            x,
            #[inline(always)]
            |x, acc| x.fma(x, acc),
        );
        let scale = V::splat(1.0 / (squares / x.len() as f32 + eps).sqrt());
        map2::<V>(
            x,
            w,
            dst,
            #[inline(always)]
            |x, w| x.mul(scale).mul(w),
        );
    }
}

/// `dst += x`.
///
/// # Safety
/// As [`Vector`].
#[inline(always)]
pub(crate) unsafe fn add_assign<V: Vector>(dst: &mut [f32], x: &[f32]) {
    assert_eq!(dst.len(), x.len());
    // SAFETY: reads each vector of `dst` before it writes it.
    unsafe {
        let old = std::slice::from_raw_parts(dst.as_ptr(), dst.len());
        map2::<V>(
            old,
            x,
            std::slice::from_raw_parts_mut(dst.as_mut_ptr(), x.len()),
            #[inline(always)]
            |a, b| a.add(b),
        );
    }
}

/// `dst = gate / (1 + e^-gate) * up`.
///
/// # Safety
/// As [`Vector`].
#[inline(always)]
pub(crate) unsafe fn swiglu<V: Vector>(gate: &[f32], up: &[f32], dst: &mut [f32]) {
    unsafe {
        map2::<V>(
            gate,
            up,
            dst,
            #[inline(always)]
            |g, u| gated(g, u),
        );
    }
}

/// `g / (1 + e^-g) * u`
///
/// # Safety
/// As [`Vector`].
#[inline(always)]
pub(crate) unsafe fn gated<V: Vector>(g: V, u: V) -> V {
    unsafe {
        let below = V::splat(1.0).add(exp(V::splat(0.0).sub(g)));
        g.div(below).mul(u)
    }
}

/// `dst[16 i + j] = sums[i * step + j]`, or added to what is there.
///
/// # Safety
/// As [`Vector`].
#[inline(always)]
pub(crate) unsafe fn gather<V: Vector>(sums: &[f32], step: usize, dst: &mut [f32], adds: bool) {
    let strips = dst.len() / ROWS;
    assert!(strips == 0 || sums.len() >= (strips - 1) * step + ROWS);
    unsafe {
        for i in 0..strips {
            for j in (0..ROWS).step_by(V::LANES) {
                let sums = V::load(sums.as_ptr().add(i * step + j));
                let dst = dst.as_mut_ptr().add(i * ROWS + j);
                match adds {
                    true => V::load(dst).add(sums).store(dst),
                    false => sums.store(dst),
                }
            }
        }
    }
    if strips * ROWS < dst.len() {
        scalar::float::gather_from(strips, sums, step, dst, adds);
    }
}

/// Replaces `x` by `e^(x - max) / Σ`.
///
/// # Safety
/// As [`Vector`].
#[inline(always)]
pub(crate) unsafe fn softmax<V: Vector>(x: &mut [f32]) {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    unsafe {
        let shift = V::splat(max);
        let len = x.len();
        let p = x.as_mut_ptr();
        // SAFETY: each vector is read before it is written.
        let (src, dst) = (
            std::slice::from_raw_parts(p, len),
            std::slice::from_raw_parts_mut(p, len),
        );
        map2::<V>(
            src,
            src,
            dst,
            #[inline(always)]
            |x, _| exp(x.sub(shift)),
        );
        let total = reduce_sum::<V>(
            x,
            #[inline(always)]
            |x, acc| acc.add(x),
        );
        let inverse = 1.0 / total;
        x.iter_mut().for_each(|x| *x *= inverse);
    }
}
