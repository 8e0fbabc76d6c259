//! Decodes the AMX instructions, and nothing else, from machine code.
//!
//! All of them are three-byte VEX, map `0F38`, `L = 0`, `W = 0`; only segment and
//! address-size prefixes may stand in front. (Intel SDM volume 2, "VEX prefix" and each
//! instruction's page.)

use crate::Op;

/// Longest x86 instruction.
const MAX_LENGTH: usize = 15;

/// A segment whose base is added to an address. The others have base zero in 64-bit mode.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Segment {
    Fs,
    Gs,
}

/// Width of the address computation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AddressSize {
    Bits32,
    Bits64,
}

/// A memory operand. Registers are numbered as x86-64 encodes them (`rax` 0 … `r15` 15).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Address {
    pub segment: Option<Segment>,
    pub size: AddressSize,
    pub base: Option<u8>,
    /// Register and scale (1, 2, 4, 8). For tile loads and stores this product is the
    /// distance between rows, not part of the address.
    pub index: Option<(u8, u8)>,
    pub displacement: i32,
    /// Relative to the end of the instruction.
    pub rip_relative: bool,
}

/// An instruction and its operands; tiles are 0..8.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Instruction {
    LdTileCfg(Address),
    StTileCfg(Address),
    TileRelease,
    TileZero {
        tile: u8,
    },
    TileLoad {
        tile: u8,
        address: Address,
        hint_t1: bool,
    },
    TileStore {
        tile: u8,
        address: Address,
    },
    Dot {
        op: Op,
        dest: u8,
        a: u8,
        b: u8,
    },
}

impl Instruction {
    /// Which counter it belongs to.
    pub fn op(&self) -> Op {
        match *self {
            Instruction::LdTileCfg(_) => Op::LdTileCfg,
            Instruction::StTileCfg(_) => Op::StTileCfg,
            Instruction::TileRelease => Op::TileRelease,
            Instruction::TileZero { .. } => Op::TileZero,
            Instruction::TileLoad { hint_t1: false, .. } => Op::TileLoadD,
            Instruction::TileLoad { hint_t1: true, .. } => Op::TileLoadDT1,
            Instruction::TileStore { .. } => Op::TileStoreD,
            Instruction::Dot { op, .. } => op,
        }
    }
}

/// A decoded instruction and its length in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Decoded {
    pub instruction: Instruction,
    pub length: usize,
}

/// Mandatory prefix, the `pp` field.
const NONE: u8 = 0;
const P66: u8 = 1;
const F3: u8 = 2;
const F2: u8 = 3;

/// Reads bytes one at a time, so that a decoder at the end of a page never looks further
/// than the instruction reaches.
struct Cursor<F> {
    fetch: F,
    length: usize,
}

impl<F: FnMut(usize) -> Option<u8>> Cursor<F> {
    fn byte(&mut self) -> Option<u8> {
        if self.length >= MAX_LENGTH {
            return None;
        }
        let byte = (self.fetch)(self.length)?;
        self.length += 1;
        Some(byte)
    }

    fn signed_byte(&mut self) -> Option<i32> {
        Some(i32::from(self.byte()? as i8))
    }

    fn dword(&mut self) -> Option<i32> {
        Some(i32::from_le_bytes([
            self.byte()?,
            self.byte()?,
            self.byte()?,
            self.byte()?,
        ]))
    }
}

/// Register-extension bits of the VEX prefix, already un-inverted.
struct Extension {
    x: u8,
    b: u8,
}

/// Decodes one instruction; `fetch(i)` yields its `i`-th byte. `None` for everything that
/// is not an AMX instruction with valid encoding (the processor raises `#UD` there).
pub fn decode(fetch: impl FnMut(usize) -> Option<u8>) -> Option<Decoded> {
    let mut code = Cursor { fetch, length: 0 };
    let mut segment = None;
    let mut size = AddressSize::Bits64;
    let escape = loop {
        match code.byte()? {
            0x64 => segment = Some(Segment::Fs),
            0x65 => segment = Some(Segment::Gs),
            // Without effect in 64-bit mode; they leave an earlier FS or GS in force.
            0x26 | 0x2e | 0x36 | 0x3e => {}
            0x67 => size = AddressSize::Bits32,
            other => break other,
        }
    };
    if escape != 0xc4 {
        return None;
    }
    let (p0, p1) = (code.byte()?, code.byte()?);
    let map = p0 & 0x1f;
    let (w, l, pp) = (p1 >> 7, p1 >> 2 & 1, p1 & 3);
    if map != 2 || w != 0 || l != 0 {
        return None;
    }
    let r = !p0 >> 7 & 1;
    let extension = Extension {
        x: !p0 >> 6 & 1,
        b: !p0 >> 5 & 1,
    };
    let vvvv = !p1 >> 3 & 0xf;

    let opcode = code.byte()?;
    if !matches!(opcode, 0x49 | 0x4b | 0x5c | 0x5e) {
        return None;
    }
    let modrm = code.byte()?;
    let (mode, reg, rm) = (modrm >> 6, modrm >> 3 & 7, modrm & 7);
    let memory = mode != 3;
    let products = matches!(opcode, 0x5c | 0x5e);
    if (products && memory) || (!products && vvvv != 0) {
        return None;
    }

    let instruction = match (opcode, pp) {
        (0x49, NONE | P66) if memory => {
            if reg != 0 {
                return None;
            }
            let address = decode_address(&mut code, mode, rm, &extension, segment, size)?;
            match pp {
                NONE => Instruction::LdTileCfg(address),
                _ => Instruction::StTileCfg(address),
            }
        }
        (0x49, NONE) if reg == 0 && rm == 0 => Instruction::TileRelease,
        (0x49, F2) if !memory && rm == 0 && r == 0 => Instruction::TileZero { tile: reg },
        (0x4b, P66 | F3 | F2) if memory && rm == 4 && r == 0 => {
            let address = decode_address(&mut code, mode, rm, &extension, segment, size)?;
            match pp {
                F3 => Instruction::TileStore { tile: reg, address },
                _ => Instruction::TileLoad {
                    tile: reg,
                    address,
                    hint_t1: pp == P66,
                },
            }
        }
        (0x5c | 0x5e, _) => {
            let op = match (opcode, pp) {
                (0x5e, F2) => Op::TdpBssd,
                (0x5e, F3) => Op::TdpBsud,
                (0x5e, P66) => Op::TdpBusd,
                (0x5e, _) => Op::TdpBuud,
                (_, F3) => Op::TdpBf16Ps,
                (_, F2) => Op::TdpFp16Ps,
                _ => return None,
            };
            // A register named twice is undefined, whatever the shapes.
            let twice = reg == rm || reg == vvvv || rm == vvvv;
            if r != 0 || extension.b != 0 || vvvv > 7 || twice {
                return None;
            }
            Instruction::Dot {
                op,
                dest: reg,
                a: rm,
                b: vvvv,
            }
        }
        _ => return None,
    };
    Some(Decoded {
        instruction,
        length: code.length,
    })
}

fn decode_address<F: FnMut(usize) -> Option<u8>>(
    code: &mut Cursor<F>,
    mode: u8,
    rm: u8,
    extension: &Extension,
    segment: Option<Segment>,
    size: AddressSize,
) -> Option<Address> {
    let mut address = Address {
        segment,
        size,
        base: None,
        index: None,
        displacement: 0,
        rip_relative: false,
    };
    let mut base_bits = rm;
    if rm == 4 {
        let sib = code.byte()?;
        base_bits = sib & 7;
        let index = extension.x << 3 | (sib >> 3 & 7);
        if index != 4 {
            address.index = Some((index, 1 << (sib >> 6)));
        }
    }
    // Base 101 without displacement means "no base" behind a SIB byte, else RIP-relative.
    if mode == 0 && base_bits == 5 {
        address.rip_relative = rm != 4;
        address.displacement = code.dword()?;
        return Some(address);
    }
    address.base = Some(extension.b << 3 | base_bits);
    address.displacement = match mode {
        0 => 0,
        1 => code.signed_byte()?,
        _ => code.dword()?,
    };
    Some(address)
}
