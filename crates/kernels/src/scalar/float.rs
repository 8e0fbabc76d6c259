//! The definitions of the float operations.

use crate::{float::FloatOps, strip::ROWS};

/// The scalar table.
pub(crate) const OPS: FloatOps = FloatOps {
    rms_norm,
    add_assign,
    swiglu,
    softmax,
    gather,
};

/// `dst = x / sqrt(mean(x²) + eps) * w`
unsafe fn rms_norm(x: &[f32], w: &[f32], eps: f32, dst: &mut [f32]) {
    assert!(x.len() == w.len() && x.len() == dst.len());
    let squares: f32 = x.iter().map(|x| x * x).sum();
    let scale = 1.0 / (squares / x.len() as f32 + eps).sqrt();
    for ((dst, x), w) in dst.iter_mut().zip(x).zip(w) {
        *dst = x * scale * w;
    }
}

/// `dst += x`
unsafe fn add_assign(dst: &mut [f32], x: &[f32]) {
    assert_eq!(dst.len(), x.len());
    for (dst, x) in dst.iter_mut().zip(x) {
        *dst += x;
    }
}

/// `dst = gate * sigmoid(gate) * up`
unsafe fn swiglu(gate: &[f32], up: &[f32], dst: &mut [f32]) {
    assert!(gate.len() == up.len() && gate.len() == dst.len());
    for ((dst, g), u) in dst.iter_mut().zip(gate).zip(up) {
        *dst = g / (1.0 + (-g).exp()) * u;
    }
}

/// `dst[16 i + j] = sums[i * step + j]`, or added to what is there
unsafe fn gather(sums: &[f32], step: usize, dst: &mut [f32], adds: bool) {
    gather_from(0, sums, step, dst, adds);
}

/// The same from strip `first` on, the last of which may be part of one.
pub(crate) fn gather_from(first: usize, sums: &[f32], step: usize, dst: &mut [f32], adds: bool) {
    for (i, dst) in dst.chunks_mut(ROWS).enumerate().skip(first) {
        for (dst, sum) in dst.iter_mut().zip(&sums[i * step..]) {
            *dst = if adds { *dst + sum } else { *sum };
        }
    }
}

/// `x = e^(x - max) / Σ`
unsafe fn softmax(x: &mut [f32]) {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut total = 0.0;
    for x in x.iter_mut() {
        *x = (*x - max).exp();
        total += *x;
    }
    for x in x {
        *x /= total;
    }
}
