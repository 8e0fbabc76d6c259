//! The decoder against iced-x86, over many encodings: valid ones, near misses, junk.

use amx_emu::{Address, AddressSize, Decoded, Instruction, Op, Segment, decode};
use iced_x86::{Code, Decoder, DecoderOptions, Instruction as Iced, OpKind, Register};

/// xorshift64*: deterministic and enough for picking encodings.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn byte(&mut self) -> u8 {
        (self.next() >> 56) as u8
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[(self.next() >> 32) as usize % from.len()]
    }
}

fn tile(register: Register) -> u8 {
    (register as u32 - Register::TMM0 as u32) as u8
}

fn gpr(register: Register) -> Option<u8> {
    (register != Register::None).then(|| register.full_register().number() as u8)
}

fn address(iced: &Iced) -> Address {
    let rip_relative = iced.is_ip_rel_memory_operand();
    let base = if rip_relative {
        None
    } else {
        gpr(iced.memory_base())
    };
    let wide = |r: Register| r == Register::None || r.is_gpr64() || r == Register::RIP;
    let size =
        if wide(iced.memory_base()) && wide(iced.memory_index()) && iced.memory_displ_size() != 4 {
            AddressSize::Bits64
        } else {
            AddressSize::Bits32
        };
    Address {
        segment: match iced.segment_prefix() {
            Register::FS => Some(Segment::Fs),
            Register::GS => Some(Segment::Gs),
            _ => None,
        },
        size,
        base,
        index: gpr(iced.memory_index()).map(|r| (r, iced.memory_index_scale() as u8)),
        displacement: if rip_relative {
            iced.memory_displacement64().wrapping_sub(iced.next_ip()) as i32
        } else {
            iced.memory_displacement64() as i32
        },
        rip_relative,
    }
}

/// What iced says, in our terms; `None` when it is no AMX instruction of ours.
fn oracle(bytes: &[u8]) -> Option<Decoded> {
    let mut decoder = Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE);
    let iced = decoder.decode();
    let dot = |op| Instruction::Dot {
        op,
        dest: tile(iced.op0_register()),
        a: tile(iced.op1_register()),
        b: tile(iced.op2_register()),
    };
    let instruction = match iced.code() {
        Code::VEX_Ldtilecfg_m512 => Instruction::LdTileCfg(address(&iced)),
        Code::VEX_Sttilecfg_m512 => Instruction::StTileCfg(address(&iced)),
        Code::VEX_Tilerelease => Instruction::TileRelease,
        Code::VEX_Tilezero_tmm => Instruction::TileZero {
            tile: tile(iced.op0_register()),
        },
        Code::VEX_Tileloadd_tmm_sibmem | Code::VEX_Tileloaddt1_tmm_sibmem => {
            Instruction::TileLoad {
                tile: tile(iced.op0_register()),
                address: address(&iced),
                hint_t1: iced.code() == Code::VEX_Tileloaddt1_tmm_sibmem,
            }
        }
        Code::VEX_Tilestored_sibmem_tmm => {
            assert_eq!(iced.op0_kind(), OpKind::Memory);
            Instruction::TileStore {
                tile: tile(iced.op1_register()),
                address: address(&iced),
            }
        }
        Code::VEX_Tdpbssd_tmm_tmm_tmm => dot(Op::TdpBssd),
        Code::VEX_Tdpbsud_tmm_tmm_tmm => dot(Op::TdpBsud),
        Code::VEX_Tdpbusd_tmm_tmm_tmm => dot(Op::TdpBusd),
        Code::VEX_Tdpbuud_tmm_tmm_tmm => dot(Op::TdpBuud),
        Code::VEX_Tdpbf16ps_tmm_tmm_tmm => dot(Op::TdpBf16Ps),
        Code::VEX_Tdpfp16ps_tmm_tmm_tmm => dot(Op::TdpFp16Ps),
        _ => return None,
    };
    Some(Decoded {
        instruction,
        length: iced.len(),
    })
}

/// The address size can't be read back from iced where neither base nor index is named, so
/// it is taken from the prefix there.
fn settle_size(mut decoded: Decoded, bytes: &[u8]) -> Decoded {
    let prefixed = bytes.iter().take_while(|&&b| b != 0xc4).any(|&b| b == 0x67);
    let size = if prefixed {
        AddressSize::Bits32
    } else {
        AddressSize::Bits64
    };
    match &mut decoded.instruction {
        Instruction::LdTileCfg(a)
        | Instruction::StTileCfg(a)
        | Instruction::TileLoad { address: a, .. }
        | Instruction::TileStore { address: a, .. } => a.size = size,
        _ => {}
    }
    decoded
}

fn compare(bytes: &[u8]) -> bool {
    let ours = decode(|i| bytes.get(i).copied());
    let theirs = oracle(bytes).map(|d| settle_size(d, bytes));
    assert_eq!(ours, theirs, "bytes {bytes:02x?}");
    ours.is_some()
}

#[test]
fn agrees_with_iced_on_every_vex_payload_and_modrm() {
    let mut valid = 0u32;
    for opcode in [0x49, 0x4b, 0x5c, 0x5e, 0x48, 0x4a, 0x5d, 0x6c] {
        for p0_high in 0..8u8 {
            for p1 in 0..=255u8 {
                for modrm in 0..=255u8 {
                    let bytes = [
                        0xc4,
                        p0_high << 5 | 2,
                        p1,
                        opcode,
                        modrm,
                        0x9c,
                        0x10,
                        0x20,
                        0x30,
                        0x40,
                    ];
                    valid += u32::from(compare(&bytes));
                }
            }
        }
    }
    assert!(valid > 4_000, "only {valid} encodings were valid");
}

#[test]
fn agrees_with_iced_on_random_prefixes_and_addresses() {
    let mut random = Random(0x5eed);
    let mut valid = 0u32;
    for _ in 0..400_000 {
        let mut bytes = Vec::new();
        for _ in 0..random.next() % 3 {
            bytes.push(random.pick(&[0x64, 0x65, 0x67, 0x26, 0x2e, 0x36, 0x3e]));
        }
        // Mostly a well-formed prefix, so that the addresses get exercised.
        let map = random.pick(&[2, 2, 2, 2, 2, 2, 1, 3]);
        let any = random.byte();
        let p1 = random.pick(&[0x78, 0x79, 0x7a, 0x7b, 0x7b, any]);
        bytes.extend([0xc4, random.byte() & 0xe0 | map, p1]);
        bytes.push(random.pick(&[0x49, 0x4b, 0x4b, 0x5c, 0x5e]));
        let modrm = random.byte() & random.pick(&[0xff, 0xc7, 0xfc]);
        bytes.push(modrm);
        bytes.extend((0..5).map(|_| random.byte()));
        bytes.truncate(15);
        valid += u32::from(compare(&bytes));
    }
    assert!(valid > 15_000, "only {valid} encodings were valid");
}

#[test]
fn truncated_instructions_are_no_instructions() {
    let whole = [0x64, 0xc4, 0xe2, 0x7b, 0x4b, 0x84, 0x08, 1, 2, 3, 4];
    assert!(decode(|i| whole.get(i).copied()).is_some());
    for length in 0..whole.len() {
        assert_eq!(
            decode(|i| whole[..length].get(i).copied()),
            None,
            "{length} bytes"
        );
    }
}
