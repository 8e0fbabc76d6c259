//! ggml's tensor element types: ids, names, block geometry.

use std::{fmt, str::FromStr};

macro_rules! ggml_types {
    (
        $($variant:ident = $id:literal, $name:literal, $block:literal, $bytes:literal;)*
        => $($(#[$doc:meta])* $sparse:ident = $sid:literal, $sname:literal, $dense:ident;)*
    ) => {
        /// A tensor element type as GGUF files name it, or a sparse twin of one.
        ///
        /// Block geometry is ggml's: `block_len` weights take `block_bytes` bytes. Sparse
        /// types have the geometry of their dense twin, but no fixed size: see
        /// [`crate::sparse`].
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        #[allow(non_camel_case_types)]
        #[repr(u32)]
        pub enum GgmlType { $($variant = $id,)* $($(#[$doc])* $sparse = $sid,)* }

        impl GgmlType {
            /// Every type of ggml's that this build can name, in order of id.
            pub const ALL: &'static [GgmlType] = &[$(GgmlType::$variant,)*];

            /// The sparse types, which GGUF files don't name: see [`crate::sparse`].
            pub const SPARSE: &'static [GgmlType] = &[$(GgmlType::$sparse,)*];

            /// The type with ggml's numeric id, if this build knows it.
            pub const fn from_id(id: u32) -> Option<GgmlType> {
                match id { $($id => Some(GgmlType::$variant),)* _ => None }
            }

            /// The name users know, such as `Q4_K`.
            pub const fn name(self) -> &'static str {
                match self {
                    $(GgmlType::$variant => $name,)*
                    $(GgmlType::$sparse => $sname,)*
                }
            }

            /// Weights per block.
            pub const fn block_len(self) -> usize {
                match self {
                    $(GgmlType::$variant => $block,)*
                    $(GgmlType::$sparse => GgmlType::$dense.block_len(),)*
                }
            }

            /// Bytes per block; of a sparse type, per block of its dense twin.
            pub const fn block_bytes(self) -> usize {
                match self {
                    $(GgmlType::$variant => $bytes,)*
                    $(GgmlType::$sparse => GgmlType::$dense.block_bytes(),)*
                }
            }

            /// The type whose rows a sparse type holds without their zeros; a dense type is
            /// its own.
            pub const fn dense(self) -> GgmlType {
                match self { $(GgmlType::$sparse => GgmlType::$dense,)* other => other }
            }

            /// The type that holds this one's rows without their zeros, if there is one.
            pub const fn sparse(self) -> Option<GgmlType> {
                match self {
                    $(GgmlType::$dense | GgmlType::$sparse => Some(GgmlType::$sparse),)*
                    _ => None,
                }
            }
        }
    };
}

ggml_types! {
    F32 = 0, "F32", 1, 4;
    F16 = 1, "F16", 1, 2;
    Q4_0 = 2, "Q4_0", 32, 18;
    Q4_1 = 3, "Q4_1", 32, 20;
    Q5_0 = 6, "Q5_0", 32, 22;
    Q5_1 = 7, "Q5_1", 32, 24;
    Q8_0 = 8, "Q8_0", 32, 34;
    Q2_K = 10, "Q2_K", 256, 84;
    Q3_K = 11, "Q3_K", 256, 110;
    Q4_K = 12, "Q4_K", 256, 144;
    Q5_K = 13, "Q5_K", 256, 176;
    Q6_K = 14, "Q6_K", 256, 210;
    IQ2_XXS = 16, "IQ2_XXS", 256, 66;
    IQ2_XS = 17, "IQ2_XS", 256, 74;
    IQ3_XXS = 18, "IQ3_XXS", 256, 98;
    IQ1_S = 19, "IQ1_S", 256, 50;
    IQ4_NL = 20, "IQ4_NL", 32, 18;
    IQ3_S = 21, "IQ3_S", 256, 110;
    IQ2_S = 22, "IQ2_S", 256, 82;
    IQ4_XS = 23, "IQ4_XS", 256, 136;
    I8 = 24, "I8", 1, 1;
    I16 = 25, "I16", 1, 2;
    I32 = 26, "I32", 1, 4;
    I64 = 27, "I64", 1, 8;
    F64 = 28, "F64", 1, 8;
    IQ1_M = 29, "IQ1_M", 256, 56;
    BF16 = 30, "BF16", 1, 2;
    MXFP4 = 39, "MXFP4", 32, 17;
    NVFP4 = 40, "NVFP4", 64, 36;
    =>
    /// `BF16` without its zeros.
    S_BF16 = 0x5350_0001, "S-BF16", BF16;
    /// `Q8_0` without its zeros.
    S8 = 0x5350_0002, "S8", Q8_0;
    /// `Q4_0` without its zeros.
    S4 = 0x5350_0003, "S4", Q4_0;
}

impl GgmlType {
    /// ggml's numeric id; sparse types have numbers that ggml will not reach.
    pub const fn id(self) -> u32 {
        self as u32
    }

    /// Bytes of `len` consecutive weights, or `None` when `len` is no whole number of
    /// blocks or the product overflows, or the type is sparse.
    pub fn bytes_for(self, len: u64) -> Option<u64> {
        if self.is_sparse() {
            return None;
        }
        let block = self.block_len() as u64;
        if !len.is_multiple_of(block) {
            return None;
        }
        (len / block).checked_mul(self.block_bytes() as u64)
    }

    /// True for the types of [`GgmlType::SPARSE`].
    pub const fn is_sparse(self) -> bool {
        self as u32 != self.dense() as u32
    }

    /// True for the block-quantised types, false for plain floats and integers.
    pub const fn is_quantized(self) -> bool {
        self.block_len() > 1
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The name given to [`GgmlType::from_str`] is none that this build knows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown tensor type `{0}`")]
pub struct UnknownType(pub String);

impl FromStr for GgmlType {
    type Err = UnknownType;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let all = GgmlType::ALL.iter().chain(GgmlType::SPARSE);
        all.copied()
            .find(|t| t.name().eq_ignore_ascii_case(s))
            .ok_or_else(|| UnknownType(s.to_owned()))
    }
}
