//! Writing the KV cache and attending to it.

use super::{Compute, matmul::WRITE_AHEAD};
use crate::{
    acts::{Acts, ActsWriter, Forms, TILE_GROUP},
    attn::{CHUNK, ChunkArgs, TILE_CHUNK, TileAttention, TileChunk, TileScratch},
    disjoint::DisjointMut,
    kv::{
        KV_PAGE, KvCache, PageTable,
        pruned::{Half, PackScratch},
        write::TOGETHER,
    },
    mem::{self, AlignedVec},
    profile::Op,
};
use std::{cell::RefCell, collections::HashSet, ops::Range};

/// Where a token of a batch stands: its sequence (an index into the tables that are passed
/// beside) and its position there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Token {
    pub sequence: usize,
    pub position: usize,
}

/// Query rows that a task handles together, so that they share the reading of K and V.
const TASK_ROWS: usize = 32;

/// What writing a value of a key or value to the cache costs, in values of a sum: each of a
/// key goes to a line of its own. Four heads of 128 are shared out: the caller alone took 16 us for
/// them where several threads took 7 for eight (`docs/bench/2026-11-28-h200-d`).
const STORE_COST: usize = 64;

/// Cuts tokens, given by their pages, where the page changes; not at all if one comes again.
fn page_runs(pages: impl Iterator<Item = u32>) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    let (mut seen, mut last) = (HashSet::new(), None);
    let mut again = false;
    for (t, page) in pages.enumerate() {
        match runs.last_mut() {
            Some(run) if last == Some(page) => run.end = t + 1,
            _ => runs.push(t..t + 1),
        }
        again |= last != Some(page) && !seen.insert(page);
        last = Some(page);
    }
    if again {
        let all = 0..runs.last().map_or(0, |run| run.end);
        return vec![all];
    }
    runs
}

/// A run of neighbouring tokens of one sequence.
#[derive(Clone, Copy)]
struct Block {
    first: usize,
    count: usize,
    /// Positions that its last token sees.
    reach: usize,
}

/// Weighted values of some positions, rows of `[dim]`, and the rows' maxima and then their sums.
#[derive(Default)]
struct Part {
    acc: Vec<f32>,
    stats: Vec<f32>,
}

impl Part {
    /// Nothing yet, of so many rows.
    fn clear(&mut self, rows: usize, dim: usize) {
        self.acc.clear();
        self.acc.resize(rows * dim, 0.0);
        self.stats.clear();
        self.stats.resize(rows, f32::NEG_INFINITY);
        self.stats.resize(2 * rows, 0.0);
    }

    /// Adds another part, of `acc` and `stats`: both are rescaled to the larger maximum.
    fn add(&mut self, acc: &[f32], stats: &[f32], dim: usize) {
        let rows = stats.len() / 2;
        let (max, sum) = stats.split_at(rows);
        let (own_max, own_sum) = self.stats.split_at_mut(rows);
        for row in 0..rows {
            if sum[row] == 0.0 {
                continue;
            }
            let new = own_max[row].max(max[row]);
            let (old, add) = ((own_max[row] - new).exp(), (max[row] - new).exp());
            own_max[row] = new;
            own_sum[row] = own_sum[row] * old + sum[row] * add;
            let own = &mut self.acc[row * dim..(row + 1) * dim];
            for (own, acc) in own.iter_mut().zip(&acc[row * dim..]) {
                *own = *own * old + acc * add;
            }
        }
    }
}

#[derive(Default)]
struct Scratch {
    q: Vec<f32>,
    visible: Vec<usize>,
    scores: Vec<f32>,
    /// What a chunk left, what its span has so far, and what all spans have.
    chunk: Part,
    span: Part,
    total: Part,
    /// Queries as tiles.
    q_tiles: AlignedVec<u16>,
    /// Weighted values on tiles, rows of `[dim]`, and the rows' maxima and then their sums.
    sums: AlignedVec<f32>,
    stats: Vec<f32>,
    tiles: TileScratch,
    /// Pruned pages made dense, for tiles, and memory for packing some.
    unpacked: [Vec<u8>; 2 * TILE_PAGES],
    packing: PackScratch,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
    /// What the spans of a call leave: of each the weighted values, maxima and sums of all rows.
    static PARTIAL: RefCell<AlignedVec<f32>> = RefCell::default();
}

/// Chunks are merged in spans and spans in order, wherever they were computed, so that tasks may be
/// cut at any span. The first chunks are spans of their own: short contexts have few.
const SINGLE: usize = 8;

/// Chunks of each span behind those: what is left to merge is one part for all of them, and the
/// first one alone is read without having been asked for.
const SPAN: usize = 8;

/// The span of a chunk.
fn span_of(chunk: usize) -> usize {
    match chunk.checked_sub(SINGLE) {
        None => chunk,
        Some(behind) => SINGLE + behind / SPAN,
    }
}

/// The chunks of a span.
fn chunks_of(span: usize) -> Range<usize> {
    match span.checked_sub(SINGLE) {
        None => span..span + 1,
        Some(behind) => SINGLE + behind * SPAN..SINGLE + (behind + 1) * SPAN,
    }
}

/// Pages of a chunk at most.
const TILE_PAGES: usize = TILE_CHUNK / KV_PAGE;

/// K and V of the pages of one chunk.
type Pages<'a> = [(&'a [u8], &'a [u8]); TILE_PAGES];

/// What packing a value costs, in values of a sum.
const PACK_COST: usize = 16;

impl Block {
    fn tokens(&self) -> Range<usize> {
        self.first..self.first + self.count
    }

    /// Chunks that its last token sees.
    fn chunks(&self) -> usize {
        self.reach.div_ceil(CHUNK)
    }

    /// Spans that its last token sees.
    fn spans(&self) -> usize {
        span_of(self.chunks() - 1) + 1
    }

    /// Its chunks in a span.
    fn chunks_of(&self, span: usize) -> Range<usize> {
        let chunks = chunks_of(span);
        chunks.start..chunks.end.min(self.chunks())
    }
}

/// Where attention goes.
pub enum Attended<'a> {
    /// `[m][heads][dim]`
    Rows(&'a mut [f32]),
    /// In the forms that the next product takes; heads are whole groups of 32.
    Acts(&'a mut Acts, Forms),
}

/// The same, open for all tasks.
enum Out<'a> {
    Rows(DisjointMut<'a, f32>),
    Acts(ActsWriter<'a>, Forms),
}

/// What is common to all tasks of one call.
struct Call<'a> {
    compute: &'a Compute,
    cache: &'a KvCache,
    layer: usize,
    tables: &'a [&'a PageTable],
    tokens: &'a [Token],
    q: &'a [f32],
    heads: usize,
    scale: f32,
    /// Tasks that the query heads of a KV head are shared out to.
    parts: usize,
}

impl Compute {
    /// Writes K and V (`[m][kv_heads][dim]`) of `tokens` into a layer of the cache. The
    /// positions must be filled or reserved in their tables. A cache that prunes has those
    /// pages packed, too, whose last position is among them.
    ///
    /// # Panics
    /// When lengths disagree or a position is beyond its table.
    pub fn kv_store<'a>(
        &self,
        cache: &mut KvCache,
        layer: usize,
        tables: &[&PageTable],
        tokens: &[Token],
        k: &'a [f32],
        v: &'a [f32],
    ) {
        let _span = self.profile.span(Op::KvStore);
        let (heads, dim) = (cache.shape().heads, cache.shape().dim);
        assert!(k.len() == tokens.len() * heads * dim && v.len() == k.len());
        assert!(tokens.iter().all(|t| t.position < tables[t.sequence].len()));
        let at = layer;
        let mut layer = cache.layer_mut(layer);
        let writer = layer.writer();
        let row = |x: &'a [f32], t: usize, head: usize| &x[(t * heads + head) * dim..][..dim];
        let write = |head: usize, range: Range<usize>| {
            let mut t = range.start;
            while t < range.end {
                let Token { sequence, position } = tokens[t];
                let (page, slot) = (tables[sequence].page(position), position % KV_PAGE);
                let follows = |(i, next): (usize, &Token)| {
                    (next.sequence, next.position) == (sequence, position + i)
                };
                let together = slot + TOGETHER <= KV_PAGE
                    && t + TOGETHER <= range.end
                    && tokens[t..t + TOGETHER].iter().enumerate().all(follows);
                for t in (t..range.end).skip(TOGETHER).take(TOGETHER) {
                    mem::prefetch(row(k, t, head));
                    mem::prefetch(row(v, t, head));
                }
                // SAFETY: tasks have a head of their own, or pages of their own.
                unsafe {
                    if together {
                        let of = |x| std::array::from_fn(|i| row(x, t + i, head));
                        writer.put_together(page, slot, head, of(k), of(v));
                        t += TOGETHER;
                    } else {
                        writer.put(page, slot, head, row(k, t, head), row(v, t, head));
                        t += 1;
                    }
                }
            }
        };
        // Neighbouring positions of a head share cache lines, pages share none.
        let runs = page_runs(tokens.iter().map(|t| tables[t.sequence].page(t.position)));
        let longest = runs.iter().map(Range::len).max().unwrap_or(0);
        let cost = longest * dim * STORE_COST;
        // Each task writes one head of its pages: nobody else touches them.
        self.for_each(heads * runs.len(), cost, &|task| {
            write(task % heads, runs[task / heads].clone());
        });
        self.kv_pack(cache, at, tables, tokens);
    }

    /// Packs the pages that these tokens have filled.
    fn kv_pack(&self, cache: &mut KvCache, layer: usize, tables: &[&PageTable], tokens: &[Token]) {
        let (heads, dim) = (cache.shape().heads, cache.shape().dim);
        let Some(packing) = cache.packing(layer) else {
            return;
        };
        let last = |t: &&Token| t.position % KV_PAGE == KV_PAGE - 1;
        let full: Vec<(u32, u32)> = tokens
            .iter()
            .filter(last)
            .map(|t| {
                let table = tables[t.sequence];
                (table.page(t.position), table.packed(t.position / KV_PAGE))
            })
            .collect();
        self.for_each(heads * full.len(), KV_PAGE * dim * PACK_COST, &|task| {
            let (from, to) = full[task / heads];
            SCRATCH.with_borrow_mut(|scratch| {
                // SAFETY: a page is filled once, and each task has a head of its own.
                unsafe { packing.pack(from, to, task % heads, &mut scratch.packing) };
            });
        });
    }

    /// Causal attention of each token to the positions of its sequence up to its own.
    ///
    /// `q` and what comes out are `[m][heads][dim]`; query heads share KV heads in runs of
    /// `heads / kv_heads`. The result for a token depends on nothing but its query and its
    /// sequence.
    ///
    /// # Panics
    /// When lengths disagree, `heads` is no multiple of the KV heads, a position is beyond its
    /// table, or heads that are no whole groups go to [`Attended::Acts`].
    #[allow(clippy::too_many_arguments)]
    pub fn attention(
        &self,
        cache: &KvCache,
        layer: usize,
        tables: &[&PageTable],
        tokens: &[Token],
        q: &[f32],
        heads: usize,
        scale: f32,
        out: Attended<'_>,
    ) {
        let _span = self.profile.span(Op::Attention);
        let shape = cache.shape();
        let (dim, kv_heads) = (shape.dim, shape.heads);
        assert_eq!(q.len(), tokens.len() * heads * dim);
        let out = match out {
            Attended::Rows(rows) => {
                assert_eq!(rows.len(), q.len());
                Out::Rows(DisjointMut::new(rows))
            }
            Attended::Acts(acts, forms) => {
                assert!(dim.is_multiple_of(32));
                Out::Acts(acts.begin(tokens.len(), heads * dim, forms), forms)
            }
        };
        assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads));
        assert!(tokens.iter().all(|t| t.position < tables[t.sequence].len()));
        if tokens.is_empty() {
            return;
        }
        let mut call = Call {
            compute: self,
            cache,
            layer,
            tables,
            tokens,
            q,
            heads,
            scale,
            parts: 1,
        };
        let group = heads / kv_heads;
        if let Some(tiles) = self.table.attn.tiles_for(dim, tokens.len()) {
            return self.on_tiles(&call, tiles, &out);
        }
        let blocks = call.blocks((TASK_ROWS / group).max(1));
        let longest = blocks.iter().map(Block::spans).max().unwrap_or(0);
        if longest == 1 {
            // Few positions are read quickly, by several threads too.
            let mut parts = (1..=group).filter(|parts| group.is_multiple_of(*parts));
            let enough = |parts: &usize| blocks.len() * kv_heads * parts >= self.pool.threads();
            call.parts = parts.find(enough).unwrap_or(group);
        }
        let call = call;
        let (group, units) = (call.group(), blocks.len() * kv_heads * call.parts);
        if longest == 1 || units >= 2 * self.pool.threads() {
            self.pool.run(units, &|unit| {
                let (block, head) = call.unit(&blocks, unit);
                SCRATCH.with_borrow_mut(|scratch| {
                    call.begin(scratch, block, head);
                    scratch.total.clear(block.count * group, dim);
                    for span in 0..block.spans() {
                        let beside = (span > 0, span + 1 < block.spans());
                        call.span(scratch, block, head, span, beside);
                        let Scratch { span, total, .. } = scratch;
                        total.add(&span.acc, &span.stats, dim);
                    }
                    let Part { acc, stats } = &scratch.total;
                    // SAFETY: a block and a head belong to one task.
                    unsafe { call.finish(acc, stats, block.tokens(), call.heads_of(head), &out) };
                });
            });
            return;
        }
        self.split_spans(&call, &blocks, longest, &out);
    }

    /// Many queries: all chunks of a block and head in one task, on tiles.
    fn on_tiles(&self, call: &Call<'_>, tiles: &TileAttention, out: &Out<'_>) {
        let kv_heads = call.cache.shape().heads;
        // Reading and converting the cache is shared by a task's rows; but every thread
        // should find several tasks.
        let wanted = 4 * self.pool.threads();
        let units = |rows| call.tokens.len() * call.group() / rows * kv_heads;
        let rows = [256, 128, 64]
            .into_iter()
            .find(|&rows| units(rows) >= wanted);
        let mut blocks = call.blocks((rows.unwrap_or(32) / call.group()).max(1));
        // The longest first, so that no thread is left alone with one.
        blocks.sort_by_key(|b| std::cmp::Reverse(b.reach));
        self.pool.run(blocks.len() * kv_heads, &|unit| {
            let (block, head) = call.unit(&blocks, unit);
            SCRATCH.with_borrow_mut(|scratch| {
                call.begin_tiles(scratch, block, head);
                for chunk in 0..block.reach.div_ceil(TILE_CHUNK) {
                    call.tile_chunk(scratch, tiles, block, head, chunk);
                }
                let Scratch { sums, stats, .. } = scratch;
                // SAFETY: a block and a head belong to one task.
                unsafe { call.finish(sums, stats, block.tokens(), call.heads_of(head), out) };
            });
        });
    }

    /// Few queries, long context: spans are spread over the threads, and what they leave is
    /// merged afterwards in the same order and with the same arithmetic as above.
    fn split_spans(&self, call: &Call<'_>, blocks: &[Block], longest: usize, out: &Out<'_>) {
        let (dim, kv_heads) = (call.cache.shape().dim, call.cache.shape().heads);
        let rows = blocks.iter().map(|b| b.count).max().unwrap_or(0) * call.group();
        let part = rows * (dim + 2);
        let units = blocks.len() * kv_heads;
        // The short ones last, so that all threads end together.
        let mut spans = Vec::with_capacity(units * longest);
        for some in [SINGLE..longest, 0..longest.min(SINGLE)] {
            for unit in 0..units {
                let own = call.unit(blocks, unit).0.spans();
                spans.extend(some.clone().filter(|&s| s < own).map(|s| (unit, s)));
            }
        }
        PARTIAL.with_borrow_mut(|partial| {
            partial.fit(units * longest * part);
            {
                let partial = DisjointMut::new(&mut partial[..units * longest * part]);
                self.pool.run(spans.len(), &|task| {
                    let (unit, span) = spans[task];
                    let (block, head) = call.unit(blocks, unit);
                    // Nobody has asked for what comes first.
                    mem::prefetch(call.first_keys(block, head, chunks_of(span).start));
                    SCRATCH.with_borrow_mut(|scratch| {
                        call.begin(scratch, block, head);
                        call.span(scratch, block, head, span, (false, false));
                        let at = (unit * longest + span) * part;
                        // SAFETY: each span has a part of its own.
                        let to = unsafe { partial.slice(at..at + part) };
                        let (acc, stats) = to.split_at_mut(rows * dim);
                        let Part {
                            acc: own,
                            stats: own_stats,
                        } = &scratch.span;
                        acc[..own.len()].copy_from_slice(own);
                        stats[..own_stats.len()].copy_from_slice(own_stats);
                    });
                });
            }
            // A query head is a task: what others have left takes long to come.
            let group = call.group();
            self.pool.run(units * group, &|task| {
                let (unit, i) = (task / group, task % group);
                let (block, head) = call.unit(blocks, unit);
                let own = block.count * group;
                SCRATCH.with_borrow_mut(|Scratch { total, .. }| {
                    for t in 0..block.count {
                        let row = t * group + i;
                        total.clear(1, dim);
                        for span in 0..block.spans() {
                            let at = (unit * longest + span) * part;
                            let (acc, stats) = partial[at..at + part].split_at(rows * dim);
                            let stats = [stats[row], stats[own + row]];
                            total.add(&acc[row * dim..(row + 1) * dim], &stats, dim);
                        }
                        let (t, h) = (block.first + t, head * group + i);
                        // SAFETY: a token and a query head belong to one task.
                        unsafe { call.finish(&total.acc, &total.stats, t..t + 1, h..h + 1, out) };
                    }
                });
            });
        });
    }
}

/// Cuts a batch into runs of at most `limit` neighbours of one sequence, and where `together`
/// doesn't hold of the run's first and the next one.
fn blocks(tokens: &[Token], limit: usize, together: impl Fn(&Token, &Token) -> bool) -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    for (i, token) in tokens.iter().enumerate() {
        let reach = token.position + 1;
        match blocks.last_mut() {
            Some(b)
                if b.count < limit
                    && tokens[b.first].sequence == token.sequence
                    && together(&tokens[b.first], token) =>
            {
                b.count += 1;
                b.reach = b.reach.max(reach);
            }
            _ => blocks.push(Block {
                first: i,
                count: 1,
                reach,
            }),
        }
    }
    blocks
}

impl Call<'_> {
    /// Cuts the batch into blocks of at most `limit` tokens. In a cache that prunes, these see
    /// the same page as it is, and so the same pages packed.
    fn blocks(&self, limit: usize) -> Vec<Block> {
        let prunes = self.cache.halves().is_some();
        let page = |t: &Token| t.position / KV_PAGE;
        blocks(self.tokens, limit, |a, b| !prunes || page(a) == page(b))
    }

    /// Query heads that a task takes together.
    fn group(&self) -> usize {
        self.heads / self.cache.shape().heads / self.parts
    }

    /// A unit of the work: every block meets every group of query heads.
    fn unit(&self, blocks: &[Block], unit: usize) -> (Block, usize) {
        let groups = self.cache.shape().heads * self.parts;
        (blocks[unit / groups], unit % groups)
    }

    /// Query heads of a group.
    fn heads_of(&self, head: usize) -> Range<usize> {
        head * self.group()..(head + 1) * self.group()
    }

    /// Gathers the query rows of a block, `[token][query head of the group][dim]`, scaled.
    fn begin(&self, scratch: &mut Scratch, block: Block, head: usize) {
        let (dim, group) = (self.cache.shape().dim, self.group());
        let rows = block.count * group;
        scratch.q.clear();
        for t in block.tokens() {
            let at = (t * self.heads + head * group) * dim;
            let scaled = self.q[at..at + group * dim].iter().map(|x| x * self.scale);
            scratch.q.extend(scaled);
        }
        scratch.scores.resize(rows * CHUNK, 0.0);
        scratch.visible.resize(rows, 0);
        scratch.chunk.clear(rows, dim);
        scratch.span.clear(rows, dim);
    }

    /// The same as tiles: per 16 rows `[dim / 32][16][32]` bf16.
    fn begin_tiles(&self, scratch: &mut Scratch, block: Block, head: usize) {
        let (dim, group) = (self.cache.shape().dim, self.group());
        let rows = block.count * group;
        let full = rows.next_multiple_of(TILE_GROUP);
        let pack = self.compute.table.matmul.tiles.as_ref();
        let pack = pack.expect("tile attention comes with tile products").pack;
        // Weights are powers of two.
        let scale = self.scale * std::f32::consts::LOG2_E;
        scratch.q_tiles.fit(full * dim);
        scratch.q_tiles[..full * dim].fill(0);
        let token = |i: usize| ((block.first + i) * self.heads + head * group) * dim;
        for row in 0..rows {
            let at = token(row / group) + row % group * dim;
            if row % group == 0 && row / group + 2 < block.count {
                mem::prefetch(&self.q[token(row / group + 2)..][..group * dim]);
            }
            scratch.q.clear();
            let scaled = self.q[at..at + dim].iter().map(|x| x * scale);
            scratch.q.extend(scaled);
            let to = row / TILE_GROUP * TILE_GROUP * dim + row % TILE_GROUP * 32;
            // SAFETY: one row of a tile of each 32 dimensions.
            unsafe {
                let to = scratch.q_tiles.as_mut_ptr().add(to);
                pack(&scratch.q, to, TILE_GROUP * 32);
            }
        }
        scratch.visible.resize(rows, 0);
        scratch.stats.clear();
        scratch.stats.resize(rows, f32::NEG_INFINITY);
        scratch.stats.resize(2 * rows, 0.0);
        scratch.sums.fit(full * dim);
        scratch.sums[..full * dim].fill(0.0);
    }

    /// Adds one chunk to all rows of the block, on tiles.
    fn tile_chunk(
        &self,
        scratch: &mut Scratch,
        tiles: &TileAttention,
        block: Block,
        head: usize,
        chunk: usize,
    ) {
        let chunk = (chunk, TILE_CHUNK);
        self.see(&mut scratch.visible, block, chunk);
        let (mut pages, count, packed) = self.pages(block, head, chunk);
        if let Some(halves) = self.cache.halves() {
            let unpack = |half: &Half, page: &[u8], out: &mut Vec<u8>| {
                out.resize(half.ty.page_bytes(half.dim), 0);
                // SAFETY: the table was made for a tier that the CPU has; what the cache holds
                // was packed by it, or checked.
                unsafe { (self.compute.table.attn.unpack)(half, page, out) };
            };
            let room = scratch.unpacked.chunks_exact_mut(2);
            for ((k, v), room) in pages[..packed].iter_mut().zip(room) {
                let [k_room, v_room] = room else { continue };
                unpack(&halves.k, k, k_room);
                unpack(&halves.v, v, v_room);
                (*k, *v) = (k_room, v_room);
            }
        }
        let rows = scratch.visible.len();
        let (max, sum) = scratch.stats.split_at_mut(rows);
        let mut args = TileChunk {
            k_type: self.cache.shape().k,
            v_type: self.cache.shape().v,
            dim: self.cache.shape().dim,
            q: &scratch.q_tiles,
            visible: &scratch.visible,
            pages: &pages[..count],
            scratch: &mut scratch.tiles,
            acc: &mut scratch.sums,
            max,
            sum,
        };
        // SAFETY: the table was made for a tier that the CPU has and a right to use AMX.
        unsafe { (tiles.chunk)(&mut args) };
    }

    /// How many positions of a chunk of `size` each row of a block sees.
    fn see(&self, visible: &mut [usize], block: Block, (chunk, size): (usize, usize)) {
        let group = self.group();
        for (i, visible) in visible.iter_mut().enumerate() {
            let seen = self.tokens[block.first + i / group].position + 1;
            *visible = seen.saturating_sub(chunk * size).min(size);
        }
    }

    /// K and V of the pages of a chunk of `size`, how many there are, and how many of them,
    /// the first ones, are packed.
    fn pages(
        &self,
        block: Block,
        head: usize,
        (chunk, size): (usize, usize),
    ) -> (Pages<'_>, usize, usize) {
        let Token { sequence, position } = self.tokens[block.first];
        let table = self.tables[sequence];
        let (head, first) = (head / self.parts, chunk * size / KV_PAGE);
        let mut last = (first + size / KV_PAGE).min(table.pages().len());
        let mut packed = 0;
        if self.cache.halves().is_some() {
            // Pages behind the block's own are nobody's, and may be packed already.
            let own = position / KV_PAGE;
            last = last.min(own + 1);
            packed = own.min(last) - first;
        }
        let mut pages = Pages::default();
        for (i, slot) in (first..last).zip(&mut pages) {
            *slot = match i < first + packed {
                true => self.cache.packed_head(self.layer, table.packed(i), head),
                false => self.cache.head(self.layer, table.pages()[i], head),
            };
        }
        (pages, last - first, packed)
    }

    /// One span for all rows of the block; leaves `scratch.span`. The caller says whether the one
    /// before has just been read, and whether the next one comes after it.
    fn span(
        &self,
        scratch: &mut Scratch,
        block: Block,
        head: usize,
        span: usize,
        (before, after): (bool, bool),
    ) {
        let dim = self.cache.shape().dim;
        let chunks = block.chunks_of(span);
        for chunk in chunks.clone() {
            let beside = (
                before || chunk > chunks.start,
                after || chunk + 1 < chunks.end,
            );
            self.chunk(scratch, block, head, chunk, beside);
            let Scratch {
                chunk: part, span, ..
            } = &mut *scratch;
            match chunk == chunks.start {
                true => std::mem::swap(part, span),
                false => span.add(&part.acc, &part.stats, dim),
            }
        }
    }

    /// Keys of the first page of a chunk.
    fn first_keys(&self, block: Block, head: usize, chunk: usize) -> &[u8] {
        self.pages(block, head, (chunk, CHUNK)).0[0].0
    }

    /// One chunk for all rows of the block; leaves `scratch.chunk`. The caller says whether the one
    /// before has just been read, and whether the next one comes after it.
    fn chunk(
        &self,
        scratch: &mut Scratch,
        block: Block,
        head: usize,
        chunk: usize,
        (before, after): (bool, bool),
    ) {
        let (next, next_count, _) = match after {
            true => self.pages(block, head, (chunk + 1, CHUNK)),
            false => Default::default(),
        };
        let chunk = (chunk, CHUNK);
        self.see(&mut scratch.visible, block, chunk);
        let (pages, count, packed) = self.pages(block, head, chunk);
        let halves = self.cache.halves().filter(|_| packed > 0);
        let rows = scratch.visible.len();
        let (max, sum) = scratch.chunk.stats.split_at_mut(rows);
        let mut args = ChunkArgs {
            k_type: self.cache.shape().k,
            v_type: self.cache.shape().v,
            dim: self.cache.shape().dim,
            q: &scratch.q,
            visible: &scratch.visible,
            pages: &pages[..count],
            asked: before,
            next: &next[..next_count],
            pruned: halves.map(|halves| (*halves, packed)),
            scores: &mut scratch.scores,
            acc: &mut scratch.chunk.acc,
            max,
            sum,
        };
        // SAFETY: the table was made for a tier that the CPU has.
        unsafe { (self.compute.table.attn.chunk)(&mut args) };
    }

    /// Divides rows of tokens and query heads, `[tokens][heads][dim]`, by their sums and writes them
    /// where they belong.
    ///
    /// # Safety
    /// No other task writes these.
    unsafe fn finish(
        &self,
        total: &[f32],
        stats: &[f32],
        tokens: Range<usize>,
        heads: Range<usize>,
        out: &Out<'_>,
    ) {
        let dim = self.cache.shape().dim;
        let (sums, width) = (&stats[stats.len() / 2..], heads.len() * dim);
        let divide = |i: usize, to: &mut [f32]| {
            let rows = total[i * width..(i + 1) * width].chunks_exact(dim);
            let rows = rows.zip(&sums[i * heads.len()..]);
            for (to, (row, sum)) in to.chunks_exact_mut(dim).zip(rows) {
                let inverse = 1.0 / sum;
                to.iter_mut().zip(row).for_each(|(to, x)| *to = x * inverse);
            }
        };
        let (m, column) = (self.tokens.len(), heads.start * dim);
        let mut row = Vec::new();
        for (i, t) in tokens.clone().enumerate() {
            let later = t + WRITE_AHEAD;
            let ahead = later < tokens.end;
            match out {
                Out::Rows(rows) => {
                    let at = |t| t * self.heads * dim + column;
                    if ahead {
                        rows.prefetch(at(later)..at(later) + width);
                    }
                    // SAFETY: as the caller promises; rows of different blocks and heads are
                    // apart.
                    divide(i, unsafe { rows.slice(at(t)..at(t) + width) });
                }
                Out::Acts(writer, forms) => {
                    if ahead {
                        writer.prefetch((0, m), later, column..column + width);
                    }
                    row.resize(width, 0.0);
                    divide(i, &mut row);
                    let kernels = &self.compute.table.matmul;
                    // SAFETY: as above; the table's tier was checked.
                    unsafe { writer.put(kernels, *forms, (0, m), t, column, &row) };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{SINGLE, chunks_of, page_runs, span_of};

    #[test]
    fn spans_follow_each_other_and_hold_the_chunks_that_say_so() {
        let mut chunk = 0;
        for span in 0..SINGLE + 20 {
            let chunks = chunks_of(span);
            assert_eq!(chunks.start, chunk);
            assert!(chunks.clone().all(|c| span_of(c) == span) && !chunks.is_empty());
            chunk = chunks.end;
        }
    }

    #[test]
    fn no_two_runs_share_a_page() {
        let runs = |pages: &[u32]| page_runs(pages.iter().copied());
        assert!(runs(&[]).is_empty());
        assert_eq!(runs(&[7, 7, 7]), Vec::from_iter(Some(0..3)));
        assert_eq!(runs(&[7, 7, 3, 4, 4]), [0..2, 2..3, 3..5]);
        assert_eq!(runs(&[7, 3, 7, 4]), Vec::from_iter(Some(0..4)));
    }
}
