//! Random weights of every type.

use tegula_gguf::GgmlType;
use tegula_kernels::strip;

/// xorshift64.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// In [-1, 1).
    pub fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

/// Where a block's f16 numbers are, so that random blocks have sensible scales.
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

/// Blocks of random codes with sensible scales.
pub fn random_weights(ty: GgmlType, rows: usize, k: usize, rng: &mut Rng) -> Vec<u8> {
    let len = ty.bytes_for((rows * k) as u64).unwrap() as usize;
    let mut bytes: Vec<u8> = (0..len).map(|_| (rng.next() >> 32) as u8).collect();
    for block in bytes.chunks_exact_mut(ty.block_bytes()) {
        match ty {
            GgmlType::F32 => block.copy_from_slice(&rng.float().to_le_bytes()),
            GgmlType::BF16 => {
                block.copy_from_slice(&half::bf16::from_f32(rng.float()).to_le_bytes())
            }
            GgmlType::MXFP4 => block[0] = 118 + block[0] % 8,
            // The scale's top nibble is in the last two bytes.
            GgmlType::IQ1_M => block[55] = 0x20 | (block[55] & 0xf),
            _ => {}
        }
        for &at in halves(ty) {
            let d = half::f16::from_f32(rng.float() * 0.05);
            block[at..at + 2].copy_from_slice(&d.to_le_bytes());
        }
    }
    bytes
}

/// The types that products take.
pub fn matrix_types() -> impl Iterator<Item = GgmlType> {
    GgmlType::ALL
        .iter()
        .copied()
        .filter(|&ty| strip::layout(ty).is_some())
}
