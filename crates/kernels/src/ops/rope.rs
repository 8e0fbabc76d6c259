//! Rotary position embedding.
//!
//! All scalings that models use are linear in the position, so each comes down to one
//! frequency per dimension pair and a factor on the magnitude, computed once per model
//! ([`RopeParams`]); a batch's cosines and sines are computed once for all layers
//! ([`RopeTable`]).

use super::Compute;
use crate::disjoint::DisjointMut;
use crate::profile::Op;

/// Which dimensions rotate together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RopeStyle {
    /// `(0, 1), (2, 3), …` — llama.
    Normal,
    /// `(i, i + n/2)` — GPT-NeoX, qwen.
    Neox,
}

/// YaRN's parameters (Peng et al., arXiv 2309.00071), as GGUF files store them.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Yarn {
    /// How much longer the context is than the original.
    pub factor: f32,
    pub original_context: u32,
    pub beta_fast: f32,
    pub beta_slow: f32,
    /// Multiplies the attention scale correction; 1 by default.
    pub attention_factor: f32,
}

/// Frequencies of a model.
#[derive(Clone, PartialEq, Debug)]
pub struct RopeParams {
    pub style: RopeStyle,
    /// Radians per position of each pair; twice as many leading dimensions rotate.
    pub frequencies: Vec<f32>,
    /// Factor on cosine and sine.
    pub magnitude: f32,
}

impl RopeParams {
    /// Plain RoPE over the first `dims` dimensions (even): pair `i` turns by
    /// `base^(-2i/dims)` per position.
    pub fn new(style: RopeStyle, dims: usize, base: f32) -> RopeParams {
        let frequency = |i| f64::from(base).powf(-2.0 * i as f64 / dims as f64) as f32;
        RopeParams {
            style,
            frequencies: (0..dims / 2).map(frequency).collect(),
            magnitude: 1.0,
        }
    }

    /// Linear scaling: positions count for `1 / factor`.
    pub fn linear(mut self, factor: f32) -> RopeParams {
        self.frequencies.iter_mut().for_each(|f| *f /= factor);
        self
    }

    /// Explicit divisors, one per pair: what GGUF's `rope_freqs.weight` holds, among them
    /// Llama 3's scaling. Returns `None` when their number is another.
    pub fn divided_by(mut self, divisors: &[f32]) -> Option<RopeParams> {
        if divisors.len() != self.frequencies.len() {
            return None;
        }
        self.frequencies
            .iter_mut()
            .zip(divisors)
            .for_each(|(f, d)| *f /= d);
        Some(self)
    }

    /// Llama 3.1's scaling: wavelengths longer than `context / low` are stretched by
    /// `factor`, shorter than `context / high` left alone, between them blended.
    pub fn llama3(mut self, factor: f32, low: f32, high: f32, context: f32) -> RopeParams {
        for f in &mut self.frequencies {
            let wavelength = 2.0 * std::f32::consts::PI / *f;
            let stretched = *f / factor;
            *f = if wavelength > context / low {
                stretched
            } else if wavelength < context / high {
                *f
            } else {
                let blend = (context / wavelength - low) / (high - low);
                (1.0 - blend) * stretched + blend * *f
            };
        }
        self
    }

    /// YaRN: dimensions that turn more than `beta_fast` times over the original context keep
    /// their frequency, those below `beta_slow` are interpolated, with a ramp between.
    pub fn yarn(mut self, base: f32, yarn: &Yarn) -> RopeParams {
        let dims = 2.0 * self.frequencies.len() as f32;
        let turns_at = |beta: f32| {
            let context = yarn.original_context as f32;
            dims * (context / (beta * 2.0 * std::f32::consts::PI)).ln() / (2.0 * base.ln())
        };
        let low = turns_at(yarn.beta_fast).floor().max(0.0);
        let high = turns_at(yarn.beta_slow).ceil().min(dims - 1.0);
        for (i, f) in self.frequencies.iter_mut().enumerate() {
            let ramp = ((i as f32 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
            *f = *f / yarn.factor * ramp + *f * (1.0 - ramp);
        }
        self.magnitude *= yarn.attention_factor * (1.0 + 0.1 * yarn.factor.ln());
        self
    }
}

/// Cosines and sines of a batch's positions.
#[derive(Clone, Debug, Default)]
pub struct RopeTable {
    /// `[m][pairs]`
    cos: Vec<f32>,
    sin: Vec<f32>,
    pairs: usize,
}

impl RopeTable {
    /// Cosines and sines, `[m][pairs]`, and the number of pairs.
    pub(crate) fn rows(&self) -> (&[f32], &[f32], usize) {
        (&self.cos, &self.sin, self.pairs)
    }

    /// The table that [`RopeTable::rows`] shows.
    pub(crate) fn from_rows(cos: Vec<f32>, sin: Vec<f32>, pairs: usize) -> RopeTable {
        RopeTable { cos, sin, pairs }
    }

    /// Computes the table for `positions`.
    pub fn fill(&mut self, params: &RopeParams, positions: impl Iterator<Item = usize>) {
        self.pairs = params.frequencies.len();
        self.cos.clear();
        self.sin.clear();
        for position in positions {
            for &frequency in &params.frequencies {
                let angle = f64::from(position as f32 * frequency);
                self.cos.push(angle.cos() as f32 * params.magnitude);
                self.sin.push(angle.sin() as f32 * params.magnitude);
            }
        }
    }
}

/// Dimensions of a head that is normalised, at most.
const MOST_NORMED: usize = 1024;

/// A batch's queries or keys.
pub struct Heads<'a> {
    /// `[m][heads][dim]`
    pub x: &'a mut [f32],
    pub heads: usize,
    /// `[dim]`: weights of each head's norm, if there is one.
    pub norm: Option<&'a [f32]>,
}

impl Compute {
    /// Normalises each head, where there is a norm, and rotates it by its token's position: in
    /// place, queries and keys in one dispatch.
    ///
    /// # Panics
    /// When lengths disagree, more dimensions rotate than a head has, or a head that is
    /// normalised is longer than 1024.
    pub fn heads(
        &self,
        mut both: [Heads<'_>; 2],
        dim: usize,
        eps: f32,
        style: RopeStyle,
        table: &RopeTable,
    ) {
        let _span = self.profile.span(Op::Heads);
        let pairs = table.pairs;
        let tokens = both[0].x.len() / (both[0].heads * dim).max(1);
        assert!(table.cos.len() == tokens * pairs && 2 * pairs <= dim);
        for h in &both {
            assert_eq!(h.x.len(), tokens * h.heads * dim);
            assert!(h.norm.is_none_or(|w| w.len() == dim && dim <= MOST_NORMED));
        }
        let cost = both.iter().map(|h| h.heads * dim).sum();
        let both = both
            .each_mut()
            .map(|h| (DisjointMut::new(&mut *h.x), h.heads * dim, h.norm));
        self.for_each(tokens, cost, &|t| {
            let (cos, sin) = (&table.cos[t * pairs..], &table.sin[t * pairs..]);
            let (cos, sin) = (&cos[..pairs], &sin[..pairs]);
            let mut copy = [0f32; MOST_NORMED];
            for (x, row, norm) in &both {
                // SAFETY: each task has its own token.
                let x = unsafe { x.slice(t * row..(t + 1) * row) };
                for head in x.chunks_exact_mut(dim) {
                    if let Some(w) = norm {
                        let copy = &mut copy[..dim];
                        copy.copy_from_slice(head);
                        // SAFETY: the table's tier was checked.
                        unsafe { (self.table.float.rms_norm)(copy, w, eps, head) };
                    }
                    rotate(head, style, cos, sin);
                }
            }
        });
    }
}

fn rotate(head: &mut [f32], style: RopeStyle, cos: &[f32], sin: &[f32]) {
    let pairs = cos.len();
    match style {
        RopeStyle::Neox => {
            let (first, second) = head[..2 * pairs].split_at_mut(pairs);
            for (((a, b), c), s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                (*a, *b) = (*a * c - *b * s, *a * s + *b * c);
            }
        }
        RopeStyle::Normal => {
            for ((pair, c), s) in head.chunks_exact_mut(2).zip(cos).zip(sin) {
                let (a, b) = (pair[0], pair[1]);
                (pair[0], pair[1]) = (a * c - b * s, a * s + b * c);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_frequencies_and_linear_scaling() {
        let plain = RopeParams::new(RopeStyle::Neox, 8, 10000.0);
        assert_eq!(plain.frequencies, [1.0, 0.1, 0.01, 0.001]);
        let half = plain.clone().linear(2.0);
        assert_eq!(half.frequencies, [0.5, 0.05, 0.005, 0.0005]);
        assert_eq!(plain.clone().divided_by(&[1.0]), None);
        assert_eq!(
            plain.divided_by(&[2.0; 4]).map(|p| p.frequencies),
            Some(half.frequencies)
        );
    }

    #[test]
    fn llama3_keeps_the_fast_and_stretches_the_slow() {
        let plain = RopeParams::new(RopeStyle::Normal, 128, 500_000.0);
        let scaled = plain.clone().llama3(8.0, 1.0, 4.0, 8192.0);
        assert_eq!(scaled.frequencies[0], plain.frequencies[0]);
        assert_eq!(scaled.frequencies[63], plain.frequencies[63] / 8.0);
        let ratios: Vec<_> = plain
            .frequencies
            .iter()
            .zip(&scaled.frequencies)
            .map(|(p, s)| p / s)
            .collect();
        assert!(ratios.is_sorted(), "the stretch grows with the wavelength");
    }

    #[test]
    fn yarn_blends_between_its_limits() {
        let plain = RopeParams::new(RopeStyle::Neox, 128, 1_000_000.0);
        let yarn = Yarn {
            factor: 4.0,
            original_context: 32768,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: 1.0,
        };
        let scaled = plain.clone().yarn(1_000_000.0, &yarn);
        assert_eq!(scaled.frequencies[0], plain.frequencies[0]);
        assert_eq!(scaled.frequencies[63], plain.frequencies[63] / 4.0);
        assert!((scaled.magnitude - 1.138_629_4).abs() < 1e-6);
    }
}
