//! Operations on rows: norms and sums.

use super::Compute;
use crate::disjoint::DisjointMut;
use crate::profile::Op;

/// Values below which a dispatch costs more than the work.
const INLINE: usize = 16 * 1024;

/// Bytes that a task of [`Compute::copy`] copies.
const COPY: usize = 256 << 10;

impl Compute {
    /// Fills `to` with the parts, one after another, on all threads: one thread alone is slower
    /// than a link to a device.
    ///
    /// # Panics
    /// When they are not as long together.
    pub fn copy(&self, to: &mut [u8], parts: &[&[u8]]) {
        let _span = self.profile.span(Op::Copy);
        let mut tasks = Vec::new();
        let mut at = 0;
        for part in parts {
            for from in part.chunks(COPY) {
                tasks.push((at, from));
                at += from.len();
            }
        }
        assert_eq!(at, to.len());
        let to = DisjointMut::new(to);
        self.pool.run(tasks.len(), &|task| {
            let (at, from) = tasks[task];
            // SAFETY: each task has its own part.
            unsafe { to.slice(at..at + from.len()) }.copy_from_slice(from);
        });
    }

    /// Runs `task(0..count)`, in place when `count * size` values are too few to share out.
    pub(crate) fn for_each(&self, count: usize, size: usize, task: &(dyn Fn(usize) + Sync)) {
        if count * size <= INLINE {
            (0..count).for_each(task);
        } else {
            self.pool.run(count, task);
        }
    }

    /// `out = x / rms(x) * w` for each row of `w.len()` values; `x` and `out` are `[m][k]`.
    ///
    /// # Panics
    /// When lengths disagree.
    pub fn rms_norm(&self, x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
        let _span = self.profile.span(Op::Norm);
        let k = w.len();
        assert!(x.len() == out.len() && x.len().is_multiple_of(k));
        let out = DisjointMut::new(out);
        self.for_each(x.len() / k, k, &|t| {
            // SAFETY: each task has its own row; the table's tier was checked.
            unsafe {
                let out = out.slice(t * k..(t + 1) * k);
                (self.table.float.rms_norm)(&x[t * k..(t + 1) * k], w, eps, out);
            }
        });
    }

    /// `dst += x`.
    ///
    /// # Panics
    /// When lengths disagree.
    pub fn add_assign(&self, dst: &mut [f32], x: &[f32]) {
        let _span = self.profile.span(Op::Add);
        assert_eq!(dst.len(), x.len());
        let len = x.len();
        let part = 4096;
        let dst = DisjointMut::new(dst);
        self.for_each(len.div_ceil(part), part, &|i| {
            let range = i * part..len.min((i + 1) * part);
            // SAFETY: each task has its own range; the table's tier was checked.
            unsafe { (self.table.float.add_assign)(dst.slice(range.clone()), &x[range]) };
        });
    }

    /// Adds `bias` to each row of `x`, `[m][bias.len()]`.
    ///
    /// # Panics
    /// When `x` is no whole number of rows.
    pub fn add_bias(&self, x: &mut [f32], bias: &[f32]) {
        let _span = self.profile.span(Op::Add);
        let k = bias.len();
        assert!(x.len().is_multiple_of(k));
        let rows = x.len() / k;
        let x = DisjointMut::new(x);
        self.for_each(rows, k, &|t| {
            // SAFETY: each task has its own row; the table's tier was checked.
            unsafe { (self.table.float.add_assign)(x.slice(t * k..(t + 1) * k), bias) };
        });
    }

    /// `out = silu(gate) * up`.
    ///
    /// # Panics
    /// When lengths disagree.
    pub fn swiglu(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        assert!(gate.len() == up.len() && gate.len() == out.len());
        let len = gate.len();
        let part = 1024;
        let out = DisjointMut::new(out);
        self.for_each(len.div_ceil(part), part, &|i| {
            let range = i * part..len.min((i + 1) * part);
            // SAFETY: each task has its own range; the table's tier was checked.
            unsafe {
                let out = out.slice(range.clone());
                (self.table.float.swiglu)(&gate[range.clone()], &up[range], out);
            }
        });
    }

    /// Softmax of one row in place.
    pub fn softmax(&self, x: &mut [f32]) {
        // SAFETY: the table's tier was checked.
        unsafe { (self.table.float.softmax)(x) }
    }
}
