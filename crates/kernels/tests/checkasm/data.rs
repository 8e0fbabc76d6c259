//! Random weights and activations, usual and hostile.

use crate::Random;
use tegula_gguf::{Bytes, GgmlType};
use tegula_kernels::{Weights, strip};

/// The types that matrix products take.
pub fn matrix_types() -> impl Iterator<Item = GgmlType> {
    let taken = |ty: &GgmlType| strip::layout(*ty).is_some();
    GgmlType::ALL.iter().copied().filter(taken)
}

/// What a matrix's bytes are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Codes {
    /// Random, with scales as models have them.
    Usual,
    /// All bits of the codes clear, or set: the largest sums.
    Clear,
    Set,
    /// All bits random, so that scales are as large as can be, subnormal, infinite or NaN.
    Wild,
}

/// Where a block's f16 numbers are.
fn halves(ty: GgmlType) -> &'static [usize] {
    use GgmlType as T;
    match ty {
        T::Q4_0 | T::Q5_0 | T::Q8_0 | T::IQ4_NL | T::IQ4_XS | T::F16 => &[0],
        T::IQ2_XXS | T::IQ2_XS | T::IQ2_S | T::IQ3_XXS | T::IQ3_S | T::IQ1_S => &[0],
        T::Q4_1 | T::Q5_1 | T::Q4_K | T::Q5_K => &[0, 2],
        T::Q2_K => &[80, 82],
        T::Q3_K => &[108],
        T::Q6_K => &[208],
        _ => &[],
    }
}

/// The raw bytes of `rows` rows of `k` weights.
pub fn weight_bytes(
    ty: GgmlType,
    rows: usize,
    k: usize,
    codes: Codes,
    random: &mut Random,
) -> Vec<u8> {
    let len = ty.bytes_for((rows * k) as u64).unwrap() as usize;
    let mut bytes: Vec<u8> = (0..len)
        .map(|_| match codes {
            Codes::Usual | Codes::Wild => (random.bits() >> 32) as u8,
            Codes::Clear => 0,
            Codes::Set => 0xff,
        })
        .collect();
    if codes == Codes::Wild && ty.is_quantized() {
        return bytes;
    }
    for block in bytes.chunks_exact_mut(ty.block_bytes()) {
        match ty {
            GgmlType::F32 => block.copy_from_slice(&random.normal().to_le_bytes()),
            GgmlType::BF16 => {
                block.copy_from_slice(&half::bf16::from_f32(random.normal()).to_le_bytes());
            }
            GgmlType::MXFP4 => block[0] = 118 + block[0] % 8,
            // From 2^-7 to 2^0.
            GgmlType::NVFP4 => block[..4].iter_mut().for_each(|d| *d = 16 + *d % 56),
            // The scale's top nibble is in the last two bytes.
            GgmlType::IQ1_M => block[55] = 0x20 | (block[55] & 0xf),
            _ => {}
        }
        for &at in halves(ty) {
            let d = half::f16::from_f32(random.normal() * 0.05);
            block[at..at + 2].copy_from_slice(&d.to_le_bytes());
        }
    }
    bytes
}

/// The same float weights without their signs.
pub fn magnitudes(ty: GgmlType, bytes: &[u8]) -> Vec<u8> {
    let width = ty.block_bytes();
    let mut bytes = bytes.to_vec();
    let signs = bytes.iter_mut().skip(width - 1).step_by(width);
    signs.for_each(|byte| *byte &= 0x7f);
    bytes
}

pub fn raw(ty: GgmlType, n: usize, k: usize, experts: usize, bytes: &[u8]) -> Weights {
    Weights::raw(ty, n, k, experts, Bytes::from_vec(bytes.to_vec())).unwrap()
}

/// Rows of activations that quantise to the extremes, and some that do not quantise at all.
pub fn hostile_rows(k: usize, random: &mut Random) -> Vec<Vec<f32>> {
    let with = |at: usize, value: f32| {
        let mut row = vec![0.5; k];
        row[at % k] = value;
        row
    };
    vec![
        vec![0.0; k],
        vec![-0.0; k],
        vec![1.0; k],
        vec![-1.0; k],
        (0..k).map(|i| [1.0, -1.0][i % 2]).collect(),
        // The largest code of each pair of products, for sums of 16 bits.
        (0..k).map(|i| [1.0, 1.0, -1.0, -1.0][i % 4]).collect(),
        random.normals(k).iter().map(|x| x * 1e30).collect(),
        vec![1e30; k],
        // Groups that count as zero, just not, and subnormal.
        vec![0.99e-30; k],
        vec![1.01e-30; k],
        vec![1e-40; k],
        with(1, 1e30),
        with(k - 1, f32::NAN),
        with(k / 2, f32::INFINITY),
        with(0, f32::NEG_INFINITY),
    ]
}
