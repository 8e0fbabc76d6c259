//! Matrix products over the pool.

use std::cell::RefCell;

use super::{
    Compute,
    low_rank::{Lows, Segment},
};
use crate::{
    acts::{Acts, ActsView, Forms, GROUP},
    ahead,
    disjoint::DisjointMut,
    mem::{self, AlignedVec},
    profile::Op,
    sparse,
    strip::{
        ROWS,
        kernels::{MAX_STRIPS, MatmulKernels, PANEL_BYTES, StripArgs},
    },
    weights::{Encoding, Weights},
};

/// Larger batches decode the weights once per so many tokens. Vectors keep their activations in the
/// second-level cache; tiles bring them there as they go, and keep the sums.
const TOKEN_BLOCK: usize = 512;
const TILE_TOKEN_BLOCK: usize = 1024;

/// So many tokens before their results are written their places are asked for.
pub(super) const WRITE_AHEAD: usize = 4;

/// What a worker keeps between tasks.
pub(crate) struct Scratch {
    panel: AlignedVec<u8>,
    /// Strips packed on the fly from raw weights.
    packed: AlignedVec<u8>,
    /// Results of the kernels.
    pub(crate) tile: AlignedVec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        panel: AlignedVec::default(),
        packed: AlignedVec::default(),
        tile: AlignedVec::default(),
    });
}

/// Runs `f` with this thread's scratch.
pub(crate) fn with_scratch<R>(f: impl FnOnce(&mut Scratch) -> R) -> R {
    SCRATCH.with(|s| f(&mut s.borrow_mut()))
}

/// Strips `first .. first + count` of matrix `expert`.
#[derive(Clone, Copy)]
pub(crate) struct Part<'a> {
    pub w: &'a Weights,
    pub expert: usize,
    pub first: usize,
    pub count: usize,
}

impl Scratch {
    /// Multiplies strips with the tokens of `acts`, which are part of a product with `total`
    /// tokens; `tile[at..]` receives `[count][acts.m][16]` and must be that long. `next` is what
    /// this thread multiplies then, if it knows.
    ///
    /// # Panics
    /// When `acts` has not the form or the k of the weights, or the tile is too short.
    pub(crate) fn mul(
        &mut self,
        kernels: &MatmulKernels,
        part: Part<'_>,
        next: Option<Part<'_>>,
        (acts, total): (ActsView<'_>, usize),
        at: usize,
    ) {
        let Part {
            w,
            expert,
            first,
            count,
        } = part;
        assert_eq!(acts.k, w.k());
        assert!(count <= MAX_STRIPS);
        let len = count * acts.m * ROWS;
        let tiles = kernels.tiles_for(w, total);
        let takes = tiles.map_or(kernels.sparse, |t| t.sparse);
        let mut strips = [std::ptr::null(); MAX_STRIPS];
        let mut bytes = [w.strip_bytes(); MAX_STRIPS];
        // Sparse strips that the kernel does not know become dense ones.
        let expand = w.encoding() == Encoding::Sparse16 && !takes(w.ty());
        if expand || w.encoding() == Encoding::Raw {
            self.packed.fit(count * w.strip_bytes());
        }
        let mut packed = &mut self.packed[..];
        for (i, slot) in strips[..count].iter_mut().enumerate() {
            let scratch = packed.split_off_mut(..w.strip_bytes()).unwrap_or_default();
            *slot = if expand {
                let strip = w.strip(expert, first + i, &mut []);
                // SAFETY: the strip was checked; the scratch has a dense strip's bytes.
                unsafe { sparse::expand(w.ty(), w.k(), strip.as_ptr(), scratch.as_mut_ptr()) };
                scratch.as_ptr()
            } else {
                let strip = w.strip(expert, first + i, scratch);
                bytes[i] = strip.len();
                strip.as_ptr()
            };
        }
        let mut after = [std::ptr::null(); MAX_STRIPS];
        let next = next.filter(|n| n.count == count && n.w.encoding() != Encoding::Raw);
        if let Some(n) = next {
            for (i, slot) in after[..count].iter_mut().enumerate() {
                *slot = n.w.strip(n.expert, n.first + i, &mut []).as_ptr();
            }
        }
        let panel = tiles.map_or(PANEL_BYTES, |t| t.scratch);
        self.panel.fit(panel);
        let args = StripArgs {
            ty: if expand { w.ty().dense() } else { w.ty() },
            k: w.k(),
            strips: &strips[..count],
            bytes: &bytes[..count],
            next: &after[..next.map_or(0, |n| n.count)],
            asked: ahead::asked(strips[0]),
            acts: acts.only(kernels.form(w, total)),
            tile: self.tile[at..at + len].as_mut_ptr(),
            panel: self.panel.as_mut_ptr(),
        };
        // SAFETY: strips are whole strips of the type and k; the view holds the form; the
        // tile is `[count][m][16]`; the table's tier was checked when it was made.
        unsafe { (tiles.map_or(kernels.mul_strips, |t| t.mul_strips))(&args) };
        ahead::set_asked(after[0], args.asked);
        if let Some(factor) = w.factors().get(expert) {
            let tile = &mut self.tile[at..at + len];
            tile.iter_mut().for_each(|sum| *sum *= factor);
        }
    }
}

/// One product of [`Compute::products`].
pub(super) struct Product<'a> {
    pub w: &'a Weights,
    /// The matrix of the stack, and how many tokens.
    pub segment: Segment,
    /// These tokens.
    pub x: ActsView<'a>,
    /// `[tokens][rows]`
    pub y: &'a mut [f32],
}

/// The pieces that a product with `m` tokens is cut into: (first token, tokens). They are
/// about equal, and all but the last are whole groups.
pub(crate) fn token_blocks(m: usize, tiles: bool) -> impl Iterator<Item = (usize, usize)> {
    let most = if tiles { TILE_TOKEN_BLOCK } else { TOKEN_BLOCK };
    let len = m.div_ceil(m.div_ceil(most).max(1)).next_multiple_of(32);
    (0..m).step_by(len.max(1)).map(move |t| (t, len.min(m - t)))
}

/// Strips `first .. first + count` of the item with that index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub item: usize,
    pub first: usize,
    pub count: usize,
}

/// What [`runs`] cuts: `strips` strips, each of which costs `cost`, at most `most` in a run
/// and a multiple of `least`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Item {
    pub strips: usize,
    pub cost: usize,
    pub most: usize,
    pub least: usize,
}

impl Item {
    /// A whole product: with bf16 tiles strips are multiplied in pairs and gain from company, so that
    /// the last runs are not the shortest possible.
    fn product(w: &Weights, tiles: bool) -> Item {
        let (most, least) = if tiles { (MAX_STRIPS, 4) } else { (4, 1) };
        Item {
            strips: w.strips(),
            cost: w.k(),
            most,
            least,
        }
    }
}

/// Cuts items into runs for `threads` threads: large ones first, so that the activations are
/// reused, then ever smaller ones, so that all threads end together.
pub(crate) fn runs(items: &[Item], threads: usize) -> impl Iterator<Item = Run> {
    let mut left: usize = items.iter().map(|i| i.strips * i.cost).sum();
    let (mut item, mut first) = (0, 0);
    std::iter::from_fn(move || {
        while items.get(item)?.strips == first {
            (item, first) = (item + 1, 0);
        }
        let i = &items[item];
        let share = 2 * left / (3 * threads * i.cost.max(1)) / i.least * i.least;
        let count = share.clamp(i.least, i.most).min(i.strips - first);
        let run = Run { item, first, count };
        first += count;
        left -= count * i.cost;
        Some(run)
    })
}

/// Bytes that a thread is told of ahead, of a second-level cache of at least 512 KiB.
const TOLD_BYTES: usize = 128 << 10;

/// The largest batch of which products are told ahead: reading is what counts there.
pub(super) const TOLD_TOKENS: usize = 8;

/// The strips of a part, as far as a thread is told of them that begins with `strips` of them.
/// Sparse ones gained nothing, and raw ones are not read as strips.
pub(super) fn pieces(part: Part<'_>, strips: usize) -> impl Iterator<Item = &[u8]> {
    let packed = part.w.encoding() == Encoding::Strip16;
    let strips_of = (part.first..part.first + part.count).take_while(move |_| packed);
    strips_of.map(move |s| {
        let strip = part.w.strip(part.expert, s, &mut []);
        &strip[..strip.len().min(TOLD_BYTES / strips)]
    })
}

impl Compute {
    /// The forms of activations that products of `weights` with `m` tokens take, with what their
    /// adapters take.
    pub fn forms<'w>(&self, m: usize, weights: impl IntoIterator<Item = &'w Weights>) -> Forms {
        let kernels = &self.table.matmul;
        let form = |f, w: &Weights| {
            let adapters = w.adapters().iter();
            adapters.fold(f | kernels.form(w, m), |f, l| f | kernels.form(&l.a, m))
        };
        weights.into_iter().fold(Forms::NONE, form)
    }

    /// Prepares `x`, `[m][k]`, in `forms`.
    ///
    /// # Panics
    /// When `x` has not `m * k` values, or q8 is asked for and `k` is no multiple of 32.
    pub fn prepare(&self, acts: &mut Acts, x: &[f32], m: usize, k: usize, forms: Forms) {
        let _span = self.profile.span(Op::Prepare);
        assert_eq!(x.len(), m * k);
        let writer = acts.begin(m, k, forms);
        if k == 0 {
            return;
        }
        let kernels = &self.table.matmul;
        // Tokens that share cache lines are one task's, but for the scales of q8 and their sums.
        let part = k.min(1024);
        let parts = k.div_ceil(part);
        self.for_each(m.div_ceil(GROUP) * parts, m.min(GROUP) * part, &|task| {
            let (group, col) = (task / parts, task % parts * part);
            let end = k.min(col + part);
            let tokens = group * GROUP..m.min((group + 1) * GROUP);
            for t in tokens.clone() {
                if t + 1 < tokens.end {
                    mem::prefetch(&x[(t + 1) * k + col..(t + 1) * k + end]);
                    writer.prefetch((0, m), t + 1, col..end);
                }
                let x = &x[t * k + col..t * k + end];
                // SAFETY: every task writes tokens and columns of its own.
                unsafe { writer.put(kernels, forms, (0, m), t, col, x) };
            }
        });
    }

    /// Prepares `x / rms(x) * w`, row by row, in `forms`: [`Compute::rms_norm`] and
    /// [`Compute::prepare`] in one pass. `x` is `[m][w.len()]`; `normed` is scratch.
    ///
    /// # Panics
    /// As those two.
    pub fn norm_prepare(
        &self,
        acts: &mut Acts,
        x: &[f32],
        w: &[f32],
        eps: f32,
        forms: Forms,
        normed: &mut Vec<f32>,
    ) {
        let k = w.len();
        assert!(x.len().is_multiple_of(k));
        let m = x.len() / k;
        if m <= GROUP {
            // Too few rows to share out: each step shares what it can.
            normed.resize(x.len(), 0.0);
            self.rms_norm(x, w, eps, normed);
            self.prepare(acts, normed, m, k, forms);
            return;
        }
        let _span = self.profile.span(Op::Prepare);
        let writer = acts.begin(m, k, forms);
        let (kernels, float) = (&self.table.matmul, &self.table.float);
        self.pool.run(m.div_ceil(GROUP), &|group| {
            with_scratch(|scratch| {
                scratch.tile.fit(k);
                let row = &mut scratch.tile[..k];
                let tokens = group * GROUP..m.min((group + 1) * GROUP);
                mem::prefetch(&x[tokens.start * k..][..k]);
                for t in tokens.clone() {
                    if t + 1 < tokens.end {
                        mem::prefetch(&x[(t + 1) * k..][..k]);
                        writer.prefetch((0, m), t + 1, 0..k);
                    }
                    // SAFETY: the table's tier was checked; every task writes tokens of its
                    // own.
                    unsafe {
                        (float.rms_norm)(&x[t * k..(t + 1) * k], w, eps, row);
                        writer.put(kernels, forms, (0, m), t, 0, row);
                    }
                }
            });
        });
    }

    /// Says that the products with `m` tokens after the job that runs are those of `weights` in one
    /// dispatch, or begin with the first: threads without a task ask for what they will read. To be
    /// called beside that job.
    pub fn ahead<'w>(&self, weights: impl IntoIterator<Item = &'w Weights>, m: usize) {
        if m == 0 || m > TOLD_TOKENS {
            return;
        }
        let weights: Vec<&Weights> = weights.into_iter().collect();
        let tiles = |w: &Weights| self.table.matmul.form(w, m).has(Forms::TILES);
        let items = weights.iter().map(|w| Item::product(w, tiles(w)));
        let items: Vec<Item> = items.collect();
        let threads = self.pool.threads();
        let first = runs(&items, threads).take(threads).enumerate();
        self.pool.ahead(first.flat_map(|(thread, run)| {
            let part = Part {
                w: weights[run.item],
                expert: 0,
                first: run.first,
                count: run.count,
            };
            pieces(part, run.count).map(move |piece| (thread, piece))
        }));
    }

    /// `y = x · wᵀ`: `x` `[m][k]`, `w` `[n][k]`, `y` `[m][n]`.
    ///
    /// # Panics
    /// When shapes disagree or `x` lacks the form that `w` takes.
    pub fn matmul(&self, w: &Weights, x: &Acts, y: &mut [f32]) {
        self.matmul_many(&mut [(w, y)], x);
    }

    /// `y += x · wᵀ`, each sum rounded before it is added.
    ///
    /// # Panics
    /// As [`Compute::matmul`].
    pub fn matmul_add(&self, w: &Weights, x: &Acts, y: &mut [f32]) {
        self.matmul_beside(&mut [(w, y)], x, true, || {});
    }

    /// Several products with the same activations in one dispatch.
    ///
    /// # Panics
    /// As [`Compute::matmul`].
    pub fn matmul_many(&self, products: &mut [(&Weights, &mut [f32])], x: &Acts) {
        self.matmul_beside(products, x, false, || {});
    }

    /// [`Compute::matmul_many`], or [`Compute::matmul_add`] of each, for the first rows of
    /// matrices, as many as each `y` holds: `[m][rows]`, whole strips unless they are all. The
    /// caller runs `beside` while other threads multiply.
    ///
    /// # Panics
    /// As [`Compute::matmul`], and when rows are no whole strips.
    pub fn matmul_beside(
        &self,
        products: &mut [(&Weights, &mut [f32])],
        x: &Acts,
        adds: bool,
        beside: impl FnOnce(),
    ) {
        let _span = self.profile.span(Op::Products);
        let m = x.m();
        if m == 0 {
            return beside();
        }
        let whole = Segment::whole(m);
        let lows = self.lower(products.iter().map(|(w, _)| *w), x, &[whole], false);
        let mut parts = Vec::with_capacity(products.len());
        for (w, y) in products {
            assert_eq!(w.experts(), 1, "a stack of matrices is for moe_ffn");
            self.observed(w, 0, &x.view());
            parts.push(Product {
                w,
                segment: whole,
                x: x.view(),
                y,
            });
        }
        self.products(&mut parts, &lows, adds, beside);
    }

    /// Several products in one dispatch, with what `lows` add to them; the rest is as in
    /// [`Compute::matmul_beside`].
    pub(super) fn products(
        &self,
        products: &mut [Product<'_>],
        lows: &Lows<'_>,
        adds: bool,
        beside: impl FnOnce(),
    ) {
        let kernels = &self.table.matmul;
        let mut items = Vec::with_capacity(products.len());
        let mut outputs = Vec::with_capacity(products.len());
        for Product { w, segment, x, y } in products {
            let m = segment.len;
            let n = y.len() / m;
            assert!(y.len() == m * n && n <= w.n());
            assert!(n == w.n() || n.is_multiple_of(ROWS));
            items.push(Item {
                strips: n.div_ceil(ROWS),
                ..Item::product(w, kernels.form(w, m).has(Forms::TILES))
            });
            outputs.push((*w, *segment, *x, n, DisjointMut::new(y)));
        }
        let tasks: Vec<Run> = runs(&items, self.pool.threads()).collect();
        let gather = self.table.float.gather;
        let multiply = |task: usize| {
            let Run { item, first, count } = tasks[task];
            let (w, segment, x, n, y) = &outputs[item];
            let m = segment.len;
            let part = Part {
                w,
                expert: segment.expert,
                first,
                count,
            };
            let row = first * ROWS;
            let rows = (count * ROWS).min(n - row);
            with_scratch(|scratch| {
                for (start, len) in token_blocks(m, kernels.tiles_for(w, m).is_some()) {
                    let values = count * len * ROWS;
                    scratch.tile.fit(values + lows.spare(values));
                    scratch.mul(kernels, part, None, (x.slice(start, len), m), 0);
                    let tokens = (*segment, start, len);
                    scratch.add_lows(kernels, part, (lows, item), tokens, 0, values);
                    for t in 0..len {
                        let at = (start + t) * n + row;
                        let later = at + WRITE_AHEAD * n;
                        y.prefetch(later..later + rows);
                        // SAFETY: strips belong to one task each, so do their columns.
                        // (And the table's tier was checked.)
                        unsafe {
                            let out = y.slice(at..at + rows);
                            gather(&scratch.tile[t * ROWS..], len * ROWS, out, adds);
                        }
                    }
                }
            });
        };
        self.pool.run_beside(tasks.len(), &multiply, beside);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cover_all_strips_and_shrink() {
        let item = |strips, tiles| Item {
            strips,
            cost: 4096,
            most: if tiles { MAX_STRIPS } else { 4 },
            least: if tiles { 2 } else { 1 },
        };
        for tiles in [false, true] {
            for strips in [
                [0, 0],
                [1, 0],
                [2, 3],
                [31, 1],
                [256, 64],
                [768, 768],
                [9496, 0],
            ] {
                for threads in [1, 2, 14] {
                    let items = strips.map(|s| item(s, tiles));
                    let (mut next, mut before) = ([0, 0], MAX_STRIPS);
                    for Run { item, first, count } in runs(&items, threads) {
                        assert_eq!(first, next[item]);
                        next[item] += count;
                        let ends = next[item] == strips[item];
                        assert!(ends || count <= before, "{strips:?} {threads}");
                        assert!(ends || !tiles || count % 2 == 0);
                        before = if ends { before } else { count };
                    }
                    assert_eq!(next, strips);
                }
            }
        }
    }

    #[test]
    fn token_blocks_are_even_and_whole_groups() {
        let cut = |m, tiles| token_blocks(m, tiles).collect::<Vec<_>>();
        assert_eq!(cut(0, false), []);
        assert_eq!(cut(512, false), [(0, 512)]);
        assert_eq!(cut(513, false), [(0, 288), (288, 225)]);
        assert_eq!(cut(513, true), [(0, 513)]);
        assert_eq!(cut(1100, true), [(0, 576), (576, 524)]);
    }
}
