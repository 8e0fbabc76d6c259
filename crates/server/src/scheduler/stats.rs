//! What the scheduler counts, for `/metrics` and `/slots`.

use std::time::Duration;

/// A histogram in Prometheus' sense: counts of what is at most each bound.
#[derive(Clone, Debug)]
pub struct Histogram {
    bounds: &'static [f64],
    counts: Vec<u64>,
    sum: f64,
    count: u64,
}

/// Seconds until something first happens.
const WAITS: &[f64] = &[
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
];
/// Seconds from token to token.
const STEPS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
];

impl Histogram {
    fn new(bounds: &'static [f64]) -> Histogram {
        Histogram {
            bounds,
            counts: vec![0; bounds.len()],
            sum: 0.0,
            count: 0,
        }
    }

    pub(crate) fn add(&mut self, time: Duration) {
        let seconds = time.as_secs_f64();
        for (bound, count) in self.bounds.iter().zip(&mut self.counts) {
            *count += u64::from(seconds <= *bound);
        }
        self.sum += seconds;
        self.count += 1;
    }

    /// Each bound with how many were at most that.
    pub fn buckets(&self) -> impl Iterator<Item = (f64, u64)> {
        self.bounds.iter().copied().zip(self.counts.iter().copied())
    }

    /// The sum of all, in seconds.
    pub fn sum(&self) -> f64 {
        self.sum
    }

    pub fn count(&self) -> u64 {
        self.count
    }
}

/// Counters since the start.
#[derive(Clone, Debug)]
pub struct Totals {
    /// Prompt tokens that were run.
    pub prompt_tokens: u64,
    /// Prompt tokens that were found in the cache.
    pub cached_tokens: u64,
    pub generated_tokens: u64,
    /// Tasks that ended as they should.
    pub finished: u64,
    /// Tasks whose client went away.
    pub cancelled: u64,
    pub failed: u64,
    /// Requests that found the queue full.
    pub refused: u64,
    /// Runs of the model.
    pub steps: u64,
    /// Tokens in these runs.
    pub step_tokens: u64,
    /// Time in these runs.
    pub busy: Duration,
    /// From a task's arrival to its slot.
    pub queue_wait: Histogram,
    /// From a task's arrival to its first token.
    pub first_token: Histogram,
    /// From one token of a task to the next.
    pub token: Histogram,
}

impl Default for Totals {
    fn default() -> Self {
        Totals {
            prompt_tokens: 0,
            cached_tokens: 0,
            generated_tokens: 0,
            finished: 0,
            cancelled: 0,
            failed: 0,
            refused: 0,
            steps: 0,
            step_tokens: 0,
            busy: Duration::ZERO,
            queue_wait: Histogram::new(WAITS),
            first_token: Histogram::new(WAITS),
            token: Histogram::new(STEPS),
        }
    }
}

/// What a slot is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotState {
    Idle,
    /// Running a prompt.
    Prompt,
    Generating,
    Embedding,
}

/// One slot as it is seen from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotInfo {
    pub state: SlotState,
    /// The task's number, counted from 1; 0 if there never was one.
    pub task: u64,
    pub prompt_tokens: usize,
    /// Prompt tokens that have been run or were in the cache.
    pub prompt_done: usize,
    pub cached_tokens: usize,
    pub generated_tokens: usize,
    pub limit: Option<usize>,
}

impl SlotInfo {
    pub(crate) const IDLE: SlotInfo = SlotInfo {
        state: SlotState::Idle,
        task: 0,
        prompt_tokens: 0,
        prompt_done: 0,
        cached_tokens: 0,
        generated_tokens: 0,
        limit: None,
    };
}

/// The scheduler at one moment.
#[derive(Clone, Debug)]
pub struct Snapshot {
    pub slots: Vec<SlotInfo>,
    /// Requests that wait for a slot.
    pub waiting: usize,
    /// Pages of the KV cache.
    pub pages: usize,
    pub free_pages: usize,
    /// Finished prompts and answers that are kept for reuse.
    pub cached_sequences: usize,
    pub totals: Totals,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_cumulative() {
        let mut h = Histogram::new(STEPS);
        for ms in [1, 2, 30, 9000] {
            h.add(Duration::from_millis(ms));
        }
        let buckets: Vec<_> = h.buckets().collect();
        assert_eq!(buckets[0], (0.001, 1));
        assert_eq!(buckets[1], (0.0025, 2));
        assert_eq!(buckets.last(), Some(&(2.5, 3)));
        assert_eq!(h.count(), 4);
        assert!((h.sum() - 9.033).abs() < 1e-9);
    }
}
