//! What instructions the built functions consist of: their bytes in this very program,
//! decoded.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{Read as _, Seek as _, SeekFrom},
};

/// Most bytes of a function.
const LONGEST: u64 = 64 << 10;

/// Most functions that are looked at: the first and what it calls, near ones before far ones.
const FUNCTIONS: usize = 32;

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
    /// Instructions between the start and the end of the loop that multiplies most.
    pub kinds: BTreeMap<Kind, usize>,
}

impl Mix {
    /// All instructions.
    pub fn total(&self) -> usize {
        self.kinds.values().sum()
    }

    fn of(&self, kind: Kind) -> usize {
        self.kinds.get(&kind).copied().unwrap_or(0)
    }
}

/// The mix of the loop that multiplies most (of these, the longest) in the function at this
/// address of this process and in what it calls, for the compiler decides what it inlines.
///
/// # Errors
/// When the program's file can't be read, or there is no loop.
pub fn mix_at(address: usize) -> Result<Mix, String> {
    let code = Code::around(address)?;
    code.mix_of(address as u64)
        .ok_or_else(|| format!("no loop at {address:#x}"))
}

/// Instructions as they lie in memory.
struct Code {
    bytes: Vec<u8>,
    /// Address of the first byte.
    start: u64,
}

impl Code {
    /// The code around an address, from the file that is mapped there.
    fn around(address: usize) -> Result<Code, String> {
        let maps = fs::read_to_string("/proc/self/maps").map_err(|e| e.to_string())?;
        let mapped = maps.lines().find_map(|line| {
            let mut fields = line.split_whitespace();
            let (start, end) = fields.next()?.split_once('-')?;
            let hex = |s: &str| u64::from_str_radix(s, 16).ok();
            let (start, end) = (hex(start)?, hex(end)?);
            let offset = hex(fields.nth(1)?)?;
            (start..end)
                .contains(&(address as u64))
                .then_some((offset, start, end - start))
        });
        let (offset, start, length) = mapped.ok_or("the code is not mapped")?;
        let mut file = fs::File::open("/proc/self/exe").map_err(|e| e.to_string())?;
        file.seek(SeekFrom::Start(offset))
            .map_err(|e| e.to_string())?;
        let mut bytes = Vec::new();
        file.take(length)
            .read_to_end(&mut bytes)
            .map_err(|e| e.to_string())?;
        Ok(Code { bytes, start })
    }

    fn mix_of(&self, address: u64) -> Option<Mix> {
        let mut functions = vec![address];
        let mut best: Option<Mix> = None;
        let rank = |mix: &Mix| (mix.of(Kind::Multiply), mix.total());
        for at in 0..FUNCTIONS {
            let Some(&function) = functions.get(at) else {
                break;
            };
            let (loops, calls) = self.function(function);
            for mix in loops {
                if best.as_ref().is_none_or(|b| rank(&mix) > rank(b)) {
                    best = Some(mix);
                }
            }
            for call in calls {
                if !functions.contains(&call) {
                    functions.push(call);
                }
            }
        }
        best
    }

    /// The loops of a function and what it calls. Follows the branches from the start, so
    /// that data and neighbours don't count.
    fn function(&self, address: u64) -> (Vec<Mix>, Vec<u64>) {
        let mut seen: BTreeMap<u64, Instruction> = BTreeMap::new();
        let mut loops = BTreeSet::new();
        let mut calls = Vec::new();
        let mut todo = vec![address];
        while let Some(at) = todo.pop() {
            if !(address..address + LONGEST).contains(&at) {
                // A call in place of a return.
                calls.push(at);
                continue;
            }
            let start = (at - self.start) as usize;
            let Some(bytes) = self.bytes.get(start..) else {
                continue;
            };
            let mut decoder = Decoder::with_ip(64, bytes, at, DecoderOptions::NONE);
            while decoder.can_decode() {
                let instruction = decoder.decode();
                let here = instruction.ip();
                if instruction.is_invalid() || seen.insert(here, instruction).is_some() {
                    break;
                }
                let target = instruction.near_branch_target();
                match instruction.flow_control() {
                    FlowControl::Return | FlowControl::IndirectBranch | FlowControl::Exception => {
                        break;
                    }
                    FlowControl::Call => calls.push(target),
                    FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch => {
                        if (address..=here).contains(&target) {
                            loops.insert((target, here));
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
        let mix = |&(start, end): &(u64, u64)| {
            let mut mix = Mix::default();
            for instruction in seen.range(start..=end).map(|(_, i)| i) {
                *mix.kinds.entry(kind(instruction)).or_default() += 1;
            }
            mix
        };
        calls.retain(|&call| (self.start..self.start + self.bytes.len() as u64).contains(&call));
        (loops.iter().map(mix).collect(), calls)
    }
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
        lab::{Way, code_address, panel_addresses},
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
        let code = |bytes: &[u8]| Code {
            bytes: bytes.to_vec(),
            start: 0x1000,
        };
        let mix = code(&bytes).mix_of(0x1000).unwrap();
        assert_eq!(mix.of(Kind::Multiply), 2);
        assert_eq!((mix.of(Kind::Load), mix.of(Kind::Store)), (1, 0));
        assert_eq!(mix.of(Kind::Scalar), 2);
        assert_eq!(mix.total(), 5);
        assert_eq!(code(&[0xc3]).mix_of(0x1000), None);

        // The same behind a call, and a longer loop that does not multiply.
        let mut caller = vec![0xe8, 4, 0, 0, 0]; // call over this loop
        caller.extend([0x90, 0x90, 0xeb, 0xfc]);
        caller.extend(bytes);
        assert_eq!(code(&caller).mix_of(0x1000), Some(mix));
    }

    /// Eight tokens' sums would be read and written for every product otherwise, as they once were:
    /// prompts took 1.8 times as long, and no result was wrong.
    #[test]
    fn sums_of_panels_stay_in_registers() {
        for address in panel_addresses() {
            let mix = mix_at(address).unwrap();
            let (products, stores) = (mix.of(Kind::Multiply), mix.of(Kind::Store));
            assert!(products >= 16 && 2 * stores < products, "{mix:?}");
        }
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
                assert!(
                    mix.of(Kind::Multiply) >= 2,
                    "{tier} {}: {mix:?}",
                    way.name()
                );
                assert!(mix.of(Kind::Decode) >= 2, "{tier} {}: {mix:?}", way.name());
            }
        }
    }
}
