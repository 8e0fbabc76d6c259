//! What instructions the built functions consist of: their bytes in this very program,
//! decoded.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register};
use std::{
    collections::BTreeMap,
    fs,
    io::{Read as _, Seek as _, SeekFrom},
};

/// Most bytes of a function.
const LONGEST: usize = 64 << 10;

/// What an instruction does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Multiplies and adds bytes, words or floats.
    Multiply,
    /// Spreads a value from memory over a vector.
    Broadcast,
    /// Reads a vector from memory (also as an operand of something else).
    Load,
    /// Writes to memory.
    Store,
    /// Integer arithmetic, shifts, masks and permutations on vectors: decoding.
    Decode,
    /// Conversions between integers and floats.
    Convert,
    /// Anything without vectors: addresses, counters, scales unpacked one by one.
    Scalar,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 7] = [
        Kind::Multiply,
        Kind::Broadcast,
        Kind::Load,
        Kind::Store,
        Kind::Decode,
        Kind::Convert,
        Kind::Scalar,
    ];

    /// As reports name it.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Multiply => "multiply",
            Kind::Broadcast => "broadcast",
            Kind::Load => "load",
            Kind::Store => "store",
            Kind::Decode => "decode",
            Kind::Convert => "convert",
            Kind::Scalar => "scalar",
        }
    }
}

/// Counts of a function's loop over blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mix {
    /// Instructions between the start and the end of the longest loop.
    pub kinds: BTreeMap<Kind, usize>,
}

impl Mix {
    /// All instructions.
    pub fn total(&self) -> usize {
        self.kinds.values().sum()
    }
}

/// The mix of the longest loop of the function at this address of this process.
///
/// # Errors
/// When the program's file can't be read, or there is no loop.
pub fn mix_at(address: usize) -> Result<Mix, String> {
    let bytes = bytes_at(address)?;
    mix_of(&bytes, address as u64).ok_or_else(|| format!("no loop at {address:#x}"))
}

/// The code at an address, from the file that is mapped there.
fn bytes_at(address: usize) -> Result<Vec<u8>, String> {
    let maps = fs::read_to_string("/proc/self/maps").map_err(|e| e.to_string())?;
    let mapped = maps.lines().find_map(|line| {
        let mut fields = line.split_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let hex = |s: &str| usize::from_str_radix(s, 16).ok();
        let (start, end) = (hex(start)?, hex(end)?);
        let offset = hex(fields.nth(1)?)?;
        (start..end)
            .contains(&address)
            .then(|| (offset + address - start, end - address))
    });
    let (offset, length) = mapped.ok_or("the code is not mapped")?;
    let mut file = fs::File::open("/proc/self/exe").map_err(|e| e.to_string())?;
    file.seek(SeekFrom::Start(offset as u64))
        .map_err(|e| e.to_string())?;
    let mut bytes = Vec::new();
    file.take(length.min(LONGEST) as u64)
        .read_to_end(&mut bytes)
        .map_err(|e| e.to_string())?;
    Ok(bytes)
}

/// Follows the branches from the start, so that data and neighbours don't count.
fn mix_of(bytes: &[u8], address: u64) -> Option<Mix> {
    let mut seen: BTreeMap<u64, Instruction> = BTreeMap::new();
    let mut todo = vec![address];
    let mut longest: Option<(u64, u64)> = None;
    while let Some(at) = todo.pop() {
        let Some(start) = at
            .checked_sub(address)
            .filter(|o| (*o as usize) < bytes.len())
        else {
            continue;
        };
        let mut decoder = Decoder::with_ip(64, bytes, address, DecoderOptions::NONE);
        decoder.set_position(start as usize).ok()?;
        decoder.set_ip(at);
        while decoder.can_decode() {
            let instruction = decoder.decode();
            if instruction.is_invalid() || seen.insert(instruction.ip(), instruction).is_some() {
                break;
            }
            let target = instruction.near_branch_target();
            match instruction.flow_control() {
                FlowControl::Return | FlowControl::IndirectBranch | FlowControl::Exception => break,
                FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch => {
                    let here = instruction.ip();
                    if (address..=here).contains(&target)
                        && longest.is_none_or(|(start, end)| here - target > end - start)
                    {
                        longest = Some((target, here));
                    }
                    todo.push(target);
                    if instruction.flow_control() == FlowControl::UnconditionalBranch {
                        break;
                    }
                }
                _ => {}
            }
        }
    }
    let (start, end) = longest?;
    let mut mix = Mix::default();
    for instruction in seen.range(start..=end).map(|(_, i)| i) {
        *mix.kinds.entry(kind(instruction)).or_default() += 1;
    }
    Some(mix)
}

fn kind(i: &Instruction) -> Kind {
    use Mnemonic as M;
    let vector = |r: Register| r.is_xmm() || r.is_ymm() || r.is_zmm() || r.is_tmm();
    let has_vector = (0..i.op_count()).any(|op| vector(i.op_register(op)));
    let memory = |op: u32| op < i.op_count() && i.op_kind(op) == OpKind::Memory;
    if !has_vector {
        return match memory(0) && i.mnemonic() == M::Mov {
            true => Kind::Store,
            false => Kind::Scalar,
        };
    }
    match i.mnemonic() {
        M::Vpdpbusd | M::Vpmaddubsw | M::Vpmaddwd | M::Vdpbf16ps | M::Tdpbf16ps | M::Tdpbssd => {
            Kind::Multiply
        }
        M::Vmulps | M::Vmulss | M::Vaddss | M::Vaddps => Kind::Multiply,
        m if format!("{m:?}").starts_with("Vfmadd") || format!("{m:?}").starts_with("Vfnmadd") => {
            Kind::Multiply
        }
        M::Vpbroadcastd
        | M::Vbroadcastss
        | M::Vpbroadcastb
        | M::Vpbroadcastw
        | M::Vbroadcasti128
        | M::Vbroadcasti32x4 => Kind::Broadcast,
        M::Vcvtdq2ps | M::Vcvtph2ps | M::Vcvtsi2ss => Kind::Convert,
        _ if memory(0) => Kind::Store,
        m if format!("{m:?}").starts_with("Vmov") && memory(1) => Kind::Load,
        _ => Kind::Decode,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tegula_gguf::GgmlType;
    use tegula_kernels::{
        Tier,
        lab::{Way, code_address},
    };

    #[test]
    fn the_loop_is_found_and_what_is_outside_does_not_count() {
        let bytes = [
            0x31, 0xc0, // xor eax, eax
            0xc5, 0xfe, 0x6f, 0x07, // 2: vmovdqu ymm0, [rdi]
            0xc4, 0xe2, 0x75, 0x04, 0xc0, // vpmaddubsw ymm0, ymm1, ymm0
            0xc4, 0xe2, 0x6d, 0xb8, 0xd8, // vfmadd231ps ymm3, ymm2, ymm0
            0xff, 0xce, // dec esi
            0x75, 0xee, // jnz 2
            0xc5, 0xfe, 0x7f, 0x1a, // vmovdqu [rdx], ymm3
            0xc3, // ret
            0x90, 0x90,
        ];
        let mix = mix_of(&bytes, 0x1000).unwrap();
        let count = |kind| mix.kinds.get(&kind).copied().unwrap_or(0);
        assert_eq!(count(Kind::Multiply), 2);
        assert_eq!((count(Kind::Load), count(Kind::Store)), (1, 0));
        assert_eq!(count(Kind::Scalar), 2);
        assert_eq!(mix.total(), 5);
        assert_eq!(mix_of(&[0xc3], 0), None);
    }

    /// Of a development build, whose checks stand between everything: only that the right
    /// function is found.
    #[test]
    fn built_kernels_multiply() {
        for tier in [Tier::Avx2, Tier::Avx512]
            .into_iter()
            .filter(|t| t.available())
        {
            for way in Way::ALL {
                let address = code_address(way, tier, GgmlType::Q4_0).unwrap();
                let mix = mix_at(address).unwrap();
                let of = |kind| mix.kinds.get(&kind).copied().unwrap_or(0);
                assert!(of(Kind::Multiply) >= 2, "{tier} {}: {mix:?}", way.name());
                assert!(of(Kind::Decode) >= 2, "{tier} {}: {mix:?}", way.name());
            }
        }
    }
}
