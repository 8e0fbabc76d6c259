//! Splitting every layer over several devices (`-sm tensor`): by KV heads and by hidden
//! values. Each device holds the rows of q, k and v of its heads and the columns of the output
//! projection that they meet, the rows of gate and up and the columns of down of its hidden
//! values; norms and routers are on all of them. What each device adds to the residual stream
//! is summed here, in the devices' order, and brought to all: twice a layer.

use crate::{Error, ModelConfig, Result};
use std::ops::Range;
use tegula_gguf::{Gguf, TensorInfo};

/// What of a tensor a device holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Cut {
    Nothing,
    Whole,
    /// Rows (outputs) of a matrix, of each matrix of a stack, or values of a vector.
    Rows(Range<usize>),
    /// Columns (inputs).
    Columns(Range<usize>),
}

/// Each device's part of every layer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TensorSplit {
    /// KV heads of each device, with the query heads that share them.
    pub heads: Vec<Range<usize>>,
    /// Hidden values of the networks, or of each expert.
    pub ff: Vec<Range<usize>>,
    /// Query heads of a KV head, times the head dimension.
    q_cols: usize,
    head_dim: usize,
}

fn lcm(a: usize, b: usize) -> usize {
    let gcd = |mut a: usize, mut b: usize| {
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    a / gcd(a, b) * b
}

/// `total` in runs of whole `unit`s by shares.
fn runs(total: usize, unit: usize, shares: &[f64]) -> Vec<Range<usize>> {
    let units = total / unit;
    let sum: f64 = shares.iter().sum();
    let (mut so_far, mut start) = (0.0, 0);
    let mut runs = Vec::with_capacity(shares.len());
    for share in shares {
        so_far += share;
        let end = ((units as f64 * so_far / sum).round() as usize).clamp(start, units);
        runs.push(start * unit..end * unit);
        start = end;
    }
    if let Some(last) = shares.iter().rposition(|s| *s > 0.0) {
        runs[last].end = units * unit;
        runs[last + 1..]
            .iter_mut()
            .for_each(|r| *r = units * unit..units * unit);
    }
    runs
}

/// The largest run of weights that no cut may divide, over tensors whose name ends so.
fn block(gguf: &Gguf, ends: &[&str]) -> usize {
    let meant = |t: &&TensorInfo| ends.iter().any(|end| t.name.ends_with(end));
    let blocks = gguf
        .tensors()
        .iter()
        .filter(meant)
        .map(|t| t.ty.block_len());
    blocks.fold(1, lcm)
}

impl TensorSplit {
    /// Splits by shares, one of each device.
    ///
    /// # Errors
    /// When a layer's matrices can't be cut at all: their blocks are as long as their rows.
    pub fn new(c: &ModelConfig, gguf: &Gguf, shares: &[f64]) -> Result<TensorSplit> {
        let q_cols = c.heads / c.kv_heads * c.head_dim;
        let unit = lcm(q_cols, block(gguf, &["attn_output.weight"])) / q_cols;
        let ff = c.experts.map_or(c.ff, |e| e.ff);
        let ff_unit = block(gguf, &["ffn_down.weight", "ffn_down_exps.weight"]);
        if !c.kv_heads.is_multiple_of(unit) || !ff.is_multiple_of(ff_unit) {
            return Err(Error::Placement(format!(
                "-sm tensor: {} KV heads can be cut in groups of {unit}, {ff} hidden values in \
                 groups of {ff_unit}, and neither may be left over; use -sm layer",
                c.kv_heads
            )));
        }
        Ok(TensorSplit {
            heads: runs(c.kv_heads, unit, shares),
            ff: runs(ff, ff_unit, shares),
            q_cols,
            head_dim: c.head_dim,
        })
    }

    /// Devices that attend.
    pub fn attending(&self) -> Vec<usize> {
        let some = |d: &usize| !self.heads[*d].is_empty();
        (0..self.heads.len()).filter(some).collect()
    }

    /// Devices that hold a part of the networks.
    pub fn feeding(&self) -> Vec<usize> {
        let some = |d: &usize| !self.ff[*d].is_empty();
        (0..self.ff.len()).filter(some).collect()
    }

    /// Devices that hold anything, and so the residual stream.
    pub fn all(&self) -> Vec<usize> {
        let some = |d: &usize| !self.heads[*d].is_empty() || !self.ff[*d].is_empty();
        (0..self.heads.len()).filter(some).collect()
    }

    /// What of a layer's tensor device `d` holds.
    pub(crate) fn cut(&self, name: &str, d: usize) -> Cut {
        let Some((_, part)) = name
            .strip_prefix("blk.")
            .and_then(|rest| rest.split_once('.'))
        else {
            return Cut::Nothing;
        };
        let (heads, ff) = (&self.heads[d], &self.ff[d]);
        let times = |r: &Range<usize>, n: usize| r.start * n..r.end * n;
        if part.starts_with("attn_") {
            return match part {
                _ if heads.is_empty() => Cut::Nothing,
                "attn_q.weight" | "attn_q.bias" => Cut::Rows(times(heads, self.q_cols)),
                "attn_k.weight" | "attn_k.bias" | "attn_v.weight" | "attn_v.bias" => {
                    Cut::Rows(times(heads, self.head_dim))
                }
                "attn_output.weight" => Cut::Columns(times(heads, self.q_cols)),
                // Added once.
                "attn_output.bias" if heads.start > 0 => Cut::Nothing,
                _ => Cut::Whole,
            };
        }
        match part {
            _ if ff.is_empty() => Cut::Nothing,
            "ffn_gate.weight" | "ffn_up.weight" | "ffn_gate_exps.weight" | "ffn_up_exps.weight" => {
                Cut::Rows(ff.clone())
            }
            "ffn_down.weight" | "ffn_down_exps.weight" => Cut::Columns(ff.clone()),
            _ => Cut::Whole,
        }
    }

    /// The model as device `d` sees it: with its heads alone.
    pub(crate) fn config(&self, c: &ModelConfig, d: usize) -> ModelConfig {
        let kv_heads = self.heads[d].len();
        ModelConfig {
            heads: c.heads / c.kv_heads * kv_heads,
            kv_heads,
            ..c.clone()
        }
    }

    /// Bytes that a layer's attention brings from the devices and to them, per token, and that
    /// its network does.
    pub(crate) fn exchanged(&self, c: &ModelConfig) -> [u64; 2] {
        let to = self.all().len();
        [self.attending().len(), self.feeding().len()].map(|from| ((from + to) * c.embd * 4) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_whole_units_by_shares() {
        assert_eq!(runs(8, 1, &[1.0, 1.0]), [0..4, 4..8]);
        assert_eq!(runs(8, 1, &[1.0, 1.0, 1.0]), [0..3, 3..5, 5..8]);
        assert_eq!(runs(2, 1, &[1.0, 1.0, 1.0]), [0..1, 1..1, 1..2]);
        assert_eq!(runs(768, 256, &[3.0, 1.0]), [0..512, 512..768]);
        assert_eq!(runs(8, 2, &[0.0, 1.0]), [0..0, 0..8]);
        assert_eq!(runs(8, 2, &[1.0, 0.0]), [0..8, 8..8]);
    }

    #[test]
    fn cuts_meet() {
        let split = TensorSplit {
            heads: vec![0..2, 2..3],
            ff: vec![0..64, 64..96],
            q_cols: 256,
            head_dim: 64,
        };
        let cut = |part: &str, d| split.cut(&format!("blk.1.{part}"), d);
        assert_eq!(cut("attn_q.weight", 1), Cut::Rows(512..768));
        assert_eq!(cut("attn_v.bias", 1), Cut::Rows(128..192));
        assert_eq!(cut("attn_output.weight", 0), Cut::Columns(0..512));
        assert_eq!(cut("attn_output.bias", 0), Cut::Whole);
        assert_eq!(cut("attn_output.bias", 1), Cut::Nothing);
        assert_eq!(cut("attn_q_norm.weight", 1), Cut::Whole);
        assert_eq!(cut("ffn_up_exps.weight", 1), Cut::Rows(64..96));
        assert_eq!(cut("ffn_down.weight", 0), Cut::Columns(0..64));
        assert_eq!(cut("ffn_gate_inp.weight", 1), Cut::Whole);
        assert_eq!(split.cut("output.weight", 0), Cut::Nothing);
    }
}
