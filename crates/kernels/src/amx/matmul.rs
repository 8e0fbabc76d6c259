//! Strips times tokens on tiles: 16 outputs by 16 tokens by 32 inputs an instruction.
//!
//! A stretch of several strips is decoded to bf16 tiles once per batch, then all tokens pass
//! over it, 32 at a time. Activations are bf16 too; sums are f32. There is no scaling inside
//! a product, so all formats share one micro-kernel and every tile is full.
//!
//! What limits it is where tiles come from: each is used for two products of 16 cycles, so
//! that 64 bytes a cycle must arrive. The activations of 32 tokens (128 KiB) are brought from
//! the third-level cache once per stretch, while the tokens before them are multiplied; they,
//! the weight tiles (512 KiB) and the sums are then in the second-level cache, from which the
//! micro-kernel prefetches ahead of its loads.

use std::marker::PhantomData;

use tegula_gguf::GgmlType;

use super::{
    Amx, bytes, fewest_tokens, most_byte_tokens,
    panel::{self, Choice, Decoders},
    tile::{self, MOST_TOKENS, TILE_BYTES, TILE_K, TILE_ROWS},
};
use crate::{
    acts::Forms,
    avx512::sparse,
    generic::{
        format::{self, Format, Shape, Visitor},
        matmul::{self as generic, BF16, F16, FloatWeights},
    },
    strip::{
        ROWS,
        kernels::{self, MAX_STRIPS, PANEL_BYTES, StripArgs, Tiles},
    },
    tier::Tier,
};

/// Inputs that are decoded at a time: the tiles of all strips of a call then take a quarter of
/// the second-level cache, and sums are not loaded and stored too often.
const PANEL_K: usize = 2048;

/// Bytes of all strips' tiles.
const TILES: usize = MAX_STRIPS * PANEL_K / TILE_K * TILE_BYTES;

/// Where sums of 8-bit tiles are in the scratch, behind a panel of codes.
pub(super) const SUMS_AT: usize = PANEL_BYTES.next_multiple_of(64);

/// Where bf16 tiles begin in the scratch, behind codes on their way to tiles.
const CODES: usize = SUMS_AT + size_of::<bytes::Sums>();

type Pack = unsafe fn(&[f32], *mut u16, usize);
type Swiglu = unsafe fn(*const f32, *const f32, usize, usize, *mut u16);

/// The tile products, decoding with the instructions of `tier`. `None` for the scalar tier,
/// which has no decoder.
pub(crate) fn tiles(amx: Amx, tier: Tier) -> Option<Tiles> {
    let choice = panel::choose(tier)?;
    let sparse = match choice {
        Choice::Bf16 => sparse::takes,
        Choice::Avx512 | Choice::Avx2 => |_| false,
    };
    let (mul_strips, pack, swiglu): (unsafe fn(&StripArgs<'_>), Pack, Swiglu) = match choice {
        Choice::Bf16 => (
            mul_strips::<panel::Bf16>,
            panel::Bf16::pack,
            panel::Bf16::swiglu,
        ),
        Choice::Avx512 => (
            mul_strips::<panel::Avx512>,
            panel::Avx512::pack,
            panel::Avx512::swiglu,
        ),
        Choice::Avx2 => (
            mul_strips::<panel::Avx2>,
            panel::Avx2::pack,
            panel::Avx2::swiglu,
        ),
    };
    Some(Tiles {
        name: amx.name(),
        mul_strips,
        pack,
        swiglu,
        scratch: CODES + TILES,
        fewest_tokens,
        most_byte_tokens,
        sparse,
    })
}

/// # Safety
/// As `MatmulKernels::mul_strips`, with activations in tiles; AMX may be executed and the
/// CPU has what `D` is compiled for; `args.panel` is `Tiles::scratch` bytes.
unsafe fn mul_strips<D: Decoders>(args: &StripArgs<'_>) {
    use GgmlType as T;
    // SAFETY: the caller's.
    unsafe {
        if !args.acts.forms.has(Forms::TILES) {
            return bytes::mul_strips::<D>(args);
        }
        match args.ty {
            T::BF16 => in_place(args),
            T::F16 => through(args, PANEL_K, |s, k, len, out, _| {
                let w = args.strips[s].add(k / 2 * F16::PAIR_BYTES);
                D::floats::<F16>(w, len, out);
            }),
            T::S_BF16 | T::S8 | T::S4 => sparse(args),
            ty => format::visit(ty, OnTiles::<D>(args, PhantomData)),
        }
        tile::release();
    }
}

struct OnTiles<'a, D>(&'a StripArgs<'a>, PhantomData<D>);

impl<D: Decoders> Visitor for OnTiles<'_, D> {
    unsafe fn blocks<F: Format>(self) {
        // SAFETY: the caller's.
        unsafe { quantized::<D, F>(self.0) }
    }
    unsafe fn grids<S: Shape>(self) {
        // SAFETY: the caller's.
        unsafe { from_grids::<D, S>(self.0) }
    }
}

/// # Safety
/// As [`mul_strips`].
unsafe fn quantized<D: Decoders, F: Format>(args: &StripArgs<'_>) {
    let per_block = F::GROUPS * 32;
    // SAFETY: the caller's; panels begin at whole blocks.
    unsafe {
        through(args, PANEL_K, |s, k, len, out, (next, next_k)| {
            let at = |k| k / per_block * F::BYTES;
            let next = next.wrapping_add(at(next_k));
            D::quantized::<F>(args.strips[s].add(at(k)), len / per_block, out, next);
        });
    }
}

/// # Safety
/// As [`mul_strips`].
unsafe fn from_grids<D: Decoders, S: Shape>(args: &StripArgs<'_>) {
    // SAFETY: the caller's; the first part of the scratch holds codes.
    unsafe {
        through(args, kernels::PANEL_K, |s, k, len, out, _| {
            let strip = args.strips[s];
            let panel = generic::decode_grids::<S>((args.ty, false), strip, k, len, args.panel);
            D::codes::<S>(&panel, out);
        });
    }
}

/// Bytes of activations that all pairs of sparse strips may read anew.
const FEW_ACTS: usize = 512 << 10;

/// Inputs of a pair of sparse strips whose tiles (32 KiB) do not leave the first-level cache.
const PAIR_K: usize = 512;

/// Sparse strips: zeros are put back on the way to tiles, once per batch. A stretch begins
/// where the strip's last one ended, which only its bitmaps tell.
///
/// Tiles of few tokens are read once or twice: writing them to the second-level cache and
/// bringing them back would take longer than the products do. Where the activations of all
/// inputs stay in that cache, a pair of strips at a time goes through the first-level one.
///
/// # Safety
/// As [`mul_strips`]; [`sparse::takes`] accepts the type.
unsafe fn sparse(args: &StripArgs<'_>) {
    let (together, panel_k) = match 2 * args.acts.m * args.acts.k <= FEW_ACTS {
        true => (2, PAIR_K),
        false => (MAX_STRIPS, PANEL_K),
    };
    for first in (0..args.strips.len()).step_by(together) {
        let some = first..args.strips.len().min(first + together);
        let after = args.strips.get(some.end).or(args.next.first()).copied();
        let mut at = [std::ptr::null(); MAX_STRIPS];
        at[..some.len()].copy_from_slice(&args.strips[some.clone()]);
        let part = StripArgs {
            strips: &args.strips[some.clone()],
            bytes: &args.bytes[some],
            tile: args.tile_of(first),
            ..*args
        };
        let last = part.strips.len() - 1;
        // SAFETY: the caller's; stretches but the last are whole super-blocks.
        unsafe {
            through(&part, panel_k, |s, k, len, out, _| {
                // The next strip's part of this stretch, or the first one's of the next.
                let next = match (s < last, k + len < part.k) {
                    (true, _) => at[s + 1],
                    (false, true) => at[0],
                    (false, false) => after.unwrap_or(at[s]),
                };
                let of = (part.ty, part.k, part.bytes[s]);
                at[s] = sparse::to_tiles(of, at[s], len, out, next);
            });
        }
    }
}

/// Decodes stretches of the strips, of `panel_k` inputs, with `decode(index of the strip,
/// first input, inputs, out, next)` and multiplies them. `next` is the strip, and the input in
/// it, that comes after this one: few tokens leave no time to wait for memory, which stops
/// prefetching by itself where a stretch ends.
///
/// # Safety
/// As [`mul_strips`].
unsafe fn through(
    args: &StripArgs<'_>,
    panel_k: usize,
    mut decode: impl FnMut(usize, usize, usize, *mut u8, (*const u8, usize)),
) {
    for k in (0..args.k).step_by(panel_k) {
        let len = panel_k.min(args.k - k);
        let strip_tiles = panel_k / TILE_K * TILE_BYTES;
        let tile = |s: usize| args.panel.wrapping_add(CODES + s * strip_tiles);
        for s in 0..args.strips.len() {
            let next = match args.strips.get(s + 1) {
                Some(&strip) => (strip, k),
                None => (args.strips[0], k + len),
            };
            decode(s, k, len, tile(s), next);
        }
        // SAFETY: tiles of `len` inputs of all strips were written.
        unsafe { all_tokens(args, |s| tile(s).cast_const(), k, len) };
    }
}

/// BF16 strips are tiles already.
///
/// # Safety
/// As [`mul_strips`].
unsafe fn in_place(args: &StripArgs<'_>) {
    for k in (0..args.k).step_by(PANEL_K) {
        let len = PANEL_K.min(args.k - k);
        let tile = |s: usize| args.strips[s].wrapping_add(k / 2 * BF16::PAIR_BYTES);
        // SAFETY: a strip has the tiles of all its inputs.
        unsafe { all_tokens(args, tile, k, len) };
    }
}

/// Multiplies all tokens with inputs `k .. k + len` of the strips, whose tiles are at
/// `tiles(strip)`.
///
/// # Safety
/// The tiles hold these inputs; otherwise as [`mul_strips`].
unsafe fn all_tokens(
    args: &StripArgs<'_>,
    tiles: impl Fn(usize) -> *const u8,
    k: usize,
    len: usize,
) {
    let acts = &args.acts;
    let mut configured = 0;
    for t in (0..acts.m).step_by(MOST_TOKENS) {
        let tokens = MOST_TOKENS.min(acts.m - t);
        // SAFETY: groups of 16 tokens of the view, tiles of the caller, sums of the tile.
        unsafe {
            if tokens != configured {
                tile::configure(tokens);
                configured = tokens;
            }
            let group = |t: usize, k: usize| {
                let tokens = TILE_ROWS.min(acts.m - t);
                let at = t * acts.k + k * tokens;
                (acts.tiles.add(at).cast::<u8>(), tokens * 64)
            };
            let first = group(t, k);
            let second = if tokens > TILE_ROWS {
                group(t + TILE_ROWS, k)
            } else {
                first
            };
            // Whose turn is next: the tokens that follow, or the first ones a stretch later.
            let next = match (t + tokens < acts.m, k + len < acts.k) {
                (true, _) => (t + tokens, k),
                (false, true) => (0, k + len),
                (false, false) => (0, 0),
            };
            let last_group = (acts.m - 1) / TILE_ROWS * TILE_ROWS;
            let next = [0, TILE_ROWS].map(|t| group((next.0 + t).min(last_group), next.1).0);
            for (pair, s) in (0..args.strips.len()).step_by(2).enumerate() {
                let last = (s + 1).min(args.strips.len() - 1);
                let block = tile::Block {
                    a: [first.0, second.0],
                    a_step: [first.1, second.1],
                    b: [tiles(s), tiles(last)],
                    c: [s, last].map(|s| args.tile_of(s).add(t * ROWS)),
                    steps: len / TILE_K,
                    fresh: k == 0,
                    // Half of a group a pair, as long as there is some left.
                    next: next[pair / 2 % 2].wrapping_add(pair % 2 * len / TILE_K * tile::NEXT),
                };
                tile::multiply(tokens, last - s + 1, &block);
            }
        }
    }
}
