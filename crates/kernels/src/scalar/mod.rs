//! The scalar tier: the definition of every operation.

pub(crate) mod matmul;
