//! Plain Rust: the definition of every operation.

pub(crate) mod attention;
pub(crate) mod float;
pub(crate) mod matmul;
