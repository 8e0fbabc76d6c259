//! The float arithmetic of the tile products: f32 fused multiply-add, round to nearest even,
//! subnormal inputs and results flushed to signed zero, MXCSR ignored.

/// Replaces a subnormal by the zero of its sign.
pub(crate) fn flush(x: f32) -> f32 {
    if x.is_subnormal() {
        0f32.copysign(x)
    } else {
        x
    }
}

/// A bf16 bit pattern as f32; subnormals count as zero.
pub(crate) fn from_bf16(bits: u16) -> f32 {
    flush(f32::from_bits(u32::from(bits) << 16))
}

/// An fp16 bit pattern as f32. Every fp16 subnormal is a normal f32, so nothing is lost.
pub(crate) fn from_fp16(bits: u16) -> f32 {
    half::f16::from_bits(bits).to_f32()
}

/// `a * b + c` with one rounding.
pub(crate) fn fma(a: f32, b: f32, c: f32) -> f32 {
    flush(a.mul_add(b, flush(c)))
}

/// `a + b`.
pub(crate) fn add(a: f32, b: f32) -> f32 {
    flush(flush(a) + flush(b))
}
