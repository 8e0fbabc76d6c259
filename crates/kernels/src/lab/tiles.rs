//! The product on 8-bit tiles with the weights' own scales: what bf16 tiles are weighed
//! against.
//!
//! A scale counts for 32 weights, so a tile product may run over 32 inputs and no more: half
//! of what 8-bit tiles could take. Its integer sums then go through memory, become f32, and
//! are scaled and added up by vector code, 16 rows by 16 tokens at a time. bf16 tiles carry
//! the scales inside the weights and keep their sums over thousands of inputs.

use std::arch::{asm, x86_64::*};

use tegula_gguf::{GgmlType, blocks};

use crate::{
    Amx, disjoint::DisjointMut, mem::AlignedBuf, pool::Pool, scalar::matmul::q8_scale, strip::ROWS,
    tier::Tier,
};

/// Inputs that share a scale.
const BLOCK: usize = 32;
/// Tokens that a step multiplies, and rows of weights.
const TOKENS: usize = 32;
/// Bytes of a tile of weights: 8 rows of 16 outputs by 4 inputs.
const WEIGHT_TILE: usize = BLOCK * ROWS;
/// Blocks that all tokens pass over before the next ones: 64 KiB of two strips.
const PANEL: usize = 64;

/// A matrix `[n][k]` as 8-bit tiles.
#[derive(Debug)]
pub struct ByteMatrix {
    n: usize,
    k: usize,
    /// `[strip][block][8][16][4]`.
    codes: AlignedBuf,
    /// `[strip][block][16]`.
    scales: Vec<f32>,
}

impl ByteMatrix {
    /// True for a type of codes with a scale for every 32 and no minimum.
    pub fn takes(ty: GgmlType) -> bool {
        blocks::group_len(ty) == Some(BLOCK) && !blocks::has_min(ty)
    }

    /// A matrix of raw rows `[n][k]`.
    ///
    /// # Panics
    /// When the type is none that this [takes](ByteMatrix::takes), `n` is no multiple of 32,
    /// or the bytes are not those of the rows.
    pub fn new((ty, n, k): (GgmlType, usize, usize), raw: &[u8]) -> ByteMatrix {
        assert!(Self::takes(ty) && n.is_multiple_of(2 * ROWS) && k.is_multiple_of(BLOCK));
        let per_row = k / BLOCK;
        let (mut row_codes, mut row_scales) = (vec![0i8; n * k], vec![0.0; n * per_row]);
        blocks::decode_codes(ty, raw, &mut row_codes, &mut row_scales, &mut [])
            .expect("whole rows of a quantised type");
        let mut codes = AlignedBuf::zeroed(n * k);
        let mut scales = vec![0.0; n * per_row];
        for row in 0..n {
            let (strip, r) = (row / ROWS, row % ROWS);
            for block in 0..per_row {
                let tile = strip * per_row + block;
                scales[tile * ROWS + r] = row_scales[row * per_row + block];
                for i in 0..BLOCK {
                    let at = tile * WEIGHT_TILE + i / 4 * 64 + r * 4 + i % 4;
                    codes[at] = row_codes[row * k + block * BLOCK + i] as u8;
                }
            }
        }
        ByteMatrix {
            n,
            k,
            codes,
            scales,
        }
    }
}

/// Activations `[m][k]` as 8-bit tiles.
#[derive(Debug)]
pub struct ByteInputs {
    m: usize,
    /// `[32 tokens][block][token][32]`, zeros behind the last token.
    codes: AlignedBuf,
    /// `[32 tokens][block][token]`.
    scales: Vec<f32>,
}

impl ByteInputs {
    /// Rounds them to bytes with a scale for every 32, as Q8 activations are.
    ///
    /// # Panics
    /// When `x` has not `m * k` values, or `k` is no multiple of 32.
    pub fn new(x: &[f32], m: usize, k: usize) -> ByteInputs {
        assert!(x.len() == m * k && k.is_multiple_of(BLOCK));
        let (groups, per_token) = (m.div_ceil(TOKENS), k / BLOCK);
        let mut codes = AlignedBuf::zeroed(groups * TOKENS * k);
        let mut scales = vec![0.0; groups * TOKENS * per_token];
        for (t, x) in x.chunks_exact(k).enumerate() {
            for (block, x) in x.as_chunks::<BLOCK>().0.iter().enumerate() {
                let largest = x.iter().fold(0.0f32, |most, v| most.max(v.abs()));
                let (scale, inverse) = q8_scale(largest);
                let at = (t / TOKENS * per_token + block) * TOKENS + t % TOKENS;
                scales[at] = scale;
                for (code, v) in codes[at * BLOCK..][..BLOCK].iter_mut().zip(x) {
                    *code = (v * inverse).round_ties_even() as i8 as u8;
                }
            }
        }
        ByteInputs { m, codes, scales }
    }
}

/// The shapes of the eight tiles, as `ldtilecfg` reads them: four of sums, two of activations
/// (16 tokens by 32 inputs), two of weights (8 by 64 bytes).
#[repr(C, align(64))]
struct Config([u8; 64]);

static CONFIG: Config = {
    let mut config = [0; 64];
    config[0] = 1;
    let shapes = [
        (16, 64),
        (16, 64),
        (16, 64),
        (16, 64),
        (16, 32),
        (16, 32),
        (8, 64),
        (8, 64),
    ];
    let mut tile = 0;
    while tile < 8 {
        config[16 + 2 * tile] = shapes[tile].1;
        config[48 + tile] = shapes[tile].0;
        tile += 1;
    }
    Config(config)
};

/// Integer sums of a block: `[16 tokens][strip][token][16]`.
#[repr(C, align(64))]
struct Sums([i32; 4 * 16 * ROWS]);

/// `y = x · wᵀ`, `[m][n]`: integer sums exact, scaled and added up block by block in f32.
/// False, and nothing done, on a CPU without AVX-512.
///
/// # Panics
/// When shapes disagree.
pub fn multiply_bytes(
    amx: Amx,
    pool: &Pool,
    matrix: &ByteMatrix,
    inputs: &ByteInputs,
    y: &mut [f32],
) -> bool {
    // The token vouches for the tiles, nothing else.
    let _: Amx = amx;
    let (n, m) = (matrix.n, inputs.m);
    assert_eq!(y.len(), n * m);
    assert_eq!(
        inputs.scales.len() * BLOCK,
        m.div_ceil(TOKENS) * TOKENS * matrix.k
    );
    if !Tier::Avx512.available() {
        return false;
    }
    let y = DisjointMut::new(y);
    pool.run(n / (2 * ROWS), &|pair| {
        let mut sums = vec![0.0; m.div_ceil(TOKENS) * TOKENS * 2 * ROWS];
        // SAFETY: the CPU has AVX-512 and the caller AMX.
        unsafe { two_strips(matrix, inputs, pair, &mut sums) };
        for (t, row) in sums.chunks_exact(2 * ROWS).take(m).enumerate() {
            let at = t * n + pair * 2 * ROWS;
            // SAFETY: two strips' columns belong to one task.
            unsafe { y.slice(at..at + 2 * ROWS) }.copy_from_slice(row);
        }
    });
    true
}

/// Adds the products of all tokens with strips `2 pair` and `2 pair + 1` to `[token][32]`.
///
/// # Safety
/// The CPU has AVX-512, and AMX may be executed.
#[target_feature(enable = "avx512f")]
unsafe fn two_strips(matrix: &ByteMatrix, inputs: &ByteInputs, pair: usize, sums: &mut [f32]) {
    let blocks = matrix.k / BLOCK;
    let strips = [2 * pair, 2 * pair + 1];
    // SAFETY: reads the 64 bytes of a configuration; the registers are declared.
    unsafe {
        asm!(
            "ldtilecfg [{config}]",
            config = in(reg) &CONFIG,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, readonly, preserves_flags),
        );
    }
    // Two, so that a block's products need not wait until the last one's sums are read.
    let mut scratch = [const { Sums([0; 4 * 16 * ROWS]) }; 2];
    for first in (0..blocks).step_by(PANEL) {
        for (group, sums) in sums.chunks_exact_mut(TOKENS * 2 * ROWS).enumerate() {
            for block in first..(first + PANEL).min(blocks) {
                let tokens = group * blocks + block;
                let tiles = strips.map(|s| s * blocks + block);
                let a = &inputs.codes[tokens * TOKENS * BLOCK..][..TOKENS * BLOCK];
                let b = tiles.map(|t| &matrix.codes[t * WEIGHT_TILE..][..WEIGHT_TILE]);
                let sums_of = &mut scratch[block % 2];
                // SAFETY: the tiles' sizes are those of the configuration.
                unsafe { block_products(a, b, sums_of) };
                let a_scales = &inputs.scales[tokens * TOKENS..][..TOKENS];
                for (s, tile) in tiles.into_iter().enumerate() {
                    let w = &matrix.scales[tile * ROWS..][..ROWS];
                    // SAFETY: 16 scales, 16 sums, and 16 of 32 columns of a token.
                    unsafe {
                        let w = _mm512_loadu_ps(w.as_ptr());
                        for (t, &scale) in a_scales.iter().enumerate() {
                            let at = (t / 16 * 2 + s) * 16 * ROWS + t % 16 * ROWS;
                            let c = _mm512_load_si512(sums_of.0.as_ptr().add(at).cast());
                            let c = _mm512_mul_ps(_mm512_cvtepi32_ps(c), w);
                            let out = sums.as_mut_ptr().add((t * 2 + s) * ROWS);
                            let sum = _mm512_loadu_ps(out);
                            _mm512_storeu_ps(out, _mm512_fmadd_ps(c, _mm512_set1_ps(scale), sum));
                        }
                    }
                }
            }
        }
    }
    // SAFETY: nothing is kept in tiles.
    unsafe {
        asm!(
            "tilerelease",
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nomem, nostack, preserves_flags),
        );
    }
}

/// The integer sums of 32 tokens with two strips over 32 inputs.
///
/// # Safety
/// The tiles are configured as [`CONFIG`] says; `a` are 32 by 32 bytes, `b` two tiles.
#[inline(always)]
unsafe fn block_products(a: &[u8], b: [&[u8]; 2], sums: &mut Sums) {
    // SAFETY: the caller's; the registers are declared.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "tileloadd tmm4, [{a} + {half}*1]",
            "tileloadd tmm6, [{b0} + {row}*1]",
            "tdpbssd tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b1} + {row}*1]",
            "tdpbssd tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a} + {half}*1 + {second}]",
            "tdpbssd tmm2, tmm5, tmm6",
            "tdpbssd tmm3, tmm5, tmm7",
            "tilestored [{c} + {row}*1], tmm0",
            "tilestored [{c} + {row}*1 + 1024], tmm1",
            "tilestored [{c} + {row}*1 + 2048], tmm2",
            "tilestored [{c} + {row}*1 + 3072], tmm3",
            a = in(reg) a.as_ptr(),
            b0 = in(reg) b[0].as_ptr(),
            b1 = in(reg) b[1].as_ptr(),
            c = in(reg) sums.0.as_mut_ptr(),
            half = in(reg) BLOCK,
            row = in(reg) 64usize,
            second = const 16 * BLOCK,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        PoolConfig,
        lab::tests::{Numbers, rows},
    };

    /// Integer sums, scaled and added in the order of the blocks, by plain code.
    fn plain((ty, n, k): (GgmlType, usize, usize), raw: &[u8], x: &[f32], m: usize) -> Vec<f32> {
        let (mut codes, mut scales) = (vec![0; n * k], vec![0.0; n * k / BLOCK]);
        blocks::decode_codes(ty, raw, &mut codes, &mut scales, &mut []).unwrap();
        let mut y = vec![0.0f32; m * n];
        for (t, x) in x.chunks_exact(k).enumerate() {
            for row in 0..n {
                for (block, x) in x.chunks_exact(BLOCK).enumerate() {
                    let largest = x.iter().fold(0.0f32, |most, v| most.max(v.abs()));
                    let (scale, inverse) = q8_scale(largest);
                    let at = row * k + block * BLOCK;
                    let products = codes[at..at + BLOCK].iter().zip(x);
                    let sum: i32 = products
                        .map(|(&w, v)| i32::from(w) * (v * inverse).round_ties_even() as i32)
                        .sum();
                    let y = &mut y[t * n + row];
                    *y = (sum as f32 * scales[at / BLOCK]).mul_add(scale, *y);
                }
            }
        }
        y
    }

    #[test]
    fn byte_tiles_are_exact() {
        let Ok(amx) = Amx::emulate() else { return };
        let mut numbers = Numbers(5);
        for ty in [GgmlType::Q4_0, GgmlType::Q8_0, GgmlType::IQ4_XS] {
            for (n, k, m) in [(64, 256, 1), (32, 2304, 33), (96, 256, 40)] {
                let raw = rows(ty, n, k, &mut numbers);
                let x: Vec<f32> = (0..m * k).map(|_| numbers.float()).collect();
                let matrix = ByteMatrix::new((ty, n, k), &raw);
                let inputs = ByteInputs::new(&x, m, k);
                let pool = Pool::new(PoolConfig::new(2));
                let mut y = vec![f32::NAN; m * n];
                if multiply_bytes(amx, &pool, &matrix, &inputs, &mut y) {
                    assert_eq!(y, plain((ty, n, k), &raw, &x, m), "{ty} {n} {k} {m}");
                }
            }
        }
    }

    #[test]
    fn only_scales_of_32_without_minimums() {
        let takes: Vec<_> = crate::lab::TYPES
            .into_iter()
            .filter(|&ty| ByteMatrix::takes(ty))
            .collect();
        assert_eq!(takes, [GgmlType::Q4_0, GgmlType::Q8_0, GgmlType::IQ4_XS]);
    }
}
