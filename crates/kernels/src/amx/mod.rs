//! Intel AMX: the token that proves the right to use it, and the tile products.
//!
//! Nothing here runs unless somebody holds an [`Amx`]: tables of kernels without one have no
//! pointer into this module. Without the feature `amx` the token can't be had, and the code
//! that executes tile instructions is not compiled. With `amx-abort` all of the pointers that
//! tables get from here end the process.

#[cfg(feature = "amx-abort")]
mod abort;
#[cfg(feature = "amx")]
mod attention;
#[cfg(feature = "amx")]
mod bytes;
#[cfg(feature = "amx")]
mod matmul;
#[cfg(feature = "amx")]
pub(crate) mod panel;
#[cfg(feature = "amx")]
pub(crate) mod tile;

use std::arch::x86_64::__cpuid_count;
#[cfg(feature = "amx")]
use std::{io, sync::OnceLock};

use tegula_gguf::GgmlType;

#[cfg(feature = "amx")]
use crate::{attn::TileAttention, strip::kernels::Tiles, tier::Tier};

/// From how many tokens on tiles are faster than vectors, or `None` for types that they don't
/// take. Measured, see `docs/bench`; the same on every CPU.
pub fn fewest_tokens(ty: GgmlType) -> Option<usize> {
    use GgmlType as T;
    match ty {
        // Routers and norms: few, and worth their precision.
        T::F32 | T::F64 | T::I8 | T::I16 | T::I32 | T::I64 => None,
        T::BF16 | T::S_BF16 => Some(4),
        _ => Some(12),
    }
}

/// Up to how many tokens tiles are 8-bit ones, which are faster there than bf16 ones; 0 for types
/// that these don't take. Measured likewise.
pub fn most_byte_tokens(ty: GgmlType) -> usize {
    use GgmlType as T;
    match ty {
        T::F32 | T::F64 | T::I8 | T::I16 | T::I32 | T::I64 => 0,
        T::F16 | T::BF16 | T::S_BF16 => 0,
        // One tile of tokens: a second one costs as much again, where bf16 has decoded already.
        _ => 16,
    }
}

/// Proof that this process may execute AMX instructions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Amx {
    emulated: bool,
    /// There are no such values.
    #[cfg(not(feature = "amx"))]
    never: std::convert::Infallible,
}

/// Why AMX can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AmxUnavailable {
    /// The feature `amx` was off.
    #[error("this build has no AMX code (the feature `amx` was off)")]
    NotBuilt,
    /// CPUID lacks a part of AMX that the kernels need.
    #[error("the CPU lacks {}", .0.join(", "))]
    Cpu(Vec<&'static str>),
    /// XCR0 has not both tile bits.
    #[error(
        "the operating system does not save tile registers (XCR0 is {xcr0:#x}, bits 17 and 18 are \
         needed); Linux does from 5.16 on"
    )]
    Os {
        /// The register.
        xcr0: u64,
    },
    /// The kernel refused the permission for tile data.
    #[error("the kernel refuses the permission for tile data: {0}")]
    Permission(String),
    /// The emulator could not be installed.
    #[error("AMX can't be emulated here: {0}")]
    Emulation(String),
}

/// What the processor and the operating system say about AMX.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct AmxFacts {
    /// Tiles.
    pub tile: bool,
    /// 8-bit products.
    pub int8: bool,
    /// bf16 products.
    pub bf16: bool,
    /// f16 products.
    pub fp16: bool,
    /// The state components that the operating system saves; 0 if it can't be read.
    pub xcr0: u64,
}

impl AmxFacts {
    /// This machine's. Asks for nothing and changes nothing.
    pub fn read() -> AmxFacts {
        let leaf = __cpuid_count(7, 0);
        let osxsave = __cpuid_count(1, 0).ecx & (1 << 27) != 0;
        let bit = |register: u32, n: u32| register & (1 << n) != 0;
        let sub = if leaf.eax >= 1 {
            __cpuid_count(7, 1).eax
        } else {
            0
        };
        AmxFacts {
            tile: bit(leaf.edx, 24),
            int8: bit(leaf.edx, 25),
            bf16: bit(leaf.edx, 22),
            fp16: bit(sub, 21),
            // SAFETY: OSXSAVE says that `xgetbv` may be executed.
            xcr0: if osxsave { unsafe { xcr0() } } else { 0 },
        }
    }

    /// What stands in the way before the kernel is asked.
    #[cfg(feature = "amx")]
    fn refusal(&self) -> Option<AmxUnavailable> {
        let parts = [
            ("amx-tile", self.tile),
            ("amx-bf16", self.bf16),
            ("amx-int8", self.int8),
        ];
        let missing: Vec<_> = parts.iter().filter(|p| !p.1).map(|p| p.0).collect();
        if !missing.is_empty() {
            return Some(AmxUnavailable::Cpu(missing));
        }
        const TILE_STATE: u64 = 0b11 << 17;
        (self.xcr0 & TILE_STATE != TILE_STATE).then_some(AmxUnavailable::Os { xcr0: self.xcr0 })
    }
}

/// # Safety
/// The operating system has set OSXSAVE.
unsafe fn xcr0() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reads a register; nothing else changes.
    unsafe {
        std::arch::asm!(
            "xgetbv",
            in("ecx") 0,
            out("eax") low,
            out("edx") high,
            options(nomem, nostack, preserves_flags),
        );
    }
    u64::from(high) << 32 | u64::from(low)
}

/// `arch_prctl` code that reads the permitted state components.
const ARCH_GET_XCOMP_PERM: libc::c_int = 0x1022;
/// `arch_prctl` code that asks for one.
#[cfg(feature = "amx")]
const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
/// The state component of the tile registers' contents.
const TILE_DATA: u64 = 18;

/// Whether the kernel has given this process the permission for tile data. Asks for nothing.
pub fn has_permission() -> bool {
    let mut permitted = 0u64;
    // SAFETY: the kernel writes one u64.
    let result = unsafe {
        libc::syscall(
            libc::SYS_arch_prctl,
            ARCH_GET_XCOMP_PERM,
            &raw mut permitted,
        )
    };
    result == 0 && permitted & (1 << TILE_DATA) != 0
}

#[cfg(feature = "amx")]
fn request_permission() -> io::Result<()> {
    // SAFETY: the call takes no pointer.
    let result = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

impl Amx {
    /// Asks the CPU, the operating system and the kernel, in this order, for the right to
    /// use AMX. The permission is the process's: threads that exist have it too. Asked once;
    /// later calls repeat the answer.
    ///
    /// # Errors
    /// Says which of the three refused.
    #[cfg(feature = "amx")]
    pub fn acquire() -> Result<Amx, AmxUnavailable> {
        static ANSWER: OnceLock<Result<Amx, AmxUnavailable>> = OnceLock::new();
        ANSWER
            .get_or_init(|| Amx::acquire_from(&AmxFacts::read(), request_permission))
            .clone()
    }

    /// This build has none.
    ///
    /// # Errors
    /// Always.
    #[cfg(not(feature = "amx"))]
    pub fn acquire() -> Result<Amx, AmxUnavailable> {
        Err(AmxUnavailable::NotBuilt)
    }

    #[cfg(feature = "amx")]
    fn acquire_from(
        facts: &AmxFacts,
        request: impl FnOnce() -> io::Result<()>,
    ) -> Result<Amx, AmxUnavailable> {
        if let Some(refusal) = facts.refusal() {
            return Err(refusal);
        }
        request().map_err(|e| AmxUnavailable::Permission(e.to_string()))?;
        Ok(Amx { emulated: false })
    }

    /// Executes the same instructions in software, microseconds each: for tests, on any
    /// x86-64 Linux machine. On one that has AMX the instructions trap too, as long as
    /// [`Amx::acquire`] was not called.
    ///
    /// # Errors
    /// When the trap handler can't be installed.
    #[cfg(feature = "amx")]
    pub fn emulate() -> Result<Amx, AmxUnavailable> {
        amx_emu::install().map_err(|e| AmxUnavailable::Emulation(e.to_string()))?;
        Ok(Amx { emulated: true })
    }

    /// This build has nothing to emulate.
    ///
    /// # Errors
    /// Always.
    #[cfg(not(feature = "amx"))]
    pub fn emulate() -> Result<Amx, AmxUnavailable> {
        Err(AmxUnavailable::NotBuilt)
    }

    /// True if the instructions are executed in software.
    pub fn is_emulated(self) -> bool {
        self.emulated
    }

    /// As reports name it.
    pub fn name(self) -> &'static str {
        if self.emulated {
            "amx: emulated"
        } else {
            "amx"
        }
    }
}

/// The tile products of tables of `tier`; `None` for the scalar tier.
#[cfg(feature = "amx")]
pub(crate) fn products(amx: Amx, tier: Tier) -> Option<Tiles> {
    let tiles = matmul::tiles(amx, tier);
    #[cfg(feature = "amx-abort")]
    let tiles = tiles.map(abort::products);
    tiles
}

/// Attention on tiles of tables of `tier`; `None` for the scalar tier.
#[cfg(feature = "amx")]
pub(crate) fn attention(_: Amx, tier: Tier) -> Option<TileAttention> {
    let tiles = attention::kernels(tier);
    #[cfg(feature = "amx-abort")]
    let tiles = tiles.map(abort::attention);
    tiles
}

#[cfg(all(test, feature = "amx"))]
mod tests {
    use super::*;

    const ALL: AmxFacts = AmxFacts {
        tile: true,
        int8: true,
        bf16: true,
        fp16: false,
        xcr0: 0x602e7,
    };

    #[test]
    fn each_refusal_names_its_cause() {
        let never = || -> io::Result<()> { panic!("asked the kernel too early") };
        let none = Amx::acquire_from(&AmxFacts::default(), never).unwrap_err();
        assert_eq!(
            none.to_string(),
            "the CPU lacks amx-tile, amx-bf16, amx-int8"
        );
        let os = AmxFacts { xcr0: 0x2e7, ..ALL };
        let os = Amx::acquire_from(&os, never).unwrap_err();
        assert_eq!(os, AmxUnavailable::Os { xcr0: 0x2e7 });
        let denied = || Err(io::Error::from_raw_os_error(libc::EPERM));
        let denied = Amx::acquire_from(&ALL, denied).unwrap_err();
        assert!(matches!(denied, AmxUnavailable::Permission(_)), "{denied}");
        assert_eq!(
            Amx::acquire_from(&ALL, || Ok(())),
            Ok(Amx { emulated: false })
        );
    }

    #[test]
    fn reading_facts_asks_for_nothing() {
        let before = has_permission();
        let facts = AmxFacts::read();
        assert_eq!(has_permission(), before);
        if facts.tile {
            assert!(facts.xcr0 & 1 != 0);
        }
    }
}
