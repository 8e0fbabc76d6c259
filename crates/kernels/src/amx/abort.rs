//! Fault injection: the kernels of this module replaced by ones that end the process.
//!
//! Tables get no other pointers from [`super`], so a run that lives has executed no AMX code.

use crate::{
    attn::{TileAttention, TileChunk},
    strip::kernels::{StripArgs, Tiles},
};

/// The table's section, with aborting kernels.
pub(super) fn products(tiles: Tiles) -> Tiles {
    Tiles {
        mul_strips,
        pack,
        swiglu,
        ..tiles
    }
}

/// The table's section, with aborting kernels.
pub(super) fn attention(tiles: TileAttention) -> TileAttention {
    TileAttention { chunk, ..tiles }
}

fn reached(kernel: &str) -> ! {
    eprintln!("amx-abort: reached the AMX kernel `{kernel}`");
    std::process::abort()
}

unsafe fn mul_strips(_: &StripArgs<'_>) {
    reached("mul_strips")
}

unsafe fn pack(_: &[f32], _: *mut u16, _: usize) {
    reached("pack")
}

unsafe fn swiglu(_: *const f32, _: *const f32, _: usize, _: usize, _: *mut u16) {
    reached("swiglu")
}

unsafe fn chunk(_: &mut TileChunk<'_>) {
    reached("attention")
}
