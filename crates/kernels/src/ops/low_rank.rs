//! What low-rank adapters add to products: see [`LowRank`].
//!
//! `A x` of all products of a dispatch is a dispatch before it. `B` has the strips of its matrix,
//! so the task that multiplies some of these multiplies the same ones of `B` and adds them up where
//! the kernels leave their sums, before anything else sees them. That is why every operation,
//! fused or not, takes adapters alike.

use super::{
    Compute,
    matmul::{Part, Product, Scratch},
};
use crate::{
    acts::{Acts, Forms},
    strip::{ROWS, kernels::MatmulKernels},
    weights::{LowRank, Weights},
};

/// The tokens of one expert: `tokens[start .. start + len]` of the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub expert: usize,
    pub start: usize,
    pub len: usize,
}

impl Segment {
    /// All tokens and the only matrix.
    pub fn whole(m: usize) -> Segment {
        Segment {
            expert: 0,
            start: 0,
            len: m,
        }
    }
}

/// What goes into `B` of each adapter of a dispatch's products; nothing where there are none.
pub(super) struct Lows<'a>(Vec<Low<'a>>);

struct Low<'a> {
    /// The index of the product that it is added to.
    product: usize,
    b: &'a Weights,
    /// `scale · A x`, `[tokens of all segments][rank]`.
    x: Acts,
}

impl Lows<'_> {
    /// How much longer tiles must be that have `values` values, for the sums of `B`.
    pub fn spare(&self, values: usize) -> usize {
        if self.0.is_empty() { 0 } else { values }
    }
}

/// The tokens of a segment in parts, first and count each: `A` has too few strips for all threads.
/// No part is so small that it would be multiplied otherwise than the whole.
fn shares(len: usize) -> impl Iterator<Item = (usize, usize)> {
    const SHARE: usize = 256;
    let last = (len / SHARE).max(1) - 1;
    (0..=last).map(move |i| {
        let start = i * SHARE;
        (start, if i == last { len - start } else { SHARE })
    })
}

impl Compute {
    /// Multiplies the tokens of each segment with `A` of the adapters of `weights`. `x` has the
    /// segments one after another or, if they are `shared`, is the one token of each.
    pub(super) fn lower<'w>(
        &self,
        weights: impl IntoIterator<Item = &'w Weights>,
        x: &Acts,
        segments: &[Segment],
        shared: bool,
    ) -> Lows<'w> {
        let all: Vec<_> = weights
            .into_iter()
            .enumerate()
            .flat_map(|(product, w)| w.adapters().iter().map(move |l| (product, l)))
            .collect();
        if all.is_empty() {
            return Lows(Vec::new());
        }
        let total: usize = segments.iter().map(|s| s.len).sum();
        let of = |l: &LowRank| vec![0f32; total * l.a.n()];
        let mut sums: Vec<Vec<f32>> = all.iter().map(|(_, l)| of(l)).collect();
        let mut products = Vec::with_capacity(all.len() * segments.len());
        for ((_, l), sums) in all.iter().zip(&mut sums) {
            let mut rest = &mut sums[..];
            for segment in segments {
                let tokens = match shared {
                    true => x.view(),
                    false => x.segment(segment.start, segment.len),
                };
                for (start, len) in shares(segment.len) {
                    let (y, others) = rest.split_at_mut(len * l.a.n());
                    rest = others;
                    products.push(Product {
                        w: &l.a,
                        segment: Segment { len, ..*segment },
                        x: tokens.slice(start, len),
                        y,
                    });
                }
            }
        }
        self.products(&mut products, &Lows(Vec::new()), false, || {});
        let kernels = &self.table.matmul;
        let prepared = all.into_iter().zip(&mut sums).map(|((product, l), sums)| {
            sums.iter_mut().for_each(|v| *v *= l.scale);
            let (mut x, rank) = (Acts::default(), l.a.n());
            let form = |s: &Segment| kernels.form(&l.b, s.len);
            let forms = segments.iter().fold(Forms::NONE, |f, s| f | form(s));
            let writer = x.begin(total, rank, forms);
            let owners: Vec<&Segment> = segments
                .iter()
                .flat_map(|s| std::iter::repeat_n(s, s.len))
                .collect();
            self.for_each(total, rank, &|t| {
                let Segment { start, len, .. } = *owners[t];
                let row = &sums[t * rank..(t + 1) * rank];
                let form = kernels.form(&l.b, len);
                // SAFETY: every task writes a token of its own.
                unsafe { writer.put(kernels, form, (start, len), t - start, 0, row) };
            });
            Low {
                product,
                b: &l.b,
                x,
            }
        });
        Lows(prepared.collect())
    }
}

impl Scratch {
    /// Adds to `tile[at..]`, where [`Scratch::mul`] has put the product of `part` with tokens
    /// `first .. first + count` of a segment, what the lows of the product with that index make
    /// of them. `tile[spare..]` is as long and free.
    pub(super) fn add_lows(
        &mut self,
        kernels: &MatmulKernels,
        part: Part<'_>,
        (lows, product): (&Lows<'_>, usize),
        (segment, first, count): (Segment, usize, usize),
        at: usize,
        spare: usize,
    ) {
        let values = part.count * count * ROWS;
        for low in lows.0.iter().filter(|low| low.product == product) {
            let x = low.x.segment(segment.start, segment.len);
            let part = Part { w: low.b, ..part };
            self.mul(
                kernels,
                part,
                None,
                (x.slice(first, count), segment.len),
                spare,
            );
            let (sums, added) = self.tile.split_at_mut(spare);
            let sums = &mut sums[at..at + values];
            sums.iter_mut()
                .zip(&added[..values])
                .for_each(|(s, v)| *s += v);
        }
    }
}
