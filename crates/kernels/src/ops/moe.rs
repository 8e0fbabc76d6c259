//! Feed-forward networks: gate, up, SwiGLU and down, dense or by experts.

use std::cmp::Reverse;

use super::{
    Compute,
    low_rank::Segment,
    matmul::{Item, Part, Run, TOLD_TOKENS, pieces, runs, token_blocks, with_scratch},
};
use crate::{
    acts::{Acts, ActsWriter, Forms, GROUP, TILE_GROUP},
    ahead::PIECES,
    disjoint::DisjointMut,
    profile::Op,
    strip::{ROWS, kernels::MAX_STRIPS},
    weights::Weights,
};

/// Columns of the intermediate that are made together: the q8 form's group.
const FF_UNIT: usize = 32;
/// The same in strips.
const FF_STRIPS: usize = FF_UNIT / ROWS;
/// What decoding weights to tiles costs, in tokens that are multiplied with them.
const DECODE_TOKENS: usize = 8;

/// Which experts each token uses, and with which weights.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Routing {
    /// Experts per token.
    pub used: usize,
    /// `[m][used]`, best first.
    pub ids: Vec<u32>,
    /// `[m][used]`.
    pub weights: Vec<f32>,
}

impl Routing {
    /// The number of an expert that somebody else computes: [`Compute::moe_ffn`] leaves such
    /// choices out.
    pub const ELSEWHERE: u32 = u32::MAX;

    /// The same choices, of which those are elsewhere whose expert is not in `kept`, which
    /// ascends.
    pub fn only(&self, kept: &[u32]) -> Routing {
        let here = |id: &u32| match kept.binary_search(id) {
            Ok(_) => *id,
            Err(_) => Routing::ELSEWHERE,
        };
        Routing {
            ids: self.ids.iter().map(here).collect(),
            ..self.clone()
        }
    }

    /// The choices as a device takes them that has the experts `kept` alone, numbered among
    /// these: the others weigh nothing, and go to all of them in turn.
    ///
    /// # Panics
    /// When `kept` is empty.
    pub fn among(&self, kept: &[u32]) -> Routing {
        let mut routing = self.clone();
        for (i, (id, weight)) in routing.ids.iter_mut().zip(&mut routing.weights).enumerate() {
            match kept.binary_search(id) {
                Ok(at) => *id = at as u32,
                Err(_) => (*id, *weight) = ((i % kept.len()) as u32, 0.0),
            }
        }
        routing
    }

    /// How many choices fall on each expert that is used, most first, then by number.
    pub fn counts(&self) -> Vec<(u32, usize)> {
        let mut ids = self.ids.clone();
        ids.sort_unstable();
        let run = |ids: &[u32]| (ids[0], ids.len());
        let mut counts: Vec<(u32, usize)> = ids.chunk_by(|a, b| a == b).map(run).collect();
        counts.sort_by_key(|&(id, n)| (Reverse(n), id));
        counts
    }

    /// The experts that are used, ascending, and the same choice with experts numbered among
    /// these.
    pub fn compact(&self) -> (Vec<u32>, Routing) {
        let mut chosen = self.ids.clone();
        chosen.sort_unstable();
        chosen.dedup();
        let number = |id: &u32| chosen.partition_point(|c| c < id) as u32;
        let ids = self.ids.iter().map(number).collect();
        let routing = Routing {
            ids,
            ..self.clone()
        };
        (chosen, routing)
    }
}

/// How [`Compute::route`] turns logits into weights.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct RouteOptions {
    /// Experts per token.
    pub used: usize,
    /// Whether the chosen experts' weights are scaled to sum to one.
    pub normalize: bool,
    /// Factor on the weights, 1 in most models.
    pub scale: f32,
}

/// Buffers of [`Compute::moe_ffn`] that are kept from call to call.
#[derive(Debug, Default)]
pub struct MoeScratch {
    gathered: Acts,
    hidden: Acts,
}

/// Tokens grouped by expert.
#[derive(Debug, PartialEq, Eq)]
struct Groups {
    /// Experts with tokens, most tokens first.
    segments: Vec<Segment>,
    /// Token of each assignment, ascending inside a segment.
    tokens: Vec<usize>,
    /// `[m][used]`: the assignment of a token's choice; out of range for one that is elsewhere.
    place: Vec<usize>,
}

impl Groups {
    fn new(routing: &Routing, m: usize, experts: usize) -> Groups {
        let used = routing.used;
        let mut counts = vec![0usize; experts];
        let here = |id: &&u32| **id != Routing::ELSEWHERE;
        for &id in routing.ids.iter().filter(here) {
            counts[id as usize] += 1;
        }
        let mut segments: Vec<Segment> = (0..experts)
            .filter(|&e| counts[e] > 0)
            .map(|expert| Segment {
                expert,
                start: 0,
                len: counts[expert],
            })
            .collect();
        segments.sort_by_key(|s| (Reverse(s.len), s.expert));
        let mut next = vec![0usize; experts];
        let mut start = 0;
        for s in &mut segments {
            s.start = start;
            next[s.expert] = start;
            start += s.len;
        }
        let mut tokens = vec![0; start];
        let mut place = vec![usize::MAX; m * used];
        for (i, &id) in routing.ids.iter().enumerate() {
            if id == Routing::ELSEWHERE {
                continue;
            }
            let at = &mut next[id as usize];
            tokens[*at] = i / used;
            place[i] = *at;
            *at += 1;
        }
        Groups {
            segments,
            tokens,
            place,
        }
    }
}

impl Compute {
    /// Chooses the `used` best experts of each token: softmax over all `n_expert` logits,
    /// then the largest, ties to the lower id; a NaN is less than any number.
    ///
    /// `logits` is `[m][n_expert]`.
    ///
    /// # Panics
    /// When `used` is 0 or more than `n_expert`, or `logits` has the wrong length.
    pub fn route(&self, logits: &[f32], n_expert: usize, options: &RouteOptions) -> Routing {
        let _span = self.profile.span(Op::Route);
        let used = options.used;
        assert!(used > 0 && used <= n_expert && logits.len().is_multiple_of(n_expert));
        let m = logits.len() / n_expert;
        let mut ids = vec![0; m * used];
        let mut weights = vec![0.0; m * used];
        let (ids_out, weights_out) = (DisjointMut::new(&mut ids), DisjointMut::new(&mut weights));
        let one = |t: usize| {
            let logits = &logits[t * n_expert..(t + 1) * n_expert];
            let range = t * used..(t + 1) * used;
            // SAFETY: every token has its own range.
            let (ids, weights) =
                unsafe { (ids_out.slice(range.clone()), weights_out.slice(range)) };
            route_token(logits, options, ids, weights);
        };
        if m * n_expert < 2048 {
            (0..m).for_each(one);
        } else {
            let chunk = 2048_usize.div_ceil(n_expert);
            self.pool.run(m.div_ceil(chunk), &|task| {
                (task * chunk..m.min((task + 1) * chunk)).for_each(one);
            });
        }
        Routing { used, ids, weights }
    }

    /// SwiGLU's first half for all tokens and one matrix each: `hidden = silu(x · gateᵀ) *
    /// (x · upᵀ)` in the form that `down` takes, ready for `matmul(down, hidden, …)`. One
    /// dispatch.
    ///
    /// # Panics
    /// When shapes disagree or `x` lacks a form that the weights take.
    pub fn gate_up(
        &self,
        x: &Acts,
        gate: &Weights,
        up: &Weights,
        down: &Weights,
        hidden: &mut Acts,
    ) {
        let _span = self.profile.span(Op::GateUp);
        let segments = [Segment::whole(x.m())];
        let segments = if x.m() == 0 {
            &segments[..0]
        } else {
            &segments
        };
        assert_eq!((gate.experts(), up.experts(), down.experts()), (1, 1, 1));
        let writer = hidden.begin(x.m(), gate.n(), self.forms(x.m(), [down]));
        let beside = || self.ahead([down], x.m());
        self.gate_up_segments(x, segments, false, gate, up, down, &writer, beside);
    }

    /// What the dispatch of gate and up is cut from.
    fn gate_up_items(&self, gate: &Weights, segments: &[Segment]) -> Vec<Item> {
        let item = |s: &Segment| {
            let tiles = self.table.matmul.tiles_for(gate, s.len).is_some();
            Item {
                strips: gate.strips(),
                cost: s.len + DECODE_TOKENS,
                // One token reads several strips at once.
                most: match (tiles, s.len) {
                    (true, _) => MAX_STRIPS,
                    (false, 1) => 2 * FF_STRIPS,
                    (false, _) => FF_STRIPS,
                },
                least: FF_STRIPS,
            }
        };
        segments.iter().map(item).collect()
    }

    /// Has threads ask for the experts' gates that they begin with.
    fn ahead_of_gates(&self, gate: &Weights, segments: &[Segment]) {
        let threads = self.pool.threads();
        let items = self.gate_up_items(gate, segments);
        let first = runs(&items, threads).take(threads).enumerate();
        self.pool.ahead(first.flat_map(|(thread, run)| {
            let part = Part {
                w: gate,
                expert: segments[run.item].expert,
                first: run.first,
                count: run.count,
            };
            pieces(part, run.count).map(move |piece| (thread, piece))
        }));
    }

    /// Gate, up and SwiGLU of every segment; `shared` says that all segments are the one
    /// token of `x`. The caller runs `beside` while other threads multiply.
    #[allow(clippy::too_many_arguments)]
    fn gate_up_segments(
        &self,
        x: &Acts,
        segments: &[Segment],
        shared: bool,
        gate: &Weights,
        up: &Weights,
        down: &Weights,
        hidden: &ActsWriter<'_>,
        beside: impl FnOnce(),
    ) {
        let n_ff = gate.n();
        assert_eq!((up.n(), up.k(), gate.k()), (n_ff, x.k(), x.k()));
        assert_eq!(down.k(), n_ff);
        assert_eq!(
            (gate.experts(), up.experts()),
            (down.experts(), down.experts())
        );
        for s in segments {
            let view = if shared {
                x.view()
            } else {
                x.segment(s.start, s.len)
            };
            self.observed(gate, s.expert, &view);
            self.observed(up, s.expert, &view);
        }
        let lows = &self.lower([gate, up], x, segments, shared);
        let (kernels, float) = (&self.table.matmul, &self.table.float);
        let items = self.gate_up_items(gate, segments);
        let tasks: Vec<Run> = runs(&items, self.pool.threads()).collect();
        let multiply = |task: usize| {
            let Run { item, first, count } = tasks[task];
            let segment = segments[item];
            let Segment { expert, start, len } = segment;
            let (strips, first_col) = (count, first * ROWS);
            let [gate, up] = [gate, up].map(|w| Part {
                w,
                expert,
                first,
                count,
            });
            let forms = self.forms(len, [down]);
            let view = if shared {
                x.view()
            } else {
                x.segment(start, len)
            };
            with_scratch(|scratch| {
                for (first, m) in token_blocks(len, kernels.tiles_for(gate.w, len).is_some()) {
                    let acts = (view.slice(first, m), len);
                    let values = strips * m * ROWS;
                    scratch.tile.fit(3 * values);
                    scratch.mul(kernels, gate, Some(up), acts, 0);
                    scratch.mul(kernels, up, None, acts, values);
                    let (tokens, spare) = ((segment, first, m), 2 * values);
                    scratch.add_lows(kernels, gate, (lows, 0), tokens, 0, spare);
                    scratch.add_lows(kernels, up, (lows, 1), tokens, values, spare);
                    let (gate, rest) = scratch.tile[..3 * values].split_at_mut(values);
                    let (up, both) = rest.split_at_mut(values);
                    if let (Forms::TILES, Some(tiles)) = (forms, &kernels.tiles) {
                        // `k` of the tile form is whole pairs of strips, and so are all runs.
                        for (t, c) in (0..m)
                            .step_by(TILE_GROUP)
                            .flat_map(|t| (0..strips).step_by(FF_STRIPS).map(move |c| (t, c)))
                        {
                            let col = first_col + c * ROWS;
                            let (out, tokens) = hidden.tile((start, len), first + t, col);
                            let at = (c * m + t) * ROWS;
                            let [gate, up] = [&gate[at..], &up[at..]];
                            assert!(gate.len() >= (m + tokens) * ROWS);
                            // SAFETY: the table's tier was checked; two strips are there, and
                            // tasks write columns or segments of their own.
                            unsafe {
                                let [gate, up] = [gate, up].map(<[f32]>::as_ptr);
                                (tiles.swiglu)(gate, up, m * ROWS, tokens, out);
                            }
                        }
                        continue;
                    }
                    // SAFETY: the table's tier was checked.
                    unsafe { (float.swiglu)(gate, up, both) };
                    for t in 0..m {
                        for c in (0..strips).step_by(FF_STRIPS) {
                            let col = first_col + c * ROWS;
                            let mut unit = [0f32; FF_UNIT];
                            let h = &mut unit[..FF_UNIT.min(n_ff - col)];
                            // SAFETY: as above; tasks write columns or segments of their own.
                            unsafe {
                                (float.gather)(&both[(c * m + t) * ROWS..], m * ROWS, h, false);
                                hidden.put(kernels, forms, (start, len), first + t, col, h);
                            }
                        }
                    }
                }
            });
        };
        self.pool.run_beside(tasks.len(), &multiply, beside);
    }

    /// A mixture-of-experts feed-forward: adds to every token's row of `out`, `[m][down.n()]`,
    /// the sum over its experts, in the order of `routing`, of `weight * down(silu(gate(x)) *
    /// up(x))`. `x` is `[m][gate.k()]`. Three dispatches: tokens to experts, gate and up, down.
    ///
    /// A token's result depends on neither the other tokens nor the threads. Choices that are
    /// [`Routing::ELSEWHERE`] add nothing.
    ///
    /// # Panics
    /// When shapes disagree or an expert does not exist.
    #[allow(clippy::too_many_arguments)]
    pub fn moe_ffn(
        &self,
        x: &[f32],
        routing: &Routing,
        gate: &Weights,
        up: &Weights,
        down: &Weights,
        scratch: &mut MoeScratch,
        out: &mut [f32],
    ) {
        self.moe_ffn_beside(x, routing, gate, up, down, scratch, out, || {});
    }

    /// The same; the caller runs `beside` while other threads have begun with the last dispatch.
    ///
    /// # Panics
    /// As [`Compute::moe_ffn`].
    #[allow(clippy::too_many_arguments)]
    pub fn moe_ffn_beside(
        &self,
        x: &[f32],
        routing: &Routing,
        gate: &Weights,
        up: &Weights,
        down: &Weights,
        scratch: &mut MoeScratch,
        out: &mut [f32],
        beside: impl FnOnce(),
    ) {
        let _span = self.profile.span(Op::Experts);
        let (k, used, n) = (gate.k(), routing.used, down.n());
        let m = x.len() / k;
        assert_eq!(x.len(), m * k);
        assert_eq!(
            (routing.ids.len(), routing.weights.len()),
            (m * used, m * used)
        );
        assert_eq!(out.len(), m * n);
        if m == 0 || used == 0 {
            return beside();
        }
        let groups = Groups::new(routing, m, gate.experts());
        let assigned = groups.tokens.len();
        if assigned == 0 {
            return beside();
        }
        let told = m <= TOLD_TOKENS;
        if told {
            self.ahead_of_gates(gate, &groups.segments);
        }
        let kernels = &self.table.matmul;
        // A single token serves all its experts as it is.
        let shared = m == 1 && groups.segments.iter().all(|s| s.len == 1);
        let all = |weights: &[&Weights]| {
            let forms = |f, s: &Segment| f | self.forms(s.len, weights.iter().copied());
            groups.segments.iter().fold(Forms::NONE, forms)
        };
        if shared {
            self.prepare(&mut scratch.gathered, x, 1, k, all(&[gate, up]));
        } else {
            let writer = scratch.gathered.begin(assigned, k, all(&[gate, up]));
            let owner: Vec<(usize, usize)> = groups
                .segments
                .iter()
                .flat_map(|s| vec![(s.start, s.len); s.len])
                .collect();
            self.pool.run(assigned.div_ceil(GROUP), &|task| {
                let first = task * GROUP;
                for (a, &(start, len)) in owner.iter().enumerate().skip(first).take(GROUP) {
                    let forms = self.forms(len, [gate, up]);
                    let from = groups.tokens[a];
                    let x = &x[from * k..(from + 1) * k];
                    // SAFETY: every assignment is a token of its own.
                    unsafe { writer.put(kernels, forms, (start, len), a - start, 0, x) };
                }
            });
        }
        let writer = scratch.hidden.begin(assigned, gate.n(), all(&[down]));
        let tiles = |m| kernels.tiles_for(down, m).is_some();
        // With tiles strips are multiplied in pairs, and one token reads two at once.
        let run = if shared || tiles(m) { 2 } else { 1 };
        let tasks = down.strips().div_ceil(run);
        let part_of = |task: usize, s: &Segment| Part {
            w: down,
            expert: s.expert,
            first: task * run,
            count: run.min(down.strips() - task * run),
        };
        let ahead_of_downs = || {
            let threads = self.pool.threads().min(tasks);
            self.pool.ahead((0..threads).flat_map(|thread| {
                let segments = groups.segments.iter().take(PIECES / run);
                segments
                    .flat_map(move |s| pieces(part_of(thread, s), PIECES))
                    .map(move |piece| (thread, piece))
            }));
        };
        let (gathered, segments) = (&scratch.gathered, &groups.segments[..]);
        self.gate_up_segments(gathered, segments, shared, gate, up, down, &writer, || {
            if told {
                ahead_of_downs();
            }
        });

        let hidden = &scratch.hidden;
        for s in &groups.segments {
            self.observed(down, s.expert, &hidden.segment(s.start, s.len));
        }
        let lows = &self.lower([down], hidden, &groups.segments, false);
        let y = DisjointMut::new(out);
        // The block of tokens, first and count, that each assignment is multiplied in.
        let mut blocks = Vec::with_capacity(assigned);
        for &Segment { start, len, .. } in &groups.segments {
            for (first, count) in token_blocks(len, tiles(len)) {
                blocks.extend(std::iter::repeat_n((start + first, count), count));
            }
        }
        let multiply = |task: usize| {
            let first_strip = task * run;
            let strips = run.min(down.strips() - first_strip);
            let row = first_strip * ROWS;
            let rows = (strips * ROWS).min(n - row);
            with_scratch(|scratch| {
                let values = assigned * strips * ROWS;
                scratch.tile.fit(values + lows.spare(values));
                let part = |s: &Segment| part_of(task, s);
                for (i, s) in groups.segments.iter().enumerate() {
                    // An expert's strips are short: the next ones' beginnings come meanwhile.
                    let next = groups.segments.get(i + 1).map(part);
                    for (first, count) in token_blocks(s.len, tiles(s.len)) {
                        let acts = hidden.segment(s.start, s.len).slice(first, count);
                        let at = (s.start + first) * strips * ROWS;
                        scratch.mul(kernels, part(s), next, (acts, s.len), at);
                        let tokens = (*s, first, count);
                        scratch.add_lows(kernels, part(s), (lows, 0), tokens, at, values);
                    }
                }
                for t in 0..m {
                    let mut sums = [[0f32; ROWS]; 2];
                    let mut any = false;
                    for choice in t * used..(t + 1) * used {
                        let weight = routing.weights[choice];
                        let a = groups.place[choice];
                        let Some(&(first, count)) = blocks.get(a) else {
                            continue;
                        };
                        any = true;
                        for (s, sum) in sums[..strips].iter_mut().enumerate() {
                            let at = (first * strips + s * count + a - first) * ROWS;
                            for (sum, &v) in sum.iter_mut().zip(&scratch.tile[at..at + ROWS]) {
                                *sum += weight * v;
                            }
                        }
                    }
                    if !any {
                        continue;
                    }
                    // SAFETY: every strip of rows is one task's.
                    let dst = unsafe { y.slice(t * n + row..t * n + row + rows) };
                    let sums = &sums.as_flattened()[..rows];
                    dst.iter_mut().zip(sums).for_each(|(y, s)| *y += s);
                }
            });
        };
        self.pool.run_beside(tasks, &multiply, beside);
    }
}

/// Routes one token.
fn route_token(logits: &[f32], options: &RouteOptions, ids: &mut [u32], weights: &mut [f32]) {
    let key = |v: f32| if v.is_nan() { f32::NEG_INFINITY } else { v };
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let compare = |a: &u32, b: &u32| {
        let (x, y) = (key(logits[*a as usize]), key(logits[*b as usize]));
        y.total_cmp(&x).then(a.cmp(b))
    };
    if options.used < order.len() {
        order.select_nth_unstable_by(options.used - 1, compare);
    }
    order[..options.used].sort_unstable_by(compare);
    ids.copy_from_slice(&order[..options.used]);
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f32 = logits.iter().map(|&v| (v - largest).exp()).sum();
    for (w, &id) in weights.iter_mut().zip(ids.iter()) {
        *w = (logits[id as usize] - largest).exp() / total;
    }
    if options.normalize {
        let total: f32 = weights.iter().sum();
        weights.iter_mut().for_each(|w| *w /= total);
    }
    weights.iter_mut().for_each(|w| *w *= options.scale);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grouping_keeps_every_choice_and_skips_idle_experts() {
        let routing = Routing {
            used: 2,
            ids: vec![3, 1, 1, 0, 3, 1],
            weights: vec![0.5; 6],
        };
        let g = Groups::new(&routing, 3, 5);
        let lens: Vec<_> = g
            .segments
            .iter()
            .map(|s| (s.expert, s.start, s.len))
            .collect();
        assert_eq!(lens, [(1, 0, 3), (3, 3, 2), (0, 5, 1)]);
        assert_eq!(g.tokens, [0, 1, 2, 0, 2, 1]);
        for (choice, &at) in g.place.iter().enumerate() {
            assert_eq!(g.tokens[at], choice / 2);
        }
    }

    #[test]
    fn compact_routing_names_the_same_experts() {
        let routing = Routing {
            used: 2,
            ids: vec![7, 1, 1, 40, 7, 3],
            weights: vec![0.5; 6],
        };
        let (chosen, compact) = routing.compact();
        assert_eq!(chosen, [1, 3, 7, 40]);
        assert_eq!(compact.ids, [2, 0, 0, 3, 2, 1]);
        let back: Vec<u32> = compact.ids.iter().map(|i| chosen[*i as usize]).collect();
        assert_eq!(back, routing.ids);
        assert_eq!(compact.weights, routing.weights);
    }

    #[test]
    fn a_split_routing_is_the_whole_in_two_parts() {
        let routing = Routing {
            used: 2,
            ids: vec![7, 1, 1, 40, 7, 3],
            weights: vec![0.5, 0.25, 0.75, 0.125, 1.0, 2.0],
        };
        assert_eq!(routing.counts(), [(1, 2), (7, 2), (3, 1), (40, 1)]);
        let none = Routing::ELSEWHERE;
        let here = routing.only(&[3, 7]);
        assert_eq!(here.ids, [7, none, none, none, 7, 3]);
        assert_eq!(here.weights, routing.weights);
        let there = routing.among(&[1, 40]);
        assert_eq!(there.ids, [0, 0, 0, 1, 0, 1]);
        assert_eq!(there.weights, [0.0, 0.25, 0.75, 0.125, 0.0, 0.0]);
        let g = Groups::new(&here, 3, 41);
        assert_eq!((g.tokens.len(), g.segments.len()), (3, 2));
        assert_eq!(g.tokens, [0, 2, 2]);
        let out = usize::MAX;
        assert_eq!(g.place, [0, out, out, out, 1, 2]);
    }

    #[test]
    fn routing_prefers_large_logits_then_low_ids() {
        let options = RouteOptions {
            used: 3,
            normalize: true,
            scale: 1.0,
        };
        let (mut ids, mut weights) = ([0; 3], [0.0; 3]);
        route_token(
            &[1.0, 3.0, f32::NAN, 1.0, 1.0],
            &options,
            &mut ids,
            &mut weights,
        );
        assert_eq!(ids, [1, 0, 3]);
        route_token(&[1.0, 3.0, 0.0, 1.0, 1.0], &options, &mut ids, &mut weights);
        assert!((weights.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        assert!((weights[0] / weights[1] - 2f32.exp()).abs() < 1e-4);
        assert_eq!(weights[1], weights[2]);
    }
}
