//! What samples amount to.

use serde::{Deserialize, Serialize};

/// Samples are noisy when the ninetieth percentile is this many times the tenth: then they
/// are shown, and nothing is claimed from them.
pub const NOISE: f64 = 1.10;

/// The `p`-th percentile (0 to 100) by linear interpolation; not a number without samples.
pub fn percentile(samples: &[f64], p: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else {
        return f64::NAN;
    };
    let at = last as f64 * p / 100.0;
    let (below, above) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    below + (above - below) * at.fract()
}

/// The middle sample.
pub fn median(samples: &[f64]) -> f64 {
    percentile(samples, 50.0)
}

/// Mean and sample standard deviation (0 for fewer than two samples).
pub fn mean_and_deviation(samples: &[f64]) -> (f64, f64) {
    let n = samples.len() as f64;
    let mean = samples.iter().sum::<f64>() / n.max(1.0);
    let squares: f64 = samples.iter().map(|x| (x - mean).powi(2)).sum();
    let deviation = if samples.len() > 1 {
        (squares / (n - 1.0)).sqrt()
    } else {
        0.0
    };
    (mean, deviation)
}

/// Samples in a few numbers, in their unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    pub avg_ts: f64,
    pub stddev_ts: f64,
    pub median_ts: f64,
    pub p10_ts: f64,
    pub p90_ts: f64,
    /// p90 is more than [`NOISE`] times p10.
    pub noisy: bool,
}

impl Summary {
    /// Of these samples; all zero if there are none.
    pub fn of(samples: &[f64]) -> Summary {
        if samples.is_empty() {
            return Summary::default();
        }
        let (avg_ts, stddev_ts) = mean_and_deviation(samples);
        let (p10_ts, p90_ts) = (percentile(samples, 10.0), percentile(samples, 90.0));
        Summary {
            avg_ts,
            stddev_ts,
            median_ts: median(samples),
            p10_ts,
            p90_ts,
            noisy: p90_ts > NOISE * p10_ts,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_interpolate() {
        let samples = [4.0, 1.0, 3.0, 2.0, 5.0];
        assert_eq!(percentile(&samples, 0.0), 1.0);
        assert_eq!(percentile(&samples, 50.0), 3.0);
        assert_eq!(percentile(&samples, 90.0), 4.6);
        assert_eq!(percentile(&samples, 100.0), 5.0);
        assert_eq!(median(&[2.0, 4.0]), 3.0);
        assert_eq!(percentile(&[7.0], 10.0), 7.0);
        assert!(percentile(&[], 50.0).is_nan());
    }

    #[test]
    fn means_deviations_and_noise() {
        let (mean, deviation) = mean_and_deviation(&[10.0, 20.0]);
        assert_eq!(mean, 15.0);
        assert!((deviation - 50f64.sqrt()).abs() < 1e-12);
        assert_eq!(mean_and_deviation(&[3.0]), (3.0, 0.0));
        assert!(!Summary::of(&[100.0, 101.0, 102.0]).noisy);
        assert!(Summary::of(&[100.0, 101.0, 130.0]).noisy);
        assert_eq!(Summary::of(&[]), Summary::default());
    }
}
