//! The float rows for AVX-512.

use std::arch::x86_64::__m512;

use crate::{float::FloatOps, generic::float as generic};

/// The AVX-512 table.
pub(crate) const OPS: FloatOps = FloatOps {
    rms_norm,
    add_assign,
    swiglu,
    softmax,
    gather,
};

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,bmi2")]
fn rms_norm(x: &[f32], w: &[f32], eps: f32, dst: &mut [f32]) {
    // SAFETY: this function has the tier's features.
    unsafe { generic::rms_norm::<__m512>(x, w, eps, dst) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,bmi2")]
fn add_assign(dst: &mut [f32], x: &[f32]) {
    // SAFETY: as above.
    unsafe { generic::add_assign::<__m512>(dst, x) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,bmi2")]
fn swiglu(gate: &[f32], up: &[f32], dst: &mut [f32]) {
    // SAFETY: as above.
    unsafe { generic::swiglu::<__m512>(gate, up, dst) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,bmi2")]
fn softmax(x: &mut [f32]) {
    // SAFETY: as above.
    unsafe { generic::softmax::<__m512>(x) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,bmi2")]
fn gather(sums: &[f32], step: usize, dst: &mut [f32], adds: bool) {
    // SAFETY: as above.
    unsafe { generic::gather::<__m512>(sums, step, dst, adds) }
}
