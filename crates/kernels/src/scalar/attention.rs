//! The definition of attention over one chunk.

use crate::{
    attn::{CHUNK, ChunkArgs},
    kv::{KV_PAGE, KvType},
};
use half::{bf16, f16};

fn half_at(bytes: &[u8], i: usize) -> u16 {
    u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]])
}

fn f32_at(bytes: &[u8], i: usize) -> f32 {
    f32::from_le_bytes([
        bytes[4 * i],
        bytes[4 * i + 1],
        bytes[4 * i + 2],
        bytes[4 * i + 3],
    ])
}

/// K at dimension `d` of the position in `slot`.
pub(crate) fn k_at(ty: KvType, page: &[u8], dim: usize, slot: usize, d: usize) -> f32 {
    match ty {
        KvType::F16 => f16::from_bits(half_at(page, d * KV_PAGE + slot)).to_f32(),
        KvType::BF16 => {
            bf16::from_bits(half_at(page, (d / 2 * KV_PAGE + slot) * 2 + d % 2)).to_f32()
        }
        KvType::Q8_0 => {
            let scale = f32_at(&page[dim * KV_PAGE..], d / 32 * KV_PAGE + slot);
            f32::from(page[d * KV_PAGE + slot] as i8) * scale
        }
    }
}

/// V at dimension `d` of the position in `slot`.
pub(crate) fn v_at(ty: KvType, page: &[u8], dim: usize, slot: usize, d: usize) -> f32 {
    match ty {
        KvType::F16 => f16::from_bits(half_at(page, slot * dim + d)).to_f32(),
        KvType::BF16 => {
            bf16::from_bits(half_at(page, (slot / 2 * dim + d) * 2 + slot % 2)).to_f32()
        }
        KvType::Q8_0 => {
            let scale = f32_at(&page[dim * KV_PAGE..], slot * (dim / 32) + d / 32);
            f32::from(page[slot * dim + d] as i8) * scale
        }
    }
}

/// Scores, softmax and weighted values of one chunk.
pub(crate) unsafe fn chunk(args: &mut ChunkArgs<'_>) {
    if args.pruned.is_some() {
        // SAFETY: this kernel needs no tier.
        return unsafe { args.unpacked(chunk) };
    }
    args.check();
    let dim = args.dim;
    for (row, &visible) in args.visible.iter().enumerate() {
        let q = &args.q[row * dim..(row + 1) * dim];
        let scores = &mut args.scores[row * CHUNK..(row + 1) * CHUNK];
        let acc = &mut args.acc[row * dim..(row + 1) * dim];
        acc.fill(0.0);
        for (t, score) in scores[..visible].iter_mut().enumerate() {
            let page = args.pages[t / KV_PAGE].0;
            let k = |d| k_at(args.k_type, page, dim, t % KV_PAGE, d);
            *score = (0..dim).map(|d| q[d] * k(d)).sum();
        }
        let max = scores[..visible]
            .iter()
            .copied()
            .fold(f32::NEG_INFINITY, f32::max);
        let mut sum = 0.0;
        for (t, score) in scores[..visible].iter().enumerate() {
            let p = (score - max).exp();
            sum += p;
            let page = args.pages[t / KV_PAGE].1;
            for (d, acc) in acc.iter_mut().enumerate() {
                *acc += p * v_at(args.v_type, page, dim, t % KV_PAGE, d);
            }
        }
        args.max[row] = max;
        args.sum[row] = sum;
    }
}
