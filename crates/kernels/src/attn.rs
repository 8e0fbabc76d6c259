//! The section of the kernel table for attention.

// Tiles take some of this alone.
#![cfg_attr(not(feature = "amx"), allow(dead_code))]

use crate::{
    acts::TILE_GROUP,
    amx::Amx,
    kv::{
        KV_PAGE, KvType,
        pruned::{Half, Halves},
    },
    mem::AlignedVec,
    scalar,
    tier::Tier,
};

/// Positions whose softmax is taken together: two pages. Partial results of chunks merge in
/// order, so how chunks are spread over threads does not show in the result.
pub const CHUNK: usize = 2 * KV_PAGE;

/// The same on tiles: more positions share what is done once a chunk.
pub(crate) const TILE_CHUNK: usize = 4 * KV_PAGE;

/// From one row of scores to the next: rows a power of two apart would share few sets of the
/// first-level cache.
pub(crate) const SCORE_ROW: usize = TILE_CHUNK + 16;

/// Query rows that go through a chunk together on tiles, so that their scores and weights
/// stay in the first-level cache.
pub(crate) const TILE_QUERIES: usize = 2 * TILE_GROUP;

/// One chunk of keys and values against some query rows of one KV head.
pub struct ChunkArgs<'a> {
    pub k_type: KvType,
    pub v_type: KvType,
    pub dim: usize,
    /// Query rows `[rows][dim]`, already multiplied by the scale.
    pub q: &'a [f32],
    /// Positions of this chunk that each row sees, from its start: 0 ..= [`CHUNK`].
    pub visible: &'a [usize],
    /// K and V pages of the chunk, one or two.
    pub pages: &'a [(&'a [u8], &'a [u8])],
    /// Whether memory was asked for these pages before, not just for the first keys.
    pub asked: bool,
    /// Pages that this thread reads next, if it knows: the kernel may ask memory for them.
    pub next: &'a [(&'a [u8], &'a [u8])],
    /// Where the first pages of `pages` are pruned: how, and how many of them.
    pub pruned: Option<(Halves, usize)>,
    /// Scratch `[rows][CHUNK]`.
    pub scores: &'a mut [f32],
    /// Receives `Σ p·v`, `[rows][dim]`; rows that see nothing keep zeros.
    pub acc: &'a mut [f32],
    /// Receives each row's largest score (−∞ where it sees nothing).
    pub max: &'a mut [f32],
    /// Receives each row's `Σ p`.
    pub sum: &'a mut [f32],
}

impl ChunkArgs<'_> {
    /// Checks that all lengths agree; kernels index without further checks.
    pub(crate) fn check(&self) {
        let rows = self.visible.len();
        assert!(self.q.len() == rows * self.dim && self.acc.len() == rows * self.dim);
        assert!(self.scores.len() == rows * CHUNK);
        assert!(self.max.len() == rows && self.sum.len() == rows);
        let reach = self.pages.len() * KV_PAGE;
        assert!(reach <= CHUNK && self.visible.iter().all(|&n| n <= reach));
        let pruned = self.pruned.map_or(0, |(_, count)| count);
        for (k, v) in &self.pages[pruned..] {
            assert!(k.len() >= self.k_type.page_bytes(self.dim));
            assert!(v.len() >= self.v_type.page_bytes(self.dim));
        }
        if let Some((halves, count)) = &self.pruned {
            let of = |half: &Half| (half.ty, half.dim);
            assert_eq!(of(&halves.k), (self.k_type, self.dim));
            assert_eq!(of(&halves.v), (self.v_type, self.dim));
            for (k, v) in &self.pages[..*count] {
                assert!(k.len() >= halves.k.bytes() && v.len() >= halves.v.bytes());
            }
        }
    }

    /// Calls `chunk`, which knows no pruned pages, with these unpacked.
    ///
    /// # Safety
    /// As `chunk` asks for.
    pub(crate) unsafe fn unpacked(&mut self, chunk: unsafe fn(&mut ChunkArgs<'_>)) {
        let Some((halves, count)) = self.pruned else {
            // SAFETY: the caller's.
            return unsafe { chunk(self) };
        };
        self.check();
        let unpack = |half: &Half, packed: &[u8]| {
            let mut dense = vec![0; half.ty.page_bytes(half.dim)];
            half.unpack(packed, &mut dense);
            dense
        };
        let dense: Vec<_> = self.pages[..count]
            .iter()
            .map(|(k, v)| (unpack(&halves.k, k), unpack(&halves.v, v)))
            .collect();
        let first = dense.iter().map(|(k, v)| (&k[..], &v[..]));
        let pages: Vec<_> = first.chain(self.pages[count..].iter().copied()).collect();
        let mut args = ChunkArgs {
            pages: &pages,
            pruned: None,
            scores: &mut *self.scores,
            acc: &mut *self.acc,
            max: &mut *self.max,
            sum: &mut *self.sum,
            ..*self
        };
        // SAFETY: the caller's.
        unsafe { chunk(&mut args) }
    }
}

/// One chunk of keys and values against many query rows of one KV head, on tiles.
pub(crate) struct TileChunk<'a> {
    pub k_type: KvType,
    pub v_type: KvType,
    /// A multiple of 32.
    pub dim: usize,
    /// Query rows, multiplied by the scale and log2 e, as tiles: per 16 rows
    /// `[dim / 32][16][32]` bf16; rows that only fill up are zero.
    pub q: &'a [u16],
    /// Positions of this chunk that each row sees, from its start: 0 ..= [`TILE_CHUNK`].
    pub visible: &'a [usize],
    /// K and V pages of the chunk, one to four.
    pub pages: &'a [(&'a [u8], &'a [u8])],
    pub scratch: &'a mut TileScratch,
    /// `Σ p·v` so far, `[rows][dim]`, rows filled up to a multiple of 16.
    pub acc: &'a mut [f32],
    /// Each row's largest score so far (times log2 e), −∞ at first.
    pub max: &'a mut [f32],
    /// Each row's `Σ p` so far.
    pub sum: &'a mut [f32],
}

impl TileChunk<'_> {
    /// Checks that all lengths agree; kernels index without further checks.
    pub(crate) fn check(&self) {
        let rows = self.visible.len();
        let full = rows.next_multiple_of(TILE_GROUP) * self.dim;
        assert!(self.dim.is_multiple_of(32) && self.q.len() >= full && self.acc.len() >= full);
        assert!(self.max.len() == rows && self.sum.len() == rows);
        let reach = self.pages.len() * KV_PAGE;
        assert!(reach <= TILE_CHUNK && self.visible.iter().all(|&n| n <= reach));
        for (k, v) in self.pages {
            assert!(k.len() >= self.k_type.page_bytes(self.dim));
            assert!(v.len() >= self.v_type.page_bytes(self.dim));
        }
    }
}

/// Memory of [`TileAttention::chunk`] that is kept from call to call.
#[derive(Default)]
pub(crate) struct TileScratch {
    /// Weight tiles `[TILE_CHUNK / 16][dim / 32]`.
    pub keys: AlignedVec<u32>,
    /// Weight tiles `[dim / 16][TILE_CHUNK / 32]`.
    pub values: AlignedVec<u32>,
    /// `[TILE_QUERIES][SCORE_ROW]`
    pub scores: AlignedVec<f32>,
    /// Per 16 rows `[TILE_CHUNK / 32][16][32]` bf16.
    pub weights: AlignedVec<u16>,
}

impl TileScratch {
    /// Makes room for heads of `dim`. Weights of rows that only fill up are finite.
    pub(crate) fn fit(&mut self, dim: usize) {
        self.keys.fit(dim / 2 * TILE_CHUNK);
        self.values.fit(TILE_CHUNK / 2 * dim);
        self.scores.fit(TILE_QUERIES * SCORE_ROW);
        self.weights.fit(TILE_QUERIES * TILE_CHUNK);
    }
}

/// Attention on tile registers.
#[derive(Clone, Copy)]
pub(crate) struct TileAttention {
    /// Adds one chunk to all rows.
    ///
    /// # Safety
    /// The CPU has the table's tier and AMX may be executed.
    pub chunk: unsafe fn(args: &mut TileChunk<'_>),
    /// From how many tokens on it is faster than vectors.
    pub fewest_tokens: usize,
}

/// Attention kernels.
#[derive(Clone, Copy)]
pub struct AttnOps {
    /// Scores, softmax and weighted values of one chunk.
    ///
    /// # Safety
    /// The CPU has the table's tier.
    pub chunk: unsafe fn(args: &mut ChunkArgs<'_>),
    /// Unpacks a pruned page.
    ///
    /// # Safety
    /// The CPU has the table's tier; the packed page is whole; `out` has the bytes of a dense
    /// one.
    pub unpack: unsafe fn(half: &Half, packed: &[u8], out: &mut [u8]),
    /// Many tokens on tiles, where their use was asked for.
    pub(crate) tiles: Option<TileAttention>,
}

impl AttnOps {
    /// The kernels of `tier`, which the CPU must have, with tiles if there is `amx`.
    pub(crate) fn for_tier(tier: Tier, amx: Option<Amx>) -> AttnOps {
        let chunk: unsafe fn(&mut ChunkArgs<'_>) = match tier {
            Tier::Scalar => scalar::attention::chunk,
            Tier::Avx2 => crate::avx2::attention::chunk,
            Tier::Avx512 => crate::avx512::attention::chunk,
        };
        AttnOps {
            chunk,
            unpack: match tier {
                Tier::Avx512 => crate::avx512::pruned::unpack,
                _ => |half, packed, out| half.unpack(packed, out),
            },
            #[cfg(feature = "amx")]
            tiles: amx.and_then(|amx| crate::amx::attention(amx, tier)),
            #[cfg(not(feature = "amx"))]
            tiles: amx.and(None),
        }
    }

    /// The tile kernels, if they take heads of `dim` and win with `tokens`.
    pub(crate) fn tiles_for(&self, dim: usize, tokens: usize) -> Option<&TileAttention> {
        let tiles = self.tiles.as_ref()?;
        (dim.is_multiple_of(32) && tokens >= tiles.fewest_tokens).then_some(tiles)
    }
}
