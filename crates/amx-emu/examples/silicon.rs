//! Compares the tile model with real AMX on random tiles and prints one JSON document.
//!
//! `silicon [TILES]` runs that many random products of each instruction (default 200 000).
//! Exit code 1 when integers differ anywhere; float differences are counted and the first
//! ones shown.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn main() -> std::process::ExitCode {
    let count = std::env::args()
        .nth(1)
        .and_then(|n| n.parse().ok())
        .unwrap_or(200_000);
    match silicon::compare(count) {
        Ok(exact) if exact => std::process::ExitCode::SUCCESS,
        Ok(_) => std::process::ExitCode::FAILURE,
        Err(why) => {
            eprintln!("{why}");
            std::process::ExitCode::from(4)
        }
    }
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
fn main() {
    eprintln!("AMX exists on x86-64 Linux only");
    std::process::exit(4);
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod silicon {
    use amx_emu::{Op, TileConfig, TileState};
    use std::arch::asm;

    /// `[row][byte]`
    #[repr(C, align(64))]
    #[derive(Clone)]
    struct Tile([[u8; 64]; 16]);

    #[repr(C, align(64))]
    struct Config([u8; 64]);

    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        }

        fn below(&mut self, n: u64) -> u64 {
            self.next() % n
        }
    }

    /// Distributions of the 16-bit inputs. What a model holds, and what breaks corners.
    #[derive(Clone, Copy)]
    enum Floats {
        /// Magnitudes from 2^-8 to 2^8.
        Ordinary,
        /// Every bit pattern, infinities and NaNs among them.
        AnyBits,
        /// Exponents near the bottom, so that products and sums become subnormal.
        Tiny,
    }

    fn half_bits(random: &mut Random, floats: Floats) -> u16 {
        let bits = random.next() as u16;
        match floats {
            Floats::AnyBits => bits,
            Floats::Ordinary => bits & 0x807f | ((119 + random.below(16) as u16) << 7),
            Floats::Tiny => bits & 0x807f | (random.below(72) as u16) << 7,
        }
    }

    fn f32_bits(random: &mut Random, floats: Floats) -> u32 {
        u32::from(half_bits(random, floats)) << 16 | random.next() as u32 & 0xffff
    }

    fn permission() -> Result<(), String> {
        const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_long = 18;
        // SAFETY: a system call without memory arguments.
        let refused = unsafe {
            libc::syscall(
                libc::SYS_arch_prctl,
                ARCH_REQ_XCOMP_PERM,
                XFEATURE_XTILEDATA,
            )
        };
        if refused == 0 {
            Ok(())
        } else {
            Err(format!("no AMX here: {}", std::io::Error::last_os_error()))
        }
    }

    macro_rules! product {
        ($instruction:literal, $config:expr, $c:expr, $a:expr, $b:expr) => {
            // SAFETY: the permission was granted; the operands hold 16 rows of 64 bytes.
            unsafe {
                asm!(
                    "ldtilecfg [{config}]",
                    "tileloadd tmm0, [{c} + {stride}]",
                    "tileloadd tmm1, [{a} + {stride}]",
                    "tileloadd tmm2, [{b} + {stride}]",
                    concat!($instruction, " tmm0, tmm1, tmm2"),
                    "tilestored [{c} + {stride}], tmm0",
                    "tilerelease",
                    config = in(reg) $config,
                    c = in(reg) $c,
                    a = in(reg) $a,
                    b = in(reg) $b,
                    stride = in(reg) 64usize,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _,
                )
            }
        };
    }

    fn hardware(op: Op, config: &Config, c: &mut Tile, a: &Tile, b: &Tile) {
        match op {
            Op::TdpBssd => product!("tdpbssd", config, c, a, b),
            Op::TdpBsud => product!("tdpbsud", config, c, a, b),
            Op::TdpBusd => product!("tdpbusd", config, c, a, b),
            Op::TdpBuud => product!("tdpbuud", config, c, a, b),
            Op::TdpBf16Ps => product!("tdpbf16ps", config, c, a, b),
            other => unreachable!("{} is not compared", other.name()),
        }
    }

    fn model(op: Op, config: &Config, c: &mut Tile, a: &Tile, b: &Tile) {
        let mut state = TileState::new();
        let valid = "the shapes are drawn so that they fit";
        state.configure(TileConfig(config.0)).expect(valid);
        for (tile, from) in [&*c, a, b].into_iter().enumerate() {
            state
                .load(tile, |row, line| {
                    line.copy_from_slice(&from.0[row][..line.len()])
                })
                .expect(valid);
        }
        state.dot(op, 0, 1, 2).expect(valid);
        state
            .store(0, |row, line| c.0[row][..line.len()].copy_from_slice(line))
            .expect(valid);
    }

    /// Returns whether everything was exact.
    pub fn compare(count: u64) -> Result<bool, String> {
        permission()?;
        let mut random = Random(20_261_123);
        let mut all_exact = true;
        let mut rows = Vec::new();
        let integers = [Op::TdpBssd, Op::TdpBsud, Op::TdpBusd, Op::TdpBuud];
        let cases = integers.into_iter().map(|op| (op, None)).chain(
            [Floats::Ordinary, Floats::AnyBits, Floats::Tiny].map(|f| (Op::TdpBf16Ps, Some(f))),
        );
        for (op, floats) in cases {
            let (mut elements, mut differing, mut nan_payload) = (0u64, 0u64, 0u64);
            let mut examples = Vec::new();
            for _ in 0..count {
                let shape = |random: &mut Random| {
                    if random.below(4) == 0 {
                        random.below(16) + 1
                    } else {
                        16
                    }
                };
                let (m, n, k) = (shape(&mut random), shape(&mut random), shape(&mut random));
                let mut shapes = [(0, 0); 8];
                shapes[0] = (m as u8, 4 * n as u16);
                shapes[1] = (m as u8, 4 * k as u16);
                shapes[2] = (k as u8, 4 * n as u16);
                let config = Config(TileConfig::new(shapes).0);
                let mut tiles = [const { Tile([[0; 64]; 16]) }; 3];
                for (i, tile) in tiles.iter_mut().enumerate() {
                    for dword in tile.0.as_flattened_mut().chunks_exact_mut(4) {
                        let bits = match floats {
                            None => random.next() as u32,
                            Some(f) if i == 0 => f32_bits(&mut random, f),
                            Some(f) => {
                                u32::from(half_bits(&mut random, f)) << 16
                                    | u32::from(half_bits(&mut random, f))
                            }
                        };
                        dword.copy_from_slice(&bits.to_le_bytes());
                    }
                }
                let [c, a, b] = tiles;
                let (mut real, mut ours) = (c.clone(), c);
                hardware(op, &config, &mut real, &a, &b);
                model(op, &config, &mut ours, &a, &b);
                elements += m * n;
                let pairs = real
                    .0
                    .as_flattened()
                    .chunks_exact(4)
                    .zip(ours.0.as_flattened().chunks_exact(4));
                for (x, y) in pairs {
                    if x == y {
                        continue;
                    }
                    let bits = |w: &[u8]| u32::from_le_bytes([w[0], w[1], w[2], w[3]]);
                    let (x, y) = (bits(x), bits(y));
                    if floats.is_some() && f32::from_bits(x).is_nan() && f32::from_bits(y).is_nan()
                    {
                        nan_payload += 1;
                        continue;
                    }
                    differing += 1;
                    if examples.len() < 8 {
                        examples.push(format!("\"{x:08x} {y:08x} k={k}\""));
                    }
                }
            }
            all_exact &= differing == 0;
            let inputs = match floats {
                None => "any bits",
                Some(Floats::Ordinary) => "ordinary",
                Some(Floats::AnyBits) => "any bits",
                Some(Floats::Tiny) => "tiny",
            };
            rows.push(format!(
                "{{\"op\":\"{}\",\"inputs\":\"{inputs}\",\"tiles\":{count},\"elements\":{elements},\"differing\":{differing},\"nan_payload_only\":{nan_payload},\"examples_silicon_model\":[{}]}}",
                op.name(),
                examples.join(",")
            ));
        }
        println!(
            "{{\"schema\":1,\"seed\":20261123,\"cases\":[\n{}\n]}}",
            rows.join(",\n")
        );
        Ok(all_exact)
    }
}
