//! File types: the mixes of tensor types that quantisers name a file by.

use std::{fmt, str::FromStr};

use crate::{GgmlType, blocks};

macro_rules! file_types {
    ($($(#[$doc:meta])* $variant:ident = $id:literal, $base:ident;)*) => {
        /// What a file is quantised to, as `general.file_type` numbers it: a base type and
        /// rules for the tensors that get another one.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[allow(non_camel_case_types)]
        #[repr(u32)]
        pub enum FileType { $($(#[$doc])* $variant = $id,)* }

        impl FileType {
            /// Every file type, in order of id.
            pub const ALL: &'static [FileType] = &[$(FileType::$variant,)*];

            /// The file type with this number in `general.file_type`.
            pub const fn from_id(id: u32) -> Option<FileType> {
                match id { $($id => Some(FileType::$variant),)* _ => None }
            }

            /// The name that users know, such as `Q4_K_M`.
            pub const fn name(self) -> &'static str {
                match self { $(FileType::$variant => stringify!($variant),)* }
            }

            /// The type of the tensors that no rule covers.
            pub const fn base(self) -> GgmlType {
                match self { $(FileType::$variant => GgmlType::$base,)* }
            }
        }
    };
}

file_types! {
    F32 = 0, F32;
    F16 = 1, F16;
    Q4_0 = 2, Q4_0;
    Q4_1 = 3, Q4_1;
    Q8_0 = 7, Q8_0;
    Q5_0 = 8, Q5_0;
    Q5_1 = 9, Q5_1;
    Q2_K = 10, Q2_K;
    Q3_K_S = 11, Q3_K;
    Q3_K_M = 12, Q3_K;
    Q3_K_L = 13, Q3_K;
    Q4_K_S = 14, Q4_K;
    Q4_K_M = 15, Q4_K;
    Q5_K_S = 16, Q5_K;
    Q5_K_M = 17, Q5_K;
    Q6_K = 18, Q6_K;
    IQ2_XXS = 19, IQ2_XXS;
    IQ2_XS = 20, IQ2_XS;
    Q2_K_S = 21, Q2_K;
    IQ3_XS = 22, IQ3_S;
    IQ3_XXS = 23, IQ3_XXS;
    IQ1_S = 24, IQ1_S;
    IQ4_NL = 25, IQ4_NL;
    IQ3_S = 26, IQ3_S;
    IQ3_M = 27, IQ3_S;
    /// Its base is smaller than its name says, as llama.cpp defined it.
    IQ2_S = 28, IQ2_XS;
    IQ2_M = 29, IQ2_S;
    IQ4_XS = 30, IQ4_XS;
    IQ1_M = 31, IQ1_M;
    BF16 = 32, BF16;
    /// Experts in MXFP4, all else in Q8_0.
    MXFP4_MOE = 38, MXFP4;
    NVFP4 = 39, NVFP4;
}

impl FileType {
    /// The number in `general.file_type`.
    pub const fn id(self) -> u32 {
        self as u32
    }

    /// True if files of this type can be written; the others can only be read.
    pub fn can_write(self) -> bool {
        blocks::can_quantize(self.base())
    }

    /// The names of all file types that can be written, separated by spaces.
    pub fn writable_names() -> String {
        let writable = FileType::ALL.iter().filter(|t| t.can_write());
        writable.map(|t| t.name()).collect::<Vec<_>>().join(" ")
    }
}

impl fmt::Display for FileType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The name given to [`FileType::from_str`] is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown file type `{name}`; possible: {possible}", name = .0, possible = FileType::writable_names())]
pub struct UnknownFileType(pub String);

impl FromStr for FileType {
    type Err = UnknownFileType;

    /// A name in any case, a number of `general.file_type`, or `Q3_K`, `Q4_K`, `Q5_K` for
    /// their medium mixes.
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let name = match s.to_ascii_uppercase().as_str() {
            "Q3_K" => "Q3_K_M".to_owned(),
            "Q4_K" => "Q4_K_M".to_owned(),
            "Q5_K" => "Q5_K_M".to_owned(),
            other => other.to_owned(),
        };
        let by_name = FileType::ALL.iter().copied().find(|t| t.name() == name);
        by_name
            .or_else(|| FileType::from_id(s.parse().ok()?))
            .ok_or_else(|| UnknownFileType(s.to_owned()))
    }
}
