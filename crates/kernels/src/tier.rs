//! Instruction-set tiers: what the CPU has, and tokens that prove it.
//!
//! A tier is a CPU generation, not a single bit: every kernel of a tier may use all of the
//! tier's features. Finer differences inside a tier (BF16 dot products, VBMI) are
//! [`Features`] flags that the kernel tables look at once.

use std::{fmt, str::FromStr, sync::OnceLock};

/// The tiers, lowest first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Tier {
    /// Plain Rust, any x86-64: the definition of every operation.
    Scalar,
    /// AVX2, FMA, F16C and BMI2 (Haswell, Zen).
    Avx2,
    /// AVX-512 F, BW, VL, DQ and VNNI (Ice Lake, Zen 4).
    Avx512,
}

impl Tier {
    /// All tiers, lowest first.
    pub const ALL: [Tier; 3] = [Tier::Scalar, Tier::Avx2, Tier::Avx512];

    /// As `--isa` takes it.
    pub const fn name(self) -> &'static str {
        match self {
            Tier::Scalar => "scalar",
            Tier::Avx2 => "avx2",
            Tier::Avx512 => "avx512",
        }
    }

    /// The highest tier that this CPU has.
    pub fn detect_max() -> Tier {
        if Avx512::detect().is_some() {
            Tier::Avx512
        } else if Avx2::detect().is_some() {
            Tier::Avx2
        } else {
            Tier::Scalar
        }
    }

    /// True if this CPU can run the tier's kernels.
    pub fn available(self) -> bool {
        self.why_not().is_none()
    }

    /// Why the tier can't be used here: the features that are missing.
    pub fn why_not(self) -> Option<String> {
        let missing = Features::get().missing(self);
        (!missing.is_empty()).then(|| format!("the CPU lacks {}", missing.join(", ")))
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The name given to [`Tier::from_str`] is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown instruction set `{0}`; known are scalar, avx2, avx512")]
pub struct UnknownTier(pub String);

impl FromStr for Tier {
    type Err = UnknownTier;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let named = |tier: &&Tier| tier.name().eq_ignore_ascii_case(s);
        Tier::ALL
            .iter()
            .find(named)
            .copied()
            .ok_or_else(|| UnknownTier(s.to_owned()))
    }
}

macro_rules! features {
    ($($field:ident = $feature:tt, $doc:literal;)*) => {
        /// CPU features as CPUID and the operating system report them.
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
        pub struct Features { $(#[doc = $doc] pub $field: bool,)* }

        impl Features {
            fn detect() -> Features {
                Features { $($field: is_x86_feature_detected!($feature),)* }
            }

            /// Name and presence of each, in a fixed order.
            pub fn list(&self) -> Vec<(&'static str, bool)> {
                vec![$(($feature, self.$field),)*]
            }
        }
    };
}

features! {
    avx2 = "avx2", "256-bit integers.";
    fma = "fma", "Fused multiply-add.";
    f16c = "f16c", "Conversions from and to f16.";
    bmi2 = "bmi2", "Bit extract and deposit.";
    avxvnni = "avxvnni", "256-bit 8-bit dot products (VEX).";
    avx512f = "avx512f", "AVX-512 foundation.";
    avx512bw = "avx512bw", "Bytes and words.";
    avx512vl = "avx512vl", "Shorter vectors.";
    avx512dq = "avx512dq", "Doublewords and quadwords.";
    avx512vnni = "avx512vnni", "8-bit dot products.";
    avx512bf16 = "avx512bf16", "bf16 dot products.";
    avx512vbmi = "avx512vbmi", "Byte permutations.";
    avx512vbmi2 = "avx512vbmi2", "Byte expand and compress.";
}

impl Features {
    /// This machine's, detected once.
    pub fn get() -> &'static Features {
        static FEATURES: OnceLock<Features> = OnceLock::new();
        FEATURES.get_or_init(Features::detect)
    }

    /// What `tier` needs and this CPU lacks.
    pub fn missing(&self, tier: Tier) -> Vec<&'static str> {
        let needs: &[(&'static str, bool)] = match tier {
            Tier::Scalar => &[],
            Tier::Avx2 => &[
                ("avx2", self.avx2),
                ("fma", self.fma),
                ("f16c", self.f16c),
                ("bmi2", self.bmi2),
            ],
            Tier::Avx512 => &[
                ("avx2", self.avx2),
                ("fma", self.fma),
                ("f16c", self.f16c),
                ("bmi2", self.bmi2),
                ("avx512f", self.avx512f),
                ("avx512bw", self.avx512bw),
                ("avx512vl", self.avx512vl),
                ("avx512dq", self.avx512dq),
                ("avx512vnni", self.avx512vnni),
            ],
        };
        needs
            .iter()
            .filter(|(_, has)| !has)
            .map(|&(name, _)| name)
            .collect()
    }
}

macro_rules! token {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug)]
        pub struct $name(());

        impl $name {
            /// The token, if this CPU has the tier.
            pub fn detect() -> Option<$name> {
                Features::get().missing(Tier::$name).is_empty().then_some($name(()))
            }
        }
    };
}

token! {
    /// Proof that the CPU has [`Tier::Avx2`].
    Avx2
}
token! {
    /// Proof that the CPU has [`Tier::Avx512`].
    Avx512
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back() {
        for tier in Tier::ALL {
            assert_eq!(tier.name().parse(), Ok(tier));
        }
        assert_eq!("AVX512".parse(), Ok(Tier::Avx512));
        assert_eq!("sse".parse::<Tier>(), Err(UnknownTier("sse".into())));
    }

    #[test]
    fn reasons_agree_with_tokens() {
        assert!(Tier::Scalar.available());
        assert_eq!(Tier::Avx2.available(), Avx2::detect().is_some());
        assert_eq!(Tier::Avx512.available(), Avx512::detect().is_some());
        assert!(Tier::detect_max().available());
        let none = Features::default();
        assert_eq!(none.missing(Tier::Avx2), ["avx2", "fma", "f16c", "bmi2"]);
        assert!(none.missing(Tier::Avx512).contains(&"avx512vnni"));
    }
}
