//! Block formats: plain (de)quantisers, and the decode that kernels are defined by.
//!
//! # The structured decode
//!
//! Every quantised format is, in groups of [`group_len`] weights,
//!
//! ```text
//! w[i] = scales[i / G] * codes[i]                    // has_min(ty) == false
//! w[i] = scales[i / G] * codes[i] + mins[i / G]      // has_min(ty) == true
//! ```
//!
//! with `codes` in `i8`, in f32 with one rounding per operation (no fused multiply-add).
//! [`decode_codes`] yields the three; [`dequantize`] evaluates exactly this expression, and
//! equals ggml's dequantisers bit for bit. `d`, `dmin`, `m` are the block's f16 fields
//! widened to f32; operations run in the written order.
//!
//! | type | G | codes | scale | min |
//! |---|---|---|---|---|
//! | Q4_0 | 32 | q − 8: −8…7 | `d` | |
//! | Q4_1 | 32 | 0…15 | `d` | `m` |
//! | Q5_0 | 32 | q − 16: −16…15 | `d` | |
//! | Q5_1 | 32 | 0…31 | `d` | `m` |
//! | Q8_0 | 32 | −128…127 | `d` | |
//! | MXFP4 | 32 | `grids::MXFP4`: −12…12 | 2^(e − 128) | |
//! | NVFP4 | 16 | `grids::MXFP4`: −12…12 | half of `d` (E4M3) | |
//! | IQ4_NL | 32 | `grids::IQ4`: −127…113 | `d` | |
//! | IQ4_XS | 32 | `grids::IQ4`: −127…113 | `d * (s − 32)` | |
//! | Q2_K | 16 | 0…3 | `d * s` | `-(dmin * m)` |
//! | Q3_K | 16 | −4…3 | `d * (s − 32)` | |
//! | Q4_K | 32 | 0…15 | `d * s` | `-(dmin * m)` |
//! | Q5_K | 32 | 0…31 | `d * s` | `-(dmin * m)` |
//! | Q6_K | 16 | q − 32: −32…31 | `d * s` (`s` signed) | |
//! | IQ2_XXS | 32 | ±8, ±25, ±43 | `d * (0.5 + s) * 0.25` | |
//! | IQ2_XS, IQ2_S | 16 | ±8, ±25, ±43 | `d * (0.5 + s) * 0.25` | |
//! | IQ3_XXS | 32 | ±4…±62 | `d * (0.5 + s) * 0.5` | |
//! | IQ3_S | 32 | odd, ±1…±15 | `d * (1 + 2s)` | |
//! | IQ1_S | 32 | 8·grid ± 1: ±1, ±7, ±9 | `d * (2s + 1) * 0.125` | |
//! | IQ1_M | 16 | 8·grid ± 1: ±1, ±7, ±9 | `d * (2s + 1) * 0.125` | |
//!
//! IQ1's shift of an eighth lives in the codes, so that IQ1_M, whose shift changes every 8
//! weights, needs no minima; the eighth in the scale is exact. A byte holds any code; only
//! Q8_0 can hold −128 (other programs' files; our quantiser never writes it).

mod decode;
mod encode;
pub mod grids;
pub mod layout;
mod search;

pub use encode::to_ue4m3;

use crate::types::GgmlType;
use decode::Block;

/// Why blocks could not be read or written.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum BlockError {
    /// The operation does not exist for this type.
    #[error("{ty} cannot be {operation}")]
    Unsupported {
        ty: GgmlType,
        operation: &'static str,
    },
    /// The source or destination is no whole number of blocks.
    #[error("{ty}: {len} {unit} are no whole number of blocks of {block}")]
    Ragged {
        ty: GgmlType,
        unit: &'static str,
        len: usize,
        block: usize,
    },
    /// Two buffers disagree on the number of blocks.
    #[error("{ty}: {what} holds {len} elements, not {want}")]
    Length {
        ty: GgmlType,
        what: &'static str,
        len: usize,
        want: usize,
    },
    /// A weight is NaN or infinite.
    #[error("{ty}: weight {index} is {value}")]
    NotFinite {
        ty: GgmlType,
        index: usize,
        value: f32,
    },
    /// An importance factor is NaN, infinite or negative.
    #[error("{ty}: importance of column {index} is {value}")]
    BadImportance {
        ty: GgmlType,
        index: usize,
        value: f32,
    },
    /// A weight, or the scale of the block that starts with it, leaves the type's range.
    #[error("{ty}: weights from {index} on are too large for the type")]
    TooLarge { ty: GgmlType, index: usize },
}

/// Evaluates `$body` with `$B` naming the block struct of `$ty`, or `$other` for a type that
/// has none.
macro_rules! with_block {
    ($ty:expr, $B:ident => $body:expr, _ => $other:expr) => {
        with_block!(@ $ty, $B, $body, $other, [
            Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 MXFP4 NVFP4 IQ4_NL IQ4_XS Q2_K Q3_K Q4_K Q5_K Q6_K
            IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ1_S IQ1_M
        ])
    };
    (@ $ty:expr, $B:ident, $body:expr, $other:expr, [$($name:ident)*]) => {
        match $ty {
            $(GgmlType::$name => { type $B = layout::$name; $body })*
            _ => $other,
        }
    };
}

/// As [`with_block`], for the types that can be written.
macro_rules! with_encode {
    ($ty:expr, $B:ident => $body:expr, _ => $other:expr) => {
        with_block!(@ $ty, $B, $body, $other, [
            Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 MXFP4 NVFP4 IQ4_NL IQ4_XS Q2_K Q3_K Q4_K Q5_K Q6_K
        ])
    };
}

/// Weights that share a scale in [`decode_codes`]: 16 or 32, or `None` for a type that is
/// not quantised.
pub fn group_len(ty: GgmlType) -> Option<usize> {
    with_block!(ty, B => Some(<B as Block>::GROUP), _ => None)
}

/// True if [`decode_codes`] yields a minimum for every group.
pub fn has_min(ty: GgmlType) -> bool {
    with_block!(ty, B => <B as Block>::HAS_MIN, _ => false)
}

/// True if [`dequantize`] knows the type: all but the integers and F64.
pub fn can_dequantize(ty: GgmlType) -> bool {
    matches!(ty, GgmlType::F32 | GgmlType::F16 | GgmlType::BF16) || group_len(ty).is_some()
}

/// Widens or dequantises `src`, any number of whole blocks, to `dst`, one f32 per weight.
///
/// Any bytes are valid: non-finite scales give non-finite weights.
///
/// # Errors
///
/// [`BlockError`] if the type is an integer type or F64, or the lengths do not fit.
pub fn dequantize(ty: GgmlType, src: &[u8], dst: &mut [f32]) -> Result<(), BlockError> {
    if !can_dequantize(ty) {
        return Err(BlockError::Unsupported {
            ty,
            operation: "dequantised",
        });
    }
    let blocks = whole_blocks(ty, src)?;
    expect_len(ty, "destination", dst.len(), blocks * ty.block_len())?;
    match ty {
        GgmlType::F32 => widen(src, dst, f32::from_le_bytes),
        GgmlType::F16 => widen(src, dst, layout::f16),
        GgmlType::BF16 => widen(src, dst, |b: [u8; 2]| {
            f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)
        }),
        _ => with_block!(ty, B => decode::dequantize::<B>(bytemuck::cast_slice(src), dst), _ => {}),
    }
    Ok(())
}

/// True if [`quantize`] can write the type.
pub fn can_quantize(ty: GgmlType) -> bool {
    use GgmlType::*;
    matches!(ty, F32 | F16 | BF16) || with_encode!(ty, B => B::TYPE == ty, _ => false)
}

/// Narrows or quantises `src`, one or many rows, to the blocks `dst`.
///
/// `importance`, if given, holds one factor per column (so its length is the row's): how
/// much that column's errors count, such as the mean square of its activations. Q8_0, MXFP4,
/// NVFP4 and the float types have no choice to make and ignore it.
///
/// Without importance Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, MXFP4, NVFP4 (whose scales stay below 256),
/// F16 and BF16 equal ggml's quantisers bit for bit; the others search the scales by the same
/// criteria. The same input
/// gives the same bytes on every machine.
///
/// # Errors
///
/// [`BlockError`] if the type cannot be written, the lengths do not fit, a weight is not
/// finite or leaves the type's range, or a factor is not finite or negative. `dst` is then
/// partly written.
pub fn quantize(
    ty: GgmlType,
    src: &[f32],
    importance: Option<&[f32]>,
    dst: &mut [u8],
) -> Result<(), BlockError> {
    if !can_quantize(ty) {
        return Err(BlockError::Unsupported {
            ty,
            operation: "quantised",
        });
    }
    let block = ty.block_len();
    let ragged = |unit, len| {
        Err(BlockError::Ragged {
            ty,
            unit,
            len,
            block,
        })
    };
    if !src.len().is_multiple_of(block) {
        return ragged("weights", src.len());
    }
    expect_len(
        ty,
        "destination",
        dst.len(),
        src.len() / block * ty.block_bytes(),
    )?;
    if let Some(factors) = importance {
        if factors.is_empty() || !factors.len().is_multiple_of(block) {
            return ragged("importance factors", factors.len());
        }
        if !src.len().is_multiple_of(factors.len()) {
            let unit = "weights (the importance of a row)";
            return Err(BlockError::Ragged {
                ty,
                unit,
                len: src.len(),
                block: factors.len(),
            });
        }
        let bad = |f: &f32| !f.is_finite() || *f < 0.0;
        if let Some(index) = factors.iter().position(bad) {
            return Err(BlockError::BadImportance {
                ty,
                index,
                value: factors[index],
            });
        }
    }
    // One pass without a branch per weight; the place is sought only when it fails.
    if !src.iter().fold(true, |ok, x| ok & x.is_finite())
        && let Some(index) = src.iter().position(|x| !x.is_finite())
    {
        return Err(BlockError::NotFinite {
            ty,
            index,
            value: src[index],
        });
    }
    let importance = importance.map(normalized);
    let importance = importance.as_deref();
    let row = importance.map_or(src.len(), <[f32]>::len);
    let too_large = |index| BlockError::TooLarge { ty, index };
    match ty {
        GgmlType::F32 => narrow(src, dst, |x| Some(x.to_le_bytes())),
        GgmlType::F16 => narrow(src, dst, |x| {
            let h = half::f16::from_f32(x);
            h.is_finite().then(|| h.to_le_bytes())
        }),
        GgmlType::BF16 => narrow(src, dst, |x| {
            let h = half::bf16::from_f32(x);
            h.is_finite().then(|| h.to_le_bytes())
        }),
        _ => with_encode!(
            ty,
            B => encode::quantize::<B>(src, row, importance, bytemuck::cast_slice_mut(dst))
                .map_err(|i| i * block),
            _ => Ok(())
        ),
    }
    .map_err(too_large)
}

/// Takes `src`, any number of whole blocks, apart into `codes` (one per weight), `scales`
/// and `mins` (one per group of [`group_len`] weights; `mins` is empty for a type without).
///
/// The [module's documentation](self) defines the three for each type.
///
/// # Errors
///
/// [`BlockError`] if the type is not quantised, or the lengths do not fit.
pub fn decode_codes(
    ty: GgmlType,
    src: &[u8],
    codes: &mut [i8],
    scales: &mut [f32],
    mins: &mut [f32],
) -> Result<(), BlockError> {
    let Some(group) = group_len(ty) else {
        return Err(BlockError::Unsupported {
            ty,
            operation: "decoded to codes",
        });
    };
    let len = whole_blocks(ty, src)? * ty.block_len();
    expect_len(ty, "codes", codes.len(), len)?;
    expect_len(ty, "scales", scales.len(), len / group)?;
    expect_len(
        ty,
        "mins",
        mins.len(),
        if has_min(ty) { len / group } else { 0 },
    )?;
    with_block!(
        ty,
        B => decode::codes::<B>(bytemuck::cast_slice(src), codes, scales, mins),
        _ => {}
    );
    Ok(())
}

fn widen<const N: usize>(src: &[u8], dst: &mut [f32], value: impl Fn([u8; N]) -> f32) {
    let (src, _) = src.as_chunks::<N>();
    for (&bytes, out) in src.iter().zip(dst) {
        *out = value(bytes);
    }
}

/// The factors brought below 2 by a power of two, which changes no comparison of errors.
fn normalized(factors: &[f32]) -> Vec<f32> {
    let high = factors.iter().copied().fold(0.0, f32::max);
    let exponent = (high.to_bits() >> 23) as i32 - 127;
    // In two steps, for one power may lie outside f32's range.
    let half = exponent / 2;
    let [half, rest] = [half, exponent - half].map(|e| f32::from_bits(((127 - e) as u32) << 23));
    factors.iter().map(|f| f * half * rest).collect()
}

/// On failure returns the index of the weight that `bytes` has no value for.
fn narrow<const N: usize>(
    src: &[f32],
    dst: &mut [u8],
    bytes: impl Fn(f32) -> Option<[u8; N]>,
) -> Result<(), usize> {
    let (dst, _) = dst.as_chunks_mut::<N>();
    for (i, (&x, out)) in src.iter().zip(dst).enumerate() {
        *out = bytes(x).ok_or(i)?;
    }
    Ok(())
}

fn whole_blocks(ty: GgmlType, src: &[u8]) -> Result<usize, BlockError> {
    let block = ty.block_bytes();
    if !src.len().is_multiple_of(block) {
        return Err(BlockError::Ragged {
            ty,
            unit: "bytes",
            len: src.len(),
            block,
        });
    }
    Ok(src.len() / block)
}

fn expect_len(ty: GgmlType, what: &'static str, len: usize, want: usize) -> Result<(), BlockError> {
    if len == want {
        Ok(())
    } else {
        Err(BlockError::Length {
            ty,
            what,
            len,
            want,
        })
    }
}
