//! Products a second: loops of nothing but one instruction on independent sums.

use super::{Rates, measure};
use crate::{amx::Amx, pool::Pool, tier::Features};
use std::{arch::asm, time::Duration};

/// An instruction whose speed bounds kernels.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Peak {
    /// f32 multiplication and addition, one at a time.
    Scalar,
    /// f32 fused multiply-add over 8 lanes.
    Avx2Fma,
    /// 8-bit products by `vpmaddubsw`, widened and added, over 8 lanes.
    Avx2Int8,
    /// 8-bit dot products over 8 lanes (VEX).
    AvxVnni,
    /// f32 fused multiply-add over 16 lanes.
    Avx512Fma,
    /// 8-bit dot products over 16 lanes.
    Avx512Vnni,
    /// bf16 dot products over 16 lanes.
    Avx512Bf16,
    /// 8-bit tile products.
    AmxInt8,
    /// bf16 tile products.
    AmxBf16,
}

impl Peak {
    /// All of them.
    pub const ALL: [Peak; 9] = [
        Peak::Scalar,
        Peak::Avx2Fma,
        Peak::Avx2Int8,
        Peak::AvxVnni,
        Peak::Avx512Fma,
        Peak::Avx512Vnni,
        Peak::Avx512Bf16,
        Peak::AmxInt8,
        Peak::AmxBf16,
    ];

    /// As reports name it.
    pub const fn name(self) -> &'static str {
        match self {
            Peak::Scalar => "scalar f32",
            Peak::Avx2Fma => "avx2 f32",
            Peak::Avx2Int8 => "avx2 int8",
            Peak::AvxVnni => "avx vnni int8",
            Peak::Avx512Fma => "avx512 f32",
            Peak::Avx512Vnni => "avx512 vnni int8",
            Peak::Avx512Bf16 => "avx512 bf16",
            Peak::AmxInt8 => "amx int8",
            Peak::AmxBf16 => "amx bf16",
        }
    }

    /// Whether it can be measured here. Tiles need a token that isn't the emulator's.
    pub fn available(self, amx: Option<Amx>) -> bool {
        let f = Features::get();
        match self {
            Peak::Scalar => true,
            Peak::Avx2Fma => f.avx2 && f.fma,
            Peak::Avx2Int8 => f.avx2,
            Peak::AvxVnni => f.avxvnni,
            Peak::Avx512Fma => f.avx512f,
            Peak::Avx512Vnni => f.avx512f && f.avx512vnni,
            Peak::Avx512Bf16 => f.avx512f && f.avx512bf16,
            Peak::AmxInt8 | Peak::AmxBf16 => amx.is_some_and(|amx| !amx.is_emulated()),
        }
    }

    /// The loop, and its operations per round: a multiplication and an addition are two.
    fn kernel(self) -> (unsafe fn(u64), u64) {
        match self {
            Peak::Scalar => (scalar, CHAINS * 2),
            Peak::Avx2Fma => (avx2_fma, CHAINS * 8 * 2),
            Peak::Avx2Int8 => (avx2_int8, CHAINS * 8 * 4 * 2),
            Peak::AvxVnni => (avx_vnni, CHAINS * 8 * 4 * 2),
            Peak::Avx512Fma => (avx512_fma, CHAINS * 16 * 2),
            Peak::Avx512Vnni => (avx512_vnni, CHAINS * 16 * 4 * 2),
            Peak::Avx512Bf16 => (avx512_bf16, CHAINS * 16 * 2 * 2),
            Peak::AmxInt8 => (tiles::int8, tiles::CHAINS * 16 * 16 * 64 * 2),
            Peak::AmxBf16 => (tiles::bf16, tiles::CHAINS * 16 * 16 * 32 * 2),
        }
    }
}

/// Operations per second of all threads together; nothing where the instruction can't be
/// measured.
pub fn compute_peak(
    peak: Peak,
    pool: &Pool,
    amx: Option<Amx>,
    repetitions: usize,
    time: Duration,
) -> Option<Rates> {
    if !peak.available(amx) {
        return None;
    }
    let (kernel, operations) = peak.kernel();
    Some(measure(
        pool,
        repetitions,
        time,
        ROUNDS as f64 * operations as f64,
        &|_, units| {
            // SAFETY: the instruction is available.
            unsafe { kernel(units * ROUNDS) }
        },
    ))
}

/// Rounds of the loop per unit of work: long enough that the clock costs nothing.
const ROUNDS: u64 = 1_000;

/// Independent sums: more than the latency times the instructions that start in a cycle.
const CHAINS: u64 = 12;

/// The bits of 2⁻⁹ as f32, which are small as bf16 and as bytes too: nothing overflows early,
/// and no operand is zero.
const OPERAND: u32 = 0x3b00_3b00;

/// A loop over twelve sums in registers 0 to 11, operands in 12 and 13, ones (as 16-bit
/// integers) in 14, and 15 free. `$step` is a macro from a sum's number to its instructions.
macro_rules! chains {
    ($name:ident, $features:literal, $register:literal, $step:ident) => {
        /// # Safety
        /// The CPU has the instruction.
        #[target_feature(enable = $features)]
        unsafe fn $name(rounds: u64) {
            // SAFETY: registers only; those written are declared.
            unsafe {
                asm!(
                    "vmovd xmm12, {ones:e}",
                    concat!("vpbroadcastd ", $register, "14, xmm12"),
                    "vmovd xmm12, {operand:e}",
                    concat!("vpbroadcastd ", $register, "13, xmm12"),
                    concat!("vpbroadcastd ", $register, "12, xmm12"),
                    "2:",
                    $step!("0"), $step!("1"), $step!("2"), $step!("3"), $step!("4"), $step!("5"),
                    $step!("6"), $step!("7"), $step!("8"), $step!("9"), $step!("10"), $step!("11"),
                    "dec {rounds}",
                    "jnz 2b",
                    "vzeroupper",
                    ones = in(reg) 0x0001_0001,
                    operand = in(reg) OPERAND,
                    rounds = inout(reg) rounds.max(1) => _,
                    out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
                    out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
                    out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                    out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                    options(nomem, nostack),
                );
            }
        }
    };
}

macro_rules! fma256 {
    ($sum:literal) => {
        concat!("vfmadd231ps ymm", $sum, ", ymm12, ymm13")
    };
}
macro_rules! maddubs256 {
    ($sum:literal) => {
        concat!(
            "vpmaddubsw ymm15, ymm12, ymm13\n",
            "vpmaddwd ymm15, ymm15, ymm14\n",
            "vpaddd ymm",
            $sum,
            ", ymm",
            $sum,
            ", ymm15"
        )
    };
}
macro_rules! vnni256 {
    ($sum:literal) => {
        concat!("{{vex}} vpdpbusd ymm", $sum, ", ymm12, ymm13")
    };
}
macro_rules! fma512 {
    ($sum:literal) => {
        concat!("vfmadd231ps zmm", $sum, ", zmm12, zmm13")
    };
}
macro_rules! vnni512 {
    ($sum:literal) => {
        concat!("vpdpbusd zmm", $sum, ", zmm12, zmm13")
    };
}
macro_rules! bf16_512 {
    ($sum:literal) => {
        concat!("vdpbf16ps zmm", $sum, ", zmm12, zmm13")
    };
}

chains!(avx2_fma, "avx2,fma", "ymm", fma256);
chains!(avx2_int8, "avx2", "ymm", maddubs256);
chains!(avx_vnni, "avx2,avxvnni", "ymm", vnni256);
chains!(avx512_fma, "avx512f", "zmm", fma512);
chains!(avx512_vnni, "avx512f,avx512vnni", "zmm", vnni512);
chains!(avx512_bf16, "avx512f,avx512bf16", "zmm", bf16_512);

/// Twelve sums, each multiplied and added to: what code for any x86-64 does without vectors.
///
/// # Safety
/// None needed; as the others.
unsafe fn scalar(rounds: u64) {
    macro_rules! step {
        ($sum:literal) => {
            concat!("mulss xmm", $sum, ", xmm12\naddss xmm", $sum, ", xmm12")
        };
    }
    // SAFETY: registers only; those written are declared.
    unsafe {
        asm!(
            "movd xmm12, {operand:e}",
            "2:",
            step!("0"), step!("1"), step!("2"), step!("3"), step!("4"), step!("5"),
            step!("6"), step!("7"), step!("8"), step!("9"), step!("10"), step!("11"),
            "dec {rounds}",
            "jnz 2b",
            operand = in(reg) OPERAND,
            rounds = inout(reg) rounds.max(1) => _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _,
            options(nomem, nostack),
        );
    }
}

/// Loops over tile products that load nothing.
#[cfg(feature = "amx")]
mod tiles {
    use std::arch::asm;

    /// Sums: four products of 16 cycles hide the latency of one.
    pub const CHAINS: u64 = 4;

    /// All tiles whole: 16 rows of 64 bytes.
    #[repr(C, align(64))]
    struct Config([u8; 64]);

    static WHOLE: Config = {
        let mut config = [0; 64];
        config[0] = 1;
        let mut tile = 0;
        while tile < 8 {
            config[16 + 2 * tile] = 64;
            config[48 + tile] = 16;
            tile += 1;
        }
        Config(config)
    };

    macro_rules! products {
        ($name:ident, $instruction:literal) => {
            /// # Safety
            /// AMX may be executed.
            pub unsafe fn $name(rounds: u64) {
                let rows = [super::OPERAND; 16 * 16];
                // SAFETY: reads the configuration and the rows; the registers written are
                // declared, and tiles are given back.
                unsafe {
                    asm!(
                        "ldtilecfg [{config}]",
                        "tilezero tmm0",
                        "tilezero tmm1",
                        "tilezero tmm2",
                        "tilezero tmm3",
                        "tileloadd tmm4, [{rows} + {stride}*1]",
                        "tileloadd tmm5, [{rows} + {stride}*1]",
                        "2:",
                        concat!($instruction, " tmm0, tmm4, tmm5"),
                        concat!($instruction, " tmm1, tmm4, tmm5"),
                        concat!($instruction, " tmm2, tmm4, tmm5"),
                        concat!($instruction, " tmm3, tmm4, tmm5"),
                        "dec {rounds}",
                        "jnz 2b",
                        "tilerelease",
                        config = in(reg) &WHOLE,
                        rows = in(reg) &rows,
                        stride = in(reg) 64usize,
                        rounds = inout(reg) rounds.max(1) => _,
                        out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                        out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                        options(nostack, readonly),
                    );
                }
            }
        };
    }

    products!(int8, "tdpbssd");
    products!(bf16, "tdpbf16ps");
}

/// A build without AMX has no token, so nothing calls these.
#[cfg(not(feature = "amx"))]
mod tiles {
    pub const CHAINS: u64 = 4;

    pub unsafe fn int8(_: u64) {}

    pub unsafe fn bf16(_: u64) {}
}
