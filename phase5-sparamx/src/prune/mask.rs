//! Which weights of a matrix become zero.

use rayon::prelude::*;
use tegula_gguf::{GgmlType, blocks, sparse::Pattern};

/// How many weights of a row are kept.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Target {
    /// This share of every row's weights becomes zero, rounded to the nearest number.
    Sparsity(f64),
    /// In every M consecutive inputs of a row N weights at most are kept.
    Pattern(Pattern),
}

/// True for the types whose zeros are exactly zero, so that pruned weights stay so.
pub fn can_prune(ty: GgmlType) -> bool {
    use GgmlType as T;
    matches!(ty.dense(), T::F32 | T::F16 | T::BF16 | T::Q8_0 | T::Q4_0)
}

/// Sets the weights of least score to zero, row by row; returns how many weights are zero
/// afterwards.
///
/// The score of a weight is its magnitude, times the factor of its column where there are
/// factors: `factors(row)` has a row's length. Of equal scores those of later columns go
/// first. `rows` are dense rows of `k` weights.
///
/// # Panics
/// When `rows` is no whole number of rows, [`can_prune`] refuses the type, or `k` is no
/// multiple of a pattern's M.
pub fn prune_rows<'f>(
    ty: GgmlType,
    k: usize,
    rows: &mut [u8],
    target: Target,
    factors: impl Fn(usize) -> Option<&'f [f32]> + Sync,
) -> u64 {
    assert!(can_prune(ty) && !ty.is_sparse());
    let row_bytes = ty.bytes_for(k as u64).expect("whole blocks") as usize;
    assert!(rows.len().is_multiple_of(row_bytes));
    rows.par_chunks_exact_mut(row_bytes)
        .enumerate()
        .map_init(
            || (vec![0f32; k], Vec::with_capacity(k)),
            |(scores, order), (r, row)| {
                blocks::dequantize(ty, row, scores).expect("whole blocks of a row");
                scores.iter_mut().for_each(|w| *w = w.abs());
                if let Some(factors) = factors(r) {
                    scores.iter_mut().zip(factors).for_each(|(s, f)| *s *= f);
                }
                let (part, keep) = match target {
                    Target::Sparsity(s) => (k, k - (k as f64 * s).round() as usize),
                    Target::Pattern(p) => (p.m(), p.n()),
                };
                for (i, scores) in scores.chunks_exact(part).enumerate() {
                    let first = i * part;
                    for at in least(scores, part - keep, order) {
                        clear(ty, row, first + at);
                    }
                }
                zeros(ty, row, k)
            },
        )
        .sum()
}

/// The indices of the `count` least scores.
fn least<'o>(
    scores: &[f32],
    count: usize,
    order: &'o mut Vec<u64>,
) -> impl Iterator<Item = usize> + 'o {
    // A magnitude's bits are in its order; NaN, which nothing should prune, comes last. The
    // index turned round breaks ties.
    order.clear();
    let key = |(i, s): (usize, &f32)| u64::from(s.to_bits()) << 32 | (u32::MAX - i as u32) as u64;
    order.extend(scores.iter().enumerate().map(key));
    if count > 0 && count < order.len() {
        order.select_nth_unstable(count - 1);
    }
    order[..count]
        .iter()
        .map(|&key| (u32::MAX - key as u32) as usize)
}

/// Makes weight `i` of a row zero.
fn clear(ty: GgmlType, row: &mut [u8], i: usize) {
    match ty {
        GgmlType::Q8_0 => row[i / 32 * 34 + 2 + i % 32] = 0,
        GgmlType::Q4_0 => {
            let byte = &mut row[i / 32 * 18 + 2 + i % 16];
            *byte = match i % 32 < 16 {
                true => *byte & 0xf0 | 8,
                false => *byte & 0x0f | 0x80,
            };
        }
        _ => {
            let width = ty.block_bytes();
            row[i * width..(i + 1) * width].fill(0);
        }
    }
}

/// Weights of a row that are zero.
fn zeros(ty: GgmlType, row: &[u8], k: usize) -> u64 {
    let zero = |i: usize| match ty {
        GgmlType::Q8_0 => row[i / 32 * 34 + 2 + i % 32] == 0,
        GgmlType::Q4_0 => {
            let byte = row[i / 32 * 18 + 2 + i % 16];
            byte >> (i % 32 / 16 * 4) & 15 == 8
        }
        _ => {
            let width = ty.block_bytes();
            row[i * width..(i + 1) * width].iter().all(|&b| b == 0)
        }
    };
    (0..k).filter(|&i| zero(i)).count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(ty: GgmlType, weights: &[f32]) -> Vec<u8> {
        let mut out = vec![0; ty.bytes_for(weights.len() as u64).unwrap() as usize];
        blocks::quantize(ty, weights, None, &mut out).unwrap();
        out
    }

    fn back(ty: GgmlType, rows: &[u8]) -> Vec<f32> {
        let mut out = vec![0.0; rows.len() / ty.block_bytes() * ty.block_len()];
        blocks::dequantize(ty, rows, &mut out).unwrap();
        out
    }

    /// Distinct magnitudes, out of order, with both signs.
    fn weights() -> Vec<f32> {
        let w = |i: usize| (i * 37 % 64 + 1) as f32 * [1.0, -1.0][i % 2];
        (0..64).map(w).collect()
    }

    #[test]
    fn the_least_magnitudes_go_in_every_type() {
        use GgmlType as T;
        for ty in [T::F32, T::F16, T::BF16, T::Q8_0, T::Q4_0] {
            let mut bytes = rows(ty, &weights());
            let before = back(ty, &bytes);
            let zeros = prune_rows(ty, 64, &mut bytes, Target::Sparsity(0.75), |_| None);
            let after = back(ty, &bytes);
            assert_eq!(zeros, 48, "{ty}");
            let mut kept: Vec<f32> = after.iter().copied().filter(|w| *w != 0.0).collect();
            assert_eq!(kept.len(), 16, "{ty}");
            for (a, b) in after.iter().zip(&before) {
                assert!(*a == 0.0 || a == b, "{ty}: {b} became {a}");
            }
            kept.iter_mut().for_each(|w| *w = w.abs());
            let least = kept.iter().copied().fold(f32::MAX, f32::min);
            let gone = before.iter().zip(&after).filter(|(_, a)| **a == 0.0);
            assert!(gone.into_iter().all(|(b, _)| b.abs() <= least), "{ty}");
        }
    }

    #[test]
    fn factors_decide_with_the_magnitudes() {
        let mut bytes = rows(GgmlType::F32, &weights());
        // Column 5 has the least weight times factor but the largest factor of all.
        let mut factors = vec![1.0; 64];
        factors[5] = 1e6;
        factors[9] = 0.0;
        prune_rows(GgmlType::F32, 64, &mut bytes, Target::Sparsity(0.5), |_| {
            Some(&factors)
        });
        let after = back(GgmlType::F32, &bytes);
        assert_ne!(after[5], 0.0);
        assert_eq!(after[9], 0.0);
    }

    #[test]
    fn patterns_hold_in_every_group() {
        let p: Pattern = "2:4".parse().unwrap();
        let mut bytes = rows(GgmlType::BF16, &weights());
        let zeros = prune_rows(GgmlType::BF16, 32, &mut bytes, Target::Pattern(p), |_| None);
        assert_eq!(zeros, 32);
        for four in back(GgmlType::BF16, &bytes).chunks_exact(4) {
            assert_eq!(four.iter().filter(|w| **w != 0.0).count(), 2);
        }
    }

    #[test]
    fn ties_go_from_the_end_and_extremes_are_exact() {
        let mut bytes = rows(GgmlType::F32, &[1.0; 8]);
        prune_rows(GgmlType::F32, 8, &mut bytes, Target::Sparsity(0.5), |_| {
            None
        });
        assert_eq!(
            back(GgmlType::F32, &bytes),
            [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
        );
        prune_rows(GgmlType::F32, 8, &mut bytes, Target::Sparsity(0.0), |_| {
            None
        });
        assert_eq!(back(GgmlType::F32, &bytes)[..4], [1.0; 4]);
        prune_rows(GgmlType::F32, 8, &mut bytes, Target::Sparsity(1.0), |_| {
            None
        });
        assert_eq!(back(GgmlType::F32, &bytes), [0.0; 8]);
    }
}
