//! Pages without their smallest values.
//!
//! When a page is full, the values of K and of V that are smallest by magnitude are dropped,
//! for each KV head by itself and always as many, so that all pages have one length. What is
//! left lies behind bitmaps of 64 bits, in the order of the bits:
//!
//! | | words | a word's bits | values |
//! |---|---|---|---|
//! | K | `[dim]` | positions | `[dim][kept of 64]` |
//! | V | `[⌈dim / 64⌉][64]` | dimensions, 64 at a time | `[⌈dim / 64⌉][64][kept of up to 64]` |
//!
//! so that a kernel expands a word's values into vectors of positions (K) or dimensions (V),
//! as dense pages have them. Values are the 16 bits that the dense page had: a page of which
//! nothing is dropped gives the same sums as the dense one, bit for bit.

use super::{KV_PAGE, KvError, KvShape, KvType};
use std::fmt;

/// The shares of K and V that finished pages lose, each from 0 to below 1.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct KvSparsity {
    k: f32,
    v: f32,
}

impl KvSparsity {
    /// `None` for shares that are not from 0 to below 1.
    pub fn new(k: f32, v: f32) -> Option<KvSparsity> {
        let good = |x: f32| (0.0..1.0).contains(&x);
        (good(k) && good(v)).then_some(KvSparsity { k, v })
    }

    /// The share of K that is dropped.
    pub fn k(&self) -> f32 {
        self.k
    }

    /// The share of V that is dropped.
    pub fn v(&self) -> f32 {
        self.v
    }
}

impl fmt::Display for KvSparsity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "K={},V={}", self.k, self.v)
    }
}

/// Keys or values.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    K,
    V,
}

/// Bytes behind the last value that kernels may read.
const SLACK: usize = 64;

/// What a pruned page of one head holds of K or of V.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Half {
    pub side: Side,
    /// F16 or BF16.
    pub ty: KvType,
    pub dim: usize,
    /// Values that are left.
    pub kept: usize,
}

impl Half {
    /// Bitmaps of 64 bits.
    pub fn words(&self) -> usize {
        match self.side {
            Side::K => self.dim,
            Side::V => self.dim.div_ceil(64) * KV_PAGE,
        }
    }

    /// Bits of a word that stand for something.
    fn width(&self, word: usize) -> usize {
        match self.side {
            Side::K => KV_PAGE,
            Side::V => (self.dim - word / KV_PAGE * 64).min(64),
        }
    }

    /// Where the dense page has what a bit stands for, in values.
    fn dense_at(&self, word: usize, bit: usize) -> usize {
        let (d, t) = match self.side {
            Side::K => (word, bit),
            Side::V => (word / KV_PAGE * 64 + bit, word % KV_PAGE),
        };
        match (self.side, self.ty) {
            (Side::K, KvType::BF16) => (d / 2 * KV_PAGE + t) * 2 + d % 2,
            (Side::V, KvType::BF16) => (t / 2 * self.dim + d) * 2 + t % 2,
            (Side::K, _) => d * KV_PAGE + t,
            (Side::V, _) => t * self.dim + d,
        }
    }

    /// Bytes in the cache, with those that kernels may read behind the values.
    pub fn bytes(&self) -> usize {
        (self.words() * 8 + self.kept * 2).next_multiple_of(64) + SLACK
    }

    /// Packs a dense page: `kept` values stay, the largest by magnitude, of equal ones the
    /// first. `scratch` is kept from call to call.
    ///
    /// # Panics
    /// When a slice is shorter than its page.
    pub fn pack(&self, dense: &[u8], scratch: &mut PackScratch, out: &mut [u8]) {
        let PackScratch { values, keys } = scratch;
        values.clear();
        for word in 0..self.words() {
            for bit in 0..self.width(word) {
                let at = 2 * self.dense_at(word, bit);
                values.push(u16::from_le_bytes([dense[at], dense[at + 1]]));
            }
        }
        // The bits of a magnitude have its order.
        let magnitude = |bits: u16| bits & 0x7fff;
        keys.clear();
        keys.extend(values.iter().map(|&bits| magnitude(bits)));
        let dropped = values.len() - self.kept;
        let (limit, mut equal) = match dropped {
            0 => (0, values.len()),
            _ => {
                let (_, &mut limit, above) = keys.select_nth_unstable(dropped);
                let larger = above.iter().filter(|&&key| key > limit).count();
                (limit, self.kept - larger)
            }
        };
        let (bitmaps, rest) = out[..self.bytes()].split_at_mut(8 * self.words());
        let mut values = values.iter();
        let mut to = rest.chunks_exact_mut(2);
        for (word, bitmap) in bitmaps.chunks_exact_mut(8).enumerate() {
            let mut bits = 0u64;
            for (bit, &value) in values.by_ref().take(self.width(word)).enumerate() {
                let key = magnitude(value);
                let keep = match key == limit {
                    true if equal > 0 => {
                        equal -= 1;
                        true
                    }
                    true => false,
                    false => key > limit,
                };
                if keep {
                    bits |= 1 << bit;
                    if let Some(to) = to.next() {
                        to.copy_from_slice(&value.to_le_bytes());
                    }
                }
            }
            bitmap.copy_from_slice(&bits.to_le_bytes());
        }
        to.for_each(|to| to.fill(0));
    }

    /// Writes the dense page, with zeros where values were dropped.
    ///
    /// # Panics
    /// When a slice is shorter than its page, or bitmaps count more values than there are.
    pub fn unpack(&self, packed: &[u8], out: &mut [u8]) {
        let (bitmaps, values) = packed.split_at(8 * self.words());
        let mut values = values.chunks_exact(2);
        for (word, bitmap) in bitmaps.as_chunks::<8>().0.iter().enumerate() {
            let bits = u64::from_le_bytes(*bitmap);
            for bit in 0..self.width(word) {
                let at = 2 * self.dense_at(word, bit);
                let to = &mut out[at..at + 2];
                match bits >> bit & 1 {
                    0 => to.fill(0),
                    _ => to.copy_from_slice(values.next().expect("as many values as bits")),
                }
            }
        }
    }

    /// Whether bitmaps count what the page holds and name nothing that isn't there: kernels
    /// trust them.
    pub fn is_whole(&self, packed: &[u8]) -> bool {
        let bitmaps = packed.get(..8 * self.words()).unwrap_or(&[]);
        let mut count = 0;
        for (word, bitmap) in bitmaps.as_chunks::<8>().0.iter().enumerate() {
            let bits = u64::from_le_bytes(*bitmap);
            if self.width(word) < 64 && bits >> self.width(word) != 0 {
                return false;
            }
            count += bits.count_ones() as usize;
        }
        packed.len() == self.bytes() && count == self.kept
    }
}

/// Memory of [`Half::pack`].
#[derive(Default)]
pub struct PackScratch {
    values: Vec<u16>,
    keys: Vec<u16>,
}

/// Both halves of a head's pruned page, and of all heads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Halves {
    pub k: Half,
    pub v: Half,
}

impl Halves {
    /// The pages of a cache of this geometry.
    ///
    /// # Errors
    /// For types that can't be pruned.
    pub fn new(shape: &KvShape, sparsity: KvSparsity) -> Result<Halves, KvError> {
        let half = |side, ty: KvType, share: f32| match ty {
            KvType::Q8_0 => Err(KvError::Pruned { ty: ty.name() }),
            _ => {
                let all = shape.dim * KV_PAGE;
                let dropped = (f64::from(share) * all as f64) as usize;
                Ok(Half {
                    side,
                    ty,
                    dim: shape.dim,
                    kept: all - dropped.min(all - 1),
                })
            }
        };
        Ok(Halves {
            k: half(Side::K, shape.k, sparsity.k)?,
            v: half(Side::V, shape.v, sparsity.v)?,
        })
    }

    /// Bytes of one head.
    pub fn head_bytes(&self) -> usize {
        self.k.bytes() + self.v.bytes()
    }

    /// K and V of one head.
    pub fn split<'a>(&self, head: &'a [u8]) -> (&'a [u8], &'a [u8]) {
        head.split_at(self.k.bytes())
    }

    /// Whether a page of several heads is whole.
    pub(crate) fn are_whole(&self, page: &[u8]) -> bool {
        page.chunks_exact(self.head_bytes()).all(|head| {
            let (k, v) = self.split(head);
            self.k.is_whole(k) && self.v.is_whole(v)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    fn halves(dim: usize, ty: KvType, k: f32, v: f32) -> Halves {
        let shape = KvShape {
            layers: 1,
            heads: 1,
            dim,
            k: ty,
            v: ty,
        };
        Halves::new(&shape, KvSparsity::new(k, v).unwrap()).unwrap()
    }

    fn dense(ty: KvType, values: usize) -> Vec<u8> {
        let mut state = 5u32;
        let mut float = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // Few steps, so that magnitudes are often equal.
            (state >> 26) as f32 / 16.0 - 2.0
        };
        let bits = |x: f32| match ty {
            KvType::BF16 => bf16::from_f32(x).to_bits(),
            _ => f16::from_f32(x).to_bits(),
        };
        (0..values)
            .flat_map(|_| bits(float()).to_le_bytes())
            .collect()
    }

    #[test]
    fn the_smallest_go_and_the_rest_comes_back() {
        for ty in [KvType::F16, KvType::BF16] {
            for dim in [2, 16, 64, 80, 128, 192] {
                let page = dense(ty, dim * KV_PAGE);
                for share in [0.0, 0.3, 0.5, 0.9] {
                    let both = halves(dim, ty, share, share);
                    for half in [both.k, both.v] {
                        let mut packed = vec![0xaa; half.bytes()];
                        half.pack(&page, &mut PackScratch::default(), &mut packed);
                        assert!(half.is_whole(&packed), "{half:?}");
                        let mut back = vec![0xbb; page.len()];
                        half.unpack(&packed, &mut back);
                        let bits = |bytes: &[u8]| -> Vec<u16> {
                            let (pairs, _) = bytes.as_chunks::<2>();
                            pairs.iter().map(|b| u16::from_le_bytes(*b)).collect()
                        };
                        let (page, back) = (bits(&page), bits(&back));
                        let kept = |(a, b): (&u16, &u16)| (a == b && *a != 0).then_some(a & 0x7fff);
                        let least = page.iter().zip(&back).filter_map(kept).min();
                        let lost = page.iter().zip(&back).filter(|(a, b)| a != b);
                        let most = lost.map(|(a, _)| a & 0x7fff).max();
                        assert!(
                            most <= least || least.is_none(),
                            "{half:?}: {most:?} {least:?}"
                        );
                        if share == 0.0 {
                            assert_eq!(page, back, "{half:?}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn pages_shrink_by_what_is_dropped() {
        let both = halves(128, KvType::F16, 0.3, 0.5);
        assert_eq!((both.k.kept, both.v.kept), (8192 - 2457, 4096));
        let dense = 2 * 128 * KV_PAGE * 2;
        let share = both.head_bytes() as f64 / dense as f64;
        assert!((0.66..0.68).contains(&share), "{share}");
    }

    #[test]
    fn bitmaps_that_lie_are_found() {
        let half = halves(80, KvType::F16, 0.5, 0.5).v;
        let mut packed = vec![0; half.bytes()];
        half.pack(
            &dense(KvType::F16, 80 * KV_PAGE),
            &mut PackScratch::default(),
            &mut packed,
        );
        assert!(half.is_whole(&packed) && !half.is_whole(&packed[1..]));
        for at in [0, 8 * KV_PAGE + 3] {
            let mut other = packed.clone();
            other[at] ^= 1;
            assert!(!half.is_whole(&other), "byte {at}");
        }
    }

    #[test]
    fn shares_are_below_one() {
        assert!(KvSparsity::new(0.0, 0.99).is_some());
        for (k, v) in [(1.0, 0.0), (0.0, -0.1), (f32::NAN, 0.0)] {
            assert!(KvSparsity::new(k, v).is_none());
        }
    }
}
