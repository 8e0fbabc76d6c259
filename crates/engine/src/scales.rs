//! Factors of whole matrices: tensors `NAME.scale`, with a number for `NAME.weight` or one per expert,
//! by which its products are multiplied. Files in NVFP4 have them, whose scales of blocks reach
//! only so far.

use tegula_gguf::{Gguf, TensorInfo};

/// The name of the matrix whose factors a tensor of that name has.
pub(crate) fn matrix(scale: &str) -> Option<String> {
    Some(format!("{}.weight", scale.strip_suffix(".scale")?))
}

/// The factors of the matrix of that name.
pub(crate) fn of<'a>(gguf: &'a Gguf, matrix: &str) -> Option<&'a TensorInfo> {
    gguf.tensor(&format!("{}.scale", matrix.strip_suffix(".weight")?))
}
