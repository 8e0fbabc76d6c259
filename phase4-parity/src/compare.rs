//! Comparators: how far two results are apart.
//!
//! All take the reference first. Slices of different lengths are as far apart as can be.

use crate::oracle::log_probability;

/// `|a - b| / |a|` in the Euclidean norm; infinite if the lengths differ, a value is not
/// finite, or `a` is zero and `b` is not.
pub fn relative_l2(reference: &[f32], other: &[f32]) -> f64 {
    if reference.len() != other.len() {
        return f64::INFINITY;
    }
    let square = |v: f64| v * v;
    let difference: f64 = reference
        .iter()
        .zip(other)
        .map(|(&a, &b)| square(f64::from(a) - f64::from(b)))
        .sum();
    let norm: f64 = reference.iter().map(|&a| square(f64::from(a))).sum();
    match (difference / norm).sqrt() {
        _ if difference == 0.0 => 0.0,
        ratio if ratio.is_nan() => f64::INFINITY,
        ratio => ratio,
    }
}

/// The Kullback-Leibler divergence, in nats, of `other`'s next-token distribution from the
/// reference's; infinite if the lengths differ or a logit is NaN.
pub fn kl_divergence(reference: &[f32], other: &[f32]) -> f64 {
    if reference.len() != other.len() || reference.iter().chain(other).any(|l| l.is_nan()) {
        return f64::INFINITY;
    }
    let norms = [reference, other].map(|l| log_probability(l, 0) - f64::from(l[0]));
    let sum: f64 = reference
        .iter()
        .zip(other)
        .map(|(&a, &b)| {
            let (log_p, log_q) = (f64::from(a) + norms[0], f64::from(b) + norms[1]);
            match log_p.exp() {
                0.0 => 0.0,
                p => p * (log_p - log_q),
            }
        })
        .sum();
    sum.max(0.0)
}

/// The share of the reference's `k` best tokens that are among the other's `k` best.
pub fn top_k_agreement(reference: &[f32], other: &[f32], k: usize) -> f64 {
    let k = k.min(reference.len());
    if reference.len() != other.len() || k == 0 {
        return 0.0;
    }
    let best = |logits: &[f32]| {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        order.truncate(k);
        order
    };
    let (a, b) = (best(reference), best(other));
    a.iter().filter(|t| b.contains(t)).count() as f64 / k as f64
}

/// By how much the perplexity `other` exceeds the reference: 0.01 is one per cent.
pub fn perplexity_excess(reference: f64, other: f64) -> f64 {
    other / reference - 1.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_is_zero_and_doubled_is_one() {
        let a = [3.0, -4.0];
        assert_eq!(relative_l2(&a, &a), 0.0);
        assert_eq!(relative_l2(&a, &[6.0, -8.0]), 1.0);
        assert_eq!(relative_l2(&[0.0], &[0.0]), 0.0);
        assert_eq!(relative_l2(&[0.0], &[1.0]), f64::INFINITY);
        assert_eq!(relative_l2(&a, &[f32::NAN, 0.0]), f64::INFINITY);
        assert_eq!(relative_l2(&a, &[3.0]), f64::INFINITY);
    }

    #[test]
    fn divergence_is_that_of_the_distributions() {
        // 1/2, 1/2 against 3/4, 1/4, whatever is added to the logits.
        let (a, b) = ([5.0, 5.0], [3f32.ln() - 2.0, -2.0]);
        let want = 0.5 * (0.5f64 / 0.75).ln() + 0.5 * (0.5f64 / 0.25).ln();
        assert!((kl_divergence(&a, &b) - want).abs() < 1e-6);
        assert_eq!(kl_divergence(&a, &a), 0.0);
        assert_eq!(kl_divergence(&a, &[0.0, f32::NAN]), f64::INFINITY);
        // A token that the reference rules out costs nothing.
        let ruled_out = [0.0, f32::NEG_INFINITY];
        assert!((kl_divergence(&ruled_out, &[0.0, 0.0]) - 2f64.ln()).abs() < 1e-9);
    }

    #[test]
    fn agreement_counts_the_common_best() {
        let (a, b) = ([9.0, 8.0, 7.0, 0.0], [8.0, 0.0, 9.0, 7.5]);
        assert_eq!(top_k_agreement(&a, &b, 1), 0.0);
        assert_eq!(top_k_agreement(&a, &b, 2), 0.5);
        assert_eq!(top_k_agreement(&a, &b, 100), 1.0);
        assert_eq!(top_k_agreement(&a, &a, 3), 1.0);
        assert!((perplexity_excess(5.0, 5.05) - 0.01).abs() < 1e-12);
    }
}
