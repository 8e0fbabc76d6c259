//! Real instruction bytes through the trap handler, in all addressing forms.
//!
//! On a machine with AMX these tests trap as well: nothing here asks for the permission.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

use amx_emu::{Op, TileConfig, TileState, configures_natively, counters};
use std::arch::asm;

/// `[row][byte]`
#[repr(C, align(64))]
struct Tile([[u8; 64]; 16]);

#[repr(C, align(64))]
struct Config([u8; 64]);

fn pattern(seed: u8) -> Tile {
    let mut tile = Tile([[0; 64]; 16]);
    for (r, row) in tile.0.iter_mut().enumerate() {
        for (c, x) in row.iter_mut().enumerate() {
            *x = seed
                .wrapping_mul(31)
                .wrapping_add((r * 64 + c) as u8)
                .wrapping_mul(113);
        }
    }
    tile
}

/// A stored configuration without the start row, where the handler leaves a mark on a
/// processor that configures tiles itself.
fn but_for_the_mark(mut stored: Config) -> [u8; 64] {
    stored.0[1] = 0;
    stored.0
}

fn load(state: &mut TileState, tile: usize, from: &Tile) {
    state
        .load(tile, |row, line| {
            line.copy_from_slice(&from.0[row][..line.len()])
        })
        .unwrap();
}

/// `tmm0 = c; tmm0 += tmm1 * tmm2` by instructions; one block so that the tile registers
/// need not survive between blocks.
macro_rules! product {
    ($instruction:literal, $config:expr, $c:expr, $a:expr, $b:expr) => {
        // SAFETY: the handler executes the instructions; all operands are live and large
        // enough for the configuration of 16 rows of 64 bytes.
        unsafe {
            asm!(
                "ldtilecfg [{config}]",
                "tileloadd tmm0, [{c} + {stride}]",
                "tileloadd tmm1, [{a} + {stride}]",
                "tileloaddt1 tmm2, [{b} + {stride}]",
                concat!($instruction, " tmm0, tmm1, tmm2"),
                "tilestored [{c} + {stride}], tmm0",
                "tilerelease",
                config = in(reg) &$config,
                c = in(reg) &mut $c,
                a = in(reg) &$a,
                b = in(reg) &$b,
                stride = in(reg) 64usize,
                out("tmm0") _, out("tmm1") _, out("tmm2") _,
            )
        }
    };
}

#[test]
fn every_product_equals_the_model() {
    amx_emu::install().unwrap();
    let config = Config(TileConfig::new([(16, 64); 8]).0);
    let (a, b) = (pattern(3), pattern(5));
    let check = |op: Op, got: &Tile| {
        let mut state = TileState::new();
        state.configure(TileConfig(config.0)).unwrap();
        load(&mut state, 0, &pattern(1));
        load(&mut state, 1, &a);
        load(&mut state, 2, &b);
        state.dot(op, 0, 1, 2).unwrap();
        for row in 0..16 {
            assert_eq!(&got.0[row], state.row(0, row), "{op:?} row {row}");
        }
    };
    let mut c = pattern(1);
    product!("tdpbssd", config, c, a, b);
    check(Op::TdpBssd, &c);
    let mut c = pattern(1);
    product!("tdpbsud", config, c, a, b);
    check(Op::TdpBsud, &c);
    let mut c = pattern(1);
    product!("tdpbusd", config, c, a, b);
    check(Op::TdpBusd, &c);
    let mut c = pattern(1);
    product!("tdpbuud", config, c, a, b);
    check(Op::TdpBuud, &c);
    let mut c = pattern(1);
    product!("tdpbf16ps", config, c, a, b);
    check(Op::TdpBf16Ps, &c);
    let mut c = pattern(1);
    product!("tdpfp16ps", config, c, a, b);
    check(Op::TdpFp16Ps, &c);
}

#[test]
fn addressing_forms_reach_the_same_memory() {
    amx_emu::install().unwrap();
    let source = pattern(7);
    let config = Config(TileConfig::new([(16, 64); 8]).0);
    let mut out: [Tile; 4] = [const { Tile([[1; 64]; 16]) }; 4];
    let mut stored = Config([1; 64]);
    // SAFETY: as above; each form addresses `source` or `out`. The no-index form reads the
    // first row sixteen times.
    unsafe {
        asm!(
            "ldtilecfg [{config} + 128 - 64]",
            "sttilecfg [{stored}]",
            "tileloadd tmm3, [{s} + {quarter} * 4 - 1000]",
            "tileloadd tmm4, [{s} + {half} * 2 - 1000]",
            "tileloadd tmm7, [{s} + {one} - 1000]",
            "tilestored [{out} + {one}], tmm3",
            "tilestored [{out} + {one} + 0x400], tmm4",
            "tilestored [{out} + {one} + 0x800], tmm7",
            "tileloadd tmm5, [{s} - 1000]",
            "tilestored [{out} + {one} + 0xc00], tmm5",
            "tilezero tmm5",
            "tilerelease",
            config = in(reg) (&raw const config).cast::<u8>().sub(64),
            stored = in(reg) &mut stored,
            s = in(reg) (&raw const source).cast::<u8>().add(1000),
            out = in(reg) &mut out,
            one = in(reg) 64usize,
            half = in(reg) 32usize,
            quarter = in(reg) 16usize,
            out("tmm3") _, out("tmm4") _, out("tmm5") _, out("tmm7") _,
        );
    }
    assert_eq!(but_for_the_mark(stored), config.0);
    for (form, tile) in out[..3].iter().enumerate() {
        assert_eq!(tile.0, source.0, "form {form}");
    }
    assert!(
        out[3].0.iter().all(|row| *row == source.0[0]),
        "without an index the stride is zero"
    );
}

#[test]
fn rip_relative_and_segment_addresses() {
    amx_emu::install().unwrap();
    static CONFIG: Config = {
        let mut c = [0; 64];
        c[0] = 1;
        c[16] = 8;
        c[48] = 2;
        Config(c)
    };
    let mut stored = Config([0; 64]);
    let mut through_fs = Config([1; 64]);
    // SAFETY: FS holds the thread pointer on x86-64 Linux and `fs:0` its own address, so the
    // offset computed from it reaches `through_fs` through the segment.
    unsafe {
        asm!(
            "ldtilecfg [rip + {config}]",
            "sttilecfg [{stored}]",
            "mov {base}, fs:[0]",
            "sub {target}, {base}",
            "sttilecfg fs:[{target}]",
            "tilerelease",
            config = sym CONFIG,
            stored = in(reg) &mut stored,
            base = out(reg) _,
            target = inout(reg) &raw mut through_fs => _,
        );
    }
    assert_eq!(but_for_the_mark(stored), CONFIG.0);
    assert_eq!(but_for_the_mark(through_fs), CONFIG.0);
}

#[test]
fn each_thread_has_its_own_tiles() {
    amx_emu::install().unwrap();
    let before = counters();
    std::thread::scope(|scope| {
        for seed in 0..4u8 {
            scope.spawn(move || {
                let config = Config(TileConfig::new([(16, 64); 8]).0);
                let (a, b) = (pattern(seed), pattern(seed + 9));
                let mut first = pattern(seed);
                product!("tdpbssd", config, first, a, b);
                for _ in 0..20 {
                    let mut again = pattern(seed);
                    product!("tdpbssd", config, again, a, b);
                    assert_eq!(again.0, first.0);
                }
            });
        }
    });
    let after = counters();
    assert!(after.get(Op::TdpBssd) - before.get(Op::TdpBssd) >= 84);
    // The release is not among them where the processor does it.
    let each = if configures_natively() { 6 } else { 7 };
    assert!(after.total() - before.total() >= 84 * each);
    assert!(after.get(Op::LdTileCfg) - before.get(Op::LdTileCfg) >= 84);
}

/// Whoever configures tiles gets zeros, also with the same shapes again.
#[test]
fn a_configuration_zeroes_tiles() {
    amx_emu::install().unwrap();
    let config = Config(TileConfig::new([(16, 64); 8]).0);
    let mut out = [pattern(1), pattern(2), pattern(3)];
    // SAFETY: three tiles' worth of rows.
    unsafe {
        asm!(
            "ldtilecfg [{config}]",
            "tileloadd tmm0, [{out} + {stride}]",
            "tilestored [{out} + {stride} + 0x400], tmm0",
            "ldtilecfg [{config}]",
            "tilestored [{out} + {stride} + 0x800], tmm0",
            "tilerelease",
            config = in(reg) &config,
            out = in(reg) &mut out,
            stride = in(reg) 64usize,
            out("tmm0") _,
        );
    }
    assert_eq!(out[1].0, pattern(1).0);
    assert_eq!(out[2].0, [[0; 64]; 16]);
}

/// Runs `body` in a child process and returns the signal that ended it.
fn signal_of_child(body: fn()) -> i32 {
    // SAFETY: the child only runs `body`, which executes a few instructions, and leaves by
    // `_exit`; it takes no lock and allocates nothing.
    unsafe {
        let child = libc::fork();
        assert!(child >= 0);
        if child == 0 {
            let none = libc::rlimit {
                rlim_cur: 0,
                rlim_max: 0,
            };
            libc::setrlimit(libc::RLIMIT_CORE, &none);
            libc::signal(libc::SIGSEGV, libc::SIG_DFL);
            body();
            libc::_exit(0);
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &mut status, 0), child);
        if libc::WIFSIGNALED(status) {
            libc::WTERMSIG(status)
        } else {
            0
        }
    }
}

#[test]
fn faults_end_the_process_as_on_silicon() {
    amx_emu::install().unwrap();
    // SAFETY: each block faults at its AMX instruction.
    let unconfigured = signal_of_child(|| unsafe { asm!("tilerelease", "tilezero tmm0") });
    assert_eq!(unconfigured, libc::SIGILL);
    let released = signal_of_child(|| {
        let config = Config(TileConfig::new([(16, 64); 8]).0);
        // SAFETY: as above.
        unsafe {
            asm!(
                "ldtilecfg [{}]", "tilezero tmm0", "tilerelease", "tilezero tmm0",
                in(reg) &config, out("tmm0") _,
            )
        }
    });
    assert_eq!(released, libc::SIGILL);
    let palette = signal_of_child(|| {
        let config = Config([2; 64]);
        // SAFETY: as above.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &config) }
    });
    assert_eq!(palette, libc::SIGSEGV);
    // SAFETY: as above.
    let other = signal_of_child(|| unsafe { asm!("ud2") });
    assert_eq!(other, libc::SIGILL);
    // SAFETY: nothing faults here.
    let fine = signal_of_child(|| unsafe { asm!("tilerelease") });
    assert_eq!(fine, 0);
}
