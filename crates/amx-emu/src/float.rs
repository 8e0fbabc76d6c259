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

/// `a * b + c` with one rounding. Results are flushed when they are subnormal *before*
/// rounding, as silicon does: one that would round up to the smallest normal number is zero.
///
/// `a` and `b` are bf16 or fp16 numbers, so that f64 holds their product exactly.
pub(crate) fn fma(a: f32, b: f32, c: f32) -> f32 {
    let c = flush(c);
    let rounded = a.mul_add(b, c);
    if rounded.abs() == f32::MIN_POSITIVE && is_below_smallest_normal(a, b, c) {
        return 0f32.copysign(rounded);
    }
    flush(rounded)
}

/// Whether |a * b + c|, exactly, is less than the smallest normal f32.
fn is_below_smallest_normal(a: f32, b: f32, c: f32) -> bool {
    let (product, c) = (f64::from(a) * f64::from(b), f64::from(c));
    // The sum and its rounding error are the exact value (Knuth's two-sum).
    let sum = product + c;
    let part = sum - product;
    let error = (product - (sum - part)) + (c - part);
    let smallest = f64::from(f32::MIN_POSITIVE);
    sum.abs() < smallest || (sum.abs() == smallest && error * sum < 0.0)
}

/// `a + b`.
pub(crate) fn add(a: f32, b: f32) -> f32 {
    flush(flush(a) + flush(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_rounds_up_to_a_normal_number_is_flushed() {
        let smallest = f32::MIN_POSITIVE;
        let half_step = 2f32.powi(-75);
        // smallest - 2^-150 rounds to `smallest`, but lies below it.
        assert_eq!((-half_step).mul_add(half_step, smallest), smallest);
        assert_eq!(fma(-half_step, half_step, smallest).to_bits(), 0);
        assert_eq!(fma(half_step, half_step, -smallest), -0.0);
        assert!(fma(half_step, half_step, -smallest).is_sign_negative());
        // From above it stays, and so does the number itself.
        assert_eq!(fma(half_step, half_step, smallest), smallest);
        assert_eq!(fma(0.0, 1.0, smallest), smallest);
        // Far below the last bit of an f64.
        let tiny = 2f32.powi(-110);
        assert_eq!(fma(-tiny, tiny, smallest).to_bits(), 0);
    }
}
