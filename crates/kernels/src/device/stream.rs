//! Weights that stay in host memory and are brought to a device for one batch.
//!
//! A batch of many tokens multiplies a matrix so long on the CPU that a device is faster even
//! if the matrix has to be copied there first. From how many tokens on is a question of rates,
//! and they are constants here: rates measured at start would differ from run to run, and with
//! them what is computed where, and the results.

use super::RawMatrix;
use crate::tier::Tier;

/// Bytes that are copied at once: larger pieces gain nothing on a PCIe link, and smaller ones
/// cost launches.
pub const PIECE: usize = 8 << 20;
/// Pieces under way: while one is filled, one crosses the link and one is being rearranged.
pub const PIECES: usize = 4;
/// Bytes on a device where pieces land.
pub const LANDING: usize = PIECE * PIECES;

/// Tokens below which nothing is streamed by itself: the overheads that [`Rates`] names are
/// guesses, and with so few tokens they are all that counts.
pub const FEWEST: usize = 32;

/// Bytes per second from the file's pages to a device: a PCIe 5.0 link of 16 lanes copies 50 to
/// 55 GB/s from pinned memory, and filling that takes its part.
const UPLOAD: f64 = 40e9;
/// Operations per second of a device with 512 tokens, decoding included: an H100 makes 313e12
/// on qwen3-8b and 116e12 on the experts of qwen3-30b-a3b.
const DEVICE: f64 = 100e12;
/// Seconds that a hop costs besides: launches, and waiting for the result.
const HOP: f64 = 200e-6;
/// Bytes per second that a thread of the CPU reads.
const MEMORY: f64 = 10e9;

/// What the CPU multiplies with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cpu {
    pub tier: Tier,
    /// AMX tiles multiply large batches.
    pub tiles: bool,
    pub threads: usize,
}

impl Cpu {
    /// Operations per second with large batches. Per thread, of records under `docs/bench`: tiles
    /// make 0.46e12 on dense matrices (qwen3-8b) and 0.28e12 on experts (qwen3-30b-a3b), AVX-512
    /// 0.18e12 (qwen3-1.7b). Experts get few tokens each, for which decoding costs as much as
    /// multiplying; that is taken to be so on every tier.
    fn rate(&self, experts: bool) -> f64 {
        let thread = match self.tier {
            _ if self.tiles => 0.46e12,
            Tier::Scalar => 0.002e12,
            Tier::Avx2 => 0.06e12,
            Tier::Avx512 => 0.18e12,
        };
        thread * self.threads as f64 * if experts { 0.6 } else { 1.0 }
    }
}

/// Matrices that are multiplied in one go.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Work {
    /// Of the matrices in the file.
    pub bytes: u64,
    /// Weights.
    pub weights: u64,
    /// Values per token that go to the device and back.
    pub values: u64,
    /// Times that they do.
    pub hops: usize,
    /// Matrices are stacks of so many, of which a token uses so many.
    pub experts: Option<(usize, usize)>,
}

impl Work {
    /// The part of the matrices that `m` tokens use, if they choose evenly.
    fn used(&self, m: usize) -> f64 {
        self.experts.map_or(1.0, |(count, used)| {
            1.0 - (1.0 - used as f64 / count as f64).powf(m as f64)
        })
    }

    /// Operations of a token.
    fn operations(&self) -> f64 {
        let part = self
            .experts
            .map_or(1.0, |(count, used)| used as f64 / count as f64);
        2.0 * self.weights as f64 * part
    }

    /// Seconds that `m` tokens take when the matrices are brought to a device.
    pub fn streamed(&self, m: usize) -> f64 {
        let moved = self.bytes as f64 * self.used(m) + (4 * self.values) as f64 * m as f64;
        HOP * self.hops as f64 + moved / UPLOAD + self.operations() * m as f64 / DEVICE
    }

    /// Seconds that they take on the CPU.
    pub fn on_cpu(&self, m: usize, cpu: &Cpu) -> f64 {
        let read = self.bytes as f64 * self.used(m) / (MEMORY * cpu.threads as f64);
        let multiplied = self.operations() * m as f64 / cpu.rate(self.experts.is_some());
        read.max(multiplied)
    }

    /// The fewest tokens, [`FEWEST`] at least, from which a device is faster; `None` if it is
    /// not up to 65536.
    pub fn fewest_tokens(&self, cpu: &Cpu) -> Option<usize> {
        let faster = |m: usize| self.streamed(m) < self.on_cpu(m, cpu);
        let (mut low, mut high) = (FEWEST, 1 << 16);
        if !faster(high) {
            return None;
        }
        while low < high {
            let middle = low + (high - low) / 2;
            match faster(middle) {
                true => high = middle,
                false => low = middle + 1,
            }
        }
        Some(low)
    }
}

/// Who fills pieces of staging memory, and what to do while there is none to fill.
pub trait Feeder {
    /// Fills `to` with the parts, one after another; together they are as long.
    fn fill(&mut self, to: &mut [u8], parts: &[&[u8]]);

    /// Called when all pieces are under way: does a little of something else. `false`: there is
    /// nothing (left) to do.
    fn meanwhile(&mut self) -> bool {
        false
    }
}

/// A run of a matrix's bytes, in whole blocks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Piece<'a> {
    /// The first of its blocks, counted over all that is brought.
    pub first_block: u64,
    /// Bytes of all parts.
    pub len: usize,
    /// Where they are.
    pub parts: Vec<&'a [u8]>,
}

/// The bytes of a matrix, or of those of a stack that `chosen` names, one after another, in
/// pieces of up to `limit` bytes.
///
/// # Panics
/// When there is no such matrix, or a block is longer than `limit`.
pub fn pieces<'a>(from: &'a RawMatrix, chosen: Option<&[u32]>, limit: usize) -> Vec<Piece<'a>> {
    let block = from.ty().block_bytes();
    let limit = limit / block * block;
    assert!(limit > 0, "a block longer than a piece");
    let one = from.bytes().len() / from.experts();
    let all = [from.bytes()];
    let stretches: Vec<&[u8]> = match chosen {
        None => all.to_vec(),
        Some(chosen) => chosen
            .iter()
            .map(|&e| &from.bytes()[e as usize * one..][..one])
            .collect(),
    };
    let mut pieces: Vec<Piece<'a>> = Vec::new();
    let mut done = 0;
    for mut stretch in stretches {
        while !stretch.is_empty() {
            let room = pieces.last().map_or(0, |p| limit - p.len);
            if room == 0 {
                pieces.push(Piece {
                    first_block: (done / block) as u64,
                    len: 0,
                    parts: Vec::new(),
                });
                continue;
            }
            let (part, rest) = stretch.split_at(room.min(stretch.len()));
            if let Some(piece) = pieces.last_mut() {
                piece.parts.push(part);
                piece.len += part.len();
            }
            done += part.len();
            stretch = rest;
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;
    use tegula_gguf::{Bytes, GgmlType};

    #[test]
    fn pieces_are_the_chosen_matrices_in_whole_blocks() {
        // Four matrices of two rows of one block; a block's first byte numbers it.
        let block = GgmlType::Q8_0.block_bytes();
        let mut bytes = vec![0; 8 * block];
        (0..8).for_each(|i| bytes[i * block] = i as u8);
        let all = RawMatrix::new(GgmlType::Q8_0, 2, 32, 4, Bytes::from_vec(bytes)).unwrap();
        let cut = |chosen: Option<&[u32]>, limit| -> Vec<(u64, Vec<u8>)> {
            let one = |p: &Piece<'_>| {
                let joined = p.parts.concat();
                assert_eq!(joined.len(), p.len);
                assert!(p.len <= limit);
                let firsts = joined.iter().step_by(block).copied().collect();
                (p.first_block, firsts)
            };
            pieces(&all, chosen, limit).iter().map(one).collect()
        };
        assert_eq!(
            cut(None, 3 * block + 5),
            [(0, vec![0, 1, 2]), (3, vec![3, 4, 5]), (6, vec![6, 7])]
        );
        assert_eq!(
            cut(Some(&[1, 3]), 3 * block),
            [(0, vec![2, 3, 6]), (3, vec![7])]
        );
        assert_eq!(cut(Some(&[]), block), []);
    }

    /// One layer of a 30-billion-parameter mixture: 128 experts of 768, 8 of them used.
    fn experts() -> Work {
        let weights = 128 * 3 * 768 * 2048;
        Work {
            bytes: weights / 32 * 18,
            weights,
            values: 4096,
            hops: 1,
            experts: Some((128, 8)),
        }
    }

    /// One feed-forward network of an 8-billion-parameter model.
    fn network() -> Work {
        let weights = 3 * 4096 * 12288;
        Work {
            bytes: weights / 32 * 18,
            weights,
            values: 8192,
            hops: 1,
            experts: None,
        }
    }

    #[test]
    fn a_slower_cpu_streams_earlier_and_experts_later_than_dense_matrices() {
        let cpu = |tier, tiles, threads| Cpu {
            tier,
            tiles,
            threads,
        };
        let amx = cpu(Tier::Avx512, true, 14);
        let avx512 = cpu(Tier::Avx512, false, 14);
        let few = cpu(Tier::Avx2, false, 4);
        for work in [experts(), network()] {
            let from = [amx, avx512, few].map(|c| work.fewest_tokens(&c).unwrap());
            assert!(from[0] >= from[1] && from[1] >= from[2], "{from:?}");
            assert!(from[2] >= FEWEST);
        }
        let of = |w: Work| w.fewest_tokens(&amx).unwrap();
        assert!(of(experts()) > 4 * of(network()));
    }

    #[test]
    fn the_crossover_is_where_the_predictions_cross() {
        let cpu = Cpu {
            tier: Tier::Avx512,
            tiles: true,
            threads: 14,
        };
        let work = experts();
        let from = work.fewest_tokens(&cpu).unwrap();
        assert!(work.streamed(from) < work.on_cpu(from, &cpu));
        assert!(work.streamed(from - 1) >= work.on_cpu(from - 1, &cpu));
        // What is small is never worth a hop.
        let small = Work {
            bytes: 18,
            weights: 32,
            values: 64,
            hops: 1,
            experts: None,
        };
        assert_eq!(small.fewest_tokens(&cpu), None);
    }
}
