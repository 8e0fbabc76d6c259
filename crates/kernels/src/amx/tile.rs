//! The micro-kernels: one `asm!` block each, from tile loads to tile stores.

use crate::strip::ROWS;

/// Rows of a tile: tokens of an activation tile, pairs of inputs of a weight tile.
pub(crate) const TILE_ROWS: usize = 16;
/// Inputs of a tile: 32 bf16 are a row of 64 bytes.
pub(crate) const TILE_K: usize = 32;
/// Bytes of a weight tile: 16 pairs of inputs of 16 outputs.
pub(crate) const TILE_BYTES: usize = TILE_ROWS * 64;

/// Tile palette 1 with the shapes of all eight tiles, as `ldtilecfg` reads it.
#[repr(C, align(64))]
pub(crate) struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    column_bytes: [u16; 16],
    rows: [u8; 16],
}

impl TileConfig {
    /// Rows and bytes of a row of each tile.
    pub(crate) const fn new(shapes: [(u8, u16); 8]) -> TileConfig {
        let (mut column_bytes, mut rows) = ([0; 16], [0; 16]);
        let mut i = 0;
        while i < 8 {
            rows[i] = shapes[i].0;
            column_bytes[i] = if shapes[i].0 == 0 { 0 } else { shapes[i].1 };
            i += 1;
        }
        TileConfig {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            column_bytes,
            rows,
        }
    }
}

const fn config(tokens: usize) -> TileConfig {
    let first = if tokens < TILE_ROWS {
        tokens
    } else {
        TILE_ROWS
    } as u8;
    let second = tokens as u8 - first;
    // Sums of the first and the second 16 tokens, their activations, two weight tiles.
    TileConfig::new([
        (first, 64),
        (first, 64),
        (second, 64),
        (second, 64),
        (first, 64),
        (second, 64),
        (16, 64),
        (16, 64),
    ])
}

/// Most tokens that a micro-kernel takes.
pub(crate) const MOST_TOKENS: usize = 2 * TILE_ROWS;

/// The configurations for 1 to [`MOST_TOKENS`] tokens, less one.
static CONFIGS: [TileConfig; MOST_TOKENS] = {
    let mut all = [const { config(1) }; MOST_TOKENS];
    let mut i = 0;
    while i < MOST_TOKENS {
        all[i] = config(i + 1);
        i += 1;
    }
    all
};

/// Configures this thread's tiles for `tokens` tokens.
///
/// # Safety
/// AMX may be executed.
pub(crate) unsafe fn configure(tokens: usize) {
    // SAFETY: the caller's.
    unsafe { load_config(&CONFIGS[tokens - 1]) };
}

/// Configures this thread's tiles.
///
/// # Safety
/// AMX may be executed.
pub(super) unsafe fn load_config(config: &TileConfig) {
    // SAFETY: reads the 64 bytes of a configuration; no code outside this module uses tiles.
    unsafe {
        std::arch::asm!(
            "ldtilecfg [{config}]",
            config = in(reg) config,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, readonly, preserves_flags),
        );
    }
}

/// Gives the tiles back, so that the operating system need not save them.
///
/// # Safety
/// As [`configure`].
pub(crate) unsafe fn release() {
    // SAFETY: nothing holds anything in tiles between micro-kernels.
    unsafe {
        std::arch::asm!(
            "tilerelease",
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nomem, nostack, preserves_flags),
        );
    }
}

/// What a micro-kernel multiplies: up to 32 tokens with one or two strips.
#[derive(Clone, Copy)]
pub(crate) struct Block {
    /// Activation tiles of the first 16 tokens, and of the rest if there are more.
    pub a: [*const u8; 2],
    /// Bytes from one activation tile to the next: 64 per token.
    pub a_step: [usize; 2],
    /// Weight tiles, [`TILE_BYTES`] apart, of one or two strips.
    pub b: [*const u8; 2],
    /// Sums `[token][16]` of each strip.
    pub c: [*mut f32; 2],
    /// Tiles along k, at least one.
    pub steps: usize,
    /// Whether sums start at zero; otherwise what is in `c` is added to.
    pub fresh: bool,
    /// What is brought to the second-level cache meanwhile, [`NEXT`] bytes a step, if there
    /// are 32 tokens and two strips. That need not be valid memory.
    pub next: *const u8,
}

/// Multiplies `tokens` tokens with one or two strips.
///
/// # Safety
/// [`configure`]`(tokens)` was the last configuration on this thread, and the pointers are
/// valid for what [`Block`] states.
pub(crate) unsafe fn multiply(tokens: usize, strips: usize, block: &Block) {
    // SAFETY: the caller's.
    unsafe {
        match (tokens, strips) {
            (MOST_TOKENS, 2) => multiply_2x2(block),
            (_, 2) if tokens > TILE_ROWS => multiply_2x2_part(block),
            (_, 2) => multiply_1x2(block),
            _ if tokens > TILE_ROWS => multiply_2x1(block),
            _ => multiply_1x1(block),
        }
    }
}

/// Asks for half of the lines of the tile that follows the one at a pointer.
///
/// Tile loads don't run far ahead: without this they wait for the second-level cache.
macro_rules! prefetch {
    ($at:literal, first) => {
        concat!(prefetch!(4 $at, "0"), prefetch!(4 $at, "256"))
    };
    ($at:literal, second) => {
        concat!(prefetch!(4 $at, "512"), prefetch!(4 $at, "768"))
    };
    (4 $at:literal, $offset:literal) => {
        concat!(
            "prefetcht0 [{", $at, "} + {tile} + ", $offset, "]\n",
            "prefetcht0 [{", $at, "} + {tile} + ", $offset, " + 64]\n",
            "prefetcht0 [{", $at, "} + {tile} + ", $offset, " + 128]\n",
            "prefetcht0 [{", $at, "} + {tile} + ", $offset, " + 192]\n",
        )
    };
}

/// Bytes of [`Block::next`] that a step asks for: every other line, since the second-level
/// cache fetches lines in pairs.
pub(crate) const NEXT: usize = 512;

/// Bytes between the sums of the first and the second 16 tokens.
const SECOND: usize = TILE_ROWS * ROWS * 4;

/// 32 tokens by two strips, or 17 to 31, whose second tile is smaller: it is a register of its
/// own.
///
/// There are four tiles of sums and no more of operands than need be, though one of them is
/// loaded a second time: with all eight tiles in use, loads wait for the products before them
/// as soon as the core's other thread is busy, and this loop takes 1.2 to 1.6 times as long. For
/// the same reason the prefetches stand between all instructions instead of behind some
/// (`docs/bench`).
macro_rules! multiply_2x2 {
    ($name:ident, $second:literal) => {
        unsafe fn $name(x: &Block) {
            // SAFETY: the caller's; only the pointers of `Block` are read and written.
            unsafe {
                std::arch::asm!(
                    "test {fresh:e}, {fresh:e}",
                    "jnz 2f",
                    "tileloadd tmm0, [{c0} + {row}*1]",
                    "tileloadd tmm1, [{c1} + {row}*1]",
                    "tileloadd tmm2, [{c0} + {row}*1 + {second}]",
                    "tileloadd tmm3, [{c1} + {row}*1 + {second}]",
                    "jmp 3f",
                    "2:",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "3:",
                    "tileloadd tmm4, [{a0} + {row}*1]",
                    prefetch!("a0", first),
                    "tileloadd tmm6, [{b0} + {row}*1]",
                    prefetch!("a0", second),
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    prefetch!("b0", first),
                    "tileloadd tmm6, [{b1} + {row}*1]",
                    prefetch!("b0", second),
                    "tdpbf16ps tmm1, tmm4, tmm6",
                    prefetch!("b1", first),
                    concat!("tileloadd ", $second, ", [{a1} + {row}*1]"),
                    prefetch!("b1", second),
                    concat!("tdpbf16ps tmm3, ", $second, ", tmm6"),
                    prefetch!("a1", first),
                    "tileloadd tmm6, [{b0} + {row}*1]",
                    prefetch!("a1", second),
                    concat!("tdpbf16ps tmm2, ", $second, ", tmm6"),
                    "prefetcht1 [{next}]",
                    "prefetcht1 [{next} + 128]",
                    "prefetcht1 [{next} + 256]",
                    "prefetcht1 [{next} + 384]",
                    "add {next}, {next_step}",
                    "add {a0}, {step0}",
                    "add {a1}, {step1}",
                    "add {b0}, {tile}",
                    "add {b1}, {tile}",
                    "dec {steps}",
                    "jnz 3b",
                    "tilestored [{c0} + {row}*1], tmm0",
                    "tilestored [{c1} + {row}*1], tmm1",
                    "tilestored [{c0} + {row}*1 + {second}], tmm2",
                    "tilestored [{c1} + {row}*1 + {second}], tmm3",
                    fresh = in(reg) u32::from(x.fresh),
                    a0 = inout(reg) x.a[0] => _,
                    a1 = inout(reg) x.a[1] => _,
                    b0 = inout(reg) x.b[0] => _,
                    b1 = inout(reg) x.b[1] => _,
                    c0 = in(reg) x.c[0],
                    c1 = in(reg) x.c[1],
                    step0 = in(reg) x.a_step[0],
                    step1 = in(reg) x.a_step[1],
                    next = inout(reg) x.next => _,
                    next_step = const NEXT,
                    steps = inout(reg) x.steps => _,
                    row = in(reg) 64usize,
                    second = const SECOND,
                    tile = const TILE_BYTES,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}

multiply_2x2!(multiply_2x2, "tmm4");
multiply_2x2!(multiply_2x2_part, "tmm5");

/// 32 tokens by one strip.
unsafe fn multiply_2x1(x: &Block) {
    // SAFETY: as above.
    unsafe {
        std::arch::asm!(
            "test {fresh:e}, {fresh:e}",
            "jnz 2f",
            "tileloadd tmm0, [{c0} + {row}*1]",
            "tileloadd tmm2, [{c0} + {row}*1 + {second}]",
            "jmp 3f",
            "2:",
            "tilezero tmm0",
            "tilezero tmm2",
            "3:",
            "tileloadd tmm4, [{a0} + {row}*1]",
            "tileloadd tmm6, [{b0} + {row}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{a1} + {row}*1]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "add {a0}, {step0}",
            "add {a1}, {step1}",
            "add {b0}, {tile}",
            "dec {steps}",
            "jnz 3b",
            "tilestored [{c0} + {row}*1], tmm0",
            "tilestored [{c0} + {row}*1 + {second}], tmm2",
            fresh = in(reg) u32::from(x.fresh),
            a0 = inout(reg) x.a[0] => _,
            a1 = inout(reg) x.a[1] => _,
            b0 = inout(reg) x.b[0] => _,
            c0 = in(reg) x.c[0],
            step0 = in(reg) x.a_step[0],
            step1 = in(reg) x.a_step[1],
            steps = inout(reg) x.steps => _,
            row = in(reg) 64usize,
            second = const SECOND,
            tile = const TILE_BYTES,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// Up to 16 tokens by two strips.
unsafe fn multiply_1x2(x: &Block) {
    // SAFETY: as above.
    unsafe {
        std::arch::asm!(
            "test {fresh:e}, {fresh:e}",
            "jnz 2f",
            "tileloadd tmm0, [{c0} + {row}*1]",
            "tileloadd tmm1, [{c1} + {row}*1]",
            "jmp 3f",
            "2:",
            "tilezero tmm0",
            "tilezero tmm1",
            "3:",
            "tileloadd tmm4, [{a0} + {row}*1]",
            "tileloadd tmm6, [{b0} + {row}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b1} + {row}*1]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "add {a0}, {step0}",
            "add {b0}, {tile}",
            "add {b1}, {tile}",
            "dec {steps}",
            "jnz 3b",
            "tilestored [{c0} + {row}*1], tmm0",
            "tilestored [{c1} + {row}*1], tmm1",
            fresh = in(reg) u32::from(x.fresh),
            a0 = inout(reg) x.a[0] => _,
            b0 = inout(reg) x.b[0] => _,
            b1 = inout(reg) x.b[1] => _,
            c0 = in(reg) x.c[0],
            c1 = in(reg) x.c[1],
            step0 = in(reg) x.a_step[0],
            steps = inout(reg) x.steps => _,
            row = in(reg) 64usize,
            tile = const TILE_BYTES,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// Up to 16 tokens by one strip.
unsafe fn multiply_1x1(x: &Block) {
    // SAFETY: as above.
    unsafe {
        std::arch::asm!(
            "test {fresh:e}, {fresh:e}",
            "jnz 2f",
            "tileloadd tmm0, [{c0} + {row}*1]",
            "jmp 3f",
            "2:",
            "tilezero tmm0",
            "3:",
            "tileloadd tmm4, [{a0} + {row}*1]",
            "tileloadd tmm6, [{b0} + {row}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "add {a0}, {step0}",
            "add {b0}, {tile}",
            "dec {steps}",
            "jnz 3b",
            "tilestored [{c0} + {row}*1], tmm0",
            fresh = in(reg) u32::from(x.fresh),
            a0 = inout(reg) x.a[0] => _,
            b0 = inout(reg) x.b[0] => _,
            c0 = in(reg) x.c[0],
            step0 = in(reg) x.a_step[0],
            steps = inout(reg) x.steps => _,
            row = in(reg) 64usize,
            tile = const TILE_BYTES,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// What [`contract`] multiplies: 16 or 32 rows of tiles with 32 columns of weight tiles.
#[derive(Clone, Copy)]
pub(crate) struct Contraction {
    /// Tiles along k, [`TILE_BYTES`] apart, of the first and the second 16 rows.
    pub a: [*const u8; 2],
    /// Tiles along k, [`TILE_BYTES`] apart, of the first and the second 16 columns.
    pub b: [*const u8; 2],
    /// Sums, 32 columns of each row.
    pub c: *mut f32,
    /// Bytes from one row of `c` to the next.
    pub c_row: usize,
    /// Tiles along k, at least one.
    pub steps: usize,
    /// Whether sums start at zero; otherwise what is in `c` is added to.
    pub fresh: bool,
}

/// Multiplies 16 rows, or 32 if there are `two` tiles of them, with 32 columns.
///
/// # Safety
/// [`configure`]`(`[`MOST_TOKENS`]`)` was the last configuration on this thread, and the
/// pointers are valid for what [`Contraction`] states.
pub(crate) unsafe fn contract(two: bool, x: &Contraction) {
    // SAFETY: the caller's.
    unsafe {
        if two {
            contract_2x2(x)
        } else {
            contract_1x2(x)
        }
    }
}

unsafe fn contract_2x2(x: &Contraction) {
    // SAFETY: the caller's; only the pointers of `Contraction` are read and written.
    unsafe {
        std::arch::asm!(
            "test {fresh:e}, {fresh:e}",
            "jnz 2f",
            "tileloadd tmm0, [{c0} + {c_row}*1]",
            "tileloadd tmm1, [{c0} + {c_row}*1 + 64]",
            "tileloadd tmm2, [{c1} + {c_row}*1]",
            "tileloadd tmm3, [{c1} + {c_row}*1 + 64]",
            "jmp 3f",
            "2:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "3:",
            "tileloadd tmm4, [{a0} + {row}*1]",
            "tileloadd tmm6, [{b0} + {row}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm6, [{b1} + {row}*1]",
            "tdpbf16ps tmm1, tmm4, tmm6",
            "tileloadd tmm4, [{a1} + {row}*1]",
            "tdpbf16ps tmm3, tmm4, tmm6",
            "tileloadd tmm6, [{b0} + {row}*1]",
            "tdpbf16ps tmm2, tmm4, tmm6",
            "add {a0}, {tile}",
            "add {a1}, {tile}",
            "add {b0}, {tile}",
            "add {b1}, {tile}",
            "dec {steps}",
            "jnz 3b",
            "tilestored [{c0} + {c_row}*1], tmm0",
            "tilestored [{c0} + {c_row}*1 + 64], tmm1",
            "tilestored [{c1} + {c_row}*1], tmm2",
            "tilestored [{c1} + {c_row}*1 + 64], tmm3",
            fresh = in(reg) u32::from(x.fresh),
            a0 = inout(reg) x.a[0] => _,
            a1 = inout(reg) x.a[1] => _,
            b0 = inout(reg) x.b[0] => _,
            b1 = inout(reg) x.b[1] => _,
            c0 = in(reg) x.c,
            c1 = in(reg) x.c.byte_add(x.c_row * TILE_ROWS),
            c_row = in(reg) x.c_row,
            steps = inout(reg) x.steps => _,
            row = in(reg) 64usize,
            tile = const TILE_BYTES,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

unsafe fn contract_1x2(x: &Contraction) {
    // SAFETY: as above.
    unsafe {
        std::arch::asm!(
            "test {fresh:e}, {fresh:e}",
            "jnz 2f",
            "tileloadd tmm0, [{c0} + {c_row}*1]",
            "tileloadd tmm1, [{c0} + {c_row}*1 + 64]",
            "jmp 3f",
            "2:",
            "tilezero tmm0",
            "tilezero tmm1",
            "3:",
            "tileloadd tmm4, [{a0} + {row}*1]",
            "tileloadd tmm6, [{b0} + {row}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b1} + {row}*1]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "add {a0}, {tile}",
            "add {b0}, {tile}",
            "add {b1}, {tile}",
            "dec {steps}",
            "jnz 3b",
            "tilestored [{c0} + {c_row}*1], tmm0",
            "tilestored [{c0} + {c_row}*1 + 64], tmm1",
            fresh = in(reg) u32::from(x.fresh),
            a0 = inout(reg) x.a[0] => _,
            b0 = inout(reg) x.b[0] => _,
            b1 = inout(reg) x.b[1] => _,
            c0 = in(reg) x.c,
            c_row = in(reg) x.c_row,
            steps = inout(reg) x.steps => _,
            row = in(reg) 64usize,
            tile = const TILE_BYTES,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configurations_are_64_bytes_in_the_documented_places() {
        assert_eq!(size_of::<TileConfig>(), 64);
        assert_eq!(std::mem::offset_of!(TileConfig, column_bytes), 16);
        assert_eq!(std::mem::offset_of!(TileConfig, rows), 48);
        for (i, c) in CONFIGS.iter().enumerate() {
            assert_eq!(usize::from(c.rows[0] + c.rows[2]), i + 1);
            assert_eq!((c.rows[4], c.rows[5]), (c.rows[0], c.rows[2]));
            assert_eq!((c.rows[6], c.rows[7]), (16, 16));
        }
    }
}
