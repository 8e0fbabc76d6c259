//! Embeddings.

use super::Compute;
use crate::{disjoint::DisjointMut, profile::Op, weights::Weights};
use tegula_gguf::blocks;

impl Compute {
    /// Rows of a weight matrix as f32, `[ids.len()][k]`.
    ///
    /// # Panics
    /// When an id is no row or the length of `out` disagrees.
    pub fn get_rows(&self, w: &Weights, ids: &[u32], out: &mut [f32]) {
        let _span = self.profile.span(Op::Embed);
        let k = w.k();
        assert_eq!(out.len(), ids.len() * k);
        assert!(ids.iter().all(|&id| (id as usize) < w.n()));
        let ty = w.ty().dense();
        let bytes = k / ty.block_len() * ty.block_bytes();
        let out = DisjointMut::new(out);
        self.for_each(ids.len(), k, &|t| {
            let mut row = vec![0u8; bytes];
            w.read_row(0, ids[t] as usize, &mut row);
            // SAFETY: each task has its own row.
            let out = unsafe { out.slice(t * k..(t + 1) * k) };
            blocks::dequantize(ty, &row, out).expect("whole blocks of a row of weights");
        });
    }
}
