//! Shapes and random data of the products.

use tegula_gguf::{GgmlType, blocks};

/// A matrix of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Model and matrix.
    pub name: &'static str,
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
}

/// Matrices of llama-3-8b and qwen3-30b-a3b.
pub const SHAPES: [Shape; 4] = [
    Shape {
        name: "llama-3-8b gate",
        n: 14336,
        k: 4096,
    },
    Shape {
        name: "llama-3-8b down",
        n: 4096,
        k: 14336,
    },
    Shape {
        name: "qwen3-30b-a3b q",
        n: 4096,
        k: 2048,
    },
    Shape {
        name: "qwen3-30b-a3b expert gate",
        n: 768,
        k: 2048,
    },
];

/// Tokens multiplied together.
pub const TOKENS: [usize; 4] = [1, 8, 64, 512];

/// Numbers that are the same in every run.
pub struct Random(u64);

impl Random {
    /// Begins the sequence of this seed.
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// Between -1 and 1.
    pub fn float(&mut self) -> f32 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as f32 / (1u64 << 30) as f32 - 1.0
    }

    /// Several of them.
    pub fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }
}

/// Raw rows `[n][k]`: 16 different ones, again and again. Speed does not depend on values.
///
/// # Errors
/// When the type can't be written or the shape has no whole blocks.
pub fn rows(ty: GgmlType, n: usize, k: usize) -> Result<Vec<u8>, String> {
    const DISTINCT: usize = 16;
    let weights = Random::new(1).floats(DISTINCT * k);
    let bytes = ty
        .bytes_for((DISTINCT * k) as u64)
        .ok_or("rows of no whole blocks")?;
    let mut raw = vec![0; bytes as usize];
    blocks::quantize(ty, &weights, None, &mut raw).map_err(|e| e.to_string())?;
    Ok(raw.repeat(n.div_ceil(DISTINCT))[..n * raw.len() / DISTINCT].to_vec())
}
