//! From logits to a token: the chain of samplers in llama.cpp's order.
//!
//! logit bias → penalties → top-k → typical → top-p → min-p → temperature → draw.
//! Each step drops or rescales candidates; equal logits keep the lower id first, so a seed
//! gives one text.

use crate::{TokenSet, Top};
use std::collections::{HashMap, VecDeque};
use tegula_kernels::device::{self, MAXIMA_BLOCK, MOST_LARGEST};

/// Settings of the chain. The defaults are llama.cpp's.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerOptions {
    /// 0 and below: always the most likely token.
    pub temperature: f32,
    /// Keep the k most likely; 0 keeps all.
    pub top_k: usize,
    /// Keep the most likely whose probabilities sum to p; 1 keeps all.
    pub top_p: f32,
    /// Keep those at least this fraction as likely as the best; 0 keeps all.
    pub min_p: f32,
    /// Locally typical sampling; 1 keeps all.
    pub typical: f32,
    /// Every filter keeps at least this many.
    pub min_keep: usize,
    /// Tokens of the past that penalties look at; 0 switches them off.
    pub penalty_last_n: usize,
    /// 1 switches it off.
    pub repeat_penalty: f32,
    /// Subtracted once per occurrence.
    pub frequency_penalty: f32,
    /// Subtracted once if it occurred.
    pub presence_penalty: f32,
    /// Added to a token's logit; −∞ forbids it.
    pub logit_bias: Vec<(u32, f32)>,
    pub seed: u64,
}

impl Default for SamplerOptions {
    fn default() -> Self {
        SamplerOptions {
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            typical: 1.0,
            min_keep: 0,
            penalty_last_n: 64,
            repeat_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

impl SamplerOptions {
    /// Always the most likely token.
    pub fn greedy() -> SamplerOptions {
        SamplerOptions {
            temperature: 0.0,
            ..SamplerOptions::default()
        }
    }

    /// True if the choice is the first of the largest logits, whatever came before.
    pub fn is_argmax(&self) -> bool {
        self.temperature <= 0.0 && !self.changes_logits()
    }

    /// True if some logits are not taken as they are.
    fn changes_logits(&self) -> bool {
        self.penalizes() || !self.logit_bias.is_empty()
    }

    fn penalizes(&self) -> bool {
        self.penalty_last_n > 0
            && (self.repeat_penalty != 1.0
                || self.frequency_penalty != 0.0
                || self.presence_penalty != 0.0)
    }

    /// How many candidates are kept at most; 0 for all.
    fn kept(&self) -> usize {
        match self.top_k {
            0 => 0,
            k => k.max(self.min_keep),
        }
    }
}

/// A token that may be chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Candidate {
    id: u32,
    logit: f32,
    p: f32,
}

/// SplitMix64 (Steele, Lea, Flood 2014): a counter and a finaliser.
#[derive(Clone, Debug)]
struct SplitMix64(u64);

impl SplitMix64 {
    /// Uniform in [0, 1), 53 bits.
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// One sequence's sampler: the settings, the past, the random stream.
#[derive(Clone, Debug)]
pub struct Sampler {
    options: SamplerOptions,
    recent: VecDeque<u32>,
    random: SplitMix64,
    /// Scratch: logits with biases and penalties, largest logits of blocks as they stand and
    /// partly sorted, what may be chosen, and what sorts that.
    logits: Vec<f32>,
    maxima: Vec<f32>,
    order: Vec<f32>,
    candidates: Vec<Candidate>,
    keys: [Vec<(u32, u32)>; 2],
}

impl Sampler {
    /// A sampler without a past.
    pub fn new(options: SamplerOptions) -> Sampler {
        let random = SplitMix64(options.seed);
        Sampler {
            options,
            recent: VecDeque::new(),
            random,
            logits: Vec::new(),
            maxima: Vec::new(),
            order: Vec::new(),
            candidates: Vec::new(),
            keys: Default::default(),
        }
    }

    /// Notes a token that the sequence now holds, prompt or chosen.
    pub fn accept(&mut self, id: u32) {
        if self.options.penalty_last_n == 0 {
            return;
        }
        if self.recent.len() >= self.options.penalty_last_n {
            self.recent.pop_front();
        }
        self.recent.push_back(id);
    }

    /// Chooses a token. The caller `accept`s it.
    ///
    /// NaN counts as impossible; if nothing is possible the answer is token 0.
    pub fn sample(&mut self, logits: &[f32]) -> u32 {
        self.sample_allowed(logits, None)
    }

    /// Chooses among the allowed tokens, as [`Sampler::sample`] does among all; where none of
    /// them is possible, the first of them.
    pub fn sample_allowed(&mut self, logits: &[f32], allowed: Option<&TokenSet>) -> u32 {
        let o = &self.options;
        // Vocabularies have 150,000 tokens: as long as nothing is changed they are not copied.
        let logits = match o.changes_logits() {
            false => logits,
            true => {
                self.logits.clear();
                self.logits.extend_from_slice(logits);
                adjust(o, &self.recent, |id, change| {
                    if let Some(logit) = self.logits.get_mut(id as usize) {
                        *logit = clean(change(clean(*logit)));
                    }
                });
                &self.logits
            }
        };
        let candidate = |id: usize| Candidate {
            id: id as u32,
            logit: clean(logits[id]),
            p: 0.0,
        };
        let c = &mut self.candidates;
        c.clear();
        let k = o.kept();
        match allowed {
            None if o.temperature <= 0.0 => return device::largest(logits),
            None if k > 0 => {
                device::maxima(logits, &mut self.maxima);
                let floor = reached_by(k, &self.maxima, &mut self.order);
                let blocks = (0..).step_by(MAXIMA_BLOCK).zip(&self.maxima);
                for (start, _) in blocks.filter(|(_, most)| **most >= floor) {
                    let end = logits.len().min(start + MAXIMA_BLOCK);
                    let block = (start..end).map(candidate);
                    c.extend(block.filter(|c| c.logit >= floor));
                }
            }
            None => c.extend((0..logits.len()).map(candidate)),
            Some(set) => {
                let ids = (0..logits.len()).filter(|&id| set.contains(id as u32));
                c.extend(ids.map(candidate));
            }
        }
        if o.temperature <= 0.0 {
            return first_of_largest(c);
        }
        self.draw()
    }

    /// The logits that [`Sampler::sample_among`] must see to choose now as [`Sampler::sample`] does
    /// from all of them; `None` where that takes all.
    ///
    /// Biases and penalties move a few tokens that are known before. All others keep their
    /// logits, so that those among the best k are among the best k and as many more.
    pub fn needs(&self) -> Option<Top> {
        let o = &self.options;
        let mut ids: Vec<u32> = o.logit_bias.iter().map(|(id, _)| *id).collect();
        if o.penalizes() {
            ids.extend(&self.recent);
        }
        ids.sort_unstable();
        ids.dedup();
        let k = match o.kept() {
            _ if o.temperature <= 0.0 => 1,
            0 => return None,
            k => k,
        };
        let k = k.saturating_add(ids.len());
        (k <= MOST_LARGEST).then_some(Top { k, ids })
    }

    /// Chooses from the logits that [`Sampler::needs`] names, ascending by token.
    pub fn sample_among(&mut self, logits: &[(u32, f32)]) -> u32 {
        let c = &mut self.candidates;
        c.clear();
        c.extend(logits.iter().map(|&(id, logit)| Candidate {
            id,
            logit: clean(logit),
            p: 0.0,
        }));
        adjust(&self.options, &self.recent, |id, change| {
            if let Ok(at) = c.binary_search_by_key(&id, |c| c.id) {
                c[at].logit = clean(change(c[at].logit));
            }
        });
        if self.options.temperature <= 0.0 {
            return first_of_largest(c);
        }
        self.draw()
    }

    /// Drops candidates, which are in the order of their ids, and draws one of the others.
    fn draw(&mut self) -> u32 {
        let (o, c) = (&self.options, &mut self.candidates);
        top_k(c, o.kept(), &mut self.keys);
        typical(c, o.typical, o.min_keep);
        top_p(c, o.top_p, o.min_keep);
        min_p(c, o.min_p, o.min_keep);
        c.iter_mut().for_each(|c| c.logit /= o.temperature);
        softmax(c);
        let point = self.random.uniform();
        let mut sum = 0.0;
        for candidate in c.iter() {
            sum += f64::from(candidate.p);
            if point < sum {
                return candidate.id;
            }
        }
        // Rounding may leave the sum a hair below the point.
        c.iter()
            .rev()
            .find(|c| c.p > 0.0)
            .or(c.first())
            .map_or(0, |c| c.id)
    }
}

/// The token of the first of the largest logits; 0 if there is none.
fn first_of_largest(c: &[Candidate]) -> u32 {
    let best = c
        .iter()
        .reduce(|a, b| if b.logit > a.logit { b } else { a });
    best.map_or(0, |c| c.id)
}

/// A logit as the chain takes it: a NaN is impossible, and there is one zero.
fn clean(logit: f32) -> f32 {
    match logit.is_nan() {
        true => f32::NEG_INFINITY,
        false => logit + 0.0,
    }
}

/// Biases, then penalties: calls `apply` with a token and what becomes of its logit.
fn adjust(
    o: &SamplerOptions,
    recent: &VecDeque<u32>,
    mut apply: impl FnMut(u32, &dyn Fn(f32) -> f32),
) {
    for &(id, bias) in &o.logit_bias {
        apply(id, &|logit| logit + bias);
    }
    if !o.penalizes() {
        return;
    }
    let mut counts: HashMap<u32, u32> = HashMap::new();
    for &id in recent {
        *counts.entry(id).or_default() += 1;
    }
    for (id, count) in counts {
        apply(id, &|logit| {
            // Dividing a negative logit would reward it.
            let logit = match logit > 0.0 {
                true => logit / o.repeat_penalty,
                false => logit * o.repeat_penalty,
            };
            logit - (count as f32 * o.frequency_penalty + o.presence_penalty)
        });
    }
}

/// A logit that at least `k` of them reach, and with luck few more, from the maxima of blocks:
/// sorting all of them out would take longer than a GPU takes for a token.
///
/// Of that many blocks the largest logit reaches it.
fn reached_by(k: usize, maxima: &[f32], order: &mut Vec<f32>) -> f32 {
    if maxima.len() < k {
        return f32::NEG_INFINITY;
    }
    order.clear();
    order.extend_from_slice(maxima);
    *order.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
}

fn by_logit(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
}

/// Sorts, best first, and keeps `k` (all when 0). The candidates are in the order of their ids.
fn top_k(c: &mut Vec<Candidate>, k: usize, keys: &mut [Vec<(u32, u32)>; 2]) {
    if k > 0 && k < c.len() {
        c.select_nth_unstable_by(k - 1, by_logit);
        c.truncate(k);
        c.sort_unstable_by(by_logit);
    } else if c.len() < MANY {
        c.sort_unstable_by(by_logit);
    } else {
        sort_many(c, keys);
    }
}

/// From so many candidates on they are sorted by digits: comparing 150,000 of them takes five
/// times as long.
const MANY: usize = 4096;

/// Sorts candidates that are in the order of their ids as [`by_logit`] says: by digits of what
/// orders logits as integers, the lowest digit first, each time keeping the order of equals.
fn sort_many(c: &mut [Candidate], keys: &mut [Vec<(u32, u32)>; 2]) {
    const BITS: u32 = 11;
    const DIGITS: usize = 1 << BITS;
    let digit = |key: u32, pass: u32| (key >> (pass * BITS)) as usize % DIGITS;
    // The order of `total_cmp`, the largest first.
    let key = |logit: f32| {
        let bits = logit.to_bits();
        match bits >> 31 {
            0 => !(bits | 1 << 31),
            _ => bits,
        }
    };
    let [from, to] = keys;
    from.clear();
    from.extend(c.iter().map(|c| (key(c.logit), c.id)));
    to.clear();
    to.resize(from.len(), (0, 0));
    for pass in 0..32u32.div_ceil(BITS) {
        let mut places = [0usize; DIGITS];
        from.iter().for_each(|k| places[digit(k.0, pass)] += 1);
        let mut sum = 0;
        for place in &mut places {
            sum += std::mem::replace(place, sum);
        }
        for &k in from.iter() {
            let place = &mut places[digit(k.0, pass)];
            to[*place] = k;
            *place += 1;
        }
        std::mem::swap(from, to);
    }
    for (c, &(key, id)) in c.iter_mut().zip(from.iter()) {
        let bits = match key >> 31 {
            0 => !key & !(1 << 31),
            _ => key,
        };
        *c = Candidate {
            id,
            logit: f32::from_bits(bits),
            p: 0.0,
        };
    }
}

/// Fills in the probabilities of sorted candidates.
fn softmax(c: &mut [Candidate]) {
    let max = c.first().map_or(0.0, |c| c.logit);
    let mut sum = 0.0;
    for c in c.iter_mut() {
        // All impossible: equal shares rather than NaN.
        c.p = if max == f32::NEG_INFINITY {
            1.0
        } else {
            (c.logit - max).exp()
        };
        sum += c.p;
    }
    c.iter_mut().for_each(|c| c.p /= sum);
}

/// Locally typical sampling (Meister et al., arXiv 2202.00666): those whose surprise is
/// nearest to the entropy, until their probabilities sum to `p`.
fn typical(c: &mut Vec<Candidate>, p: f32, min_keep: usize) {
    if p >= 1.0 {
        return;
    }
    softmax(c);
    let entropy: f32 = c
        .iter()
        .filter(|c| c.p > 0.0)
        .map(|c| -c.p * c.p.ln())
        .sum();
    let distance = |c: &Candidate| (-c.p.ln() - entropy).abs();
    c.sort_by(|a, b| distance(a).total_cmp(&distance(b)).then(a.id.cmp(&b.id)));
    keep_mass(c, p, min_keep);
    c.sort_unstable_by(by_logit);
}

fn top_p(c: &mut Vec<Candidate>, p: f32, min_keep: usize) {
    if p < 1.0 {
        softmax(c);
        keep_mass(c, p, min_keep);
    }
}

/// Keeps the first candidates whose probabilities reach `p`, at least `min_keep` and one.
fn keep_mass(c: &mut Vec<Candidate>, p: f32, min_keep: usize) {
    let mut sum = 0.0;
    let reached = c.iter().enumerate().position(|(i, c)| {
        sum += c.p;
        sum >= p && i + 1 >= min_keep
    });
    if let Some(last) = reached {
        c.truncate(last + 1);
    }
}

fn min_p(c: &mut Vec<Candidate>, p: f32, min_keep: usize) {
    if p <= 0.0 {
        return;
    }
    let floor = c
        .first()
        .map_or(f32::NEG_INFINITY, |best| best.logit + p.ln());
    let keep = c.partition_point(|c| c.logit >= floor).max(min_keep).max(1);
    c.truncate(keep);
}

#[cfg(test)]
mod tests {
    use super::*;
    use tegula_kernels::device::largest_of;

    fn neutral() -> SamplerOptions {
        SamplerOptions {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            ..SamplerOptions::default()
        }
    }

    /// Which of the tokens ever come out.
    fn support(options: &SamplerOptions, logits: &[f32]) -> Vec<u32> {
        let mut sampler = Sampler::new(options.clone());
        let mut seen: Vec<u32> = (0..4000).map(|_| sampler.sample(logits)).collect();
        seen.sort_unstable();
        seen.dedup();
        seen
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        let mut sampler = Sampler::new(SamplerOptions::greedy());
        assert_eq!(sampler.sample(&[1.0, 3.0, 3.0, f32::NAN]), 1);
        assert_eq!(sampler.sample(&[f32::NAN; 3]), 0);
        assert_eq!(sampler.sample(&[f32::NEG_INFINITY, -1e30]), 1);
    }

    #[test]
    fn only_the_allowed_come_out() {
        let allowed: TokenSet = [1, 4].into_iter().collect();
        let logits = [9.0, 1.0, 8.0, 7.0, 1.5];
        for options in [SamplerOptions::greedy(), neutral()] {
            let mut sampler = Sampler::new(options);
            let mut seen: Vec<u32> = (0..200)
                .map(|_| sampler.sample_allowed(&logits, Some(&allowed)))
                .collect();
            seen.sort_unstable();
            seen.dedup();
            assert!(seen == [4] || seen == [1, 4], "{seen:?}");
        }
        let mut sampler = Sampler::new(neutral());
        assert_eq!(
            sampler.sample_allowed(&[f32::NAN; 5], Some(&allowed)) % 3,
            1
        );
    }

    #[test]
    fn filters_keep_what_they_promise() {
        // Probabilities 0.5, 0.25, 0.125, 0.0625, 0.0625.
        let logits = [4f32, 2.0, 1.0, 0.5, 0.5].map(f32::ln);
        assert_eq!(support(&neutral(), &logits), [0, 1, 2, 3, 4]);
        assert_eq!(
            support(
                &SamplerOptions {
                    top_k: 2,
                    ..neutral()
                },
                &logits
            ),
            [0, 1]
        );
        assert_eq!(
            support(
                &SamplerOptions {
                    top_p: 0.7,
                    ..neutral()
                },
                &logits
            ),
            [0, 1]
        );
        assert_eq!(
            support(
                &SamplerOptions {
                    min_p: 0.24,
                    ..neutral()
                },
                &logits
            ),
            [0, 1, 2]
        );
        assert_eq!(
            support(
                &SamplerOptions {
                    min_p: 0.9,
                    min_keep: 3,
                    ..neutral()
                },
                &logits
            ),
            [0, 1, 2]
        );
        // Entropy is 1.3 nats; surprises are 0.69, 1.39, 2.08, 2.77.
        assert_eq!(
            support(
                &SamplerOptions {
                    typical: 0.2,
                    ..neutral()
                },
                &logits
            ),
            [1]
        );
        let forbidden = SamplerOptions {
            logit_bias: vec![(0, f32::NEG_INFINITY), (9, 1.0)],
            ..neutral()
        };
        assert_eq!(support(&forbidden, &logits), [1, 2, 3, 4]);
    }

    #[test]
    fn all_of_the_k_largest_reach_the_floor() {
        let mut random = SplitMix64(1);
        for (n, k, distinct) in [
            (5000, 40, 1e9),
            (5000, 40, 9.0),
            (5000, 78, 1e9),
            (5000, 79, 1e9),
            (64, 1, 5.0),
            (100, 3, 1.0),
        ] {
            let mut logits: Vec<f32> = (0..n)
                .map(|_| (random.uniform() * distinct).floor() as f32)
                .collect();
            logits[n / 2] = f32::NEG_INFINITY;
            let mut maxima = Vec::new();
            device::maxima(&logits, &mut maxima);
            let floor = reached_by(k, &maxima, &mut Vec::new());
            let reach = logits.iter().filter(|l| **l >= floor).count();
            assert!(reach >= k, "{n} {k} {distinct}");
            logits.sort_by(|a, b| b.total_cmp(a));
            assert!(logits[k - 1] >= floor);
            if distinct > 1e6 && k == 40 {
                assert!(reach < n / 10, "{reach} of {n}");
            }
        }
    }

    #[test]
    fn the_logits_that_are_needed_give_the_choice_of_all() {
        let mut random = SplitMix64(5);
        let mut drawn = 0;
        let biases = vec![
            (7, 3.0),
            (7, -1.0),
            (70, f32::NEG_INFINITY),
            (900, 2.0),
            (5, 8.0),
        ];
        let variants = [
            SamplerOptions::default(),
            SamplerOptions {
                top_k: 3,
                repeat_penalty: 1.5,
                logit_bias: biases.clone(),
                ..SamplerOptions::default()
            },
            SamplerOptions {
                top_k: 2,
                min_keep: 4,
                presence_penalty: -2.0,
                penalty_last_n: 5,
                typical: 0.7,
                ..neutral()
            },
            SamplerOptions {
                temperature: 0.0,
                frequency_penalty: 0.7,
                logit_bias: biases,
                ..neutral()
            },
            SamplerOptions {
                top_k: 1000,
                ..SamplerOptions::default()
            },
            neutral(),
        ];
        for (i, options) in variants.into_iter().enumerate() {
            for coarse in [1.0, 1e6] {
                let mut all = Sampler::new(options.clone());
                let mut some = all.clone();
                for _ in 0..300 {
                    let mut logits: Vec<f32> = (0..800)
                        .map(|_| ((random.uniform() * 8.0 - 4.0) * coarse).round() as f32)
                        .map(|v| if coarse > 1.0 { v / coarse as f32 } else { v })
                        .collect();
                    logits[9] = f32::NAN;
                    logits[11] = -0.0;
                    let id = all.sample(&logits);
                    let Some(Top { k, ids }) = some.needs() else {
                        assert!(i >= 4, "variant {i}");
                        break;
                    };
                    let mut seen = largest_of(&logits, k);
                    let there = ids.iter().filter(|id| **id < 800);
                    seen.extend(there.map(|&id| (id, logits[id as usize])));
                    seen.sort_by_key(|v| v.0);
                    seen.dedup_by_key(|v| v.0);
                    assert_eq!(some.sample_among(&seen), id, "variant {i}");
                    all.accept(id);
                    some.accept(id);
                    drawn += 1;
                }
            }
        }
        assert_eq!(drawn, 4 * 2 * 300);
        // Nothing is possible.
        let forbidden = SamplerOptions {
            logit_bias: vec![(5, f32::NEG_INFINITY)],
            ..SamplerOptions::greedy()
        };
        let mut sampler = Sampler::new(forbidden);
        assert_eq!(sampler.needs(), Some(Top { k: 2, ids: vec![5] }));
        let dead = f32::NEG_INFINITY;
        assert_eq!(sampler.sample_among(&[(0, dead), (5, 1.0)]), 0);
    }

    #[test]
    fn frequencies_follow_the_distribution_and_the_temperature() {
        let logits = [0.75f32.ln(), 0.25f32.ln()];
        let share = |temperature| {
            let mut sampler = Sampler::new(SamplerOptions {
                temperature,
                ..neutral()
            });
            (0..20_000).filter(|_| sampler.sample(&logits) == 0).count() as f64 / 20_000.0
        };
        assert!((share(1.0) - 0.75).abs() < 0.01);
        // At half the temperature 9 : 1.
        assert!((share(0.5) - 0.9).abs() < 0.01);
    }

    #[test]
    fn penalties_push_down_what_was_seen() {
        let options = SamplerOptions {
            repeat_penalty: 2.0,
            temperature: 0.0,
            ..neutral()
        };
        let mut sampler = Sampler::new(options);
        assert_eq!(sampler.sample(&[3.0, 2.0, -1.0]), 0);
        sampler.accept(0);
        assert_eq!(sampler.sample(&[3.0, 2.0, -1.0]), 1);
        let negative = SamplerOptions {
            repeat_penalty: 2.0,
            temperature: 0.0,
            ..neutral()
        };
        let mut sampler = Sampler::new(negative);
        sampler.accept(0);
        assert_eq!(
            sampler.sample(&[-1.0, -1.5]),
            1,
            "a negative logit falls too"
        );
        let window = SamplerOptions {
            presence_penalty: 5.0,
            penalty_last_n: 1,
            temperature: 0.0,
            ..neutral()
        };
        let mut sampler = Sampler::new(window);
        sampler.accept(0);
        sampler.accept(1);
        assert_eq!(sampler.sample(&[3.0, 2.9]), 0, "only the last token counts");
    }

    #[test]
    fn a_seed_is_a_text() {
        let logits: Vec<f32> = (0..100).map(|i| (i as f32 * 0.37).sin()).collect();
        let run = |seed| {
            let mut sampler = Sampler::new(SamplerOptions {
                seed,
                ..SamplerOptions::default()
            });
            (0..50).map(|_| sampler.sample(&logits)).collect::<Vec<_>>()
        };
        assert_eq!(run(7), run(7));
        assert_ne!(run(7), run(8));
    }

    /// The chain without what makes it fast: every logit cleaned and copied, all of them sorted.
    fn plainly(sampler: &mut Sampler, logits: &[f32], allowed: Option<&TokenSet>) -> u32 {
        let o = &sampler.options;
        let mut logits: Vec<f32> = logits.iter().map(|&l| clean(l)).collect();
        adjust(o, &sampler.recent, |id, change| {
            logits[id as usize] = clean(change(logits[id as usize]));
        });
        let ids = (0..logits.len() as u32).filter(|&id| allowed.is_none_or(|set| set.contains(id)));
        let mut c: Vec<Candidate> = ids
            .map(|id| Candidate {
                id,
                logit: logits[id as usize],
                p: 0.0,
            })
            .collect();
        c.sort_by(by_logit);
        if o.temperature <= 0.0 {
            return match c.first() {
                Some(best) if best.logit > f32::NEG_INFINITY => best.id,
                _ => c.iter().map(|c| c.id).min().unwrap_or(0),
            };
        }
        if o.top_k > 0 {
            c.truncate(o.top_k.max(o.min_keep));
        }
        typical(&mut c, o.typical, o.min_keep);
        top_p(&mut c, o.top_p, o.min_keep);
        min_p(&mut c, o.min_p, o.min_keep);
        c.iter_mut().for_each(|c| c.logit /= o.temperature);
        softmax(&mut c);
        let point = sampler.random.uniform();
        let mut sum = 0.0;
        let drawn = c.iter().find(|c| {
            sum += f64::from(c.p);
            point < sum
        });
        let last = c.iter().rev().find(|c| c.p > 0.0);
        drawn.or(last).or(c.first()).map_or(0, |c| c.id)
    }

    #[test]
    fn what_makes_it_fast_changes_no_choice() {
        let mut random = SplitMix64(5);
        let mut rows: Vec<Vec<f32>> = [(6000, 12.0), (6000, 3.0), (100, 12.0)]
            .iter()
            .map(|&(n, scale)| {
                let logit = |_| ((random.uniform() - 0.7) * scale) as f32;
                (0..n).map(logit).collect()
            })
            .collect();
        // Equals, both zeros, and what is no number.
        rows.push((0..9000).map(|i| (i % 7) as f32 - 3.0).collect());
        for (i, l) in rows[1].iter_mut().enumerate() {
            match i % 50 {
                0 => *l = f32::NAN,
                1 => *l = f32::NEG_INFINITY,
                2 => *l = -0.0,
                3 => *l = 0.0,
                _ => {}
            }
        }
        rows.push(vec![f32::NAN; 5000]);
        let allowed: TokenSet = (0..5000).filter(|id| id % 3 > 0).collect();
        let all = SamplerOptions {
            top_p: 1.0,
            min_p: 0.0,
            top_k: 0,
            ..SamplerOptions::default()
        };
        let options = [
            SamplerOptions::greedy(),
            SamplerOptions {
                repeat_penalty: 1.3,
                ..SamplerOptions::greedy()
            },
            SamplerOptions::default(),
            SamplerOptions {
                logit_bias: vec![(3, f32::NEG_INFINITY), (70, 4.0)],
                presence_penalty: 0.5,
                ..SamplerOptions::default()
            },
            SamplerOptions {
                top_k: 5000,
                ..all.clone()
            },
            SamplerOptions {
                typical: 0.8,
                ..all.clone()
            },
            SamplerOptions {
                top_p: 0.9,
                ..all.clone()
            },
            all,
        ];
        for (r, row) in rows.iter().enumerate() {
            for (i, options) in options.iter().enumerate() {
                let ids = options.logit_bias.iter().map(|b| b.0 as usize);
                if ids.max().is_some_and(|id| id >= row.len()) {
                    continue;
                }
                for set in [None, Some(&allowed)] {
                    let mut fast = Sampler::new(options.clone());
                    let mut plain = fast.clone();
                    for step in 0..6 {
                        let id = fast.sample_allowed(row, set);
                        let expected = plainly(&mut plain, row, set);
                        assert_eq!(id, expected, "row {r}, options {i}, step {step}");
                        fast.accept(id);
                        plain.accept(id);
                    }
                }
            }
        }
    }
}
