//! The float rows for AVX2.

use std::arch::x86_64::__m256;

use crate::{float::FloatOps, generic::float as generic};

/// The AVX2 table.
pub(crate) const OPS: FloatOps = FloatOps {
    rms_norm,
    add_assign,
    swiglu,
    softmax,
    gather,
};

#[target_feature(enable = "avx2,fma,f16c,bmi2")]
fn rms_norm(x: &[f32], w: &[f32], eps: f32, dst: &mut [f32]) {
    // SAFETY: this function has the tier's features.
    unsafe { generic::rms_norm::<__m256>(x, w, eps, dst) }
}

#[target_feature(enable = "avx2,fma,f16c,bmi2")]
fn add_assign(dst: &mut [f32], x: &[f32]) {
    // SAFETY: as above.
    unsafe { generic::add_assign::<__m256>(dst, x) }
}

#[target_feature(enable = "avx2,fma,f16c,bmi2")]
fn swiglu(gate: &[f32], up: &[f32], dst: &mut [f32]) {
    // SAFETY: as above.
    unsafe { generic::swiglu::<__m256>(gate, up, dst) }
}

#[target_feature(enable = "avx2,fma,f16c,bmi2")]
fn softmax(x: &mut [f32]) {
    // SAFETY: as above.
    unsafe { generic::softmax::<__m256>(x) }
}

#[target_feature(enable = "avx2,fma,f16c,bmi2")]
fn gather(sums: &[f32], step: usize, dst: &mut [f32], adds: bool) {
    // SAFETY: as above.
    unsafe { generic::gather::<__m256>(sums, step, dst, adds) }
}
