//! Intel AMX without AMX: executes the tile instructions in software.
//!
//! Two entrances share one tile model:
//!
//! * [`TileState`] called directly, for tests that want the arithmetic alone;
//! * [`install`], a `SIGILL` handler that decodes and executes the very bytes that real AMX
//!   would run, so that inline assembly can be tested on any x86-64 Linux machine. It also
//!   catches them on a machine *with* AMX as long as the process has not asked the kernel
//!   for the tile-data permission, which is how use of AMX can be proved absent.
//!
//! The handler allocates nothing and takes no lock; tile state is per thread. A trap costs
//! microseconds: good for correctness, worthless for timing.
//!
//! Deliberately absent: anything about models or matrices, `TCMMIMFP16PS` and the later
//! complex/transpose extensions, Windows.

mod decode;
mod float;
mod tile;

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod trap;

pub use decode::{Address, AddressSize, Decoded, Instruction, Segment, decode};
pub use tile::{Fault, MAX_COLUMN_BYTES, MAX_ROWS, TILES, TileConfig, TileState};

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub use trap::{InstallError, configures_natively, counters, install, is_installed, total};

/// The instructions that are emulated; the index into [`Counters`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(usize)]
pub enum Op {
    LdTileCfg,
    StTileCfg,
    TileRelease,
    TileZero,
    TileLoadD,
    TileLoadDT1,
    TileStoreD,
    TdpBssd,
    TdpBsud,
    TdpBusd,
    TdpBuud,
    TdpBf16Ps,
    TdpFp16Ps,
}

impl Op {
    /// All of them, in order of index.
    pub const ALL: [Op; 13] = [
        Op::LdTileCfg,
        Op::StTileCfg,
        Op::TileRelease,
        Op::TileZero,
        Op::TileLoadD,
        Op::TileLoadDT1,
        Op::TileStoreD,
        Op::TdpBssd,
        Op::TdpBsud,
        Op::TdpBusd,
        Op::TdpBuud,
        Op::TdpBf16Ps,
        Op::TdpFp16Ps,
    ];

    /// Intel's mnemonic in lower case.
    pub const fn name(self) -> &'static str {
        match self {
            Op::LdTileCfg => "ldtilecfg",
            Op::StTileCfg => "sttilecfg",
            Op::TileRelease => "tilerelease",
            Op::TileZero => "tilezero",
            Op::TileLoadD => "tileloadd",
            Op::TileLoadDT1 => "tileloaddt1",
            Op::TileStoreD => "tilestored",
            Op::TdpBssd => "tdpbssd",
            Op::TdpBsud => "tdpbsud",
            Op::TdpBusd => "tdpbusd",
            Op::TdpBuud => "tdpbuud",
            Op::TdpBf16Ps => "tdpbf16ps",
            Op::TdpFp16Ps => "tdpfp16ps",
        }
    }
}

/// How often each instruction has been executed by the trap handler, process-wide.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters(pub [u64; Op::ALL.len()]);

impl Counters {
    /// Executions of one instruction.
    pub fn get(&self, op: Op) -> u64 {
        self.0[op as usize]
    }

    /// Executions of all instructions together.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }
}
