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
pub const FEWEST: usize = 64;

/// A device helps with experts if the two take no more than this part of the time.
const WORTH_IT: f64 = 0.9;

/// The CPU computes some of the experts beside a stream of the others if that takes no more than
/// this part of the time that the stream of all takes. What it computes keeps it from filling
/// pieces, so that a guess that is a little too good costs more than one that is too bad: where
/// 0.9 of the time was reckoned, it was more than twice that.
const WORTH_SHARING: f64 = 0.75;

/// How fast things are.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Rates {
    /// Bytes per second from the file's pages to a device.
    pub upload: f64,
    /// Operations per second of a device with 512 tokens, decoding included.
    pub device: f64,
    /// Seconds that a hop costs besides: launches, and waiting for the result.
    pub hop: f64,
    /// Bytes per second that a thread of the CPU reads.
    pub memory: f64,
    /// Bytes per second that it copies.
    pub copy: f64,
    /// Tokens whose products on tiles take as long as decoding an expert for them.
    pub decoding: f64,
    /// How many times as long an expert takes the CPU while it fills staging memory for others.
    pub sharing: f64,
}

/// A PCIe 5.0 link of 16 lanes copies 50 to 55 GB/s from pinned memory, and filling that takes
/// its part. An H100 makes 313e12 operations a second on qwen3-8b and 116e12 on the experts of
/// qwen3-30b-a3b; 14 threads of the machine that it is in read 140 GB/s. There a layer's experts
/// took 4.0 ms with 512 tokens where the CPU kept every sixth, 1.8 ms where it only copied: what
/// it keeps takes it about three times as long as without copying.
pub const RATES: Rates = Rates {
    upload: 40e9,
    device: 100e12,
    hop: 200e-6,
    memory: 10e9,
    copy: 5e9,
    decoding: 20.0,
    sharing: 3.0,
};

/// The part of a matrix on the CPU that a device multiplies for single tokens meanwhile, which it
/// reads from pinned memory: what the link brings of what both read together, 50 of 170 GB/s on
/// the machine of [`RATES`], less what sending and waiting take. Reckoned, not yet measured.
pub const DECODE_SHARE: f64 = 0.25;

/// Bytes below which a part is not worth a device's time: what takes the link 2 µs.
pub const LEAST_SHARE: u64 = 128 << 10;

/// What the CPU multiplies with.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Cpu {
    pub rates: Rates,
    pub tier: Tier,
    /// AMX tiles multiply large batches.
    pub tiles: bool,
    pub threads: usize,
}

impl Cpu {
    /// Operations per second with large batches. Per thread, of records under `docs/bench`: tiles
    /// make 0.46e12 on dense matrices (qwen3-8b), AVX-512 0.18e12 (qwen3-1.7b).
    fn rate(&self) -> f64 {
        let thread = match self.tier {
            _ if self.tiles => 0.46e12,
            Tier::Scalar => 0.002e12,
            Tier::Avx2 => 0.06e12,
            Tier::Avx512 => 0.18e12,
        };
        thread * self.threads as f64
    }

    /// Seconds to read so many bytes.
    fn reading(&self, bytes: f64) -> f64 {
        bytes / (self.rates.memory * self.threads as f64)
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
    /// How many tokens each matrix gets that `m` tokens use, if they choose evenly.
    fn evenly(&self, m: usize) -> Vec<f64> {
        let Some((count, used)) = self.experts else {
            return vec![m as f64];
        };
        let part = 1.0 - (1.0 - used as f64 / count as f64).powf(m as f64);
        let chosen = (count as f64 * part).round().max(1.0);
        vec![(m * used) as f64 / chosen; chosen as usize]
    }

    /// The same if they all choose the same ones.
    fn alike(&self, m: usize) -> Vec<f64> {
        vec![m as f64; self.experts.map_or(1, |(_, used)| used)]
    }

    fn stack(&self) -> f64 {
        self.experts.map_or(1.0, |(count, _)| count as f64)
    }

    /// Seconds that a matrix and its tokens keep the link and the device busy.
    fn streamed(&self, tokens: f64, rates: &Rates) -> f64 {
        let operations = 2.0 * self.weights as f64 / self.stack();
        self.bytes as f64 / self.stack() / rates.upload + operations * tokens / rates.device
    }

    /// Seconds that they keep the CPU busy.
    fn on_cpu(&self, tokens: f64, cpu: &Cpu) -> f64 {
        let operations = 2.0 * self.weights as f64 / self.stack();
        // Vectors decode while they multiply.
        let decoding = match self.experts {
            Some(_) if cpu.tiles => cpu.rates.decoding,
            _ => 0.0,
        };
        let read = cpu.reading(self.bytes as f64 / self.stack());
        read.max(operations * (tokens + decoding) / cpu.rate())
    }

    /// Seconds that hops and the values that they move take.
    fn hops(&self, m: usize, rates: &Rates) -> f64 {
        rates.hop * self.hops as f64 + (4 * self.values) as f64 * m as f64 / rates.upload
    }

    /// How many of the matrices, with these tokens each and the most tokens first, a device had
    /// best take while the CPU computes the others; and the seconds that this takes. Staging
    /// memory is filled by the CPU. All or none of them, unless a part is much better.
    fn best_split(&self, m: usize, tokens: &[f64], cpu: &Cpu) -> (usize, f64) {
        let filling = self.bytes as f64 / self.stack() / (cpu.rates.copy * cpu.threads as f64);
        let alone: f64 = tokens.iter().map(|&t| self.on_cpu(t, cpu)).sum();
        let mut here = alone * cpu.rates.sharing;
        let mut there = self.hops(m, &cpu.rates);
        let mut part = (0, f64::INFINITY);
        let mut all = f64::INFINITY;
        for (taken, &t) in (1..).zip(tokens) {
            here += filling - self.on_cpu(t, cpu) * cpu.rates.sharing;
            there += self.streamed(t, &cpu.rates);
            let time = here.max(there);
            if taken == tokens.len() {
                all = time;
            } else if time < part.1 {
                part = (taken, time);
            }
        }
        match part.1 < WORTH_SHARING * all.min(alone) {
            true => part,
            false if all < alone => (tokens.len(), all),
            false => (0, alone),
        }
    }

    /// The experts that a device had best take of a batch of `m` tokens, ascending, while the CPU
    /// computes the others; `counts` are the tokens of each, most first.
    pub fn split(&self, m: usize, counts: &[(u32, usize)], cpu: &Cpu) -> Vec<u32> {
        let tokens: Vec<f64> = counts.iter().map(|c| c.1 as f64).collect();
        let (taken, _) = self.best_split(m, &tokens, cpu);
        let mut chosen: Vec<u32> = counts[..taken].iter().map(|c| c.0).collect();
        chosen.sort_unstable();
        chosen
    }

    /// The fewest tokens, [`FEWEST`] at least, from which a device is faster if it takes all;
    /// where `shared` is set, from which it helps if all tokens choose the same experts, since
    /// then [`Work::split`] decides for every batch. `None` if it is not up to 65536.
    pub fn fewest_tokens(&self, cpu: &Cpu, shared: bool) -> Option<usize> {
        let faster = |m: usize| {
            let tokens = match shared {
                true => self.alike(m),
                false => self.evenly(m),
            };
            let here: f64 = tokens.iter().map(|&t| self.on_cpu(t, cpu)).sum();
            let all: f64 = tokens.iter().map(|&t| self.streamed(t, &cpu.rates)).sum();
            match shared {
                true => self.best_split(m, &tokens, cpu).1 < WORTH_IT * here,
                false => all + self.hops(m, &cpu.rates) < here,
            }
        };
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

    fn cpu(tier: Tier, tiles: bool, threads: usize) -> Cpu {
        Cpu {
            rates: RATES,
            tier,
            tiles,
            threads,
        }
    }

    #[test]
    fn a_slower_cpu_streams_earlier_and_experts_later_than_dense_matrices() {
        let amx = cpu(Tier::Avx512, true, 14);
        let avx512 = cpu(Tier::Avx512, false, 14);
        let few = cpu(Tier::Avx2, false, 4);
        for (work, shared) in [(experts(), false), (experts(), true), (network(), false)] {
            let from = [amx, avx512, few].map(|c| work.fewest_tokens(&c, shared).unwrap());
            assert!(from[0] >= from[1] && from[1] >= from[2], "{from:?}");
            assert!(from[2] >= FEWEST);
        }
        let of = |w: Work, shared| w.fewest_tokens(&amx, shared).unwrap();
        assert!(of(experts(), false) > 4 * of(network(), false));
        // The two together are sooner worth it than the device alone.
        assert!(of(experts(), true) < of(experts(), false));
        // What is small is never worth a hop.
        let small = Work {
            bytes: 18,
            weights: 32,
            values: 64,
            hops: 1,
            experts: None,
        };
        assert_eq!(small.fewest_tokens(&amx, false), None);
    }

    #[test]
    fn a_split_gives_the_device_what_has_most_tokens_and_balances() {
        let work = experts();
        let mut amx = cpu(Tier::Avx512, true, 14);
        // An older link, and staging memory that fills itself.
        (amx.rates.upload, amx.rates.sharing) = (15e9, 1.0);
        let counts: Vec<(u32, usize)> = (0..128).map(|e| (127 - e, 160 - e as usize)).collect();
        let chosen = work.split(1000, &counts, &amx);
        assert!(chosen.is_sorted() && chosen.len() > 10 && chosen.len() < 120);
        // Those with most tokens have the highest numbers here.
        assert_eq!(chosen[0] as usize, 128 - chosen.len());
        let tokens: Vec<f64> = counts.iter().map(|c| c.1 as f64).collect();
        let (taken, time) = work.best_split(1000, &tokens, &amx);
        assert_eq!(taken, chosen.len());
        let alone: f64 = tokens.iter().map(|&t| work.on_cpu(t, &amx)).sum();
        let all: f64 = tokens.iter().map(|&t| work.streamed(t, &amx.rates)).sum();
        assert!(time < WORTH_SHARING * alone && time < WORTH_SHARING * all);
        // A few tokens of few experts are not worth it.
        assert!(work.split(4, &[(3, 4), (9, 4)], &amx).is_empty());
    }

    /// What was measured, of 512 tokens on 14 threads with tiles and an H100: with few experts in
    /// use all of them had best stream, and a layer took 1.8 ms instead of 4.0 with a sixth of
    /// them here, or 10 with all of them.
    #[test]
    fn few_experts_of_many_tokens_all_stream() {
        let (work, amx) = (experts(), cpu(Tier::Avx512, true, 14));
        assert!(work.fewest_tokens(&amx, true).unwrap() <= 512);
        for experts in [20u32, 25, 30, 64] {
            let each = 8 * 512 / experts as usize;
            let counts: Vec<_> = (0..experts).map(|e| (e, each)).collect();
            let chosen = work.split(512, &counts, &amx);
            assert_eq!(chosen, (0..experts).collect::<Vec<_>>());
        }
        // One token each stays here, and many tokens each never do.
        let of = |n: usize| (0..128).map(|e| (e, n)).collect::<Vec<_>>();
        assert!(work.split(16, &of(1), &amx).is_empty());
        assert_eq!(work.split(8192, &of(512), &amx).len(), 128);
    }
}
