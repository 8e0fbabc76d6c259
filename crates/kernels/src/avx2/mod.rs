//! AVX2, FMA and F16C.

pub(crate) mod attention;
pub(crate) mod float;
pub(crate) mod matmul;
