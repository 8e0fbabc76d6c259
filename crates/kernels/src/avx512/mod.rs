//! AVX-512 F, BW, VL, DQ and VNNI.

pub(crate) mod attention;
pub(crate) mod float;
pub(crate) mod matmul;
pub(crate) mod pruned;
pub(crate) mod sparse;
